"""bclip_lab: backdoor attacks on image classifiers, and the defence by activation clipping.

`import bclip_lab as bl` gives the nouns and verbs of a notebook; `from bclip_lab import plots, widgets` adds the
pictures. The method: arXiv 2308.04617 (MMAC, MMDF) and arXiv 2205.06900 (MM-BD, MM-BM).
"""

from bclip_lab import data, models, zoo
from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    AttackSet,
    BackdoorAttack,
    BlendedTrigger,
    CheckerboardTrigger,
    CleanLabelAttack,
    CombinedTrigger,
    Cover,
    InputAwareAttack,
    ManyToOne,
    MarginLimitedAttack,
    MaskTrigger,
    OneToOne,
    PartialTrigger,
    PatchTrigger,
    RandomTrigger,
    SinusoidTrigger,
    WarpTrigger,
)
from bclip_lab.clipping import ClippedModel, abnormality, load_bounds, save_bounds
from bclip_lab.data import LabelledImages, PoisonedImages, Splits, TriggeredImages
from bclip_lab.defenses import MMACConfig, MMACStep, MMBMConfig, MMBMStep, mmac, mmbm
from bclip_lab.detection import MMBD, MMDF
from bclip_lab.evaluation import Evaluation, RocCurve, Visibility, evaluate
from bclip_lab.margins import MaximumMarginConfig, classification_margins, maximum_margin_images
from bclip_lab.models import logits
from bclip_lab.training import TrainConfig, TrainStep, run, train

__version__ = "0.1.0"

__all__ = [
    "MMBD",
    "MMDF",
    "AllToAll",
    "AllToOne",
    "AttackSet",
    "BackdoorAttack",
    "BlendedTrigger",
    "CheckerboardTrigger",
    "CleanLabelAttack",
    "ClippedModel",
    "CombinedTrigger",
    "Cover",
    "Evaluation",
    "InputAwareAttack",
    "LabelledImages",
    "MMACConfig",
    "MMACStep",
    "MMBMConfig",
    "MMBMStep",
    "ManyToOne",
    "MarginLimitedAttack",
    "MaskTrigger",
    "MaximumMarginConfig",
    "OneToOne",
    "PartialTrigger",
    "PatchTrigger",
    "PoisonedImages",
    "RandomTrigger",
    "RocCurve",
    "SinusoidTrigger",
    "Splits",
    "TrainConfig",
    "TrainStep",
    "TriggeredImages",
    "Visibility",
    "WarpTrigger",
    "abnormality",
    "classification_margins",
    "data",
    "evaluate",
    "load_bounds",
    "logits",
    "maximum_margin_images",
    "mmac",
    "mmbm",
    "models",
    "run",
    "save_bounds",
    "train",
    "zoo",
]

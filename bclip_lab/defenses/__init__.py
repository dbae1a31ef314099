"""Defences: they see a model and a few clean images, never the attack."""

from bclip_lab.defenses.anp import ANPConfig, ANPStep, anp
from bclip_lab.defenses.clp import CLPConfig, CLPStep, clp
from bclip_lab.defenses.fine_pruning import FinePruneConfig, FinePruneStep, fine_prune
from bclip_lab.defenses.fine_tuning import FineTuneConfig, FineTuneStep, fine_tune
from bclip_lab.defenses.ibau import IBAUConfig, IBAUStep, ibau
from bclip_lab.defenses.mmac import MMACConfig, MMACStep, mmac
from bclip_lab.defenses.mmbm import EARLY_SITES, MMBMConfig, MMBMStep, mmbm
from bclip_lab.defenses.nad import NADConfig, NADStep, nad
from bclip_lab.defenses.stand_ins import TriggerStandIns
from bclip_lab.defenses.unlearning import UnlearningConfig, UnlearningStep, unlearn

__all__ = [
    "EARLY_SITES",
    "ANPConfig",
    "ANPStep",
    "CLPConfig",
    "CLPStep",
    "FinePruneConfig",
    "FinePruneStep",
    "FineTuneConfig",
    "FineTuneStep",
    "IBAUConfig",
    "IBAUStep",
    "MMACConfig",
    "MMACStep",
    "MMBMConfig",
    "MMBMStep",
    "NADConfig",
    "NADStep",
    "TriggerStandIns",
    "UnlearningConfig",
    "UnlearningStep",
    "anp",
    "clp",
    "fine_prune",
    "fine_tune",
    "ibau",
    "mmac",
    "mmbm",
    "nad",
    "unlearn",
]

"""Attacks: triggers, label maps, poisoning."""

from bclip_lab.attacks.backdoor import BackdoorAttack, Cover
from bclip_lab.attacks.clean_label import CleanLabelAttack
from bclip_lab.attacks.input_aware import DynamicTrigger, InputAwareAttack, InputAwareBackdoor, InputAwareStep
from bclip_lab.attacks.label_maps import AllToAll, AllToOne, LabelMap, ManyToOne, OneToOne
from bclip_lab.attacks.margin_limited import MarginLimitedAttack
from bclip_lab.attacks.sets import AttackSet
from bclip_lab.attacks.triggers import (
    BlendedTrigger,
    CheckerboardTrigger,
    CombinedTrigger,
    MaskTrigger,
    PartialTrigger,
    PatchTrigger,
    RandomTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)

__all__ = [
    "AllToAll",
    "AllToOne",
    "AttackSet",
    "BackdoorAttack",
    "BlendedTrigger",
    "CheckerboardTrigger",
    "CleanLabelAttack",
    "CombinedTrigger",
    "Cover",
    "DynamicTrigger",
    "InputAwareAttack",
    "InputAwareBackdoor",
    "InputAwareStep",
    "LabelMap",
    "ManyToOne",
    "MarginLimitedAttack",
    "MaskTrigger",
    "OneToOne",
    "PartialTrigger",
    "PatchTrigger",
    "RandomTrigger",
    "SinusoidTrigger",
    "Trigger",
    "WarpTrigger",
]

"""Attacks: triggers, label maps, poisoning."""

from bclip_lab.attacks.backdoor import BackdoorAttack
from bclip_lab.attacks.clean_label import CleanLabelAttack
from bclip_lab.attacks.input_aware import DynamicTrigger, InputAwareAttack, InputAwareBackdoor, InputAwareStep
from bclip_lab.attacks.label_maps import AllToAll, AllToOne, LabelMap, ManyToOne, OneToOne
from bclip_lab.attacks.margin_limited import MarginLimitedAttack
from bclip_lab.attacks.triggers import BlendedTrigger, PatchTrigger, SinusoidTrigger, Trigger

__all__ = [
    "AllToAll",
    "AllToOne",
    "BackdoorAttack",
    "BlendedTrigger",
    "CleanLabelAttack",
    "DynamicTrigger",
    "InputAwareAttack",
    "InputAwareBackdoor",
    "InputAwareStep",
    "LabelMap",
    "ManyToOne",
    "MarginLimitedAttack",
    "OneToOne",
    "PatchTrigger",
    "SinusoidTrigger",
    "Trigger",
]

"""Defences: they see a model and a few clean images, never the attack."""

from bclip_lab.defenses.mmac import MMACConfig, MMACStep, mmac
from bclip_lab.defenses.mmbm import MMBMConfig, MMBMStep, mmbm

__all__ = ["MMACConfig", "MMACStep", "MMBMConfig", "MMBMStep", "mmac", "mmbm"]

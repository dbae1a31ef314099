"""Defences: they see a model and a few clean images, never the attack."""

from bclip_lab.defenses.mmac import MMACConfig, MMACStep, mmac
from bclip_lab.defenses.mmbm import MMBMConfig, MMBMStep, mmbm
from bclip_lab.defenses.stand_ins import TriggerStandIns

__all__ = ["MMACConfig", "MMACStep", "MMBMConfig", "MMBMStep", "TriggerStandIns", "mmac", "mmbm"]

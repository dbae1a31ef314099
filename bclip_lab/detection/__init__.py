"""Detectors: MMDF on images at test time, MM-BD on whole models."""

from bclip_lab.detection.mmbd import MMBD
from bclip_lab.detection.mmdf import MMDF, MMDFDecisions

__all__ = ["MMBD", "MMDF", "MMDFDecisions"]

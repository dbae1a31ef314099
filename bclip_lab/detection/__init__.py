"""Detectors: MMDF and its peers on images at test time, MM-BD and Neural Cleanse on whole models."""

from bclip_lab.detection.corruptions import CORRUPTIONS, corrupt
from bclip_lab.detection.ibd_psc import IBDPSC
from bclip_lab.detection.mmbd import MMBD
from bclip_lab.detection.mmdf import MMDF, MMDFDecisions
from bclip_lab.detection.neural_cleanse import NeuralCleanse
from bclip_lab.detection.scale_up import ScaleUp
from bclip_lab.detection.strip import STRIP
from bclip_lab.detection.teco import TeCo

__all__ = [
    "CORRUPTIONS",
    "IBDPSC",
    "MMBD",
    "MMDF",
    "STRIP",
    "MMDFDecisions",
    "NeuralCleanse",
    "ScaleUp",
    "TeCo",
    "corrupt",
]

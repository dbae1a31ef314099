"""Interactive widgets for JupyterLab: each a shell over a plain object that needs no kernel."""

from bclip_lab.widgets.activation_explorer import ActivationExplorer
from bclip_lab.widgets.activations import ActivationExploration
from bclip_lab.widgets.designer import TriggerDesigner
from bclip_lab.widgets.designing import TriggerDesign
from bclip_lab.widgets.detection_explorer import DetectionExplorer
from bclip_lab.widgets.detections import DetectionExploration
from bclip_lab.widgets.drag import DragLine, Steps
from bclip_lab.widgets.tuner import BoundTuner
from bclip_lab.widgets.tuning import BoundTuning

__all__ = [
    "ActivationExploration",
    "ActivationExplorer",
    "BoundTuner",
    "BoundTuning",
    "DetectionExploration",
    "DetectionExplorer",
    "DragLine",
    "Steps",
    "TriggerDesign",
    "TriggerDesigner",
]

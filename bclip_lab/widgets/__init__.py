"""Interactive widgets for JupyterLab: each a shell over a plain object that needs no kernel.

What all of them do:

* Moves that are made while a cell runs take effect after it, and do not touch the figures that it draws. Of moves
  that come faster than they can be computed the last one counts.
* Two widgets may share a model. Each shows what it has itself set and measured; the model has the bounds that were
  set last, and a `BoundTuner` that is moved sets all of its own again.
* A cell that is run again makes a new widget in place of the old one. A `BoundTuner` starts with the bounds that the
  model has then; the others start anew.
* After a restart of the kernel the controls in the page do nothing until the cells are run again.
* A notebook that is closed and opened again while its kernel runs has its widgets as they were. Without that kernel
  the last picture remains, and the cells are to be run.
"""

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

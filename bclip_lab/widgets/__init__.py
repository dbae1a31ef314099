"""Interactive widgets for JupyterLab: each a shell over a plain object that needs no kernel."""

from bclip_lab.widgets.designer import TriggerDesigner
from bclip_lab.widgets.designing import TriggerDesign
from bclip_lab.widgets.tuner import BoundTuner
from bclip_lab.widgets.tuning import BoundTuning

__all__ = ["BoundTuner", "BoundTuning", "TriggerDesign", "TriggerDesigner"]

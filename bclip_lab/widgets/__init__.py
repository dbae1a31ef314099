"""Interactive widgets for JupyterLab: each a shell over a plain object that needs no kernel."""

from bclip_lab.widgets.activation_explorer import ActivationExplorer
from bclip_lab.widgets.activations import ActivationExploration
from bclip_lab.widgets.tuner import BoundTuner
from bclip_lab.widgets.tuning import BoundTuning

__all__ = ["ActivationExploration", "ActivationExplorer", "BoundTuner", "BoundTuning"]

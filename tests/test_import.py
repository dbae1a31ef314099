"""`import bclip_lab` stays light: no plotting, no notebook, no torchvision, no torchmetrics."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("matplotlib", "seaborn", "ipywidgets", "jupyter", "ipykernel", "nbformat", "IPython")
HEAVY += ("torchvision", "torchmetrics")


def test_import_is_light():
    # In a fresh interpreter: this one has imported nearly everything already.
    code = "import sys, bclip_lab; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert "bclip_lab" in imported
    assert [name for name in imported if name.startswith(HEAVY)] == []

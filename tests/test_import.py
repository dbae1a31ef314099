"""`import bclip_lab` stays light, and so does learning: no plotting, no notebook, no torchvision, no compiler."""

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


def test_learning_loads_no_compiler():
    # Of a session's first optimiser torch.optim takes more than a second to load what would compile it.
    code = """
import sys
import torch
import bclip_lab as bl
model = bl.models.resnet10(4, seed=0, width=4)
images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
data = bl.LabelledImages(images, bl.logits(model, images).argmax(1), ("a", "b", "c", "d"))
mmac = bl.MMACConfig(epochs=1, patch=2, synthetic=bl.MaximumMarginConfig(per_class=1, steps=1))
bl.run(bl.mmac(bl.ClippedModel(model), data, mmac))
for learned in (bl.anp(model, data), bl.ibau(model, data), bl.nad(model, data)):
    next(learned)
bl.MMBD(model).fit(data)
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert "bclip_lab.optimisers" in imported and "torch._dynamo" not in imported

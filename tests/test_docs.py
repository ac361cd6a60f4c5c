"""What the documentation shows runs as it stands there."""

import re
from pathlib import Path

import nibabel
import numpy as np
import torch
from tiny import SETTINGS, volumes

from cover import pretrain

DOCS = Path(__file__).parent.parent / "docs"


def snippet(page, heading):
    """The first Python example below a heading."""
    return re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)[1]


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.diag([-1, 1, 1, 1])), path)  # from right to left


def test_fine_tuning_learns_to_segment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in sorted(volumes(tmp_path / "arrays", shape=(19, 20, 13)).iterdir()):  # no multiple of the stride
        image = np.load(path)
        save(tmp_path / "scans" / f"{path.stem}.nii.gz", image)
        save(tmp_path / "labels" / f"{path.stem}.nii.gz", np.digitize(image, np.quantile(image, [0.6, 0.9])))
    pretrain("scans", out="runs/first", **SETTINGS)
    names = {}
    exec(snippet("pretraining.md", "Fine-tuning"), names)
    x, y = names["read"](0)
    assert names["segmentation"].shape == y.shape == (1, *x.shape[2:])
    # always naming the commonest class would be right in 60 % of the voxels
    assert (names["segmentation"] == y).float().mean() > 0.8
    assert torch.equal(y.unique(), torch.tensor([0, 1, 2]))

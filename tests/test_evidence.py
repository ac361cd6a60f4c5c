"""The scripts of the evidence: what they measure, and one tiny run from images to tables."""

import json
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

import correspondence
import downstream
import report
import run_all
import sets
from downstream import IGNORE, Labelled

TASK = sets.Task("", "hippocampus", "label", 3, (1,), (8, 8, 8), ridge=1e-5)


class Backbone(nn.Module):
    """Two levels: the image's own channels pooled by 2, and as they are."""

    def __init__(self, channels, d):
        super().__init__()
        self.channels, self.strides = (channels, channels), ((2,) * d, (1,) * d)

    def forward(self, x):
        pool = F.avg_pool3d if x.dim() == 5 else F.avg_pool2d
        return [pool(x, 2), x]


@pytest.mark.parametrize("size", [(8, 12), (4, 6, 8)])
def test_classifying_levels_equals_classifying_concatenated_features(size):
    model = downstream.Segmenter(Backbone(3, len(size)), classes=4)
    x = torch.randn(2, 3, *size)
    features = torch.cat([downstream.upsample(f, size) for f in model.backbone(x)], 1)
    weight = torch.cat([head.weight for head in model.heads], 1).flatten(1)
    expected = torch.einsum("kc,bc...->bk...", weight, features)
    expected = expected + sum(head.bias for head in model.heads).view(-1, *[1] * len(size))
    torch.testing.assert_close(model(x), expected)


def test_probe_separates_what_is_separable_whatever_the_scale_of_the_features():
    image = torch.randn(1, 8, 8, 8) * 1e3 + 5e3
    label = torch.where(image[0] > 6e3, 2, torch.where(image[0] > 5e3, 1, 0))
    # one-hot features of the classes, badly scaled: linearly separable
    features = torch.cat([(label == k).float()[None] * 10.0**k + 100 for k in range(3)])
    items = [Labelled(features, label)]
    model = downstream.fit_probe(Backbone(3, 3), items, TASK, seed=0)
    assert downstream.mean_dice(model, items, 3) == 1


def test_probe_never_sees_padding():
    image = torch.randn(1, 8, 8, 8)
    label = (image[0] > 0).long()
    label[4:] = 1 - label[4:]
    padded = label.clone()
    padded[4:] = IGNORE
    model = downstream.fit_probe(Backbone(1, 3), [Labelled(image, padded)], TASK, seed=0)
    assert downstream.mean_dice(model, [Labelled(image, padded)], 3) > 0.9


class Answer(nn.Module):
    """Scores that say the classes written in the image."""

    def forward(self, x):
        return F.one_hot(x[:, 0].long(), 3).movedim(-1, 1).float()


@pytest.mark.parametrize(
    ("predicted", "label", "dice"),
    [
        ([0, 1, 1, 2], [0, 1, 1, 2], 1.0),
        ([0, 1, 0, 2], [0, 1, 1, 2], (2 / 3 + 1) / 2),
        ([0, 0, 0, 0], [0, 1, 1, 2], 0.0),
        ([0, 1, 1, 2], [0, 1, 1, 0], 1.0),  # class 2 is not in this image: not counted
        ([0, 1, 1, 1], [0, 1, 1, IGNORE], 1.0),  # padding is not counted
    ],
)
def test_mean_dice(predicted, label, dice):
    item = Labelled(torch.tensor([[predicted]]).float(), torch.tensor([label]))
    assert downstream.mean_dice(Answer(), [item], 3) == pytest.approx(dice)


def test_segmentation_loss_vanishes_for_the_truth_and_ignores_padding():
    label = torch.randint(0, 3, (2, 4, 4))
    scores = 50.0 * F.one_hot(label, 3).movedim(-1, 1)
    assert downstream.segmentation_loss(scores, label) < 1e-5
    label[:, 2:] = IGNORE
    expected = downstream.segmentation_loss(scores, label)
    scores[:, :, 2:] = torch.randn(2, 3, 2, 4)
    assert downstream.segmentation_loss(scores, label) == expected
    assert downstream.segmentation_loss(-scores, label) > 1


def test_crops_keep_image_and_label_together():
    position = torch.arange(16 * 16).view(1, 16, 16).float()
    task = sets.Task("", "cxr", "mask", 2, (1,), (4, 8))
    label = position[0].long()
    for seed in range(20):
        image, cropped = downstream.draw_crop([Labelled(position, label)], task, torch.Generator().manual_seed(seed))
        assert cropped.shape == (4, 8)
        gain = (image[0, -1, -1] - image[0, 0, 0]) / (cropped[-1, -1] - cropped[0, 0])
        assert gain == pytest.approx(1, abs=0.12)


def test_variants_change_what_they_say():
    config = sets.DATA_SETS["hippocampus"].config(crop=(16, 16, 16), heads=(2, 2, 1), channels=(4, 8, 8))
    full = sets.variant_settings("full", config)
    assert full["fit_to_reach"] is None and full == sets.full_ranges(config)
    changed = {v: dict(sets.variant_settings(v, config).items() - full.items()) for v in sets.VARIANTS}
    assert changed["full"] == {}
    assert all(changes.pop("steps") == sets.ABLATION_STEPS for v, changes in changed.items() if v != "full")
    assert changed["short"] == {}
    assert changed["single_level"] == {"heads": (1,)}
    assert changed["one_group"] == {"heads": (1, 1, 1)}
    assert changed["con_only"] == {"vector_weight": 0.0}
    assert changed["beyond_reach"].keys() <= set(sets.RANGES) and changed["beyond_reach"]["rotation"] > 90


def jobs(folder, *needs):
    """Jobs a, b, ... where job i needs the results of the jobs `needs[i]`."""
    paths = [folder / f"{name}.json" for name in "abc"]
    return [run_all.Job([], path, tuple(paths[i] for i in need)) for path, need in zip(paths, needs, strict=True)]


def test_queue_skips_what_is_done_and_lets_dependents_wait(tmp_path):
    a, b, c = jobs(tmp_path, (), (0,), ())
    queue = run_all.Queue([a, b, c], time.monotonic() + 60)
    assert queue.take() is a
    assert queue.take() is c  # b waits for a
    a.result.touch()
    queue.done(a)
    assert queue.take() is b
    assert queue.take() is None
    assert run_all.Queue([a], time.monotonic() + 60).take() is None


def test_queue_gives_up_on_what_needs_a_failed_job(tmp_path):
    a, b, c = jobs(tmp_path, (), (0,), (1,))
    queue = run_all.Queue([a, b, c], time.monotonic() + 60)
    queue.done(queue.take())
    assert queue.take() is None and queue.failed == [a] and queue.waiting == [b, c]


def test_queue_starts_nothing_after_the_deadline(tmp_path):
    assert run_all.Queue(jobs(tmp_path, (), (), ()), time.monotonic() - 1).take() is None


def test_all_jobs_are_there_once_and_need_what_comes_before(tmp_path):
    every = run_all.all_jobs(Path("data"), tmp_path, seeds=3)
    assert len({job.result for job in every}) == len(every)
    uses = {job.result.stem for job in every if job.result.parent.name == "downstream-test"}
    assert uses == {
        f"{name}-{labels}-{init}-{seed}"
        for name, task in sets.TASKS.items()
        for labels in task.labels
        for init in sets.INITS
        for seed in range(3)
    }
    seen = set()
    for job in every:
        assert seen.issuperset(job.needs)
        seen.add(job.result)


def test_insert_replaces_what_stands_between_the_markers():
    text = "one <!-- begin x -->old<!-- end x --> two <!-- begin y --><!-- end y -->"
    once = report.insert(text, "x", r"new \1")
    assert once == "one <!-- begin x -->\nnew \\1\n<!-- end x --> two <!-- begin y --><!-- end y -->"
    assert report.insert(once, "x", r"new \1") == once
    with pytest.raises(ValueError, match="markers <!-- begin z -->"):
        report.insert(text, "z", "")


def test_bars_compare_seed_by_seed():
    def run(init, seed, probe, short):
        return {"task": "lungs", "labels": 5, "init": init, "seed": seed, "probe": probe, "fine_tuning": {"60": short}}

    results = [
        run("cover", 0, 0.8, 0.6),
        run("cover", 1, 0.9, 0.5),
        run("random", 0, 0.7, 0.5),
        run("random", 1, 0.8, 0.5),
    ]
    probe, short = report.bars_table([], results).splitlines()[2:]
    assert "0.100 ± 0.000 | yes" in probe
    assert "+0.100, +0.000 | **no**" in short


@pytest.fixture
def data(tmp_path):
    """Six small volumes laid out like the hippocampus data: a bright ball whose inner half is class 2."""
    folder = tmp_path / "data" / "hippocampus_msd"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["id,image,label,split"]
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"))
    for i, split in enumerate(("train", "train", "train", "val", "test", "test")):
        distance = np.linalg.norm(grid - rng.uniform(7, 12, (3, 1, 1, 1)), axis=0)
        label = (distance < 6).astype(np.uint8) + (distance < 3)
        image = (100 * label + rng.normal(0, 5, label.shape)).astype(np.float32)
        for name, array in (("image", image), ("label", label)):
            # flipped and permuted axes: labels must follow the images to canonical order
            nibabel.Nifti1Image(array, np.diag([-1, 1, 1, 1])[[1, 0, 2, 3]]).to_filename(folder / f"{name}{i}.nii.gz")
        rows.append(f"{i},image{i}.nii.gz,label{i}.nii.gz,{split}")
    (folder / "split.csv").write_text("\n".join(rows))
    return tmp_path / "data"


def test_from_images_to_tables(data, tmp_path, monkeypatch, capsys):
    tiny = {"crop": (16, 16, 16), "channels": (8, 16), "heads": (2, 1), "steps": 3, "batch": 1, "val_samples": 1}
    monkeypatch.setitem(sets.DATA_SETS, "hippocampus", sets.DataSet("hippocampus_msd", "small-3d", tiny))
    monkeypatch.setattr(sets, "ABLATION_STEPS", 2)
    monkeypatch.setattr(correspondence, "PAIRS", 2)
    out = tmp_path / "out"
    paths = [f"--data={data}", f"--out={out}"]
    for variant in ("full", "con_only"):
        correspondence.main([*paths, "--data-set=hippocampus", f"--variant={variant}"])
    for init in sets.INITS:
        changes = ["schedules=[2, 30]", "crop=[16, 16, 16]", "samples=2000"]
        downstream.main([*paths, "--task=hippocampus", "--labels=2", f"--init={init}", *changes])

    result = json.loads((out / "results/downstream-test/hippocampus-2-random-0.json").read_text())
    assert result["images"] == 2 and result["probe"] > 0.6 and result["fine_tuning"]["30"] > result["fine_tuning"]["2"]

    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*.json"))
    correspondence.main([*paths, "--data-set=hippocampus"])
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*.json")) == before

    document = tmp_path / "results.md"
    names = ("correspondence hippocampus", "downstream hippocampus", "bars")
    document.write_text("\n".join(f"<!-- begin {name} --><!-- end {name} -->" for name in names))
    report.main([*paths, f"--document={document}", f"--figures={tmp_path / 'figures'}"])
    text = document.read_text()
    assert "| full model | 3 | 1 |" in text and "| L_con alone | 2 | 1 |" in text
    assert "| 2 | linear probe | 0." in text
    assert (tmp_path / "figures" / "hippocampus.svg").stat().st_size > 5000

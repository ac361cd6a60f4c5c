"""Data sets: what belongs to them, crops with their margins, order, workers, and images that fail on the way."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cover.config import DataConfig
from cover.data import BatchSampler, DataError, PretrainDataset, check, open_images, splits
from cover.data.cache import Cache, Entry
from cover.data.dataset import cut
from cover.data.manifest import find
from cover.data.report import Finding, Report

VOLUME = DataConfig(crop=(8, 6, 4))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Four volumes of different shapes, in two folders."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    for k, name in enumerate(["a.npy", "b.npy", "more/c.npy", "more/d.npy"]):
        np.save(data / name, noise(10 + k, 12, 14 - k, seed=k))
    return data


# which files


def test_folders_are_searched_and_hidden_files_left_out(folder):
    (folder / "more/._c.npy").write_text("left by another system")
    (folder / ".git").mkdir()
    np.save(folder / ".git/x.npy", noise(9, 9, 9))
    (folder / "README.txt").write_text("not an image")
    assert [source.name for source in find(folder)] == ["a.npy", "b.npy", "more/c.npy", "more/d.npy"]
    assert [source.name for source in find(folder / "a.npy")] == ["a.npy"]
    assert [source.path for source in find([folder / "b.npy", str(folder / "a.npy")])] == [
        folder / "b.npy",
        folder / "a.npy",
    ]
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        find(folder / "nothing")


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "e.npy", noise(9, 9, 9))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "more/circle").symlink_to(folder)
    (elsewhere / "again").symlink_to(folder / "more")
    assert {source.name.split("/")[-1] for source in find(folder)} == {f"{name}.npy" for name in "abcde"}
    assert len(find(folder)) == 5


def test_a_folder_that_cannot_be_read_is_a_problem(folder, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    report = check(folder, VOLUME)
    assert (report.files, report.images) == (3, 2)
    assert report.problems[0].name == "more" and "PermissionError" in report.problems[0].what


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints/step_00000001.pt"])
def test_the_folder_of_a_run_is_left_out(folder, sign):
    run = folder / "run"
    for name in ("config.json", "figures/x.png", sign):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    assert len(find(folder)) == 4
    assert [source.name for source in find(run / "figures")] == ["x.png"]
    (run / "config.json").unlink()
    assert len(find(folder)) == 5


def test_a_file_counts_once(folder):
    (folder / "more/link.npy").symlink_to(folder / "a.npy")
    paths = [folder / "b.npy", folder / "a.npy", folder / "more/../b.npy", folder / "more/link.npy", folder / "b.npy"]
    report = check(paths, VOLUME)
    assert (report.files, report.images) == (2, 2)
    assert report.notes == (
        Finding(str(folder / "b.npy"), "is there 3 times: used once"),
        Finding(str(folder / "a.npy"), "is there 2 times: used once"),
    )
    (folder / "x.csv").write_text("image,split\na.npy,train\nb.npy,val\nmore/../a.npy,val\n")
    with pytest.raises(DataError, match=r"one file is in two splits: 'a.npy' \(train\) and 'more/../a.npy' \(val\)"):
        open_images(folder / "x.csv", VOLUME, "train")


def test_an_empty_path_is_not_this_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(find(".")) == 4
    with pytest.raises(FileNotFoundError, match="there is no file or folder ''"):
        find("")


ROWS = [("a.npy", "train"), ("b.npy", "test"), ("more/c.npy", "train"), ("more/d.npy", "val")]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_manifests_choose_by_split(folder, tmp_path, kind):
    path = folder / f"split.{kind}"
    if kind == "csv":
        path.write_text("\ufeffimage,id,split\n" + "".join(f"{image},1,{split}\n" for image, split in ROWS), "utf-8")
    else:
        path.write_text(json.dumps([{"image": image, "split": split, "age": 3} for image, split in ROWS]))
    assert splits(path) == ("train", "val", "test") and splits(folder) == ()
    train = open_images(path, VOLUME, "train", tmp_path / "cache")
    assert [train.name(i) for i in range(len(train))] == ["a.npy", "more/c.npy"]
    assert len(open_images(path, VOLUME, cache=tmp_path / "cache")) == 4
    path.write_text(path.read_text(encoding="utf-8-sig").replace("val", "train"))
    with pytest.raises(DataError, match=r"no split 'val' in .*; it has train test"):
        open_images(path, VOLUME, "val", tmp_path / "cache")


def test_a_manifest_without_splits(folder, tmp_path):
    (folder / "list.json").write_text('["a.npy", {"image": "b.npy"}]')
    (folder / "list.txt").write_text("a.npy  \r\n   \nb.npy\t\n\n")
    for name in ("list.json", "list.txt"):
        assert len(open_images(folder / name, VOLUME, cache=tmp_path / "cache")) == 2
    with pytest.raises(DataError, match=r"no split 'train' in .*; it has no splits"):
        open_images(folder / "list.json", VOLUME, "train")


def test_unusable_files_are_left_out_or_fatal(folder, tmp_path):
    np.save(folder / "b.npy", np.zeros((9, 9, 9)))
    (folder / "more/c.npy").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out, cannot be used:\n.*\nb\.npy +constant.*\nmore/c\.npy +empty file"):
        images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    assert [images.name(i) for i in range(len(images))] == ["a.npy", "more/d.npy"]
    assert (images.report.files, images.report.images, len(images.report.problems)) == (4, 2, 2)
    with pytest.raises(DataError, match=r"2 files cannot be used\n.*\nb\.npy"):
        open_images(folder, DataConfig(crop=(8, 6, 4), on_error="fail"), cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"no usable image among the 1 files\n.*\nb\.npy"):
        open_images(folder / "b.npy", VOLUME, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="no usable image among the 0 files"):
        open_images([], VOLUME, cache=tmp_path / "cache")


def test_report():
    problems = tuple(Finding(f"{k}.png", "empty file") for k in range(12))
    report = Report(12, 0, problems, spacings=((1.0, 2.0, 3.0), (2.0, 1.0, 3.0)))
    assert str(report).count("empty file") == 12 and "voxel size: 1 x 1 x 3 to 2 x 2 x 3 mm" in str(report)
    assert report.summary().count("empty file") == 10 and report.summary().endswith(
        "and 2 more: `cover check` lists all"
    )
    one = Report(1, 1, spacings=((1.0, 2.0, 3.0),))
    assert str(one) == "1 files, 1 usable images, 0 problems\nvoxel size: 1 x 2 x 3 mm"


def test_names_cannot_pretend_to_be_rows_of_a_report(tmp_path):
    names = [b"z\n0 problems\nok.npy", b"\x1b[2J.npy", b"\xff.npy", "größe 2 目.npy".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    report = check(tmp_path, VOLUME)
    lines = str(report).encode().decode().splitlines()
    assert len(lines) == 6 and lines[0].endswith("4 problems")
    assert {line.removesuffix("  empty file").rstrip() for line in lines[2:]} == {
        r"z\n0 problems\nok.npy",
        r"\x1b[2J.npy",
        r"\udcff.npy",
        "größe 2 目.npy",
    }
    np.save(tmp_path / os.fsdecode(names[0]), noise(9, 9, 9))
    assert open_images(tmp_path / os.fsdecode(names[0]), VOLUME).name(0) == r"z\n0 problems\nok.npy"


def test_slices_that_are_constant_are_left_out(tmp_path):
    x = noise(9, 8, 7)
    x[:, 2] = x[:, 5] = x.min()
    np.save(tmp_path / "x.npy", x)
    images = open_images(tmp_path, DataConfig(crop=(4, 4), slice_axis=1), cache=tmp_path / "cache")
    volume = open_images(tmp_path, VOLUME, cache=tmp_path / "cache").read(0)
    assert [images.name(i) for i in range(len(images))] == [f"x.npy, slice {k}" for k in (0, 1, 3, 4, 6, 7)]
    np.testing.assert_array_equal(images.read(2), volume[:, :, 3])
    assert images.foreground(2) is None
    resized = open_images(tmp_path, DataConfig(crop=(4, 4), slice_axis=1, resize=(5, 6)), cache=tmp_path / "cache")
    assert resized.read(2).shape == (1, 5, 6)


def test_files_are_held_out_whole(tmp_path):
    for k in range(10):
        np.save(tmp_path / f"{k}.npy", noise(5, 6, 7, seed=k))
    images = open_images(tmp_path, DataConfig(crop=(4, 4), slice_axis=0), cache=tmp_path / "cache")
    for fraction, held_out in ((0, 0), (0.001, 1), (0.2, 2), (0.999, 9)):
        train, val = images.split(fraction, seed=3)
        assert len(train) + len(val) == len(images) == 50 and len(val) == 5 * held_out
        names = [{s.name(i).split(",")[0] for i in range(len(s))} for s in (train, val)]
        assert not names[0] & names[1]
        assert [val.name(i) for i in range(len(val))] == [images.split(fraction, 3)[1].name(i) for i in range(len(val))]
    val_names = {images.split(0.2, seed)[1].name(0) for seed in range(10)}
    assert len(val_names) > 2
    train, val = train._subset(train._items[:, 0] == train._items[0, 0]).split(0.5, 0)
    assert (len(train), len(val)) == (5, 0)


# crops


@given(st.data(), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_cut_is_the_image_with_its_border_repeated(data, d):
    size = data.draw(st.lists(st.integers(1, 9), min_size=d, max_size=d))
    shape = data.draw(st.lists(st.integers(1, 12), min_size=d, max_size=d))
    start = [data.draw(st.integers(1 - p, n - 1)) for p, n in zip(shape, size, strict=True)]
    image = noise(2, *size).astype(np.float16)
    patch, extent = cut(image, np.array(start), np.array(shape))
    where = [np.arange(s, s + p) for s, p in zip(start, shape, strict=True)]
    inside = [np.clip(w, 0, n - 1) for w, n in zip(where, size, strict=True)]
    np.testing.assert_array_equal(patch.numpy(), image[np.ix_([0, 1], *inside)])
    assert patch.dtype == extent.dtype == torch.float32
    for w, n, (first, last) in zip(where, size, extent.tolist(), strict=True):
        real = np.flatnonzero((w >= 0) & (w < n))
        assert (first, last) == (real[0], real[-1])


def test_a_sample(folder, tmp_path):
    images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    dataset = PretrainDataset(images, VOLUME, (3, 0, 2), seed=5)
    assert len(dataset) == 4
    sample = dataset[7, 2]
    assert sample["image"].shape == (1, 14, 6, 8) and sample["image"].dtype == torch.float32
    assert sample["extent"].shape == (3, 2)
    assert (sample["epoch"], sample["index"]) == (7, 2) and sample["index"].dtype == torch.int64
    with pytest.raises(ValueError, match="`margin` must have one number per axis"):
        PretrainDataset(images, VOLUME, (3, 0), seed=5)


@given(st.integers(2, 12), st.integers(1, 14), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_crops_lie_inside_the_image_or_the_image_inside_the_crop(tmp_path_factory, size, crop, margin):
    folder = tmp_path_factory.mktemp("x")
    np.save(folder / "x.npy", noise(size, size))
    config = DataConfig(crop=(crop, crop))
    images = open_images(folder, config, cache=folder)
    dataset = PretrainDataset(images, config, (margin, margin), seed=0)
    starts = set()
    for epoch in range(30):
        sample = dataset[epoch, 0]
        for first, last in sample["extent"].tolist():
            if crop >= size:
                assert margin <= first <= last < margin + crop and last - first == size - 1
                starts.add(first)
            else:
                assert first <= margin and last >= margin + crop - 1
    if crop > size:
        assert len(starts) > 1


def test_every_position_is_drawn(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(16.0).reshape(2, 8))
    config = DataConfig(crop=(2, 3), normalise="zscore")
    images = open_images(tmp_path, config, cache=tmp_path)
    dataset = PretrainDataset(images, config, (0, 0), seed=0)
    corners = torch.stack([dataset[epoch, 0]["image"][0, 0, 0] for epoch in range(200)])
    counts = torch.unique(corners, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 15


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_foreground_bias(tmp_path, share):
    x = np.zeros((40, 40, 40))
    x[25:28, 8:11, 20:23] = 1
    np.save(tmp_path / "x.npy", x)
    config = DataConfig(crop=(9, 9, 9), foreground=share, normalise="zscore")
    images = open_images(tmp_path, config, cache=tmp_path)
    dataset = PretrainDataset(images, config, (0, 0, 0), seed=0)
    centred = sum(bool(dataset[epoch, 0]["image"][0, 4, 4, 4] > 1) for epoch in range(200)) / 200
    assert centred == pytest.approx(share, abs=0.12 if share == 0.5 else 0.01)


# order and reproducibility


def test_a_sample_depends_on_seed_epoch_and_index_only(folder, tmp_path):
    images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    dataset = PretrainDataset(images, VOLUME, (1, 1, 1), seed=0)
    sample = dataset[3, 1]["image"]
    dataset[0, 0], dataset[3, 2]
    again = PretrainDataset(open_images(folder, VOLUME, cache=tmp_path / "other"), VOLUME, (1, 1, 1), seed=0)
    torch.testing.assert_close(again[3, 1]["image"], sample, rtol=0, atol=0)
    other = PretrainDataset(images, VOLUME, (1, 1, 1), seed=1)
    assert not torch.equal(dataset[4, 1]["image"], sample) and not torch.equal(other[3, 1]["image"], sample)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_batches(length, batch, start, more, seed):
    steps = start + more
    batches = list(BatchSampler(length, batch, seed, steps=steps))
    assert len(batches) == len(BatchSampler(length, batch, seed, steps=steps)) == steps
    # resuming is the same as having started at 0
    resumed = BatchSampler(length, batch, seed, start * batch, steps=more)
    assert list(resumed) == batches[start:] and len(resumed) == more
    samples = [key for keys in batches for key in keys]
    assert all(len(keys) == batch for keys in batches)
    for epoch in range(len(samples) // length):
        chosen = samples[epoch * length : (epoch + 1) * length]
        assert {e for e, _ in chosen} == {epoch} and sorted(i for _, i in chosen) == list(range(length))


def test_epochs_and_seeds_differ_in_order():
    orders = {str(list(BatchSampler(20, 20, seed, steps=3))[step]) for seed in range(3) for step in range(3)}
    assert len(orders) == 9
    with pytest.raises(ValueError, match="`length` and `batch` must be at least 1, got 0 and 2"):
        BatchSampler(0, 2, 0, steps=1)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_change_nothing(folder, tmp_path, method, workers):
    images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    dataset = PretrainDataset(images, VOLUME, (2, 2, 2), seed=0)

    def batches(**settings):
        return list(DataLoader(dataset, batch_sampler=BatchSampler(4, 3, 0, steps=5), **settings))

    for alone, worked in zip(batches(), batches(num_workers=workers, multiprocessing_context=method), strict=True):
        assert alone.keys() == worked.keys() == {"image", "extent", "epoch", "index", "replaced"}
        assert alone.pop("replaced") == worked.pop("replaced")
        torch.testing.assert_close(alone, worked, rtol=0, atol=0)


def test_an_image_set_is_small_to_send(folder, tmp_path):
    for k in range(300):  # what other data sets left in the index stays here
        Cache(tmp_path / "cache").put(Entry(key=str(k)))
    images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    sent = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 10_000
    np.testing.assert_array_equal(sent.read(1), images.read(1))


# images that fail on the way


def test_an_image_that_vanishes_is_replaced_or_fatal(tmp_path):
    for k in range(5):
        np.save(tmp_path / f"{k}.npy", noise(9, 9, seed=k))
    config = DataConfig(crop=(9, 9))
    images = open_images(tmp_path, config, cache=tmp_path)
    dataset = PretrainDataset(images, config, (0, 0), seed=0)
    assert [dataset[0, i]["replaced"] for i in range(5)] == [""] * 5
    whole = [dataset[0, i]["image"] for i in range(5)]
    (tmp_path / "1.npy").unlink()
    (tmp_path / "3.npy").write_bytes(b"gone bad")
    np.save(tmp_path / "4.npy", noise(9, 9, 9))
    replaced = []
    for i in (1, 3, 4):
        for _ in range(2):
            sample = dataset[0, i]
            assert sample["replaced"].startswith(f"data: another image takes the place of {i}.npy: ")
            assert sample["index"] == i
            replaced.append(sample["image"])
    for image, again in zip(replaced[::2], replaced[1::2], strict=True):
        assert torch.equal(image, again) and any(torch.equal(image, whole[k]) for k in (0, 2))
    fatal = PretrainDataset(images, DataConfig(crop=(9, 9), on_error="fail"), (0, 0), seed=0)
    with pytest.raises(DataError, match=r"data: 1\.npy: no such file"):
        fatal[0, 1]
    for k in range(5):
        (tmp_path / f"{k}.npy").unlink(missing_ok=True)
    with pytest.raises(DataError, match="17 images in a row can no longer be read, the last: "):
        dataset[0, 0]


def test_a_volume_that_vanishes_with_its_cache_is_replaced(folder, tmp_path):
    images = open_images(folder, VOLUME, cache=tmp_path / "cache")
    dataset = PretrainDataset(images, VOLUME, (0, 0, 0), seed=0)
    for file in (tmp_path / "cache").glob("*.volume"):
        file.unlink()
    (folder / "a.npy").unlink()
    assert dataset[0, 0]["replaced"] == "data: another image takes the place of a.npy: no such file"
    assert dataset[0, 1]["replaced"] == ""

"""The cache of decoded volumes: decodes once, trusts only what is whole and current, shared by processes."""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cover.data.cache
from cover.config import Config, DataConfig, replace
from cover.data import ImageError, open_images
from cover.data.cache import Cache

CONFIG = DataConfig(crop=(8, 8, 8))


@pytest.fixture(params=["npy", "blosc2"])
def store(request):
    """Runs a test once with every store."""
    if request.param == "blosc2":
        pytest.importorskip("blosc2")
    return request.param


@pytest.fixture
def config(store):
    return DataConfig(crop=(8, 8, 8), store=store)


@pytest.fixture
def volumes(tmp_path):
    """A folder of three volumes."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    for k in range(3):
        np.save(folder / f"{k}.npy", np.random.default_rng(k).random((12, 10, 9)))
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded, as it happens."""
    names, read = [], cover.data.cache.read
    monkeypatch.setattr(cover.data.cache, "read", lambda path, config: (names.append(path.name), read(path, config))[1])
    return names


def contents(images):
    return np.stack([images.read(i) for i in range(len(images))])


def test_volumes_are_decoded_once(volumes, tmp_path, decoded, config):
    first = open_images(volumes, config, cache=tmp_path / "cache")
    assert sorted(decoded) == ["0.npy", "1.npy", "2.npy"]
    again = open_images(volumes, config, cache=tmp_path / "cache")
    assert len(decoded) == 3
    np.testing.assert_array_equal(contents(first), contents(again))
    stored = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*-*"))
    assert again.report.cache_bytes == first.report.cache_bytes == stored
    assert f"{stored / 1e6:.1f} MB in {tmp_path / 'cache'}" in str(again.report)


def test_a_volume_is_at_half_precision(volumes, tmp_path, config):
    images = open_images(volumes, config, cache=tmp_path / "cache")
    assert images.array(0).dtype == np.float16 and images.array(0).shape == (1, 12, 10, 9)
    x = np.load(volumes / "0.npy")
    x = np.clip(x, *np.percentile(x, (0.5, 99.5)))
    np.testing.assert_allclose(images.read(0)[0], (x - x.mean()) / x.std(), rtol=1e-3, atol=1e-3)
    own = images.read(0)
    own[:] = 0
    assert own.dtype == np.float32 and images.read(0).any()


def test_a_volume_is_a_memory_map(volumes, tmp_path):
    array = open_images(volumes, CONFIG, cache=tmp_path / "cache").array(0)
    assert not array.flags.writeable and isinstance(array.base, np.memmap)


@pytest.mark.parametrize("slice_axis", [None, 0, 2])
def test_both_stores_hold_the_same_bits(tmp_path, slice_axis):
    pytest.importorskip("blosc2")
    for name, shape in (("small", (5, 6, 7)), ("whole", (64, 32, 32)), ("odd", (70, 33, 65))):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=shape))
    config = replace(Config(), crop=(8, 8) if slice_axis is not None else (8, 8, 8), slice_axis=slice_axis).data
    npy, blosc2 = (
        open_images(tmp_path, dataclasses.replace(config, store=store), cache=tmp_path / "cache")
        for store in ("npy", "blosc2")
    )
    assert len(npy) == len(blosc2)
    for i in range(len(npy)):
        x, y = npy.array(i), blosc2.array(i)
        np.testing.assert_array_equal(np.array(x).view(np.uint16), np.array(y).view(np.uint16))
        regions = [np.s_[:, 1:4, 2:5], np.s_[:, 3:60, 4:33], np.s_[:, -1:]]
        for region in regions:
            np.testing.assert_array_equal(x[region], y[region])
        assert slice_axis is not None or np.array_equal(npy.foreground(i), blosc2.foreground(i))


def test_only_the_chunks_that_a_crop_touches_are_decoded(tmp_path):
    pytest.importorskip("blosc2")
    np.save(tmp_path / "0.npy", np.random.default_rng(0).normal(size=(64, 64, 64)))
    config = DataConfig(crop=(8, 8, 8), store="blosc2")
    images = open_images(tmp_path, config, cache=tmp_path / "cache")
    truth = images.read(0)
    (file,) = (tmp_path / "cache").glob("*.volume")
    content = bytearray(file.read_bytes())
    # half way through the file are the chunks in the middle: neither the first nor the last
    content[len(content) // 2 - 5000 : len(content) // 2 + 5000] = bytes(10000)
    file.write_bytes(content)
    for corner in (np.s_[:, :32, :32, :32], np.s_[:, 32:, 32:, 32:]):
        np.testing.assert_array_equal(images.array(0)[corner], truth[corner])
    with pytest.raises(ImageError, match=rf"what the cache has of it is damaged .*: delete {file}"):
        images.read(0)


def test_a_store_whose_library_is_missing_says_what_to_install(volumes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ImportError, match=r"store=blosc2 needs blosc2: pip install 'cover-vcl\[store\]'"):
        open_images(volumes, DataConfig(crop=(8, 8, 8), store="blosc2"), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert len(open_images(volumes, CONFIG, cache=tmp_path / "cache")) == 3


def test_changed_files_and_settings_are_decoded_again(volumes, tmp_path, decoded):
    open_images(volumes, CONFIG, cache=tmp_path / "cache")
    decoded.clear()
    changed = np.random.default_rng(9).random((12, 10, 9))
    np.save(volumes / "1.npy", changed)  # of the same size
    images = open_images(volumes, CONFIG, cache=tmp_path / "cache")
    assert decoded == ["1.npy"]
    assert np.corrcoef(images.read(1).ravel(), changed.ravel())[0, 1] > 0.99
    decoded.clear()
    open_images(volumes, DataConfig(crop=(8, 8, 8), normalise="zscore"), cache=tmp_path / "cache")
    assert len(decoded) == 3
    decoded.clear()
    crop = DataConfig(crop=(4, 4, 4), foreground=0, val_fraction=0.5)  # of no consequence for what is decoded
    open_images(volumes, crop, cache=tmp_path / "cache")
    assert not decoded


def test_what_is_not_whole_is_not_trusted(volumes, tmp_path, decoded, config):
    truth = contents(open_images(volumes, config, cache=tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("*.volume"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].unlink()
    decoded.clear()
    np.testing.assert_array_equal(contents(open_images(volumes, config, cache=tmp_path / "cache")), truth)
    assert len(decoded) == 2


def test_an_index_whose_writer_was_killed(volumes, tmp_path, decoded, config):
    open_images(volumes, config, cache=tmp_path / "cache")
    index = tmp_path / "cache/index.jsonl"
    index.write_bytes(index.read_bytes().strip().splitlines()[0][:-20])
    decoded.clear()
    open_images(volumes, config, cache=tmp_path / "cache")
    assert len(decoded) == 3
    open_images(volumes, config, cache=tmp_path / "cache")
    assert len(decoded) == 3  # the line that follows the broken one counts


def test_problems_are_looked_at_again(volumes, tmp_path, decoded):
    np.save(volumes / "1.npy", np.zeros((12, 10, 9)))
    for _ in range(2):
        decoded.clear()
        with pytest.warns(UserWarning, match=r"1\.npy +constant"):
            assert len(open_images(volumes, CONFIG, cache=tmp_path / "cache")) == 2
        assert "1.npy" in decoded


def test_temporary_files_without_a_writer_are_removed(tmp_path):
    for name, age in (("old.volume.1.tmp", 7200), ("young.volume.2.tmp", 60)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(tmp_path)
    assert [file.name for file in tmp_path.glob("*.tmp")] == ["young.volume.2.tmp"]


def test_a_full_disk_is_not_mistaken_for_a_bad_image(volumes, tmp_path, monkeypatch, config):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        open_images(volumes, config, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_goes_missing_in_mid_run_is_made_again(volumes, tmp_path, config):
    images = open_images(volumes, config, cache=tmp_path / "cache")
    truth = contents(images)
    files = sorted((tmp_path / "cache").glob("*.volume"))
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:-100])
    np.testing.assert_array_equal(contents(images), truth)
    files[0].unlink()
    (volumes / "0.npy").unlink()
    failed = []
    for i in range(3):
        try:
            images.read(i)
        except ImageError as error:
            failed.append(str(error))
    assert len(failed) <= 1 and all(what == "no such file" for what in failed)


def test_what_would_run_code_in_a_cache_is_not_run(volumes, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    images = open_images(volumes, CONFIG, cache=tmp_path / "cache")
    truth = contents(images)
    for kind, path in zip(("array", "file", "index"), sorted((tmp_path / "cache").glob("*.volume")), strict=True):
        size = path.stat().st_size
        if kind == "array":
            np.save(tmp_path / "evil.npy", np.full(1, Evil()), allow_pickle=True)
            path.write_bytes((tmp_path / "evil.npy").read_bytes())
        else:
            path.write_bytes(pickle.dumps(Evil()))
        os.truncate(path, size)  # what the index says
    with (tmp_path / "cache/index.jsonl").open("ab") as file:
        file.write(pickle.dumps(Evil()) + b"\n")
    np.testing.assert_array_equal(contents(images), truth)
    np.testing.assert_array_equal(contents(open_images(volumes, CONFIG, cache=tmp_path / "cache")), truth)
    assert not (tmp_path / "ran").exists()


WRITER = """
import sys
from cover.config import DataConfig
from cover.data import open_images
print("ready", flush=True)
sys.stdin.readline()
config = DataConfig(crop=(8, 8, 8), store=sys.argv[2])
images = open_images(sys.argv[1], config, cache=sys.argv[3] if len(sys.argv) > 3 else None)
print(images.report.cache, flush=True)
"""


def start(*arguments):
    """A process that waits for a line before it opens the images: until then it has spent seconds on importing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, store, config):
    folder, cache = tmp_path / "volumes", tmp_path / "cache"
    folder.mkdir()
    for k in range(30):
        np.save(folder / f"{k}.npy", np.random.default_rng(k).random((60, 60, 60), dtype=np.float32))
    killed = start(folder, store, cache)
    go(killed)
    # in the midst of writing: after the first entry, at a moment that differs from run to run
    while not (cache / "index.jsonl").exists():
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    entries = len((cache / "index.jsonl").read_text().split())
    assert entries < 30, "the writer was done before it was killed"
    images = open_images(folder, config, cache=cache)
    clean = open_images(folder, CONFIG, cache=tmp_path / "clean")
    for i in range(30):
        np.testing.assert_array_equal(images.read(i), clean.read(i))


def test_processes_share_a_cache(volumes, tmp_path, config):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()

    def work():
        barrier.wait()
        results.put(contents(open_images(volumes, config, cache=tmp_path / "cache")))

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    outputs = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    truth = contents(open_images(volumes, config, cache=tmp_path / "cache"))
    for output in outputs:
        np.testing.assert_array_equal(output, truth)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_temporary_cache_goes_with_its_process(volumes, store):
    process = start(volumes, store)
    go(process)
    temporary = Path(process.communicate()[0].strip())
    assert process.returncode == 0
    assert temporary.name.startswith("cover-cache-") and not temporary.exists()

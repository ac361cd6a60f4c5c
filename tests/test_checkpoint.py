"""Checkpoints: all or nothing, harmless to read, and weights that come back as they were."""

import pickle
import resource
import shutil

import pytest
import torch
from tiny import SETTINGS, volumes

from cover import checkpoint, evaluate, load_backbone, load_model, pretrain
from cover.model import COVER
from cover.pyramid import VectorPyramid
from cover.unet import UNet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return pretrain(volumes(folder / "data"), out=folder / "run", **SETTINGS)


def test_a_save_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "step_00000001.pt"
    checkpoint.save(path, {"config": {}, "x": torch.ones(3)})
    before = path.read_bytes()

    def broken(content, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"config": {}, "x": torch.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_os_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file that would grow beyond it fails
    try:
        with pytest.raises(OSError, match=r"x\.pt|too large"):
            checkpoint.save(tmp_path / "x.pt", {"config": {}, "x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_was_saved_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = checkpoint.os.fsync, checkpoint.os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "x.pt", {"config": {}})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_checkpoint_holds_everything_and_loads_without_running_code(run):
    state = torch.load(checkpoint.find(run), weights_only=True)
    kept = {"version", "config", "step", "seen", "images", "held_out", "model", "optimiser", "scaler", "generators"}
    assert set(state) == kept
    assert state["step"] == SETTINGS["steps"]


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"config": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"checkpoint: .*evil\.pt is damaged or no checkpoint"):
        checkpoint.load(path)
    torch.save({"config": Evil()}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*evil\.pt is damaged or no checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "foreign"])
def test_a_damaged_file_is_named(run, tmp_path, damage):
    path = tmp_path / "bad.pt"
    whole = checkpoint.find(run).read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello", "foreign": b""}[damage])
    if damage == "foreign":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*bad\.pt"):
        checkpoint.load(path)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the folder holds no checkpoint"):
        load_model(tmp_path)


def test_old_checkpoints_and_half_written_ones_go(tmp_path):
    for step in (5, 10, 200):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"config": {}})
    (tmp_path / "checkpoints" / "step_00000201.pt.tmp").write_bytes(b"half")
    assert checkpoint.find(tmp_path) == checkpoint.path_of(tmp_path, 200)
    checkpoint.prune(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000010.pt", "step_00000200.pt"]


def test_every_so_many_steps_a_checkpoint_stays(tmp_path):
    for step in (100, 150, 200, 250, 300):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"config": {}})
        checkpoint.prune(tmp_path, 1, 100)
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(tmp_path)] == [100, 200, 300]


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    *_, before, last = checkpoint.all_of(copy)
    last.write_bytes(last.read_bytes()[:1000])
    expected = checkpoint.load(before)["model"]
    with pytest.warns(UserWarning, match=rf"{last.name} is damaged .* the checkpoint before it is taken"):
        torch.testing.assert_close(load_model(copy)[0].state_dict(), expected, rtol=0, atol=0)
    before.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{last.name} is damaged"):
        load_model(copy)


def test_model_and_backbone_come_back_from_run_checkpoint_and_backbone_file(run):
    model, config = load_model(run)
    assert config.data.crop == SETTINGS["crop"]
    assert not model.training
    expected = model.backbone.state_dict()
    for path in (run / "backbone.pt", run, checkpoint.find(run)):
        backbone = load_backbone(path)
        assert not backbone.training
        torch.testing.assert_close(backbone.state_dict(), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"backbone\.pt holds a backbone without the vector pyramid"):
        load_model(run / "backbone.pt")


def test_a_backbone_of_ones_own_comes_back(tmp_path):
    def build(config):
        """Two levels whose finest has twice the stride along the last axis."""
        backbone = UNet(3, 1, (4, 6), strides=[(2, 1, 2)])
        return COVER(backbone, VectorPyramid(backbone.channels, backbone.strides, 3, (1, 1), 4))

    data = volumes(tmp_path / "data")
    run = pretrain(data, out=tmp_path / "run", build=build, **SETTINGS)
    expected = load_model(run, build=build)[0].backbone.state_dict()
    for path in (run, run / "backbone.pt"):
        torch.testing.assert_close(load_backbone(path, build=build).state_dict(), expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"do not fit the model .* needs the `build` that made it"):
            load_backbone(path)
    assert evaluate(run, data, build=build, samples=2).voxels > 0

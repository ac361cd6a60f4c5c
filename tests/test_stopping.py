"""How a run stops, and goes on as if nothing had been: signals, disks, damaged files, numbers that are none."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from tiny import SETTINGS, Stopping, assert_same, steps, volumes, weights

from cover import checkpoint, log, pretrain
from cover.config import Config, replace
from cover.data import DataError, open_images
from cover.evaluation import held_out_batches
from cover.process import Interrupted, StopSignals
from cover.trainer import NonFiniteLoss, Trainer, WriteError


@pytest.fixture
def data(tmp_path):
    return volumes(tmp_path / "data")


def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(data, tmp_path):
    with pytest.raises(Interrupted, match="stopped after step 3; continue with --resume") as stopped:
        Stopping(replace(Config(), **SETTINGS), data, tmp_path / "part").run()
    assert stopped.value.signal == signal.SIGINT
    assert checkpoint.find(tmp_path / "part").name == "step_00000003.pt"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    part = pretrain(data, out=tmp_path / "part", resume=True)
    assert steps(part) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(part), weights(pretrain(data, out=tmp_path / "whole", **SETTINGS)))


def test_a_second_ctrl_c_acts_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_pre_emption_that_is_announced_twice_is_no_insistence():
    with StopSignals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_pre_emption_saves_within_a_step(data, tmp_path, number):
    class Preempted(Trainer):
        def train_step(self, batch):
            if self.step == 2:
                os.kill(os.getpid(), number)
            return super().train_step(batch)

    with pytest.raises(Interrupted) as stopped:
        Preempted(replace(Config(), **SETTINGS | dict(checkpoint_every=100)), data, tmp_path / "run").run()
    assert stopped.value.signal == number
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(tmp_path / "run")] == [3]


class Sabotaged(Trainer):
    """Meets a folder that can no longer be written, from its third step on."""

    def train_step(self, batch):
        if self.step == 2:
            self.sabotage()
        return super().train_step(batch)


def mount(*words):
    """Runs mount(8); skips the test where it may not."""
    if not shutil.which("mount") or subprocess.run(["mount", *words], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB."""
    (tmp_path / "disk").mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def assert_stops_and_goes_on(trainer, data, cause, repair):
    """The run stops with its cause, the checkpoint of step 2 is whole, nothing lies about, and it can go on."""
    said = rf"stopped after step \d: .*({cause}).*; the last good checkpoint is .*02\.pt"
    with pytest.raises(WriteError, match=said):
        trainer.run()
    repair()
    run = trainer.out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002.pt"]
    assert checkpoint.load(checkpoint.find(run))["step"] == 2
    pretrain(data, out=run, resume=True)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(run), weights(pretrain(data, out=data.parent / "whole", **SETTINGS)))


def test_a_full_disk_stops_the_run_and_names_the_way_back(data, disk):
    class Filling(Sabotaged):
        def sabotage(self):
            with contextlib.suppress(OSError), open(disk / "other", "wb") as file:
                file.write(bytes(2**20))

    trainer = Filling(replace(Config(), **SETTINGS), data, disk / "run")
    assert_stops_and_goes_on(trainer, data, "No space left on device", (disk / "other").unlink)


def test_a_file_that_may_not_grow_stops_the_run_and_names_the_way_back(data, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(Sabotaged):
        def sabotage(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    def repair():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        trainer = Limited(replace(Config(), **SETTINGS), data, tmp_path / "run")
        assert_stops_and_goes_on(trainer, data, "cannot be written|too large", repair)
    finally:
        repair()


def test_a_folder_that_becomes_read_only_stops_the_run_and_names_the_way_back(data, tmp_path):
    folder = tmp_path / "run" / "checkpoints"

    class ReadOnly(Sabotaged):
        def sabotage(self):
            folder.chmod(0o500)
            if os.geteuid() == 0:  # root writes all the same
                mount("--bind", folder, folder)
                mount("-o", "remount,bind,ro", folder)

    def repair():
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], capture_output=True)
        folder.chmod(0o700)

    trainer = ReadOnly(replace(Config(), **SETTINGS), data, tmp_path / "run")
    try:
        assert_stops_and_goes_on(trainer, data, "Permission denied|Read-only", repair)
    finally:
        repair()


def test_a_quota_that_is_met_when_the_disk_is_synced_stops_the_run(data, tmp_path, monkeypatch):
    fsync = os.fsync

    class Quota(Sabotaged):
        def sabotage(self):
            def full(descriptor):
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

            monkeypatch.setattr(os, "fsync", full)

    trainer = Quota(replace(Config(), **SETTINGS), data, tmp_path / "run")
    assert_stops_and_goes_on(trainer, data, "Disk quota exceeded", lambda: monkeypatch.setattr(os, "fsync", fsync))


def test_a_damaged_checkpoint_is_put_aside_and_the_run_goes_on_from_the_one_before(data, tmp_path):
    run = pretrain(data, out=tmp_path / "run", **SETTINGS)
    whole = weights(run)
    checkpoint.find(run).write_bytes(b"")
    pretrain(data, out=run, resume=True)
    assert_same(weights(run), whole)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    text = (run / "log.txt").read_text()
    assert "step_00000006.pt is damaged" in text and "resumed after step 4" in text
    assert (run / "checkpoints" / "step_00000006.damaged").exists()


def damage(images):
    """Of four images one vanishes, one is cut off and one is replaced by another, whole one."""
    (images / "volume0.npy").unlink()
    (images / "volume1.npy").write_bytes((images / "volume1.npy").read_bytes()[:200])
    shape = np.load(images / "volume2.npy").shape
    np.save(images / "volume2.npy", np.random.default_rng(9).random(shape, dtype=np.float32))


class Damaged(Trainer):
    """Loses three of its images in the second step."""

    lost_too = staticmethod(lambda: None)

    def train_step(self, batch):
        if self.step == 1:
            damage(self.damaged_images)
            self.lost_too()
        return super().train_step(batch)


REASONS = {
    "volume0.npy": "no such file",
    "volume1.npy": "cannot be read: ValueError",
    "volume2.npy": "was changed or replaced after the data set was opened",
}


def assert_all_are_named_and_counted(run):
    text = (run / "log.txt").read_text()
    for name, reason in REASONS.items():
        assert f"{name}: {reason}" in text
    replaced = [record["replaced"] for record in log.read(run, "train")]
    assert replaced[0] == 0 and sum(replaced) == text.count("warning: data: another image takes the place of") > 6


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_go_bad_in_mid_run_are_named_and_counted(tmp_path, workers):
    Damaged.damaged_images = volumes(tmp_path / "data", 4, shape=(20, 20))
    settings = SETTINGS | dict(crop=(12, 12), val_fraction=0.0, steps=16, workers=workers, checkpoint_every=16)
    Damaged(replace(Config(), **settings), tmp_path / "data", tmp_path / "run").run()
    assert_all_are_named_and_counted(tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_volumes_are_read_from_the_cache_whatever_becomes_of_their_files(tmp_path, workers):
    settings = SETTINGS | dict(val_fraction=0.0, workers=workers)
    Damaged.damaged_images = volumes(tmp_path / "data", 4)
    whole = pretrain(tmp_path / "data", out=tmp_path / "whole", **settings)
    Damaged(replace(Config(), **settings), tmp_path / "data", tmp_path / "run").run()
    assert_same(weights(tmp_path / "run"), weights(whole))
    assert not any(record["replaced"] for record in log.read(tmp_path / "run", "train"))


def test_volumes_that_go_bad_with_their_cache_are_named_and_counted(tmp_path):
    class DamagedToo(Damaged):
        damaged_images = volumes(tmp_path / "data", 4)

        def lost_too(self):
            shutil.rmtree(self.out / "cache")
            (self.out / "cache").mkdir()

    settings = SETTINGS | dict(val_fraction=0.0, steps=16, checkpoint_every=16)
    DamagedToo(replace(Config(), **settings), tmp_path / "data", tmp_path / "run").run()
    assert_all_are_named_and_counted(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_stopping_to_the_main_process(data, tmp_path, number):
    batches = Trainer(replace(Config(), **SETTINGS | dict(steps=12), workers=1), data, tmp_path / "run").batches()
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    assert len(list(batches)) == 11


def test_so_do_those_of_a_validation(data):
    config = replace(Config(), **SETTINGS, workers=1)
    batches = held_out_batches(open_images(data, config.data), config, (0, 0, 0), samples=12)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert sum(len(batch["index"]) for batch in batches) == 12 - config.train.batch


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_says_all(data, tmp_path, value):
    class Poisoned(Trainer):
        def loss(self, views):
            loss, metrics = super().loss(views)
            return (loss * value if self.step == 4 else loss), metrics

    trainer = Poisoned(replace(Config(), **SETTINGS | dict(batch=1)), data, tmp_path / "run")
    with pytest.raises(NonFiniteLoss) as failure:
        trainer.run()
    (index,) = next(trainer.batches())["index"].tolist()
    for part in ("step 5", str(value), trainer.images.name(index), "step_00000004.pt"):
        assert part in str(failure.value)
    assert str(failure.value) in (tmp_path / "run" / "log.txt").read_text()
    assert_same(trainer.model.state_dict(), weights(tmp_path / "run"))


def test_an_infinite_gradient_stops_the_run_too(data, tmp_path):
    class Poisoned(Trainer):
        def loss(self, views):
            loss, metrics = super().loss(views)
            # the square root has slope infinity at 0
            return loss + (next(self.model.parameters()).flatten()[0] * 0).abs().sqrt(), metrics

    trainer = Poisoned(replace(Config(), **SETTINGS), data, tmp_path / "run")
    with pytest.raises(NonFiniteLoss, match=r"step 1: .* gradient_norm nan"):
        trainer.run()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("variance", "error", "warnings"), [(0.001, 4.0, 1), (0.001, 2.0, 0), (0.5, 4.0, 0)])
def test_collapse_is_reported_once_and_learning_is_not_taken_for_it(data, tmp_path, variance, error, warnings):
    trainer = Trainer(replace(Config(), **SETTINGS), data, tmp_path / "run")
    trainer.begin()
    with trainer.log:
        for _ in range(200):
            trainer.watch_collapse({"feature_variance": variance, "epe": error, "epe_zero": 4.0})
    assert (tmp_path / "run" / "log.txt").read_text().count("warning: the features have collapsed") == warnings


def test_a_consistency_loss_alone_collapses_and_is_reported(data, tmp_path):
    settings = SETTINGS | dict(steps=80, lr=1e-2, vector_weight=0.0, val_fraction=0.0)
    run = pretrain(data, out=tmp_path / "run", **settings)
    assert "warning: the features have collapsed" in (run / "log.txt").read_text()


@pytest.mark.parametrize(("workers", "name"), [(0, 0), (2, 0), (0, 1), (0, 2), (2, 2)])
def test_a_file_that_goes_bad_where_that_is_fatal_is_one_clear_error(tmp_path, workers, name):
    images = volumes(tmp_path / "images", 3, shape=(20, 20))
    settings = SETTINGS | dict(crop=(12, 12), val_fraction=0.0, workers=workers, on_error="fail")
    chosen = f"volume{name}.npy"
    trainer = Trainer(replace(Config(), **settings), [images / chosen], tmp_path / "run")
    damage(images)
    expected = f"data: {images / chosen}: {REASONS[chosen]}"
    with pytest.raises(DataError, match=f"^{re.escape(expected)}"):
        trainer.run()
    assert f"stopped by DataError: {expected}" in (tmp_path / "run" / "log.txt").read_text()
    assert not multiprocessing.active_children()  # they ignore signals: nobody else would end them

"""A run: what it writes, how it stops and goes on, and that nothing but its settings and data decide its weights."""

import contextlib
import errno
import json
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
import torch
from tiny import SETTINGS, volumes
from torch.utils._pytree import tree_map

from cover import checkpoint, log, pretrain, sharding
from cover.config import Config, replace
from cover.data import DataError, open_images
from cover.evaluation import held_out_batches
from cover.log import RunInUse
from cover.model import COVER
from cover.process import Interrupted, StopSignals
from cover.pyramid import VectorPyramid
from cover.trainer import NonFiniteLoss, Trainer, WriteError


@pytest.fixture
def data(tmp_path):
    return volumes(tmp_path / "data")


def weights(run):
    return checkpoint.load(checkpoint.find(run))["model"]


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def steps(run, kind="train"):
    return [record["step"] for record in log.read(run, kind)]


# What a run does


def test_a_run_leaves_what_it_promises(data, tmp_path):
    run = pretrain(data, out=tmp_path / "run", **SETTINGS, val_fraction=0.4)
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "log.txt", "backbone.pt"}
    assert [path.name for path in checkpoint.all_of(run)] == ["step_00000004.pt", "step_00000006.pt"]
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert steps(run, "val") == [6]
    for record in log.read(run, "train"):
        assert record["loss"] == pytest.approx(record["vector_loss"] + record["consistency_loss"], rel=1e-5)
        assert 0 <= record["data_wait"] <= 1
        assert record["reachable_fraction"] > 0.8
        assert record["samples_per_second"] > 0
        assert record["peak_memory_mb"] > 10
    text = (run / "log.txt").read_text()
    assert "1 held out" in text and "0 problems" in text and f"MB in {run / 'cache'}" in text
    json.loads((run / "config.json").read_text())


def test_it_learns(tmp_path):
    settings = SETTINGS | dict(crop=(24, 24), window=5, batch=4, lr=1e-2, steps=60, val_fraction=0.0)
    shifts = dict(translation=0.12, rotation=0.0, scale=0.0, shear=0.0, nonrigid=0.0, appearance=0.0)
    run = pretrain(volumes(tmp_path / "data", shape=(48, 48)), out=tmp_path / "run", **settings, **shifts)
    last = log.read(run, "train")[-20:]
    # the EPE of a step varies with its transforms, its ratio to predicting zero hardly; 0.44 was seen
    assert sum(r["epe"] for r in last) < 0.6 * sum(r["epe_zero"] for r in last)


def test_equal_runs_are_equal_and_neither_workers_nor_validation_change_them(data, tmp_path):
    plain = pretrain(data, out=tmp_path / "plain", **SETTINGS, val_fraction=0.4)
    other = SETTINGS | dict(val_every=1, workers=2, checkpoint_every=1)
    assert_same(weights(pretrain(data, out=tmp_path / "other", **other, val_fraction=0.4)), weights(plain))
    third = pretrain(data, out=tmp_path / "third", **SETTINGS, val_fraction=0.4, seed=1)
    assert any((a != b).any() for a, b in zip(weights(third).values(), weights(plain).values(), strict=True))


def test_a_manifest_says_what_is_held_out(data, tmp_path):
    rows = ["image,split", "volume0.npy,train", "volume1.npy,val", "volume2.npy,test"]
    (data / "manifest.csv").write_text("\n".join(rows))
    trainer = Trainer(replace(Config(), **SETTINGS), data / "manifest.csv", tmp_path / "run")
    assert [trainer.images.name(i) for i in range(len(trainer.images))] == ["volume0.npy"]
    assert [trainer.held_out.name(i) for i in range(len(trainer.held_out))] == ["volume1.npy"]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_every_optimiser_moves_the_weights_and_resumes(data, tmp_path, optimiser):
    whole = pretrain(data, out=tmp_path / "whole", **SETTINGS, optimiser=optimiser)
    part = Stopping(replace(Config(), **SETTINGS, optimiser=optimiser), data, tmp_path / "part")
    with pytest.raises(Interrupted):
        part.run()
    assert_same(weights(pretrain(data, out=tmp_path / "part", resume=True)), weights(whole))


def test_the_schedule(data, tmp_path):
    trainer = Trainer(replace(Config(), **SETTINGS | dict(steps=100)), data, tmp_path / "run")
    rates = [trainer.learning_rate(step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top == 10 and rates[top] == trainer.config.train.lr
    assert 0 < rates[0] < 0.2 * rates[top] and 0 < rates[-1] < 0.01 * rates[top]
    for warmup in (0, 1):
        trainer.config = replace(trainer.config, warmup=warmup)
        assert all(0 < trainer.learning_rate(step) <= trainer.config.train.lr for step in range(100))
    trainer.config = replace(trainer.config, schedule="constant")
    assert {trainer.learning_rate(step) for step in range(100)} == {trainer.config.train.lr}


@pytest.mark.parametrize("settings", [dict(accumulate=2), dict(accumulate=4), dict(recompute="all")])
def test_what_saves_memory_changes_no_more_than_the_rounding(data, tmp_path, settings):
    plain = pretrain(data, out=tmp_path / "plain", **SETTINGS | dict(batch=4))
    other = pretrain(data, out=tmp_path / "other", **SETTINGS | dict(batch=4) | settings)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-3, atol=1e-4)
    for a, b in zip(log.read(other, "train"), log.read(plain, "train"), strict=True):
        for name in ("loss", "vector_loss", "consistency_loss", "epe", "epe_zero", "mask_fraction", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_recomputing_changes_no_bit(data, tmp_path):
    off, *others = (
        weights(pretrain(data, out=tmp_path / what, **SETTINGS, recompute=what)) for what in ("off", "norms", "stages")
    )
    for other in others:
        assert_same(other, off)


def test_a_state_lies_in_memory_as_its_parameter_does_whatever_was_saved(data, tmp_path):
    trainer = Trainer(replace(Config(), **SETTINGS, val_fraction=0.0), data, tmp_path / "run")
    trainer.run()
    state = trainer.optimiser.state_dict()
    contiguous = tree_map(lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, state)
    sharding.load(trainer.model, trainer.optimiser, trainer.model.state_dict(), contiguous)
    values = trainer.optimiser.state.items()
    # a fused optimiser walks through parameter and state side by side
    assert all(x.stride() == p.stride() for p, s in values for x in s.values() if x.dim())
    assert any(not p.is_contiguous() for p, _ in values)
    assert_same(trainer.optimiser.state_dict()["state"], state["state"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(data, tmp_path, precision):
    settings = SETTINGS | dict(precision=precision)
    whole = pretrain(data, out=tmp_path / "whole", **settings)
    plain = pretrain(data, out=tmp_path / "plain", **SETTINGS)
    for a, b in zip(log.read(whole, "train"), log.read(plain, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1) and a["loss"] != b["loss"]
    assert all(value.dtype == torch.float32 for value in weights(whole).values())
    with pytest.raises(Interrupted):
        Stopping(replace(Config(), **settings), data, tmp_path / "part").run()
    assert_same(weights(pretrain(data, out=tmp_path / "part", resume=True)), weights(whole))


@pytest.mark.parametrize(("able", "same_as"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_what_the_processor_computes_in(data, tmp_path, monkeypatch, able, same_as):
    monkeypatch.setattr("cover.learner.computes_in_bf16", lambda: able)
    runs = [pretrain(data, out=tmp_path / name, **SETTINGS, precision=name) for name in ("auto", same_as)]
    assert_same(*map(weights, runs))
    assert f", cpu, {same_as}, " in (tmp_path / "auto" / "log.txt").read_text()


def test_an_overflow_of_half_precision_skips_the_step_and_lowers_the_scale(data, tmp_path):
    class Overflowing(Trainer):
        def loss(self, views):
            loss, metrics = super().loss(views)
            return loss * (1e38 if self.step == 2 else 1), metrics

    trainer = Overflowing(replace(Config(), **SETTINGS, precision="fp16"), data, tmp_path / "run")
    trainer.run()
    assert [r["gradient_norm"] is None for r in log.read(tmp_path / "run", "train")] == [k == 2 for k in range(6)]
    assert trainer.scaler.get_scale() == 2.0**15


# How it stops


class Stopping(Trainer):
    """Gets Ctrl-C in its third step."""

    def train_step(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().train_step(batch)


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


# What it refuses


def test_a_run_is_never_overwritten(data, tmp_path):
    run = pretrain(data, out=tmp_path / "run", **SETTINGS)
    before = weights(run)
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        pretrain(data, out=run, **SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
            pretrain(data, out=tmp_path / "other", resume=resume, **SETTINGS)
    assert_same(weights(run), before)


def test_a_run_goes_on_with_its_own_settings_and_images_only(data, tmp_path):
    run = pretrain(data, out=tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match=r"has lr=0.001, it cannot go on with 0.5"):
        pretrain(data, out=run, resume=True, lr=0.5)
    with pytest.raises(ValueError, match=r"it cannot go on with"):
        pretrain(data, "small-3d", out=run, resume=True)
    with pytest.raises(ValueError, match="not the images that the run"):
        pretrain(volumes(tmp_path / "more", 4), out=run, resume=True)
    finished = weights(run)
    pretrain(data, out=run, resume=True, **SETTINGS | dict(keep=1, workers=1))
    assert_same(weights(run), finished)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "config.json").read_text())["train"]["keep"] == 1


def test_of_two_runs_that_start_at_once_the_second_is_refused_and_changes_nothing(data, tmp_path):
    first, second = (Trainer(replace(Config(), **SETTINGS, seed=i), data, tmp_path / "run") for i in range(2))
    first.run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunInUse, match="another process has been at work"):
        second.run()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_is_not_of_these_settings_and_held_out_images_is_refused(data, tmp_path):
    val = volumes(tmp_path / "val", 2, seed=1)
    run = pretrain(data, out=tmp_path / "run", val=val, **SETTINGS)
    with pytest.raises(ValueError, match=r"not the images that the run .* was evaluated on"):
        pretrain(data, out=run, resume=True, val=volumes(tmp_path / "other", 3, seed=2))
    stored = (run / "config.json").read_text()
    (run / "config.json").write_text(stored.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"the last checkpoint in .* has seed=0, its config\.json 1"):
        pretrain(data, out=run, resume=True, val=val)
    (run / "config.json").write_text(stored)
    last = checkpoint.find(run)
    last.write_bytes((run / "backbone.pt").read_bytes())
    with pytest.raises(ValueError, match=rf"{last.name} is no checkpoint of a run, but a backbone"):
        pretrain(data, out=run, resume=True, val=val)


def test_views_that_never_match_are_reported(data, tmp_path):
    run = pretrain(data, out=tmp_path / "run", **SETTINGS | dict(crop=(1, 1, 1), heads=(1,), channels=(4,)))
    assert (run / "log.txt").read_text().count("nothing is learned from such a batch") == 1


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


def test_a_backbone_whose_finest_map_is_coarser_than_the_image_trains(data, tmp_path):
    def build(config):
        class Coarse(torch.nn.Module):
            """Two maps, of a half and a quarter of the resolution."""

            channels, strides = (6, 4), ((4, 4, 4), (2, 2, 2))

            def __init__(self):
                super().__init__()
                self.fine, self.coarse = torch.nn.Conv3d(1, 4, 2, 2), torch.nn.Conv3d(4, 6, 2, 2)

            def forward(self, x):
                fine = self.fine(x)
                return [self.coarse(fine), fine]

        backbone = Coarse()
        return COVER(backbone, VectorPyramid(backbone.channels, backbone.strides, 3, (1, 1), 4))

    settings = SETTINGS | dict(crop=(13, 12, 8), val_fraction=0.4)  # 13 is padded to 16
    run = pretrain(data, out=tmp_path / "run", build=build, **settings)
    record = log.read(run, "train")[-1]
    assert 0 < record["consistency_loss"] < 2 and record["epe"] > 0
    with pytest.raises(ValueError, match="`recompute` needs a backbone that has it; Coarse has not"):
        pretrain(data, out=tmp_path / "other", build=build, **settings, recompute="stages")


def test_bad_data_leave_no_run_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        pretrain(tmp_path / "nowhere", out=tmp_path / "run", **SETTINGS)
    pretrain(volumes(tmp_path / "data"), out=tmp_path / "run", **SETTINGS)

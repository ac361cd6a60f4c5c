"""Several processes that train one model: real ones, over gloo, as `cover pretrain --nproc` and torchrun start them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import SETTINGS, as_words, volumes
from torch.utils._pytree import tree_map

from cover import checkpoint, load_backbone, log
from cover.data import BatchSampler

# float32: what another order of sums may change is then small
RUN = SETTINGS | dict(steps=20, checkpoint_every=5, keep=9, log_every=5, val_fraction=0.3, precision="fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return volumes(tmp_path_factory.mktemp("data"), 7)


def start(data, run, *options, starter=("-m", "cover"), **settings):
    words = as_words({**RUN, **settings}) if "--resume" not in options else []
    command = [sys.executable, *starter, "pretrain", data, "--out", run, *options, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, expected=0):
    output = process.communicate(timeout=500)[0].decode()
    assert process.returncode == expected, output
    return output


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """A run of two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    output = finish(start(data, run, "--nproc", 2))
    assert "process 1 of 2, with 1 threads" in output
    return run


@pytest.fixture(scope="module")
def shares(data, tmp_path_factory):
    """The same run with shares instead of replicas."""
    run = tmp_path_factory.mktemp("shares") / "run"
    finish(start(data, run, "--nproc", 2, shard=True, recompute="norms"))
    return run


# differ with the machine's load, or (feature_variance, a deviation within each part of the batch) with the parts
DIFFER = {"kind", "data_wait", "samples_per_second", "peak_memory_mb", "gradient_norm", "feature_variance"}


def assert_close(run, other):
    weights = [checkpoint.load(checkpoint.find(r))["model"] for r in (run, other)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    for kind in ("train", "val"):
        for a, b in zip(log.read(run, kind), log.read(other, kind), strict=True):
            for name in a.keys() - DIFFER:
                assert a[name] == pytest.approx(b[name], rel=1e-2, abs=2e-3), name


def test_two_processes_train_like_one_with_twice_the_batch(data, tmp_path):
    # SGD, since Adam divides a gradient that is all rounding by its own size
    finish(start(data, tmp_path / "two", "--nproc", 2, optimiser="sgd"))
    finish(start(data, tmp_path / "one", batch=2 * RUN["batch"], optimiser="sgd"))
    assert_close(tmp_path / "two", tmp_path / "one")


def test_shares_train_like_replicas_and_go_on_from_them(data, tmp_path):
    # by SGD: convolutions with channels first round otherwise, and Adam makes steps of any gradient, however small
    replicas, shares = tmp_path / "replicas", tmp_path / "shares"
    for run in (replicas, shares):
        finish(start(data, run, "--nproc", 2, shard=run == shares, optimiser="sgd"))
    resumed = shutil.copytree(replicas, tmp_path / "resumed")
    for path in checkpoint.all_of(resumed)[1:]:
        path.unlink()
    assert "resumed after step 5" in finish(start(data, resumed, "--resume", "--nproc", 2, "shard=true"))
    for run in (shares, resumed):
        assert_close(run, replicas)
        norms = [[record["gradient_norm"] for record in log.read(r, "train")] for r in (run, replicas)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        backbones = [load_backbone(r / "backbone.pt").state_dict() for r in (run, replicas)]
        torch.testing.assert_close(*backbones, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_shares_is_that_of_replicas(two, shares):
    whole, of_replicas = (checkpoint.load(checkpoint.find(run)) for run in (shares, two))
    for state in ("model", "optimiser"):
        assert layout(whole[state]) == layout(of_replicas[state])


def layout(state):
    """The state with the shapes of its tensors in their places."""
    return tree_map(lambda x: (type(x), list(x.shape)) if isinstance(x, torch.Tensor) else x, state)


@pytest.mark.parametrize("nproc", [1, 3])
@pytest.mark.parametrize("which", ["two", "shares"])
def test_a_run_of_two_processes_goes_on_with_any_number(data, which, tmp_path, nproc, request):
    run = shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    for path in checkpoint.all_of(run)[1:]:
        path.unlink()
    output = finish(start(data, run, "--resume", *(["--nproc", nproc] if nproc > 1 else [])))
    assert "resumed after step 5" in output
    assert [record["step"] for record in log.read(run, "train")] == list(range(1, 21))
    state = checkpoint.load(checkpoint.find(run))
    assert state["seen"] == RUN["batch"] * (5 * 2 + 15 * nproc)


def rank_of(process, run):
    """The rank of the process with this folder in /proc, None where it does not train in `run`."""
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return None
    ranks = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
    return ranks[0] if ranks and str(run).encode() in command else None


def test_a_killed_process_makes_torchrun_go_on_from_the_last_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "cover")
    job = start(data, run, starter=torchrun, steps=60, checkpoint_every=5)
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline and len(checkpoint.all_of(run)) < 2:
        time.sleep(0.05)
    (victim,) = [path for path in Path("/proc").glob("[0-9]*") if rank_of(path, run) == 1]
    os.kill(int(victim.name), signal.SIGKILL)
    output = finish(job)
    assert "resumed after step" in output
    assert [record["step"] for record in log.read(run, "train")] == list(range(1, 61))
    assert [record["step"] for record in log.read(run, "val")] == [60]
    state = checkpoint.load(checkpoint.find(run))
    assert (state["step"], state["seen"]) == (60, 60 * 2 * RUN["batch"])
    # one process writes: it has begun twice
    assert (run / "log.txt").read_text().count("process 1 of 2") == 2 and "process 2 of 2" not in output


def test_a_pre_emption_of_the_launcher_saves_all_processes_in_one_step(data, tmp_path):
    run = tmp_path / "run"
    job = start(data, run, "--nproc", 2, steps=100_000, checkpoint_every=100_000)
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline and not has_records(run, 3):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output = finish(job, 128 + signal.SIGUSR1)
    (last,) = checkpoint.all_of(run)
    step = checkpoint.step_of(last)
    assert f"stopped after step {step}; saved, to be resumed" in output
    assert [record["step"] for record in log.read(run, "train")] == list(range(1, step + 1))


def has_records(run, count):
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count


def test_accumulation_reduces_the_gradient_once_a_step(data, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, Path(__file__).with_name("reductions.py"), data, tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    counts = json.loads(finish(job).splitlines()[-1])
    # the small network's gradient is one bucket; beside it the voxels of the mask, and all metrics together
    assert counts == {"1": [[1, 2]] * 3, "4": [[1, 2]] * 3}


def test_processes_share_an_epoch_without_repeats():
    keys = [list(BatchSampler(12, 2, 0, steps=2, rank=rank, ranks=3)) for rank in range(3)]
    assert sorted(key for batches in keys for batch in batches for key in batch) == [(0, i) for i in range(12)]
    # what three processes do in one step, one process with three times the batch does
    together = list(BatchSampler(12, 6, 0, steps=2))
    assert [[*a, *b, *c] for a, b, c in zip(*keys, strict=True)] == together


def test_bad_settings_are_named_once_before_any_process_starts(data, tmp_path):
    output = finish(start(data, tmp_path / "run", "--nproc", 2, batch=0), 2)
    assert output.strip() == "cover pretrain: error: config: `batch` must be at least 1, got 0"
    assert "expected a number above 0, got '0'" in finish(start(data, tmp_path / "run", "--nproc", 0), 2)

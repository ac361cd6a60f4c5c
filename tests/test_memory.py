"""The memory of a step: predicted without running it, compared with what it then takes, refused where it is too much.

Also that a step never waits for the device: it is rehearsed on tensors that have no values to wait for.
"""

import json
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from math import prod
from pathlib import Path

import pytest
import torch
from tiny import SETTINGS, volumes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cover
from cover import memory, trainer
from cover.cli import main
from cover.config import Config, replace
from cover.memory import DoesNotFit, Rehearsal, Tally, predict, read_size

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "memory.py"
PLANNED = SETTINGS | dict(crop=(48, 32, 32), control_spacing=16.0, check_memory=True)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The process takes the same before every prediction, whatever the tests before it have left."""
    monkeypatch.setattr(memory, "taken", lambda device: 2**28)


def need(**settings):
    """Bytes of a step beyond what the process takes before."""
    return sum(Rehearsal(replace(Config(), **PLANNED | settings)).peak()[0].values())


@pytest.mark.parametrize("run", ["batch=16 accumulate=4 precision=bf16", "batch=8"])
def test_what_is_predicted_is_what_is_taken(run):
    command = [sys.executable, BENCHMARK, f"small-2d crop=256,256 resize=none {run}", "--inside", "--steps=2"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    predicted, measured, _ = json.loads(output.splitlines()[-1])
    assert predicted == pytest.approx(measured, rel=0.15)
    assert measured > 800 * 2**20  # twice what the libraries take


def test_a_peak_is_not_that_of_the_process_that_started_it():
    child = "import torch; from cover.process import peak_memory; print(peak_memory(torch.device('cpu')))"
    large = "import subprocess, sys; bytearray(2**31); subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    output = subprocess.run([sys.executable, "-c", large, child], check=True, stdout=subprocess.PIPE).stdout
    assert 2**26 < int(output) < 2**30


def test_the_tally_counts_what_lives():
    tally = Tally()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.empty(1000), torch.empty(1000, requires_grad=True)
        tally.add([x, weight], "given")
        with tally:
            # a product keeps its factors, exp its result
            (x * weight).exp().sum().backward()
    assert tally.parts["given"] == 8000
    # product and exp, or later exp and the gradient of the product, beside the sum and its gradient, one number each
    assert sum(tally.now.values()) == 8000 + 4000  # and the weight's gradient
    assert tally.parts["activations"] == pytest.approx(8000, abs=8)
    assert tally.parts["holes in the heap"] == pytest.approx(0.6 * 16000, rel=1e-2)


def test_what_saves_memory_needs_less():
    whole = need(batch=4)
    stages = need(batch=4, recompute="stages")
    assert need(batch=4, recompute="all") < stages < whole
    assert need(batch=4, accumulate=4) < 0.5 * whole
    assert need(batch=4, precision="bf16") < 0.9 * whole
    weights = sum(p.numel() for p in Rehearsal(replace(Config(), **PLANNED)).model.parameters()) * 4
    sgd, adam = (predict(replace(Config(), **PLANNED, optimiser=name)).parts for name in ("sgd", "adam"))
    assert sgd["parameters"] == adam["parameters"] == weights
    assert sgd["optimiser's state"] == weights
    assert adam["optimiser's state"] == pytest.approx(2 * weights, rel=0.01)


@pytest.mark.parametrize("crop", [(24, 16, 16), (40, 64)])
def test_the_largest_crop_fits_and_the_next_one_does_not(crop):
    settings = replace(Config(), **PLANNED | dict(crop=crop))
    limit = sum(memory.before(settings).values()) + 3 * need(crop=crop)
    plan = cover.plan(memory=limit, **PLANNED | dict(crop=crop))
    assert (
        plan.fits
        and plan.memory == limit
        and f"the largest crop that fits is {'x'.join(map(str, plan.crop))}" in str(plan)
    )
    assert predict(replace(settings, crop=plan.crop)).peak <= limit
    # the coarsest stride is 2, and the longest axis the finest step
    larger = [round(n * (max(plan.crop) + 2) / max(crop) / 2) * 2 for n in crop]
    assert predict(replace(settings, crop=larger)).peak > limit
    assert all(abs(n / max(plan.crop) * max(crop) - wanted) <= 2 for n, wanted in zip(plan.crop, crop, strict=True))
    assert prod(plan.crop) > prod(crop)


def test_a_setting_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    data = volumes(tmp_path / "data", shape=(40, 40, 40))
    there = predict(replace(Config(), **PLANNED)).peak - 2**20
    monkeypatch.setattr(memory, "available", lambda device: there)
    with pytest.raises(
        DoesNotFit, match=r"crop 48x32x32 needs [\d.]+ GiB, there are [\d.]+ GiB; the largest crop that fits"
    ):
        cover.pretrain(data, out=tmp_path / "run", **PLANNED)
    assert not (tmp_path / "run").exists()
    cover.pretrain(data, out=tmp_path / "run", **PLANNED | dict(check_memory=False, steps=1))
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    words = ["pretrain", str(data), "--out", str(tmp_path / "other"), "crop=8,8,8", "channels=4,8", "heads=1"]
    assert main(words) == 2


# new pages of tensors that are made and freed again, within the block and after it
KEEPS = """
import resource, sys, torch
from cover.process import keeping_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed_memory(sys.argv[1] == "True"):
    for _ in range(8):  # until the heap has room between what it holds on to
        inside = new_pages()
print(inside, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.parametrize(
    ("wanted", "settings", "keeps"),
    [(True, {}, True), (False, {}, False), (True, {"MALLOC_MMAP_THRESHOLD_": "2097152"}, False)],
)
def test_freed_memory_stays_where_it_is_wanted_and_nobody_else_has_set_it(wanted, settings, keeps):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", KEEPS, str(wanted)]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
    inside, after = map(int, done.stdout.split())
    few = 3 * 2**26 // 2**21  # 64 MiB three times, should all of it be in pages of 2 MiB
    assert (inside < few // 2) == keeps and after >= few


@pytest.mark.parametrize(
    ("share", "settings", "keeps"), [(2.1, {}, True), (1.9, {}, False), (9, {"check_memory": False}, False)]
)
def test_a_run_keeps_what_it_frees_where_twice_as_much_is_there_as_it_needs(
    tmp_path, monkeypatch, share, settings, keeps
):
    asked = []
    there = int(share * predict(replace(Config(), **PLANNED)).peak)
    monkeypatch.setattr(memory, "available", lambda device: there)
    monkeypatch.setattr(trainer, "keeping_freed_memory", lambda wanted: asked.append(wanted) or nullcontext())
    data = volumes(tmp_path / "data", shape=(40, 40, 40))
    cover.pretrain(data, out=tmp_path / "run", **PLANNED | dict(steps=1) | settings)
    assert asked == [keeps]


def test_a_backbone_that_cannot_be_rehearsed_is_trained_with_a_warning(tmp_path):
    def build(config):
        model = memory.build_model(config)
        forward = model.forward
        model.forward = lambda a, b: forward(a, b * float(b.detach().abs().max() > 0))  # wants a value
        return model

    with pytest.warns(UserWarning, match="memory of a step cannot be predicted"):
        cover.pretrain(
            volumes(tmp_path / "data"), out=tmp_path / "run", build=build, **SETTINGS | dict(check_memory=True)
        )


def test_a_step_beyond_all_numbers_is_refused():
    with pytest.raises(ValueError, match=r"more than 2\^63 bytes"):
        cover.plan("small-3d", batch=10**12)


def test_the_command_prints_the_table(capsys):
    words = ["plan", "--preset", "small-3d", "crop=16,16,16", "batch=1"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("parameters", "activations", "peak, in"))
    assert main([*words, "--memory", "1MiB"]) == 1
    assert "no crop fits" in capsys.readouterr().out
    assert main([*words, "--memory", "much"]) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("800MB", 800e6), ("6e9", 6e9), (5, 5), ("1.5 TiB", 1.5 * 2**40)]
)
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "1iB2", "-3", "1e400", "1e308GiB"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ValueError, match="`memory` must be a size"):
        read_size(text)


@pytest.mark.parametrize(
    "files",
    [
        {
            "/proc/self/cgroup": "0::/job/step\n",
            "/sys/fs/cgroup/job/memory.max": "3000\n",
            "/sys/fs/cgroup/job/memory.current": "1000\n",
            "/sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 300\n",
            "/sys/fs/cgroup/job/step/memory.max": "max\n",
        },
        {
            "/proc/self/cgroup": "4:memory:/job\n3:cpu:/job\n",
            "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000\n",
            "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            "/sys/fs/cgroup/memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 300\n",
        },
    ],
)
def test_a_control_group_limits_what_there_is(files, monkeypatch):
    monkeypatch.setattr(memory, "_read", lambda path: files.get(str(path), ""))
    assert memory._free_of_the_groups() == [2300]


# What makes the host wait for a GPU: values that it reads, shapes that depend on them, and what it copies there
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal", "is_nonzero"),
    *("lift_fresh", "repeat_interleave", "bincount"),
}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        assert name not in WAITS and not by_mask, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(batch=4, accumulate=2, recompute="all", precision="bf16", optimiser="sgd"),
        dict(precision="fp16", crop=(13, 12, 9), norm="group"),
        dict(crop=(13, 16), mask_outside=True, clip=0.0, views="a"),
    ],
)
def test_no_operator_of_a_step_waits_for_the_device(settings):
    rehearsal = Rehearsal(replace(Config(), **SETTINGS | settings))
    rehearsal.tally = Tally()
    with rehearsal.nowhere, NoWaiting():
        metrics = rehearsal.gradients(rehearsal.batch(rehearsal.config.train.batch))
        rehearsal.update()
    assert all(value.dim() == 0 for value in metrics.values())

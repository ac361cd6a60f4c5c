"""SIGKILL at any moment: a run that is killed again and again ends as the one that never was.

    pytest test_survival.py                short: 10 kills
    pytest test_survival.py --kills 200    as many as asked for

Some kills come at a random moment of a process's life. The others are aimed: the killer watches for the file that is
being written, and what the kill leaves half-written shows whether it came in time.
"""

import json
import multiprocessing
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
import survival
import torch
from tiny import SETTINGS, volumes

from cover import checkpoint, load_backbone
from cover.data.cache import Cache

RUN = SETTINGS | dict(steps=24, checkpoint_every=3, val_every=4, val_fraction=0.4, keep=2, keep_every=9)
KILLS_OF_A_RUN = 10
AIMS = ("volume", "record", "checkpoint", "anywhere")  # volumes are written before the first step, and once
MEASURED = {"data_wait", "samples_per_second", "peak_memory_mb"}  # of the machine, not of the run


@pytest.fixture(scope="module")
def processes():
    """Makes processes that start in no time: forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cover.cli", "survival"])
    return context


def finish(processes, *arguments):
    process = processes.Process(target=survival.train, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def kill(processes, arguments, aim, moment):
    """Start or resume a run and kill it, `moment` seconds after it began to write its aim, or after its start.

    Returns whether it was killed, and whether it left half of its aim.
    """
    run = arguments[1]
    before = survival.half_written(run, aim)
    process = processes.Process(target=survival.train, args=arguments)
    process.start()
    try:
        if aim == "anywhere":
            process.join(moment)
        else:
            while process.is_alive() and not survival.half_written(run, aim) - before:
                time.sleep(survival.PAUSE / 10)
            time.sleep(moment)
    finally:
        process.kill()
        process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0, bool(survival.half_written(run, aim) - before)


def records(run):
    """What the whole lines of the metrics say about the run, in order."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in found]


def assert_nothing_is_half_written_or_lost(run, whole):
    """What must hold of a run's folder at every moment."""
    if (run / "config.json").exists():
        json.loads((run / "config.json").read_text())
    known = records(whole)
    told = records(run)
    assert told == known[: len(told)]
    for path in checkpoint.all_of(run):
        state = checkpoint.load(path)
        assert [r["step"] for r in told if r["kind"] == "train"][: state["step"]] == list(range(1, state["step"] + 1))
    if (run / "backbone.pt").exists():
        checkpoint.load(run / "backbone.pt")
    for entry in Cache(run / "cache")._entries.values():
        for name, size in entry.sizes.items():
            assert (run / "cache" / name).stat().st_size == size
            np.load(run / "cache" / name)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, processes, request, capsys):
    wanted, moments = request.config.getoption("kills"), random.Random(0)
    data, whole = volumes(tmp_path / "data", 5), tmp_path / "whole"
    began = time.monotonic()
    finish(processes, data, whole, RUN, False)
    life = time.monotonic() - began
    expected = checkpoint.load(checkpoint.find(whole))["model"]
    landed, kills, runs = Counter(), 0, 0
    while kills < wanted:
        run, runs = tmp_path / f"run{runs}", runs + 1
        arguments = data, run, RUN | dict(workers=runs % 2)
        for i in range(min(KILLS_OF_A_RUN, wanted - kills)):
            aim = AIMS[i] if i < len(AIMS) else moments.choice(AIMS[1:])
            moment = moments.uniform(0, life / 2 if aim == "anywhere" else survival.PAUSE / 2)
            killed, there = kill(processes, arguments, aim, moment)
            kills += killed
            landed.update([aim] * there)
            assert_nothing_is_half_written_or_lost(run, whole)
            if not killed:  # it was faster, and is done
                break
        finish(processes, *arguments, False)
        torch.testing.assert_close(checkpoint.load(checkpoint.find(run))["model"], expected, rtol=0, atol=0)
        backbones = [load_backbone(path).state_dict() for path in (run / "backbone.pt", whole)]
        torch.testing.assert_close(*backbones, rtol=0, atol=0)
        assert records(run) == records(whole)
        assert [path.name for path in checkpoint.all_of(run)] == [path.name for path in checkpoint.all_of(whole)]
        assert not survival.half_written(run, "checkpoint") and not survival.half_written(run, "record")
        for line in (run / "log.txt").read_text().splitlines():
            assert line.count("resumed after") + line.count("kernels, torch") <= 1, line
    with capsys.disabled():
        print(f"\n{kills} kills in {runs} runs, of which left half of one: {dict(landed)}")
    assert all(landed[aim] for aim in ("volume", "record", "checkpoint"))

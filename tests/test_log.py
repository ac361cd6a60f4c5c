"""What a run tells: nothing doubled or lost in the metrics, a bar on terminals only."""

import io
import json
import os
import subprocess
import sys

import pytest
from tiny import SETTINGS, volumes

from cover import log, pretrain
from cover.log import RunLog, read


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(out, first, last, stream=None, **options):
    with RunLog(out, log.lock(out), first, 10, 2, stream=stream or io.StringIO(), **options) as run:
        for step in range(first + 1, last + 1):
            run.record("train", step, {"loss": 1.0 / step})
            run.progress(step, {"loss": 1.0 / step})
            if step % 3 == 0:
                run.record("val", step, {"epe_mean": 2.0})


def test_records_beyond_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path):
    write(tmp_path, 0, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    write(tmp_path, 5, 10)
    assert [record["step"] for record in log.read(tmp_path, "train")] == list(range(1, 11))
    assert [record["step"] for record in log.read(tmp_path, "val")] == [3, 6, 9]


def test_what_a_crashed_file_system_left_in_place_of_records_is_cut_off(tmp_path):
    write(tmp_path, 0, 4)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(bytes(40) + b'"loss": 1.0}\n{}\n')
    write(tmp_path, 4, 6)
    assert [record["step"] for record in log.read(tmp_path, "train")] == list(range(1, 7))


def test_a_record_cut_at_any_byte_is_dropped_and_the_ones_before_it_stay(tmp_path):
    write(tmp_path, 0, 4)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:size])
        log.truncate(tmp_path / "metrics.jsonl", 10)
        left = (tmp_path / "metrics.jsonl").read_bytes()
        assert left == b"".join(line for i, line in enumerate(lines) if len(b"".join(lines[: i + 1])) <= size)


def test_a_damaged_line_takes_no_other_with_it(tmp_path):
    write(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[0], lines[3] = b"garbage\n", b"[]\n"  # step 1, and the validation after step 3
    path.write_bytes(b"".join(lines) + b'{"step": "7"}\n')
    write(tmp_path, 5, 6)
    assert [record["step"] for record in log.read(tmp_path, "train")] == [2, 3, 4, 5, 6]
    assert "2 damaged lines of metrics.jsonl are left out" in (tmp_path / "log.txt").read_text()


def test_why_a_run_ended_is_in_its_log(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, log.lock(tmp_path), 0, 5, 1, stream=io.StringIO()):
        raise RuntimeError("out of luck")
    assert "stopped by RuntimeError: out of luck" in (tmp_path / "log.txt").read_text()


def test_nan_and_infinity_are_written_as_json_knows_it(tmp_path):
    with RunLog(tmp_path, log.lock(tmp_path), 0, 1, 1, stream=io.StringIO()) as run:
        run.record("train", 1, {"epe": float("nan"), "loss": float("inf")})
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record["epe"] is None and record["loss"] is None


def test_plain_lines_in_a_file_and_a_bar_on_a_terminal(tmp_path):
    plain, terminal = io.StringIO(), Terminal()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", 0, 10, plain)
    write(tmp_path / "b", 0, 10, terminal)
    assert [line.split()[1] for line in plain.getvalue().splitlines()] == ["2/10", "4/10", "6/10", "8/10", "10/10"]
    assert "\r" not in plain.getvalue()
    assert terminal.getvalue().count("\r") == 10
    assert "[############............] step 5/10" in terminal.getvalue()
    # the log file is the same
    texts = [(tmp_path / name / "log.txt").read_text().splitlines() for name in "ab"]
    assert len(texts[0]) == len(texts[1]) == 5


def test_tensorboard_is_written_when_asked_for(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, 4, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
        (4, 0.25),
    ]
    assert [event.step for event in events.Scalars("val/epe_mean")] == [3]


def test_tensorboard_names_its_extra_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'cover-vcl\[tensorboard\]'"):
        RunLog(tmp_path, log.lock(tmp_path), 0, 1, 1, tensorboard=True)


def test_a_run_on_files_whose_names_are_not_utf8_is_logged_and_saved(tmp_path):
    data = volumes(tmp_path / "data")
    (data / "volume0.npy").rename(os.fsdecode(os.fsencode(data) + b"/volume\xff.npy"))
    run = pretrain(data, out=tmp_path / "run", **SETTINGS)
    with RunLog(run, log.lock(run), 6, 10, 2, stream=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as messages:
        messages.message("volume\udcff.npy is bad")
    assert "volume\ufffd.npy is bad" in (run / "log.txt").read_text(encoding="utf-8")


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    script = "import sys, pathlib; from cover.log import lock; lock(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with RunLog(tmp_path, log.lock(tmp_path), 0, 5, 1) as first:
        first.record("train", 1, {"loss": 1.0})
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode != 0 and "RunInUse" in second.stderr and str(tmp_path) in second.stderr
    assert len(read(tmp_path, "train")) == 1  # the second one has cut nothing
    assert subprocess.run(command).returncode == 0  # free again

"""The command line: the same names as the functions, one line for the user's mistakes, codes for scripts."""

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import SETTINGS, as_words, volumes

import cover
from cover import checkpoint, evaluate
from cover.cli import main
from cover.config import Config, flatten, from_dict, replace
from cover.presets import PRESETS, preset_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return volumes(tmp_path_factory.mktemp("cli") / "data")


@pytest.fixture(scope="module")
def run(data):
    out = data.parent / "run"
    assert main(["pretrain", str(data), "--out", str(out), "--preset", "small-3d", *as_words(SETTINGS)]) == 0
    return out


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "visualize", "plan", "check"])
def test_every_command_is_a_function_of_the_package(command):
    assert inspect.isfunction(getattr(cover, command))
    assert importlib.util.find_spec(f"cover.{command}") is None  # a module of that name would take its place


def test_pretrain_applies_preset_and_settings(run):
    settings = flatten(from_dict(checkpoint.load(checkpoint.find(run))["config"]))
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert settings["nonrigid"] == PRESETS["small-3d"][1]["nonrigid"]


def test_evaluate_prints_the_table(run, data, capsys):
    assert main(["evaluate", str(run), str(data), "--samples", "3", "seed=1"]) == 0
    assert capsys.readouterr().out == f"{evaluate(run, data, samples=3, seed=1)}\n"


def test_check_reports_and_fails_where_there_are_problems(data, tmp_path, capsys):
    assert main(["check", str(data), "--preset", "small-3d"]) == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.npy").write_bytes(b"nothing")
    assert main(["check", str(tmp_path / "bad"), "crop=8,8,8"]) == 1
    assert "broken.npy" in capsys.readouterr().out


def test_presets_are_listed_and_shown(capsys):
    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)
    assert main(["presets", "paper-2d", "batch=3"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"window=7", "lr=0.0001", "batch=3", "spacing=none", "crop=384,384"} <= lines.keys()
    assert lines["clip=1.0"].endswith("  # largest gradient norm; 0: no clipping")


@pytest.mark.parametrize("name", PRESETS)
def test_what_presets_shows_can_be_given_as_settings(capsys, name):
    assert main(["presets", name]) == 0
    settings = dict(line.split()[0].split("=") for line in capsys.readouterr().out.splitlines())
    assert replace(Config(), **settings) == preset_config(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain {data}/nowhere --out {new}", "no file or folder"),
        ("pretrain {data} --out {run}", "holds a run"),
        ("pretrain {data} --out {new} --preset smal-3d", "did you mean 'small-3d'"),
        ("pretrain {data} --out {new} lrr=1", "did you mean 'lr'"),
        ("pretrain {data} --out {new} lr=fast", "`lr` must be a number, got 'fast'"),
        ("pretrain {data} --out {new} lr=1 lr=2", "'lr' is given twice"),
        ("pretrain {data} --out {new} --fast", "expected settings as key=value, got '--fast'"),
        ("pretrain {data} --out {new} more", "expected settings as key=value, got 'more'"),
        ("pretrain {data} --out {new} device=abacus crop=8,8,8", "`device` 'abacus'"),
        ("pretrain {data} --out {data}/volume0.npy", "is a file"),
        ("evaluate {data} {data}", "the folder holds no checkpoint"),
        ("evaluate {run} {data} --split test", "no split 'test'"),
        ("evaluate {run} {data} --samples 0", "`samples` must be at least 1"),
        ("evaluate {run} {data} window=5", "settings of the trained network"),
        ("visualize {new} {data}", "no such file or folder"),
        ("visualize {run} {data}/volume0.npy window=5", "settings of the trained network"),
        ("presets papers", "no preset 'papers'"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_code_2(run, data, tmp_path, capsys, words, message):
    new = tmp_path / "new"
    assert main([word.format(run=run, data=data, new=new) for word in words.split()]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("cover ") and len(errors.splitlines()) == 1
    assert not new.exists()


def test_ctrl_c_with_nothing_to_save_is_no_traceback(data, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cover.cli.check", interrupted)
    assert main(["check", str(data)]) == 130
    assert capsys.readouterr().err == "cover check: stopped\n"


def test_words_that_argparse_knows_to_be_wrong_give_code_2_too(capsys):
    for words in ([], ["pretrain", "data"], ["evaluate", "run", "data", "--samples", "few"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_saves_and_says_so_without_a_traceback(data, tmp_path, number):
    out = tmp_path / "run"
    words = [*as_words(SETTINGS | dict(steps=100_000, workers=1)), "val_fraction=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cover", "pretrain", str(data), "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    step = int(checkpoint.find(out).stem.removeprefix("step_"))
    assert f"stopped after step {step}; saved" in output
    assert len((out / "metrics.jsonl").read_text().splitlines()) == step

"""What could break quietly in the benchmarks: comparison, report, counts of work, and checks of the peers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compare
import gpu
import peers
import results
import tables

from cover_kernels import bench
from cover_kernels.measure import Peaks, one_pass, peak_above, times
from cover_kernels.problems import BACKWARD, BOTH, FORWARD, Compose, Veu, Warp, Work, window_pairs


def entry(who, median, spread=0.01, memory=2**20, problem="veu", **info):
    stats = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread), "rounds": 9}
    work = {"flops": 2e9, "bytes": 1e9, "pairs": 1e8, "exponentials": 1e8, "memory": memory}
    return {"stats": stats, "extra_info": {"problem": problem, "pass": "forward", "who": who, **work, **info}}


def document(*entries, instructions=None, left_out=()):
    peaks = {"flops": 4e12, "copy": 1e13, "source": "loop", "flops_before_and_after": [4e12, 3e12]}
    machine = {"device": "a", "cores": 2, "threads": 2, "torch": "2", "python": "3", "cover_kernels": "1"}
    cover = {"machine": machine | {"backend": "cpu"}, "form": "full", "load": 0.1, "peaks": peaks}
    return {
        "cover": cover | {"left_out": list(left_out), "instructions": instructions or {}},
        "benchmarks": list(entries),
    }


BEFORE = document(entry("cover", 1e-3), entry("eager", 1e-2), entry("eager", 2e-2, problem="warp"))


@pytest.mark.parametrize(
    ("changed", "worse"),
    [
        ([entry("cover", 1.2e-3)], ["veu, forward: 1.20 times the time"]),
        ([entry("cover", 1.04e-3)], []),  # within the tolerance
        ([entry("cover", 1.2e-3, spread=0.3)], []),  # the quartiles meet
        ([entry("cover", 1.5e-3), entry("eager", 1.5e-2), entry("eager", 3e-2, problem="warp")], []),  # the machine
        ([entry("cover", 1e-3), entry("eager", 5e-3), entry("eager", 1e-2, problem="warp")], ["2.00 times the time"]),
        # peers became twice as fast, the peak did not: what is to be judged lies between
        ([entry("cover", 0.7e-3), entry("eager", 5e-3), entry("eager", 1e-2, problem="warp")], []),
        # the machine scatters by more than what is to be judged
        ([entry("cover", 1.2e-3), entry("eager", 1.3e-2), entry("eager", 1.5e-2, problem="warp")], []),
        ([entry("cover", 1e-3, memory=3 * 2**20)], ["peak memory 3.0 MiB, was 1.0"]),
        ([entry("eager", 1e-2)], ["not in the newer run"]),
    ],
)
def test_comparison_finds_what_got_worse_and_nothing_else(changed, worse):
    lines, found = compare.compare(BEFORE, document(*changed), 0.05)
    assert len(found) == len(worse) and all(text in line for text, line in zip(worse, found, strict=True))
    assert any(line.startswith("veu, forward") for line in lines) or "not in the newer run" in worse


@pytest.mark.parametrize(("time", "worse"), [(1e-3, []), (1.2e-3, ["veu, forward: 1.50 times the time"])])
def test_without_controls_the_peaks_drift_is_no_more_than_possible(time, worse):
    after = document(entry("cover", time))
    after["cover"]["peaks"]["flops"] = 5e12
    lines, found = compare.compare(document(entry("cover", 1e-3)), after, 0.05)
    assert found == worse
    assert "0.80 times as slow" in lines[0]


def test_comparison_of_instructions_has_no_noise(tmp_path, capsys):
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, count in zip(paths, (1000, 1011), strict=True):
        path.write_text(json.dumps(document(instructions={"veu": count})))
    assert compare.main([*map(str, paths)]) == 1
    assert "REGRESSION veu: 1.011 times the instructions" in capsys.readouterr().out
    assert compare.main([*map(str, reversed(paths))]) == 0
    none = tmp_path / "none.json"
    none.write_text(json.dumps(document()))
    assert compare.main([str(paths[0]), str(none)]) == 1
    assert "REGRESSION veu: its instructions are not in the newer run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"cover": {}}', '{"cover": {"machine": {}}, "benchmarks": [3]}', "[" * 100000]
    + [json.dumps(document(entry("cover", median))) for median in (0, float("nan"), float("inf"))]
    + [json.dumps(document(instructions={"veu": count})) for count in (0, "1")],
)
def test_files_that_hold_no_result_are_refused_by_name(tmp_path, capsys, text):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(BEFORE))
    bad.write_text(text)
    for files in ((good, bad), (bad, good)):
        with pytest.raises(SystemExit):
            compare.main([*map(str, files)])
        assert "bad.json: not a result of these suites" in capsys.readouterr().err


def test_a_comparison_of_nothing_passes_nothing(tmp_path, capsys):
    empty, good = tmp_path / "empty.json", tmp_path / "good.json"
    empty.write_text(json.dumps(document()))
    good.write_text(json.dumps(BEFORE))
    for arguments in ([empty, good], [good, good, "--tolerance=nan"]):
        with pytest.raises(SystemExit):
            compare.main([*map(str, arguments)])
    assert "nothing of ours was measured" in capsys.readouterr().err


def test_report_shows_every_row_and_what_was_left_out(tmp_path):
    absent = [{"problem": "veu", "pass": "forward", "who": "NATTEN", "reason": "not installed"}]
    points = [entry("cover", 1e-3 * n, problem=f"n{n}", axis="voxels", at=n, series="veu 2D") for n in (1, 2, 4)]
    step = entry("cover", 0.11, problem="training", bare=[0.1, 0.1, 0.2], bare_memory=2**19)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document(entry("cover", 1e-3), entry("eager", 1e-2), step, *points, left_out=absent)))
    results.main([str(path)])
    text = (tmp_path / "report.md").read_text()
    # 2e9 operations in a millisecond are half of 4e12 a second, 1e9 bytes a tenth of 1e13
    assert "| cover | 1 | 0.99-1.01 | 100 G | 2 T | 50% | 1 T | 10% | 1.0 |" in text
    assert "| eager | 10 | 9.9-10.1 | 10 G | 200 G | 5% | 100 G | 1% | 1.0 | 10.00 |" in text
    assert "- NATTEN: not timed, not installed" in text
    assert "+10.0% on top of the bare backbone's 100 ms, 2.00 times its memory" in text
    assert "![voxels](voxels.svg)" in text and (tmp_path / "voxels.svg").stat().st_size > 5000
    printed = results.text(results.load(path))
    assert "not timed: not installed" in printed and "10.00" in printed


@pytest.mark.parametrize(("S", "window"), [((1, 1), (5, 5)), ((4, 7), (3, 9)), ((3, 4, 5), (3, 1, 5))])
def test_window_pairs_are_those_inside_the_image(S, window):
    ones = torch.ones(1, 1, *S)
    kernel = torch.ones(1, 1, *window)
    convolution = {2: torch.conv2d, 3: torch.conv3d}[len(S)]
    assert window_pairs(S, window) == convolution(ones, kernel, padding=[n // 2 for n in window]).sum().item()


def test_work_is_what_must_be_computed_and_moved():
    pairs = 2 * 3 * 10 * 13  # images, groups; rows at most one apart, columns at most one apart
    features, voxels = 2 * 3 * 8 * 4 * 5, 2 * 4 * 5
    veu = Veu((4, 5), 3, heads=3, batch=2)
    assert veu.work(FORWARD) == Work(2 * 8 * pairs, 4 * (2 * features + voxels * (2 + 3)), pairs, pairs)
    assert veu.work(BOTH).flops == 5 * veu.work(FORWARD).flops and veu.work(BOTH).pairs == pairs
    assert Warp((4, 6), 3, stride=2).work(FORWARD) == Work(2 * 4 * 72, 4 * (2 * 72 + 2 * 6))
    assert Compose((4, 6)).work(FORWARD) == Work(2 * 4 * 48, 4 * (2 * 48 + 2 * 6))
    assert Warp((4, 6), 3).work(BACKWARD) == Work(2 * 2 * 4 * 72, 4 * (3 * 72 + 2 * 48))


def test_verdict_names_the_larger_floor():
    peaks = Peaks(flops=1e9, source="", copy=1e9)
    # 1 ms of multiply-adds, 0.8 ms of softmax, 1.5 ms of memory
    text = bench.verdict(Work(10**6, 3 * 10**6 // 2, 10**5, 10**5), peaks, 3.6e-3)
    assert "arithmetic bounds it, 50% of that bound" in text
    assert "memory bounds it, 80%" in bench.verdict(Work(10**6, 4 * 10**6), peaks, 5e-3)
    assert "neither bounds it but the loads of the cells' corners, 0.05 G/s" in bench.verdict(
        Work(10**6, 4 * 10**6), peaks, 1e-2
    )


def test_own_sizes_are_parsed_and_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_peaks", lambda *_: Peaks(1e11, "loop", 1e10))
    monkeypatch.setattr(bench, "times", lambda call: times(call, 0, least=2))
    assert bench.main(["--shape", "1x8x12x16", "--window", "5", "--heads", "2", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "veu 1x8x12x16 N=5 J=2 bfloat16" in out and "forward + backward" in out and "bounds it" in out
    for wrong in (
        "--shape 1x8x12",
        "--shape 1x8x12x16 --heads 3",
        "--shape 1x8x12x16 --window 4294967297",
        "--shape 1x8x12x16 --stride 2",
        "--shape 1x8x12x16 --device meta",
        "warp --shape 1x8x12x16 --stride 5",
        "warp --shape 1x8x12x16 --window 5",
    ):
        with pytest.raises(SystemExit):
            bench.parse(wrong.split())


@pytest.mark.parametrize("problem", tables.OPERATORS["quick"], ids=str)
def test_peers_agree_with_the_reference(problem):
    problem = replace(problem, dtype=torch.float32)
    for name in ("cover", *peers.PEERS[type(problem)]):
        if name in peers.COMPILING:
            continue
        try:
            candidate = peers.peer(name, problem, "cpu")
        except peers.Unable as reason:
            assert "not installed" in str(reason)
            continue
        peers.check(candidate, problem, "cpu", FORWARD)
        if name != "eager in place":
            peers.check(candidate, problem, "cpu", BACKWARD)


def test_a_peer_that_is_wrong_is_not_timed():
    problem = Veu((8, 9), 3)
    almost = peers.Peer(lambda q, k: problem(q, k) * 1.005)
    for which in (FORWARD, BACKWARD):
        with pytest.raises(peers.Unable, match="differs from the reference"):
            peers.check(almost, problem, "cpu", which)


def test_key_blocks_hold_every_pair_of_the_window():
    S, window, size = (5, 7), 3, 4
    found = peers.blocks_within_reach(S, window, size, "cpu")
    position = torch.cartesian_prod(*map(torch.arange, S))
    near = ((position[:, None] - position[None]).abs() <= 1).all(-1)
    expected = torch.zeros_like(found)
    for query, key in near.nonzero().tolist():
        expected[query // size, key // size] = True
    assert torch.equal(found, expected) and not expected.all()


def test_passes_and_peak_memory():
    x = torch.randn(3, requires_grad=True)
    forward, backward, both = (one_pass(lambda x: 2 * x, [x], which) for which in (FORWARD, BACKWARD, BOTH))
    assert torch.equal(forward(), 2 * x) and not forward().requires_grad
    assert torch.equal(backward()[0], both()[0])
    assert peak_above(lambda: torch.ones(2**24))[0] == pytest.approx(2**26, rel=0.1)


def test_on_a_gpu_a_part_that_fails_or_hangs_takes_no_other_along(monkeypatch, capsys, tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "HOURS", 0.1 / 3600)
    assert not gpu.passes(sleep, tmp_path)
    monkeypatch.setattr(gpu, "passes", lambda command, folder, **environment: "test_veu.py" not in command)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    assert gpu.main() == 1
    verdicts = capsys.readouterr().out.split("== summary\n")[1]
    assert "FAILED  tests, test_veu.py" in verdicts and verdicts.count("FAILED") == 1
    assert all(
        f"passed  {part}" in verdicts for part in ("self-test", "tests, test_warp.py", "times, veu", "times, warp")
    )


def test_on_a_gpu_the_sanitizers_run_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/bin/{tool}")
    parts = gpu.checks("cuda", quick=False)
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command, _ = parts[f"compute-sanitizer {name}"]
        assert command[0] == "/bin/compute-sanitizer" and command[-2:] == ["-m", "cover_kernels"]
    assert not any("sanitizer" in part for part in gpu.checks("cpu", quick=False))


def test_suites_of_the_model_and_of_data_run_to_their_end(tmp_path):
    suites = [str(Path(compare.__file__).parent / f"bench_{name}.py") for name in ("model", "data")]
    command = [sys.executable, "-m", "pytest", "-q", "--form", "quick", "--benchmark-quiet", "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *suites], cwd=Path(suites[0]).parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:]

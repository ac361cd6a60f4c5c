"""The suites' frame: their options, the timing of a call and what is recorded beside it, the table at the end."""

import os
from dataclasses import asdict

import pytest
import results
from tables import FORMS

from cover_kernels.measure import machine, measure_peaks, peak_above, synchronised, times
from cover_kernels.problems import Work

KEY = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("cover")
    group.addoption("--form", choices=FORMS, default="short", help="how much is measured (default: short)")
    group.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_configure(config):
    config.stash[KEY] = {"benchmarks": [], "left_out": [], "peaks": [], "instructions": {}}


@pytest.fixture(scope="session")
def form(request) -> str:
    return request.config.getoption("form")


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="session", autouse=True)
def peaks(request, device):
    """The machine's peaks, before everything and after it: what counts is the larger of both."""
    found = request.config.stash[KEY]["peaks"]
    found.append(measure_peaks(device))
    yield
    found.append(measure_peaks(device))


@pytest.fixture
def left_out(request):
    """Call it with a problem, a pass, a peer and the reason why it is not timed: skips the test."""

    def skip(problem, which: str, who: str, reason: object):
        reason = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        entry = {"problem": str(problem), "pass": which, "who": who, "reason": reason}
        request.config.stash[KEY]["left_out"].append(entry)
        pytest.skip(reason)

    return skip


@pytest.fixture
def timed(benchmark, request, form, device):
    """Times a call: `timed(call, problem, which, who, work, ...)`, further arguments being recorded as they are."""
    # how long to go on, and how many rounds at least: of a call, and of one that takes longer than a second
    seconds, least, least_of_slow = {"quick": (0.0, 2, 2), "short": (0.5, 5, 3), "full": (2.0, 10, 5)}[form]

    def run(call, problem, which: str, who: str, work: Work | None = None, before=None, **more):
        call = synchronised(call, device)
        (once,) = times(call, 0, least=1)
        rounds = least_of_slow if once > 1 else int(min(200, max(least, seconds / once)))
        benchmark.pedantic(call, setup=before, rounds=rounds)
        memory = peak_above(call, device)[0]
        identity = {"problem": str(problem), "pass": which, "who": who}
        benchmark.extra_info.update(identity | asdict(work or Work(0, 0)) | {"memory": memory} | more)
        request.config.stash[KEY]["benchmarks"].append(benchmark.stats)

    return run


def context(config) -> dict:
    """What belongs to a run beside its times."""
    stash, device = config.stash[KEY], config.getoption("device")
    peaks = {
        "flops": max(p.flops for p in stash["peaks"]),
        "source": stash["peaks"][0].source,
        "copy": max(p.copy for p in stash["peaks"]),
        "flops_before_and_after": [p.flops for p in stash["peaks"]],
    }
    return {
        "machine": machine(device),
        "form": config.getoption("form"),
        "load": os.getloadavg()[0],  # of one minute: more than the threads is other work on the machine
        "peaks": peaks,
        "left_out": stash["left_out"],
        "instructions": stash["instructions"],
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["cover"] = context(config)


def pytest_terminal_summary(terminalreporter, config):
    entries = [
        {"stats": stats.as_dict()["stats"], "extra_info": stats.extra_info} for stats in config.stash[KEY]["benchmarks"]
    ]
    if entries:
        terminalreporter.write_line("\n" + results.text({"cover": context(config), "benchmarks": entries}))

"""Two results side by side, and whether the newer one is a regression: `python compare.py OLD.json NEW.json`.

The exit status is 1 where something of ours got worse: instructions by more than 1 %, peak memory by more than 5 % and
1 MiB, a time beyond noise, or a row that is no longer there. A machine is not as fast in every run: times are divided
by its drift, the median ratio of the rows that run nothing of ours (of the measured peaks, where there are none).
A time is beyond noise if it then is slower by more than the tolerance, by more than twice what those rows scatter and
by more than what separates their drift from that of the peaks, and if the quartiles of both runs do not meet.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from results import Row, load, rows

INSTRUCTIONS, MEMORY = 1.01, 1.05


@dataclass(frozen=True)
class Drift:
    """How much slower the machine was in the newer run, and how far from that its single rows were."""

    factor: float
    scatter: float
    of: str  # what it is the ratio of


def keyed(document: dict) -> dict[tuple[str, str, str], Row]:
    return {(row.problem, row.which, row.who): row for row in rows(document)}


def drift(old: dict, new: dict) -> Drift:
    before, after = keyed(old), keyed(new)
    flops = [(document["cover"].get("peaks") or {}).get("flops") for document in (old, new)]
    peaks = flops[0] / flops[1] if all(flops) else 1.0
    ratios = [after[key].median / before[key].median for key in before.keys() & after.keys() if key[2] != "cover"]
    if ratios:
        middle = statistics.median(ratios)
        scatter = statistics.median(abs(ratio / middle - 1) for ratio in ratios)
        if all(flops):
            scatter = max(scatter, abs(middle / peaks - 1) / 2)
        return Drift(middle, scatter, f"{len(ratios)} rows that run nothing of ours")
    # the truth lies between no drift and theirs
    return Drift(peaks, abs(1 / peaks - 1) / 2, "measured peaks; there are no rows that run nothing of ours")


def slower(before: Row, after: Row, machine: Drift, tolerance: float) -> bool:
    """Whether a row's time got worse beyond noise."""
    ratio = after.median / before.median / machine.factor
    return ratio > 1 + max(tolerance, 2 * machine.scatter) and after.q1 / machine.factor > before.q3


def compare(old: dict, new: dict, tolerance: float) -> tuple[list[str], list[str]]:
    """(lines of a table, what got worse)."""
    lines, worse, machine = [], [], drift(old, new)
    before, after = keyed(old), keyed(new)
    lines.append(
        f"the machine: {machine.factor:.2f} times as slow as in the older run, to within {2 * machine.scatter:.1%} "
        f"(by {machine.of})"
    )
    for name in ("device", "threads", "torch", "backend"):
        values = [document["cover"]["machine"].get(name) for document in (old, new)]
        if values[0] != values[1]:
            lines.append(f"not the same {name}: {values[0]}, then {values[1]}")
    lines.append(f"\n{'time, ms':64}{'old':>10}{'new':>10}{'ratio':>8}  (without the machine's drift)")
    for key, a in before.items():
        if key[2] != "cover":
            continue
        name, b = f"{key[0]}, {key[1]}", after.get(key)
        if b is None:
            worse.append(f"{name}: not in the newer run")
            continue
        ratio, memory = b.median / a.median / machine.factor, (a.info["memory"], b.info["memory"])
        verdict = ""
        if slower(a, b, machine, tolerance):
            verdict = "  slower"
            worse.append(f"{name}: {ratio:.2f} times the time")
        if memory[1] > MEMORY * memory[0] and memory[1] > memory[0] + 2**20:
            worse.append(f"{name}: peak memory {memory[1] / 2**20:.1f} MiB, was {memory[0] / 2**20:.1f}")
        lines.append(f"{name:64}{1e3 * a.median:10.4g}{1e3 * b.median:10.4g}{ratio:8.2f}{verdict}")
    counts = [document["cover"].get("instructions") or {} for document in (old, new)]
    if counts[0]:
        lines.append(f"\n{'instructions':64}{'old':>14}{'new':>14}{'ratio':>8}")
        for name, a in counts[0].items():
            b = counts[1].get(name)
            if b is None:
                worse.append(f"{name}: its instructions are not in the newer run")
                continue
            lines.append(f"{name:64}{a:14,}{b:14,}{b / a:8.3f}")
            if b > INSTRUCTIONS * a:
                worse.append(f"{name}: {b / a:.3f} times the instructions")
    return lines, worse


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="slower by this share is no regression yet")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not 0 <= options.tolerance < math.inf:
        parser.error(f"--tolerance must be a share of at least 0, got {options.tolerance}")
    if not (any(row.who == "cover" for row in rows(old)) or old["cover"].get("instructions")):
        parser.error(f"{options.old}: nothing of ours was measured")
    lines, worse = compare(old, new, options.tolerance)
    print("\n".join(lines))
    print("\n" + ("\n".join(f"REGRESSION {what}" for what in worse) or "no regression"))
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())

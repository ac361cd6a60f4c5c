"""From the JSON of a run to a table, and to a Markdown report with plots: `python results.py FOLDER/results.json`.

The JSON is pytest-benchmark's, with a section "cover" about the machine and what was left out (see conftest.py).
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. Times in seconds, memory in bytes; `info` is what was recorded beside them."""

    problem: str
    which: str
    who: str
    median: float
    q1: float
    q3: float
    rounds: int
    info: dict

    def rate(self, quantity: str) -> float:
        return self.info[quantity] / self.median


def rows(document: dict) -> list[Row]:
    found = []
    for entry in document["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        times = (stats[key] for key in ("median", "q1", "q3", "rounds"))
        found.append(Row(info["problem"], info["pass"], info["who"], *times, info))
    return found


def check(document: dict) -> None:
    """Raise ValueError for a measurement that is none; other errors where a part of the document is missing."""
    cover, timed = document["cover"], rows(document)
    above_0 = [x for row in timed for x in (row.median, row.q1, row.q3)]
    above_0 += [*(cover.get("instructions") or {}).values(), (cover.get("peaks") or {}).get("flops", 1)]
    memory = [row.info["memory"] for row in timed]
    if wrong := [x for x in above_0 if not 0 < x < math.inf] + [x for x in memory if not 0 <= x < math.inf]:
        raise ValueError(f"a measurement of {wrong[0]}")
    if not isinstance(cover["machine"], dict):
        raise ValueError("`machine` is no section")


def load(path: Path) -> dict:
    """The document in a JSON file; ValueError, which names the file, for one that the suites did not write."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        check(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a result of these suites: {type(error).__name__}: {error}") from None
    return document


def si(number: float) -> str:
    """Three digits and a prefix: 2.81 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def figures(row: Row, context: dict, ours: Row | None) -> dict[str, str]:
    """Column -> text of one row; empty where a figure has no meaning."""
    peaks, info = context["peaks"], row.info

    def share(quantity: str, peak: str) -> str:
        return f"{row.rate(quantity) / peaks[peak]:.0%}" if info[quantity] else ""

    return {
        "": row.who,
        "ms": f"{1e3 * row.median:.4g}",
        "quartiles": f"{1e3 * row.q1:.4g}-{1e3 * row.q3:.4g}",
        "pairs/s": si(row.rate("pairs")) if info["pairs"] else "",
        "FLOP/s": si(row.rate("flops")) if info["flops"] else "",
        "of peak": share("flops", "flops"),
        "B/s": si(row.rate("bytes")) if info["bytes"] else "",
        "of copy": share("bytes", "copy"),
        "MiB": f"{info['memory'] / 2**20:.1f}",
        "times ours": f"{row.median / ours.median:.2f}" if ours and row is not ours else "",
        "note": note(row),
    }


def note(row: Row) -> str:
    """Images a second; of a training step, how it compares with the bare backbone that ran in turn with it."""
    if "images" in row.info:
        return f"{si(row.rate('images'))}images/s"
    if "bare" not in row.info:
        return row.info.get("remark", "")
    bare = statistics.median(row.info["bare"])
    share, memory = row.median / bare - 1, row.info["memory"] / row.info["bare_memory"]
    return f"{share:+.1%} on top of the bare backbone's {1e3 * bare:.4g} ms, {memory:.2f} times its memory"


def header(context: dict) -> str:
    m, peaks = context["machine"], context["peaks"]
    spread = " and ".join(f"{f / 1e9:.0f}" for f in peaks["flops_before_and_after"])
    return (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads; torch {m['torch']}, Python {m['python']}, "
        f"cover_kernels {m['cover_kernels']}, {m['backend']}; load {context['load']:.1f} at the end\n"
        f"peak: {peaks['flops'] / 1e9:.0f} GFLOP/s ({peaks['source']}; before and after {spread}), "
        f"copy {peaks['copy'] / 1e9:.1f} GB/s"
    )


def groups(document: dict):
    """(problem and pass, figures of its rows, reasons of those that were left out) in the order of the run."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows(document):
        if "axis" not in row.info:
            found.setdefault((row.problem, row.which), []).append(row)
    for key, group in found.items():
        ours = next((row for row in group if row.who == "cover"), None)
        absent = {e["who"]: e["reason"] for e in document["cover"]["left_out"] if (e["problem"], e["pass"]) == key}
        yield ", ".join(key), [figures(row, document["cover"], ours) for row in group], absent


def text(document: dict) -> str:
    """The table that a run prints."""
    widths = {"": -16, "ms": 9, "quartiles": 15, "pairs/s": 8, "FLOP/s": 8, "of peak": 7}
    widths |= {"B/s": 8, "of copy": 7, "MiB": 8, "times ours": 10, "note": -1}

    def line(cells: dict[str, str]) -> str:
        padded = (f"{cells[c]:<{-w}}" if w < 0 else f"{cells[c]:>{w}}" for c, w in widths.items())
        return "  ".join(padded).rstrip()

    lines = [header(document["cover"]), "", line({column: column for column in widths})]
    for title, table, absent in groups(document):
        lines += [title, *("  " + line(cells) for cells in table)]
        lines += [f"  {who:16}  not timed: {reason}" for who, reason in absent.items()]
    return "\n".join(lines)


def markdown(document: dict, plots: list[str]) -> str:
    context = document["cover"]
    first, second = header(context).splitlines()
    lines = ["# Benchmarks", "", first + ".", second + ".", ""]
    lines.append(
        f"Form: {context['form']}. Medians and quartiles over rounds in one process. Memory is the peak above what was "
        "taken before. A share of the peak counts the multiply-adds of `cover_kernels.problems.Work`."
    )
    for title, table, absent in groups(document):
        columns = [c for c in table[0] if any(cells[c] for cells in table)]
        lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cells[c] for c in columns) + " |" for cells in table]
        if absent:
            lines += ["", *(f"- {who}: not timed, {reason}" for who, reason in absent.items())]
    lines += ["", *(f"![{Path(plot).stem}]({plot})" for plot in plots)]
    return "\n".join(lines) + "\n"


def draw(document: dict, folder: Path) -> list[str]:
    """One figure for each axis of the scaling suite: time and memory; the names of the files."""
    import matplotlib.pyplot as plt

    found = [row for row in rows(document) if "axis" in row.info]
    names = []
    for axis in dict.fromkeys(row.info["axis"] for row in found):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        series = [row for row in found if row.info["axis"] == axis]
        for name in dict.fromkeys((row.info["series"], row.which) for row in series):
            points = sorted((r.info["at"], r) for r in series if (r.info["series"], r.which) == name)
            at, line = [p[0] for p in points], [p[1] for p in points]
            label = ", ".join(name)
            (curve,) = panels[0].loglog(at, [1e3 * r.median for r in line], "o-", label=label)
            panels[0].fill_between(at, [1e3 * r.q1 for r in line], [1e3 * r.q3 for r in line], alpha=0.3)
            panels[1].loglog(at, [max(r.info["memory"], 1) / 2**20 for r in line], "o-", color=curve.get_color())
        for panel, unit in zip(panels, ("time, ms", "peak memory, MiB"), strict=True):
            panel.set(xlabel=axis, ylabel=unit)
            panel.grid(True, which="both", alpha=0.2)
        panels[0].legend(fontsize=7)
        names.append(f"{axis.replace(' ', '-')}.svg")
        figure.savefig(folder / names[-1])
        plt.close(figure)
    return names


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of a run; report.md and the plots go beside it")
    path = parser.parse_args(arguments).results
    document, folder = load(path), path.parent
    (folder / "report.md").write_text(markdown(document, draw(document, folder)), encoding="utf-8")
    print(folder / "report.md")


if __name__ == "__main__":
    main()

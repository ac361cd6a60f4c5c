"""Tables and curves from the results: writes the tables into docs/results.md, and the curves as SVG where asked."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sets import INITS, TASKS, VARIANTS, parser

Result = dict[str, Any]

VARIANT_TEXT = {
    "full": "full model",
    "short": "full model, fewer steps",
    "single_level": "one VEU, at the finest level",
    "one_group": "one group (J = 1) on every level",
    "beyond_reach": "the authors' DVF ranges, beyond the reach",
    "con_only": "L_con alone",
}
EPE_BAR, PROBE_BAR = 0.25, 0.08


def read_results(out: Path, kind: str, rows: str) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted((out / "results" / f"{kind}-{rows}").glob("*.json"))]


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    values = list(values)
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commands(results: Iterable[Result]) -> str:
    """The commands of the first seed, less the folders; those of the others differ in `--seed` only."""
    lines = [re.sub(r" --(data|out)[= ]\S+", "", result["command"]) for result in results if result["seed"] == 0]
    return "Commands (seed 0; the others differ in `--seed`):\n\n```\n" + "\n".join(lines) + "\n```"


def correspondence_table(results: list[Result], measured_on: str) -> str:
    """Endpoint error of every variant on one set of images."""
    rows = []
    shown = [r for v in VARIANTS for r in results if r["variant"] == v and measured_on in r["held_out"]]
    for variant in dict.fromkeys(result["variant"] for result in shown):
        runs = [result for result in shown if result["variant"] == variant]
        figures = [run["held_out"][measured_on] for run in runs]
        rows.append(
            [
                VARIANT_TEXT[variant],
                str(runs[0]["steps"]),
                str(len(runs)),
                spread(f["epe_mean"] for f in figures),
                spread(f["epe_mean_zero"] for f in figures),
                spread(f["epe_mean"] / f["epe_mean_zero"] for f in figures),
                spread((100 * f["within_1"] for f in figures), 1),
                spread((100 * f["within_3"] for f in figures), 1),
                spread((run["curve"]["feature_variance"][-1] for run in runs), 2),
            ]
        )
    header = ["variant", "steps", "seeds", "EPE", "EPE of zero", "ratio", "≤ 1 voxel, %", "≤ 3 voxels, %"]
    return table([*header, "feature variance"], rows) + "\n\n" + commands(shown)


def dice_by_seed(results: list[Result]) -> dict[tuple[int, str], dict[str, dict[int, float]]]:
    """(labels, measure) -> initial weights -> seed -> Dice."""
    dice: dict = defaultdict(lambda: defaultdict(dict))
    for r in results:
        measures = {"linear probe": r["probe"]}
        measures |= {f"fine-tuning, {steps} steps": value for steps, value in r["fine_tuning"].items()}
        for measure, value in measures.items():
            dice[r["labels"], measure][r["init"]][r["seed"]] = value
    return dice


def gains(by_init: dict[str, dict[int, float]], baseline: str) -> list[float]:
    """COVER minus `baseline`, seed by seed."""
    ours, theirs = by_init.get("cover", {}), by_init.get(baseline, {})
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def downstream_table(results: list[Result]) -> str:
    """Dice of one task, for every number of labels and every use of the weights."""
    rows = []
    for (labels, measure), by_init in sorted(dice_by_seed(results).items(), key=lambda item: item[0][0]):
        row = [str(labels), measure, *(spread(by_init[i].values()) if i in by_init else "" for i in INITS)]
        for baseline in ("random", "con_only"):
            gain = gains(by_init, baseline)
            row.append(f"{statistics.mean(gain):+.3f}, {sum(g > 0 for g in gain)} of {len(gain)}" if gain else "")
        rows.append(row)
    header = ["labels", "use", "COVER", "L_con alone", "random", "COVER - random, wins", "COVER - L_con, wins"]
    return table(header, rows) + "\n\n" + commands(results)


def bars_table(correspondence: list[Result], downstream: list[Result]) -> str:
    """Every bar of the evidence, what was reached, and whether that is enough."""
    rows = []
    for measured_on in ("hippocampus", "cxr", "chest_xray_1024"):
        figures = [r["held_out"].get(measured_on) for r in correspondence if r["variant"] == "full"]
        ratios = [f["epe_mean"] / f["epe_mean_zero"] for f in figures if f]
        if ratios:
            reached = statistics.mean(ratios) <= EPE_BAR
            rows.append([f"EPE / EPE of zero, {measured_on}", f"≤ {EPE_BAR}", spread(ratios), yes_no(reached)])
    for task in TASKS:
        dice = dice_by_seed([r for r in downstream if r["task"] == task])
        fewest = min((labels for labels, _ in dice), default=None)
        if gain := gains(dice.get((fewest, "linear probe"), {}), "random"):
            reached = statistics.mean(gain) >= PROBE_BAR
            what = f"linear probe, COVER - random, {task}, {fewest} labels"
            rows.append([what, f"≥ {PROBE_BAR}", spread(gain), yes_no(reached)])
        shortest = f"fine-tuning, {min(TASKS[task].schedules)} steps"
        short = {labels: gains(by_init, "random") for (labels, use), by_init in dice.items() if use == shortest}
        for labels, gain in sorted(short.items()):
            if gain:
                what = f"{shortest}, COVER - random, {task}, {labels} labels"
                rows.append([what, "> 0 in every seed", ", ".join(f"{g:+.3f}" for g in gain), yes_no(min(gain) > 0)])
    return table(["bar", "asked", "reached", "enough"], rows)


def yes_no(truth: bool) -> str:
    return "yes" if truth else "**no**"


def draw_curves(results: list[Result], folder: Path) -> None:
    """Training curves, one SVG per data set: EPE relative to predicting zero, and the spread of the features."""
    import matplotlib

    matplotlib.use("svg")
    # text stays text, and the same results give the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cover"})
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for data_set in dict.fromkeys(result["data_set"] for result in results):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for colour, variant in enumerate(VARIANTS):
            curves = [r["curve"] for r in results if (r["data_set"], r["variant"]) == (data_set, variant)]
            for number, curve in enumerate(curves):
                style = {"color": f"C{colour}", "label": VARIANT_TEXT[variant] if number == 0 else None}
                ratio = [e / z for e, z in zip(curve["epe"], curve["epe_zero"], strict=True)]
                axes[0].plot(curve["step"], ratio, **style)
                axes[1].plot(curve["step"], curve["feature_variance"], **style)
        axes[0].set(xlabel="step", ylabel="EPE / EPE of zero, training batches", yscale="log", title=data_set)
        axes[1].set(xlabel="step", ylabel="feature variance (0: collapsed)")
        axes[0].legend()
        figure.savefig(folder / f"{data_set}.svg", metadata={"Date": None})
        plt.close(figure)


def insert(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers `name` replaced by `content`; ValueError without such markers."""
    pattern = re.compile(rf"(<!-- begin {name} -->).*?(<!-- end {name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"report: expected one pair of markers <!-- begin {name} -->, <!-- end {name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def main(arguments: list[str] | None = None) -> None:
    p = parser(__doc__)
    p.add_argument("--rows", choices=("val", "test"), default="test")
    p.add_argument("--document", type=Path, help="file with markers to write the tables into; default: print them")
    p.add_argument("--figures", type=Path, help="folder for the curves; default: draw none")
    args = p.parse_args(arguments)

    correspondence = read_results(args.out, "correspondence", args.rows)
    downstream = read_results(args.out, "downstream", args.rows)
    tables = {}
    for name in dict.fromkeys(name for result in correspondence for name in result["held_out"]):
        tables[f"correspondence {name}"] = correspondence_table(correspondence, name)
    for task in TASKS:
        if results := [result for result in downstream if result["task"] == task]:
            tables[f"downstream {task}"] = downstream_table(results)
    tables["bars"] = bars_table(correspondence, downstream)
    if args.document is None:
        for name, content in tables.items():
            print(f"{name}\n\n{content}\n")
    else:
        text = args.document.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = insert(text, name, content)
        args.document.write_text(text, encoding="utf-8")
    if args.figures is not None:
        draw_curves(correspondence, args.figures)


if __name__ == "__main__":
    main()

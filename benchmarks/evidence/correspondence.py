"""Pretrain one variant on one data set with one seed, and measure its endpoint error on held-out images.

All variants are measured on the same pairs of views, made with the ranges of the full model, beside predicting zero.
"""

import json
import time
from pathlib import Path

from sets import (
    DATA_SETS,
    VARIANTS,
    full_ranges,
    parse_changes,
    parser,
    result_path,
    run_folder,
    variant_settings,
    write_result,
)

import cover

PAIRS = 208  # pairs of views per data set: every image as often as any other, give or take one


def training_curve(run: Path, points: int = 40) -> dict[str, list[float]]:
    """The metrics of a run's training batches, each averaged over `points` equal stretches of its steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    records = [line for line in lines if line["kind"] == "train"]
    length = -(-len(records) // points)
    stretches = [records[i : i + length] for i in range(0, len(records), length)]
    curve = {"step": [stretch[-1]["step"] for stretch in stretches]}
    for name in ("epe", "epe_zero", "consistency_loss", "feature_variance"):
        curve[name] = [sum(record[name] for record in stretch) / len(stretch) for stretch in stretches]
    return curve


def main(arguments: list[str] | None = None) -> None:
    p = parser(__doc__)
    p.add_argument("--data-set", choices=DATA_SETS, required=True)
    p.add_argument("--variant", choices=VARIANTS, default="full")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rows", choices=("val", "test"), default="test", help="rows on which the error is measured")
    p.add_argument("changes", nargs="*", help="key=value: settings other than the full model's, for tuning")
    args = p.parse_args(arguments)

    started = time.perf_counter()
    path = result_path(args.out, "correspondence", args.rows, args.data_set, args.variant, args.seed)
    if path.exists():
        print(f"{path} is there already")
        return
    data_set = DATA_SETS[args.data_set]
    config = data_set.config(**parse_changes(args.changes))
    settings = cover.config.flatten(config) | variant_settings(args.variant, config)
    settings |= {"seed": args.seed, "cache": str(args.out / "cache")}
    manifest = args.data / data_set.folder / "split.csv"
    run = run_folder(args.out, args.data_set, args.variant, args.seed)
    cover.pretrain(manifest, out=run, resume=run.exists(), **settings)

    held_out = {args.data_set: (manifest, args.rows)}
    if args.rows == "test":
        held_out |= {folder: (args.data / folder, None) for folder in data_set.also}
    figures = {
        name: cover.evaluate(run, images, split, samples=PAIRS, **full_ranges(config))
        for name, (images, split) in held_out.items()
    }
    for name, table in figures.items():
        print(name, table, sep="\n")
    result = {
        "data_set": args.data_set,
        "variant": args.variant,
        "seed": args.seed,
        "steps": settings["steps"],
        "held_out": {name: evaluation.as_record() for name, evaluation in figures.items()},
        "curve": training_curve(run),
    }
    write_result(path, result, started)


if __name__ == "__main__":
    main()

"""What the evidence consists of: data sets, variants and tasks with their settings, and where results lie.

Every setting here was chosen on val rows; rows of `test` are read for the final figures only.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cover.checkpoint import atomic
from cover.config import Config, replace
from cover.model import build_model
from cover.presets import preset_config
from cover.views import fit_to_reach

RANGES = ("rotation", "scale", "shear", "translation", "nonrigid", "fit_to_reach")


@dataclass(frozen=True)
class DataSet:
    """Images to pretrain on: a folder with a manifest `split.csv`, and the settings of the full model."""

    folder: str
    preset: str
    settings: dict[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()  # further folders on which the correspondence is measured, all of their images

    def config(self, **changes: Any) -> Config:
        """The full model's settings, changed by their bare names."""
        return replace(preset_config(self.preset), **self.settings | changes)


DATA_SETS = {
    "hippocampus": DataSet("hippocampus_msd", "small-3d", {"steps": 1000}),
    "cxr": DataSet("cxr_pneumonia_224", "small-2d", {"steps": 2500}, also=("chest_xray_1024",)),
    # GroupNorm sees all of its input: at 5 mm a head fits into one crop, so that training and use agree
    "ixi": DataSet("ixi_t1_2mm", "small-3d", {"spacing": (5.0, 5.0, 5.0), "crop": (40, 48, 48), "steps": 500}),
}

# the variants of an ablation train for as few steps as "short", the full model's twin among them
VARIANTS = ("full", "short", "single_level", "one_group", "beyond_reach", "con_only")
ABLATION_STEPS = 400


def variant_settings(variant: str, config: Config) -> dict[str, Any]:
    """What a variant changes of the full model's settings `config`; the rest stays.

    All but `beyond_reach` train on the full model's transforms; that one on the ranges of the authors' code.
    """
    heads = config.model.heads
    authors = {name: getattr(preset_config("authors-2d").dvf, name) for name in RANGES}
    ranges = authors if variant == "beyond_reach" else full_ranges(config)
    changes = {
        "single_level": {"heads": heads[-1:]},
        "one_group": {"heads": (1,) * len(heads)},
        "con_only": {"vector_weight": 0.0},
    }
    steps = {} if variant == "full" else {"steps": ABLATION_STEPS}
    return ranges | steps | changes.get(variant, {})


def full_ranges(config: Config) -> dict[str, Any]:
    """The ranges on which the full model trains, and on which every variant is evaluated, as explicit settings."""
    fitted = fit_to_reach(config.dvf, config.data.crop, build_model(config).pyramid.reach)
    return {name: getattr(fitted, name) for name in RANGES} | {"fit_to_reach": None}


@dataclass(frozen=True)
class Task:
    """A segmentation task with few labels."""

    folder: str
    pretrained_on: str  # a key of DATA_SETS
    column: str  # of the manifest: the file of labels
    classes: int  # background included
    labels: tuple[int, ...]  # numbers of training images
    crop: tuple[int, ...]  # of fine-tuning
    batch: int = 1
    lr: float = 3e-3  # of fine-tuning
    schedules: tuple[int, ...] = (60, 200, 600)  # steps
    samples: int = 20_000  # voxels on which the probe is fitted
    ridge: float = 1e-3  # weight decay of the probe
    evaluated: int | None = None  # number of held-out images, the first of the manifest; None: all


TASKS = {
    "lungs": Task("cxr_lungs_open", "cxr", "mask", 2, (5, 20), (112, 112), batch=2),
    "hippocampus": Task("hippocampus_msd", "hippocampus", "label", 3, (2, 5, 20), (32, 48, 32), evaluated=20),
    "ixi": Task("ixi_t1_2mm", "ixi", "tissue", 9, (1, 4), (40, 48, 48), lr=1e-3),
}

INITS = {"cover": "full", "con_only": "con_only", "random": None}  # weights: the variant that they come from


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    p.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of runs and results")
    return p


def parse_changes(pairs: Sequence[str], literal: bool = False) -> dict[str, Any]:
    """`key=value` arguments as a dict; values as text, or with `literal` as JSON (lists become tuples)."""
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise SystemExit(f"expected key=value, got {pair!r}")
        value = json.loads(text) if literal else text
        changes[name] = tuple(value) if isinstance(value, list) else value
    return changes


def run_folder(out: Path, data_set: str, variant: str, seed: int) -> Path:
    """Where a pretraining run lies."""
    return out / "pretrain" / f"{data_set}-{variant}-{seed}"


def result_path(out: Path, kind: str, rows: str, *key: Any) -> Path:
    """Where the result of one run lies: one JSON file, apart for test and val rows."""
    return out / "results" / f"{kind}-{rows}" / f"{'-'.join(map(str, key))}.json"


def write_result(path: Path, result: dict[str, Any], started: float) -> None:
    """Write a result with the command that made it, the seconds since `started` and the version of torch."""
    command = shlex.join(["python", *sys.argv])
    seconds = round(time.perf_counter() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, "w") as file:
        json.dump({**result, "command": command, "seconds": seconds, "torch": torch.__version__}, file, indent=1)

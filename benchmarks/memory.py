"""Peak memory of training, each run in a process of its own: what `cover plan` predicts beside what was then measured.

python memory.py            # ten settings in 2D and 3D, within minutes
python memory.py --bars     # the paper's U-Net at 96^3, also with eager operators, and 160^3: half an hour, 10 GB
python memory.py "paper-3d batch=1 crop=64,64,64" "eager paper-3d batch=1 crop=64,64,64"    # settings of one's own
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import eager
import numpy as np

import cover
from cover import config, log
from cover.cli import read_settings
from cover.memory import gib
from cover.presets import preset_config
from cover_kernels.measure import machine

RUNS = [
    "small-3d crop=64,64,64",
    "small-2d batch=8 resize=none crop=256,256",
    "small-3d crop=64,64,64 precision=bf16",
    "small-2d batch=16 resize=none crop=256,256 accumulate=4 precision=bf16",
    "small-3d crop=80,80,64 recompute=norms",
    "default batch=1 optimiser=sgd precision=fp32",
    "paper-3d batch=1 crop=48,48,48 recompute=off precision=fp32",
    "small-3d crop=80,80,64 batch=4 accumulate=4 recompute=stages",
    "default batch=2 recompute=all precision=fp32",
    "paper-3d batch=1 crop=48,48,48 recompute=stages precision=bf16",
]
_PAPER = "paper-3d batch=1 window=5"
BARS = [
    f"eager {_PAPER} crop=96,96,96 recompute=off precision=fp32",
    *(f"{_PAPER} crop=96,96,96 recompute={what} precision=fp32" for what in ("off", "norms", "stages", "all")),
    f"{_PAPER} crop=160,160,160 recompute=norms precision=bf16",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="'[eager] PRESET [key=value ...]'", nargs="*")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--steps", type=int, default=2, help="with the second one the optimiser has its state")
    parser.add_argument("--inside", action="store_true", help="print bytes; what the processes of a table do")
    options = parser.parse_args()
    runs = options.runs or (BARS if options.bars else RUNS)
    if options.inside:
        print(json.dumps(measure(runs[0], options.steps)))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{'':<74}{'predicted':>12}{'measured':>12}{'off by':>8}{'seconds':>9}")
    for run in runs:
        command = [sys.executable, __file__, run, "--inside", f"--steps={options.steps}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        predicted, measured, seconds = json.loads(output.splitlines()[-1])
        error = f"{predicted / measured - 1:+.1%}"
        print(f"{run:<74}{gib(predicted):>12}{gib(measured):>12}{error:>8}{seconds:>9.3g}", flush=True)


def measure(run: str, steps: int) -> tuple[int, int, float]:
    """Predicted and measured peak of this process, in bytes, and seconds of a step."""
    words = run.split()
    by_hand = words[0] == "eager"
    preset, settings = words[by_hand], read_settings(words[by_hand + 1 :])
    crop = config.replace(preset_config(preset), **settings).data.crop
    operators = eager.by_hand() if by_hand else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, operators:
        predicted = cover.plan(preset, **settings).peak
        data, out = Path(folder, "data"), Path(folder, "run")
        data.mkdir()
        for i in range(2):
            image = np.random.default_rng(i).normal(size=[n + 16 for n in crop])
            np.save(data / f"{i}.npy", image.astype(np.float32))
        settings |= {"steps": steps, "val_fraction": 0, "log_every": 1, "check_memory": False}
        cover.pretrain(data, preset, out=out, **settings)
        records = log.read(out, "train")
    batch = config.replace(preset_config(preset), **settings).train.batch
    seconds = min(batch / record["samples_per_second"] for record in records)
    return predicted, int(max(record["peak_memory_mb"] for record in records) * 2**20), seconds


if __name__ == "__main__":
    main()

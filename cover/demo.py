"""`make demo`: pretrain in 3D on the brain EPI that nibabel ships, evaluate on a volume not seen, draw figures."""

import argparse
import sys
import time
from pathlib import Path

import nibabel

from cover import evaluate, log, pretrain, visualize

TRAIN, HELD_OUT = 0, 1  # volumes of the 4D image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cover.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run; an old one is resumed")
    out = parser.parse_args().out
    image = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    if not image.exists():
        sys.exit(f"demo: this nibabel {nibabel.__version__} came without its test data: {image} is missing")

    began = time.monotonic()
    print(f"pretraining on volume {TRAIN} of {image.name}, a brain EPI of 128x96x24 voxels\n")
    run = pretrain(image, "demo-3d", out=out, resume=True, volumes=TRAIN)
    print(f"\n{time.monotonic() - began:.0f} s. Evaluation on volume {HELD_OUT}, which the network has not seen:\n")
    result = evaluate(run, image, volumes=HELD_OUT)
    print(result)
    (out / "figures" / "views.png").unlink(missing_ok=True)  # that of an earlier demo
    figures = [
        visualize(run, image, out / "figures" / "views.png", volumes=HELD_OUT),
        plot_training(run, out / "figures" / "training.png"),
    ]
    print("\nfigures:", *figures, sep="\n  ")
    if result.model.epe_mean > result.zero.epe_mean / 2:
        sys.exit("demo: the network does not halve the error of predicting zero; please report this with log.txt")


def plot_training(run: Path, path: Path) -> Path:
    """The curves of a run: endpoint error beside that of predicting zero, the losses, the spread of the features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = log.read(run, "train")
    steps = [record["step"] for record in records]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    curves = (("epe", "epe_zero"), ("vector_loss", "consistency_loss"), ("feature_variance",))
    for axis, names, label in zip(axes, curves, ("voxels", "loss", "1: directions spread evenly"), strict=True):
        for name in names:
            axis.plot(steps, smooth([record[name] for record in records]), label=name.replace("_", " "))
        axis.set(xlabel="step", ylabel=label, ylim=(0, None))
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def smooth(values: list[float], window: int = 20) -> list[float]:
    """Mean of each value and those before it, up to `window` of them."""
    means = []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(recent) / len(recent))
    return means


if __name__ == "__main__":
    main()

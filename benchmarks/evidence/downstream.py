"""Use of the features: linear probe and fine-tuning with few labels, from one kind of weights, for one seed.

The seed is that of the pretraining run, of the random weights, of the choice of labelled images and of all draws, so
that runs of one seed differ in their initial weights only.
"""

import copy
import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from sets import DATA_SETS, INITS, TASKS, Task, parse_changes, parser, result_path, run_folder, write_result
from torch import Tensor, nn

from cover.checkpoint import load_backbone
from cover.data import open_images
from cover.model import build_model

IGNORE = -1  # label of padding
LINEAR = {2: "bilinear", 3: "trilinear"}
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class Labelled(NamedTuple):
    """A labelled image. S: spatial shape."""

    image: Tensor  # float32 [1, *S], normalised
    label: Tensor  # int64 [*S], classes, IGNORE on padding


def read_split(
    task: Task, data: Path, cache: Path, split: str, count: int | None, seed: int | None = None
) -> list[Labelled]:
    """Labelled images of a split, padded so that a crop fits and the backbone takes them whole.

    The first `count` of the manifest, or of the permutation that `seed` gives; None: all.
    """
    manifest = data / task.folder / "split.csv"
    config = DATA_SETS[task.pretrained_on].config()
    images = open_images(manifest, config.data, split, cache)
    with manifest.open(newline="") as file:
        labels = {row["image"]: manifest.parent / row[task.column] for row in csv.DictReader(file)}
    multiple = build_model(config).backbone.strides[0]
    order = torch.arange(len(images))
    if seed is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    items = []
    for i in order[:count].tolist():
        image = torch.from_numpy(images.read(i))
        label = read_label(labels[images.name(i)])
        label = F.interpolate(label[None, None].float(), image.shape[1:], mode="nearest-exact")[0, 0].long()
        sizes = [-(-max(n, c) // m) * m for n, c, m in zip(label.shape, task.crop, multiple, strict=True)]
        missing = [size - n for n, size in zip(label.shape, sizes, strict=True)]
        padding = [n for after in reversed(missing) for n in (0, after)]
        image = F.pad(image[None], padding, mode="replicate")[0]
        items.append(Labelled(image, F.pad(label, padding, value=IGNORE)))
    return items


def read_label(path: Path) -> Tensor:
    """The classes in a file, int64 [*S], its axes those of the image as `open_images` gives it."""
    if path.suffix == ".png":
        import cv2

        return torch.from_numpy(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127).long()
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    return torch.from_numpy(np.asarray(canonical.dataobj).round().astype(np.int64))


def load_weights(init: str, task: Task, seed: int, out: Path) -> nn.Module:
    """A backbone with the weights `init`, a key of INITS."""
    if INITS[init] is None:
        torch.manual_seed(seed)
        return build_model(DATA_SETS[task.pretrained_on].config()).backbone
    return load_backbone(run_folder(out, task.pretrained_on, INITS[init], seed))


class Segmenter(nn.Module):
    """A backbone and a linear classifier per voxel on its feature maps of every level.

    A 1x1 convolution commutes with upsampling, so that each level is classified first and its few scores upsampled:
    the same as to concatenate all features at full resolution, without ever holding them.
    """

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(CONV[len(backbone.strides[0])](c, classes, 1) for c in backbone.channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, *S] to scores, [B, classes, *S]."""
        features = self.backbone(x)
        return sum(upsample(head(feature), x.shape[2:]) for head, feature in zip(self.heads, features, strict=True))


def upsample(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """x [B, C, *S] at the spatial shape `size`, linear with half-pixel centres."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode=LINEAR[len(size)])


@torch.no_grad()
def mean_dice(model: Segmenter, items: list[Labelled], classes: int) -> float:
    """Dice over the foreground classes that an image has, averaged over them and then over the images."""
    model.eval()
    dice = []
    for image, label in items:
        predicted = model(image[None])[0].argmax(0)[label != IGNORE]
        label = label[label != IGNORE]
        both = torch.bincount(label[label == predicted], minlength=classes)
        true, claimed = (torch.bincount(x, minlength=classes) for x in (label, predicted))
        present = true[1:] > 0
        dice.append((2 * both / (true + claimed).clamp(min=1))[1:][present].mean())
    return torch.stack(dice).mean().item()


@torch.no_grad()
def draw_features(backbone: nn.Module, items: list[Labelled], task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Features of all levels and classes of voxels drawn evenly from `items`: [n, F], [n], n about `task.samples`."""
    g = torch.Generator().manual_seed(seed)
    x, y = [], []
    for image, label in items:
        known = (label.flatten() != IGNORE).nonzero().flatten()
        chosen = known[torch.randperm(len(known), generator=g)[: task.samples // len(items)]]
        maps = backbone(image[None])
        x.append(torch.cat([upsample(f, label.shape)[0].flatten(1)[:, chosen] for f in maps]).T)
        y.append(label.flatten()[chosen])
    return torch.cat(x), torch.cat(y)


def fit_probe(backbone: nn.Module, items: list[Labelled], task: Task, seed: int) -> Segmenter:
    """Logistic regression on frozen features of all levels, fitted to convergence on voxels drawn from `items`.

    Features are standardised on these voxels; the scaling is then folded into the classifier.
    """
    model = Segmenter(backbone.eval(), task.classes)
    x, y = draw_features(backbone, items, task, seed)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)  # a collapsed feature must not be blown up
    x = (x - mean) / std

    weight = torch.zeros(x.shape[1], task.classes, requires_grad=True)
    bias = torch.zeros(task.classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + 0.5 * task.ridge * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        scaled = weight / std[:, None]
        parts = scaled.split([head.in_channels for head in model.heads])
        for head, part in zip(model.heads, parts, strict=True):
            head.weight.copy_(part.T.reshape(head.weight.shape))
            head.bias.zero_()
        model.heads[-1].bias.copy_(bias - mean @ scaled)
    return model


def draw_crop(items: list[Labelled], task: Task, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A crop of a random item, around a foreground voxel in half of the draws, with gain, offset and noise added."""
    image, label = items[torch.randint(len(items), (), generator=g)]
    S = torch.tensor(label.shape)
    crop = torch.tensor(task.crop)
    start = (torch.rand(len(S), generator=g) * (S - crop + 1)).long()
    if torch.rand((), generator=g) < 0.5:
        foreground = (label > 0).nonzero()
        centre = foreground[torch.randint(len(foreground), (), generator=g)]
        start = torch.minimum((centre - crop // 2).clamp(min=0), S - crop)
    window = [slice(i, i + n) for i, n in zip(start.tolist(), task.crop, strict=True)]
    image, label = image[(slice(None), *window)], label[tuple(window)]
    gain, offset = 0.2 * torch.rand(2, generator=g) - 0.1
    return image * (1 + gain) + offset + 0.1 * torch.randn(image.shape, generator=g), label


def segmentation_loss(scores: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy plus 1 - soft Dice, averaged over the foreground classes. scores [B, K, *S], label [B, *S]."""
    known = (label != IGNORE).unsqueeze(1)
    p = scores.softmax(1) * known
    truth = F.one_hot(label.clamp(min=0), scores.shape[1]).movedim(-1, 1) * known
    axes = [0, *range(2, scores.dim())]
    dice = (2 * (p * truth).sum(axes) + 1) / (p.sum(axes) + truth.sum(axes) + 1)
    return F.cross_entropy(scores, label, ignore_index=IGNORE) + 1 - dice[1:].mean()


def fine_tune(probe: Segmenter, items: list[Labelled], task: Task, seed: int, steps: int) -> Segmenter:
    """Train all weights for `steps` steps of one-cycle Adam, starting from the fitted probe.

    A fresh head would spend a short schedule on the bias of a rare foreground, and would distort good features on the
    way (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022). Random weights start in the same way.
    """
    model = copy.deepcopy(probe).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, task.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images, labels = zip(*(draw_crop(items, task, g) for _ in range(task.batch)), strict=True)
        with torch.autocast("cpu", torch.bfloat16):  # three times as fast in 3D where the processor has AVX512-BF16
            scores = model(torch.stack(images))
        loss = segmentation_loss(scores.float(), torch.stack(labels))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


def main(arguments: list[str] | None = None) -> None:
    p = parser(__doc__)
    p.add_argument("--task", choices=TASKS, required=True)
    p.add_argument("--labels", type=int, required=True, help="number of labelled images")
    p.add_argument("--init", choices=INITS, required=True, help="weights to start from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rows", choices=("val", "test"), default="test", help="rows on which Dice is measured")
    p.add_argument("changes", nargs="*", help="key=value, values as JSON: fields of the task, for tuning")
    args = p.parse_args(arguments)

    started = time.perf_counter()
    path = result_path(args.out, "downstream", args.rows, args.task, args.labels, args.init, args.seed)
    if path.exists():
        print(f"{path} is there already")
        return
    task = replace(TASKS[args.task], **parse_changes(args.changes, literal=True))
    cache = args.out / "cache"
    train = read_split(task, args.data, cache, "train", args.labels, args.seed)
    held_out = read_split(task, args.data, cache, args.rows, task.evaluated)
    backbone = load_weights(args.init, task, args.seed, args.out)

    probe = fit_probe(backbone, train, task, args.seed)
    probe_dice = mean_dice(probe, held_out, task.classes)
    print(f"linear probe: Dice {probe_dice:.3f}", flush=True)
    dice = {}
    for steps in task.schedules:
        dice[steps] = mean_dice(fine_tune(probe, train, task, args.seed, steps), held_out, task.classes)
        print(f"fine-tuning, {steps} steps: Dice {dice[steps]:.3f}", flush=True)
    result = {
        "task": args.task,
        "labels": args.labels,
        "init": args.init,
        "seed": args.seed,
        "images": len(held_out),
        "probe": probe_dice,
        "fine_tuning": dice,
    }
    write_result(path, result, started)


if __name__ == "__main__":
    main()

"""Crops for pretraining and the order in which they come: both pure functions of the seed and the position."""

from collections.abc import Generator, Iterable, Iterator
from multiprocessing import get_all_start_methods
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cover.config import DataConfig
from cover.data.images import ImageSet
from cover.data.report import DataError, ImageError
from cover.data.store import Chunked
from cover.process import ignore_signals
from cover.rng import Draws

_REPLACEMENTS = 16  # images tried in place of one that fails, before giving up


class PretrainDataset(Dataset):
    """Random crops, each with a margin of context; what it returns depends only on (seed, epoch, index).

    Args:
        images: where the crops come from.
        config: `crop`, `foreground` (share of crops centred on a foreground voxel, in volumes) and `on_error` count.
        margin: voxels of context on each side of the crop, one per axis.
        seed: of the run.
    """

    def __init__(self, images: ImageSet, config: DataConfig, margin: tuple[int, ...], seed: int):
        if len(margin) != len(config.crop):
            raise ValueError(f"PretrainDataset: `margin` must have one number per axis of {config.crop}, got {margin}")
        self.images, self.config, self.margin, self.seed = images, config, tuple(margin), seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | str]:
        """One sample, for the key (epoch, index).

        Returns:
            image: float32 [in_channels, *(crop + 2 * margin)]; outside the image its nearest voxel is repeated.
            extent: float32 [d, 2], first and last real voxel per axis, in coordinates of the patch.
            epoch, index: int64, the key.
            replaced: empty, or why another image stands in for one that can no longer be read (`on_error="skip"`).

        Raises:
            DataError: an image can no longer be read and `on_error` is "fail", or too many in a row cannot.
        """
        epoch, index = torch.tensor(key, dtype=torch.int64)
        failures = []
        draws = Draws(self.seed, epoch[None], index[None])
        for attempt in range(1 + _REPLACEMENTS):
            i = int(index) if attempt == 0 else int(draws.uniform(f"data.replacement.{attempt}") * len(self))
            try:
                image, extent = self._crop(i, draws)
            except ImageError as error:
                failures.append(f"{self.images.name(i)}: {error}")
                if self.config.on_error == "fail":
                    raise DataError(f"data: {failures[0]}") from error
            else:
                replaced = f"data: another image takes the place of {'; '.join(failures)}" if failures else ""
                return {"image": image, "extent": extent, "epoch": epoch, "index": index, "replaced": replaced}
        raise DataError(f"data: {len(failures)} images in a row can no longer be read, the last: {failures[-1]}")

    def _crop(self, i: int, draws: Draws) -> tuple[Tensor, Tensor]:
        array = self.images.array(i)
        size, crop, margin = (np.array(shape) for shape in (array.shape[1:], self.config.crop, self.margin))
        # a crop lies inside the image, or where the image is smaller, the image inside the crop
        low, high = np.minimum(size - crop, 0), np.maximum(size - crop, 0)
        start = low + (draws.uniform("data.start", len(size))[0].numpy() * (high - low + 1)).astype(np.int64)
        biased, which = draws.uniform("data.foreground", 2)[0].tolist()
        positions = self.images.foreground(i) if biased < self.config.foreground else None
        if positions is not None:
            start = np.clip(positions[int(which * len(positions))] - crop // 2, low, high)
        return cut(array, start - margin, crop + 2 * margin)


def batches_of(
    dataset: PretrainDataset, keys: Iterable[list[tuple[int, int]]], workers: int, pin_memory: bool = False
) -> Generator[dict[str, Any], None, None]:
    """The samples of each list of keys as one batch: tensors get a first axis, `replaced` becomes a list.

    To be closed: the worker processes, which leave signals to the main one, end then.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        # torch's workers end with their parent: when the run is killed, they must not be a fork server's children
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,
        generator=torch.Generator(),  # the global one is part of a run's checkpoint: leave it alone
    )
    failure = ""
    try:
        yield from loader
    except DataError as error:  # that of a worker process carries its traceback
        failure = str(error).rsplit("DataError: ", 1)[-1].strip()
        error.__traceback__ = None  # its frames hold the loader, and would keep the workers alive
    if failure:
        raise DataError(failure)


def cut(array: np.ndarray | Chunked, start: np.ndarray, shape: np.ndarray) -> tuple[Tensor, Tensor]:
    """A patch of [C, *S] from voxel `start` on, which may reach outside: there the nearest voxel is repeated.

    Returns:
        The patch, float32 [C, *shape], and its extent, float32 [d, 2] (see `PretrainDataset`).
    """
    size = np.array(array.shape[1:])
    first, last = np.maximum(start, 0), np.minimum(start + shape, size)
    region = array[(slice(None), *map(slice, first, last))]
    before, after = first - start, start + shape - last
    patch = torch.from_numpy(np.array(region)).float()
    padding = [int(n) for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    if any(padding):
        patch = F.pad(patch, padding, mode="replicate")
    return patch, torch.from_numpy(np.stack([before, before + last - first - 1], axis=-1)).float()


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), a pure function of (seed, position): each epoch is a permutation without repeats.

    Args:
        length: number of images.
        batch: images per batch; a batch may reach into the next epoch.
        seed: of the run.
        start: the images that the run has seen already, in all processes.
        steps: how many batches are yielded.
        rank, ranks: this process and their number; together they go through the permutation without repeats.
    """

    def __init__(
        self, length: int, batch: int, seed: int, start: int = 0, *, steps: int, rank: int = 0, ranks: int = 1
    ):
        if length < 1 or batch < 1:
            raise ValueError(f"BatchSampler: `length` and `batch` must be at least 1, got {length} and {batch}")
        self.length, self.batch, self.seed, self.start, self.steps = length, batch, seed, start, steps
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return max(0, self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, order = None, []
        for step in range(self.steps):
            keys = []
            first = self.start + (step * self.ranks + self.rank) * self.batch
            for sample in range(first, first + self.batch):
                epoch, position = divmod(sample, self.length)
                if epoch != current:
                    current, order = epoch, self._permutation(epoch)
                keys.append((epoch, order[position]))
            yield keys

    def _permutation(self, epoch: int) -> list[int]:
        draws = Draws(self.seed, torch.full((self.length,), epoch), torch.arange(self.length))
        return torch.argsort(draws.uniform("data.order"), stable=True).tolist()

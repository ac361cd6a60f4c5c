"""The processes of one run, as torchrun starts them: which of them this is, and sums over all of them.

One process by itself needs no process group, and every sum over it is the number itself.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0; process 0 writes the files of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def restarted() -> bool:
    """Whether torchrun has started this process anew, after one of its kind had died."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Within the block, the processes that torchrun has started know each other: NCCL on CUDA devices, else gloo.

    Without torchrun, or for a single process, nothing happens. `device` is the setting of that name.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun's store outlives its processes: after a restart, the addresses of the dead ones are still in it
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {_restarts()}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # A thread of gloo's may still wait for Python's lock, to let go of a tensor of the last operation. It gets it
        # here: if Python ends first, the thread ends the process, and a run that is done fails (seen with torch 2.13).
        time.sleep(0.2)


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, on each of them."""
    if count() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(value: Any) -> list[Any]:
    """What every process has for `value`, in the order of their ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """The block runs in process 0 first and then in all others: they find what the first has made."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if count() > 1 and rank() == 0:
            dist.barrier()

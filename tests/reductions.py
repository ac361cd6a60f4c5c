"""Counts what two processes tell each other in each step; torchrun starts it (test_processes.py).

    torchrun --nproc-per-node=2 reductions.py DATA FOLDER

Prints as JSON, for one part of the batch and for four: in each step the reductions of gradients, and of all else.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from tiny import SETTINGS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from cover import processes
from cover.config import Config, replace
from cover.trainer import Trainer


class Counting(Trainer):
    """Keeps how often gradients and other tensors were reduced in each step."""

    def train(self):
        self.counts = []
        self.network.register_comm_hook(None, self.reduce_gradients)
        return super().train()

    def train_step(self, batch):
        self.counts.append([0, 0])
        all_reduce = dist.all_reduce

        def counted(*arguments, **options):
            self.counts[-1][1] += not options  # the hook for the gradients gives some
            return all_reduce(*arguments, **options)

        dist.all_reduce = counted
        try:
            return super().train_step(batch)
        finally:
            dist.all_reduce = all_reduce

    def reduce_gradients(self, _, bucket):
        self.counts[-1][0] += 1
        return allreduce_hook(None, bucket)


def main(data: str, folder: str) -> None:
    counts = {}
    with processes.group("cpu"):
        for accumulate in (1, 4):
            settings = replace(Config(), **SETTINGS | dict(batch=4, steps=3, accumulate=accumulate))
            trainer = Counting(settings, data, Path(folder, str(accumulate)))
            trainer.run()
            counts[accumulate] = trainer.counts
        if processes.rank() == 0:
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

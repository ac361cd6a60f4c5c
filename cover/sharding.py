"""Models in shares, by FSDP2: every process holds a share of weights, gradients and the state of the optimiser.

Checkpoints know nothing of it: what is written is whole, and each process takes its share of what is read.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from cover import processes
from cover.model import COVER


def shard(model: COVER) -> COVER:
    """Share the model out, in place: each block of the backbone is whole only while it computes.

    The pyramid, small and called in parts, is whole from the start of a forward to its end. FSDP2 takes contiguous
    weights only: convolutions run with channels first.
    """
    # the maps that the model returns are views, without the padding; nobody writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(next(model.parameters()).device.type, (processes.count(),))
    for child in model.backbone.children():
        # a list has no forward, and so no moment at which to be whole
        for block in child if isinstance(child, nn.ModuleList) else (child,):
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within the block the model is whole in every process: each may call it as often as it has work to do."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def gathered(state: Any) -> Any:
    """A state with its tensors whole, in process 0, which is to write it; all processes have to call.

    The others get what is of no use: they let go of every tensor before the next is gathered.
    """

    def gather(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        tensor = x.full_tensor()
        return tensor if processes.rank() == 0 else None

    return tree_map(gather, state)


def share(x: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor, where it holds `like` of one: its share, or all of it laid out alike.

    Each process has to have the same `x`. PyTorch's fused optimisers take for granted that a state lies in memory as
    its parameter does, and on a CPU do not check it.
    """
    if x.shape != like.shape:  # a number of steps
        return x
    if isinstance(like, DTensor):
        x = x.to(like.device).contiguous()
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def load(model: nn.Module, optimiser: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Load whole states into a model and its optimiser, shared out or not."""
    own = model.state_dict()
    model.load_state_dict({name: share(x, own[name]) if name in own else x for name, x in weights.items()})
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    # parameters are numbered in their order
    shares = {
        i: {name: share(x, parameters[i]) if isinstance(x, Tensor) else x for name, x in values.items()}
        for i, values in state["state"].items()
    }
    # whether it is fused is not of the state: fused SGD knows no shares
    pairs = zip(state["param_groups"], optimiser.param_groups, strict=True)
    groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
    optimiser.load_state_dict({"state": shares, "param_groups": groups})

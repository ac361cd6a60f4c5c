"""The model: its vector pyramid beside an eager one, and a training step beside the bare backbone.

A training step is the trainer's own: views, model, losses, gradients, clipping, optimiser and metrics. Bare is the
backbone's forward and backward of the two views; both run in turn, and what counts is the step's time on top.
"""

import contextlib
import time

import eager
import numpy as np
import pytest
import torch
from tables import NETWORKS

from cover import config
from cover.config import ModelConfig
from cover.process import keeping_freed_memory
from cover.pyramid import VectorPyramid
from cover.trainer import Trainer
from cover.unet import CHANNELS_LAST, UNet
from cover_kernels.measure import one_pass, peak_above, synchronised
from cover_kernels.problems import BOTH, FORWARD, Work


def pytest_generate_tests(metafunc):
    networks = NETWORKS[metafunc.config.getoption("form")]
    metafunc.parametrize("network", networks, ids=lambda network: str(network).replace(" ", "_"), scope="module")


@pytest.fixture(scope="module", autouse=True)
def memory_as_in_training(device):
    """As `pretrain` has it where memory is plenty."""
    with keeping_freed_memory(device == "cpu"):
        yield


@pytest.fixture(scope="module")
def trainer(network, device, tmp_path_factory):
    """A run on two random images, somewhat larger than the crop."""
    data = tmp_path_factory.mktemp("data")
    for i in range(2):
        image = np.random.default_rng(i).normal(size=[n + 16 for n in network.S]).astype(np.float32)
        np.save(data / f"{i}.npy", image)
    settings = config.replace(config.Config(), device=device, **network.settings)
    return Trainer(settings, data, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("who", ["cover", "eager"])
@pytest.mark.parametrize("which", [FORWARD, BOTH])
def test_pyramid(network, which, who, trainer, device, timed):
    model = trainer.model
    with torch.no_grad():  # what the backbone gives, in its memory format
        maps = model.backbone(torch.randn(2 * network.batch, 1, *network.S, device=device))
    views = [view.clone(memory_format=torch.preserve_format) for x in maps for view in x.chunk(2)]
    leaves = [*(x.requires_grad_() for x in views), *model.pyramid.parameters()]

    def ours(*leaves):
        return model.pyramid(leaves[: 2 * len(maps) : 2], leaves[1 : 2 * len(maps) : 2])[-1]

    def peer(*leaves):
        with eager.by_hand():
            return ours(*leaves)

    with torch.no_grad():
        flow, other = ours(*leaves), peer(*leaves)
    assert (flow - other).abs().mean() < 1e-2 * flow.abs().mean()
    call = one_pass(ours if who == "cover" else peer, leaves, which)
    timed(call, f"pyramid {network}", which, who, suite="model")


@pytest.mark.parametrize("who", ["cover", "eager"])
def test_training_step(network, who, form, trainer, device, timed, left_out):
    problem, which = f"training {network}", "step"
    if who == "eager" and form == "short":
        left_out(problem, which, who, "as slow as all else together: only in the full form")
    batch, backbone = next(trainer.batches()), trainer.model.backbone
    batch.pop("replaced")
    x = torch.randn(2 * network.batch, 1, *network.S, device=device)
    grads = [torch.ones_like(features) for features in backbone(x)]

    def bare():
        torch.autograd.backward(backbone(x), grads)
        backbone.zero_grad()

    def step():
        with eager.by_hand() if who == "eager" else contextlib.nullcontext():
            trainer.train_step(batch)

    bare, alone = synchronised(bare, device), []

    def timed_bare():
        start = time.perf_counter()
        bare()
        alone.append(time.perf_counter() - start)

    memory = peak_above(bare, device)[0]
    timed(step, problem, which, who, before=timed_bare, suite="model", bare=alone, bare_memory=memory)


@pytest.mark.parametrize("who", ["contiguous", "channels last", "channels last, bf16"])
def test_backbone(network, who, device, timed):
    """What the backbone's order of memory and precision give: forward and backward of two views."""
    d = len(network.S)
    order = torch.contiguous_format if who == "contiguous" else CHANNELS_LAST[d]
    backbone = UNet(d, 1, network.channels).to(device, memory_format=order)
    x = torch.randn(2 * network.batch, 1, *network.S, device=device)

    def forward():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=who.endswith("bf16")):
            return backbone(x)

    grads = [torch.ones_like(features) for features in forward()]

    def call():
        torch.autograd.backward(forward(), grads)
        backbone.zero_grad()

    timed(call, f"backbone {network}", BOTH, who, suite="model")


@pytest.mark.parametrize("who", ["cover", "direct"])
def test_receptive_field(network, who, form, device, timed):
    """The paper's claim: its pyramid, with windows of 5, beside one VEU whose window is what the pyramid reaches."""
    d, levels = len(network.S), len(network.channels)
    if d == 3:
        pytest.skip("the paper's claim is about images")
    strides = [(2**level,) * d for level in range(levels)]
    chosen = range(levels - 1, -1, -1) if who == "cover" else [0]
    window = 5 if who == "cover" else 121 if form != "quick" else 13
    torch.manual_seed(0)
    heads = ModelConfig().heads[-len(chosen) :]
    pyramid = VectorPyramid([network.channels[i] for i in chosen], [strides[i] for i in chosen], window, heads)
    pyramid = pyramid.to(device)
    maps = [
        torch.randn(2, network.channels[i], *(n // 2**i for n in network.S), device=device).chunk(2) for i in chosen
    ]
    b, a = zip(*maps, strict=True)
    cost = pyramid.cost(network.S)
    work = Work(2 * sum(level.multiply_adds for level in cost), 0, sum(level.pairs for level in cost))
    field = "x".join(map(str, pyramid.receptive_field))
    problem = f"receptive field in {'x'.join(map(str, network.S))}"
    call = torch.no_grad()(lambda: pyramid(b, a))
    timed(call, problem, FORWARD, who, work, suite="model", remark=f"sees {field}")

"""What one step of the optimiser does, from a batch of patches to new weights; the trainer is all around it.

Nothing in here waits for the device: a loop of steps may be as far ahead of a GPU as the queue is long.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cover import processes, sharding
from cover.config import Config
from cover.evaluation import device_of
from cover.losses import consistency_loss, feature_variance, mean_epe, vector_loss
from cover.model import COVER, at_input, build_model
from cover.rng import Draws
from cover.views import ViewMaker, Views, fit_to_reach, reachable_fraction

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(settings: Config, device: torch.device) -> str:
    """The precision of the network's autocast, "fp32" (none), "bf16" or "fp16"."""
    if settings.train.precision != "auto":
        return settings.train.precision
    return "bf16" if device.type == "cpu" and computes_in_bf16() else "fp32"


def computes_in_bf16() -> bool:
    """Whether this machine's processor has instructions for products of bfloat16 (AVX512-BF16 or AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class Learner:
    """Model, views and optimiser, and one step of them. A variant overrides the method that it does differently.

    Args:
        settings: all settings.
        build: makes the model from the settings.
    """

    def __init__(self, settings: Config, build: Callable[[Config], COVER] = build_model):
        self.config = settings
        self.device = device_of(settings)
        self.precision = precision_of(settings, self.device)
        self.model = self.build_model(build)
        self.model.recompute(settings.train.recompute)
        self.network = self.distribute()
        self.compile()
        self.views = self.build_views()
        self.optimiser = self.build_optimiser()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def build_model(self, build: Callable[[Config], COVER]) -> COVER:
        return build(self.config).to(self.device)

    def distribute(self) -> nn.Module:
        """The model as all processes train it together."""
        if processes.count() == 1:
            return self.model
        if self.config.train.shard:
            return sharding.shard(self.model)
        # gradients lie in the buckets that are exchanged, not beside them
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def compile(self) -> None:
        """Have torch.compile make code of the backbone, or of network and losses together, when they first run."""
        if self.config.train.compile == "backbone":
            self.model.backbone.compile(dynamic=False)
        elif self.config.train.compile == "step":
            self.loss = torch.compile(self.loss, dynamic=False)

    def build_views(self) -> ViewMaker:
        """The maker of view pairs, its displacements fitted to what the pyramid can express."""
        dvf = fit_to_reach(self.config.dvf, self.config.data.crop, self.model.pyramid.reach)
        return ViewMaker(dvf, self.config.appearance, self.config.data.crop)

    def build_optimiser(self) -> torch.optim.Optimizer:
        c, parameters = self.config.train, self.model.parameters()
        if c.optimiser == "sgd":
            # fused SGD knows no shares (torch 2.13)
            return torch.optim.SGD(parameters, c.lr, c.momentum, weight_decay=c.weight_decay, fused=not c.shard)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimiser]
        return kind(parameters, c.lr, weight_decay=c.weight_decay, fused=True)

    def gradients(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of a batch, clipped; returns its metrics, scalars on the device."""
        metrics = self.backward(self.make_views(batch))
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip or math.inf)
        return metrics | {"gradient_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm}

    def update(self) -> None:
        """The optimiser's step with these gradients, which are infinite where a scaled loss has overflown: no step."""
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()

    def make_views(self, batch: dict[str, Tensor]) -> Views:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        return self.views(batch, Draws(self.config.train.seed, batch["epoch"], batch["index"], self.device))

    def backward(self, views: Views) -> dict[str, Tensor]:
        """Gradients of the mean over all voxels of the mask, in all parts and processes; the metrics likewise."""
        c = self.config.train
        voxels = processes.total(views.mask.sum())
        sums: dict[str, Tensor] = {}
        parts = [Views(*tensors) for tensors in zip(*(x.chunk(c.accumulate) for x in views), strict=True)]
        for i, part in enumerate(parts):
            # the replicas need to agree on the gradient once, with the last part; shares have no room for a whole one
            waits = isinstance(self.network, DistributedDataParallel) and i < len(parts) - 1
            with self.network.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
                    loss, metrics = self.loss(part)
                share = part.mask.sum() / voxels.clamp(min=1)
                # processes take the mean of their gradients, not the sum
                self.scaler.scale(loss * (share * processes.count())).backward()
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0) + torch.where(share > 0, share * value.detach().float(), 0)
        sums = dict(zip(sums, processes.total(torch.stack(list(sums.values()))).unbind(), strict=True))
        return sums | {"mask_fraction": voxels / (views.mask.numel() * processes.count())}

    def loss(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_vec + L_con with their factors, and the metrics of these views: scalars, means over their mask."""
        c = self.config.train
        a, b, flow, mask = views
        prediction = self.network(a, b)
        stride = self.model.backbone.strides[-1]
        finest_a, finest_b = (
            at_input(maps[-1], stride, flow.shape[2:]) for maps in (prediction.features_a, prediction.features_b)
        )
        vector = vector_loss(prediction.flow, flow, mask)
        consistency = consistency_loss(finest_b, finest_a, flow, mask)
        metrics = {
            "vector_loss": vector,
            "consistency_loss": consistency,
            "epe": mean_epe(prediction.flow.detach(), flow, mask),
            "epe_zero": mean_epe(torch.zeros_like(flow), flow, mask),
            "feature_variance": feature_variance(finest_b),
            "reachable_fraction": reachable_fraction(flow, mask, self.model.pyramid.reach),
        }
        return c.vector_weight * vector + c.consistency_weight * consistency, metrics

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: all the state of the schedule is the step."""
        c = self.config.train
        warmup = c.warmup * c.steps
        if c.schedule == "constant":
            return c.lr
        if step < warmup:
            return c.lr * (step + 1) / (warmup + 1)
        return c.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (c.steps - warmup)))

"""COVER: a backbone and a vector pyramid, from two views of an image to the displacement between them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cover.config import Config
from cover.pyramid import VectorPyramid, real_size, replicate
from cover.unet import CHANNELS_LAST, LINEAR, UNet
from cover_kernels import compose


class Backbone(Protocol):
    """What COVER pretrains: any module that returns feature maps, coarse to fine, and says their shapes.

    `forward` takes an image [B, in_channels, *S], every axis a multiple of `strides[0]`, and returns one map
    [B, channels[l], *(S / strides[l])] per level. A backbone may have an attribute `recompute`, what its backward makes
    anew to keep less: "off", "norms" (what costs little) or "stages" (all but the outputs of its stages).
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # to the input, one int per axis; each a multiple of the next

    def __call__(self, x: Tensor) -> list[Tensor]: ...


class Prediction(NamedTuple):
    """What COVER says about two views; without padding, whatever the size of the image.

    flow: [B, d, *S], the displacement from view b to view a, in voxels: b(p) shows what a(p + flow(p)) shows.
    flows: the same on each level of the pyramid, coarse to fine, [B, d, *S_l], in voxels of the level.
    features_a, features_b: maps of the backbone, coarse to fine, [B, channels[l], *S_l].
    """

    flow: Tensor
    flows: list[Tensor]
    features_a: list[Tensor]
    features_b: list[Tensor]


class COVER(nn.Module):
    """COntrast in VEctor Regression (He & Li, ICCV 2025): the displacement between two views, from features alone.

    Args:
        backbone: see `Backbone`; shared by both views.
        pyramid: made for the channels and strides of that backbone.
    """

    def __init__(self, backbone: Backbone, pyramid: VectorPyramid):
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.view_by_view = False

    def recompute(self, what: str) -> None:
        """Trade a second forward pass for memory: what is not kept for the backward, but computed again.

        Args:
            what: "off"; "norms": what lies between the convolutions of the backbone, which do not run again; "stages":
                all that lies inside its stages; "all": the backbone's maps too, one view after the other, so that the
                backward holds the stages of one view at a time.

        Raises:
            ValueError: no such choice, or the backbone has no attribute `recompute`.
        """
        choices = ("off", "norms", "stages", "all")
        if what not in choices:
            raise ValueError(f"COVER: `recompute` must be one of {', '.join(choices)}, got {what!r}")
        if what != "off" and not hasattr(self.backbone, "recompute"):
            raise ValueError(f"COVER: `recompute` needs a backbone that has it; {type(self.backbone).__name__} has not")
        self.view_by_view = what == "all"
        if hasattr(self.backbone, "recompute"):
            self.backbone.recompute = "stages" if what == "all" else what

    def forward(self, a: Tensor, b: Tensor) -> Prediction:
        """Predict the displacement psi with b(p) = a(p + psi(p)).

        Args:
            a, b: the views, [B, in_channels, *S] each, of any size: edges are replicated up to a multiple of the
                backbone's strides, the padding is left out of the prediction.

        Returns:
            See `Prediction`.

        Raises:
            ValueError: the views differ in shape or do not have the backbone's number of axes.
        """
        strides = self.backbone.strides
        if a.shape != b.shape or a.dim() != len(strides[0]) + 2:
            raise ValueError(
                f"COVER: `a` and `b` must be [B, in_channels, *S] of one shape, S of {len(strides[0])} axes, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        size = a.shape[2:]
        padded = tuple(n * s for n, s in zip(real_size(size, strides[0]), strides[0], strict=True))
        if self.view_by_view:
            run = self.backbone
            if torch.is_grad_enabled():
                run = partial(checkpoint, run, use_reentrant=False)
            features_a, features_b = (run(replicate(x, size, padded)) for x in (a, b))
        else:
            features = self.backbone(replicate(torch.cat((a, b)), size, padded))
            features_a, features_b = zip(*(x.chunk(2) for x in features), strict=True)
        flows = self.pyramid(features_b, features_a, size)
        flow, stride = flows[-1], strides[-1]
        if any(s > 1 for s in stride):
            flow = compose(flow, flow.new_zeros((*flow.shape[:2], *padded)), stride)
        return Prediction(
            _crop([flow], size, [(1,) * len(size)])[0],
            _crop(flows, size, self.pyramid.strides),
            _crop(features_a, size, strides),
            _crop(features_b, size, strides),
        )


def at_input(x: Tensor, stride: tuple[int, ...], size: Sequence[int]) -> Tensor:
    """A map [B, C, *S_l] of a level with that stride at the input's resolution, linear: [B, C, *size]."""
    if any(s > 1 for s in stride):
        x = F.interpolate(x, scale_factor=stride, mode=LINEAR[len(stride)])
    return x[(..., *map(slice, size))]


def _crop(maps, size, strides):
    """Each map without the voxels that hold nothing but padding."""
    return [x[(..., *map(slice, real_size(size, stride)))] for x, stride in zip(maps, strides, strict=True)]


def build_model(config: Config) -> COVER:
    """The U-Net and pyramid that `config` describes: `len(config.data.crop)` dimensions, randomly initialised."""
    model = config.model
    d = len(config.data.crop)
    # what that gives on a CPU: docs/performance.md
    backbone = UNet(d, config.data.in_channels, model.channels).to(memory_format=CHANNELS_LAST[d])
    pyramid = VectorPyramid(
        backbone.channels,
        backbone.strides,
        model.window,
        model.heads,
        model.group_channels,
        model.mask_outside,
        model.norm,
    )
    return COVER(backbone, pyramid)

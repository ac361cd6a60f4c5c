"""The argument checks that all operators share: one clear error, the same on every backend, before any work.

Each message names the operator and the argument, says what was expected and what came. Those of `check_raw`, for calls
of the registered operators, are the ones of csrc/binding.h.
"""

from collections.abc import Iterable
from operator import floordiv, index, mod

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that an operator accumulates in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def order(channels_last: bool, dims: int) -> torch.memory_format:
    """The order in memory of an image [B, C, *S] of so many axes."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Whether an image [B, C, *S] lies in memory with its channels last, and not contiguous as well."""
    return x.is_contiguous(memory_format=order(True, x.dim())) and not x.is_contiguous()


def _check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if forward_ad.unpack_dual(x).tangent is not None:  # torch.library would drop the tangent without a word
        raise RuntimeError(f"{op}: `{name}` carries a tangent, but {op} has no forward-mode derivative (jvp)")


def check_image(op: str, name: str, x: Tensor, channels: str = "C") -> int:
    """Check that `x` is a floating-point [B, channels, H, W] or [B, channels, D, H, W]; returns d (2 or 3)."""
    _check_tensor(op, name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: `{name}` must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{op}: `{name}` must be [B, {channels}, H, W] or [B, {channels}, D, H, W], got {list(x.shape)}"
        )
    if any(size == 0 for size in x.shape[1:]):
        raise ValueError(f"{op}: `{name}` must have no empty axis but the batch, got {list(x.shape)}")
    return x.dim() - 2


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor, shape, dtypes=None) -> None:
    """Check that `x` has the given shape, the device of `like` and one of `dtypes` (default: that of `like`)."""
    _check_tensor(op, name, x)
    if x.device != like.device:
        raise ValueError(f"{op}: `{name}` must be on the device of `{like_name}`, {like.device}, got {x.device}")
    dtypes = dtypes or (like.dtype,)
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{op}: `{name}` must be {expected} beside `{like_name}` in {like.dtype}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{op}: `{name}` must have shape {list(shape)} beside `{like_name}` {list(like.shape)}, got {list(x.shape)}"
        )


def check_grad(op: str, grad: Tensor) -> None:
    """Check the gradient of an operator's output: autograd has seen to its shape, dtype and device."""
    _check_tensor(op, "grad", grad)


def promoted(x: Tensor, like: Tensor) -> Tensor:
    """`x`, under autocast in the wider of both dtypes: what comes of convolutions meets what does not."""
    if not all(isinstance(t, Tensor) and t.dtype in DTYPES for t in (x, like)) or x.dtype == like.dtype:
        return x
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    return x.to(torch.promote_types(x.dtype, like.dtype)) if autocast else x


def is_count(value) -> bool:
    """Whether `value` is an int above 0, NumPy's included, and not a bool."""
    if isinstance(value, (bool, Tensor)):
        return False
    try:
        return 1 <= index(value) < 2**31
    except TypeError:  # not an int; an array has the method, but may not have the number
        return False


def is_finite(value, dtype: torch.dtype) -> bool:
    """Whether `value` is an int or float, and not a bool, that is finite in `dtype`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= torch.finfo(dtype).max


def per_axis(op: str, name: str, value, d: int) -> list[int]:
    """An int or one int per axis, as a list of d positive ints."""
    # an array without axes calls itself iterable
    several = isinstance(value, Iterable) and not isinstance(value, Tensor) and getattr(value, "ndim", 1)
    values = list(value) if several else [value] * d
    if len(values) != d or not all(map(is_count, values)):
        raise ValueError(f"{op}: `{name}` must be a positive int or {d} of them, one per spatial axis, got {value!r}")
    return list(map(index, values))


def coarse_shape(op: str, stride: list[int], fine_name: str, fine: Tensor) -> list[int]:
    """The spatial shape of a flow that is coarser than `fine` by `stride`."""
    S = list(fine.shape[2:])
    if any(size % s for size, s in zip(S, stride, strict=True)):
        raise ValueError(f"{op}: `stride` must divide the spatial shape of `{fine_name}`, {S}, got {stride}")
    return [size // s for size, s in zip(S, stride, strict=True)]


def _expect(holds: bool, *message: str) -> None:
    if not holds:
        raise RuntimeError("".join(message))


def check_raw(name: str, arguments: dict) -> None:
    """Keep a raw call of a registered operator inside its tensors, on backends that are not csrc/binding.h's: its twin.

    `arguments`: by their names in `schemas.py`. Raises RuntimeError.
    """
    op = name.split("_")[0]
    like = arguments[{"veu": "q", "warp": "x", "compose": "residual"}[op]]
    per_axis = arguments["window" if op == "veu" else "stride"]
    _expect(like.dim() in (4, 5), op, ": expected [B, C, *S] with 2 or 3 spatial axes")
    B, C, *S = like.shape
    d, dtype = len(S), like.dtype
    _expect(len(per_axis) == d, op, ": expected a number for each axis")
    _expect(C > 0 and all(S), op, ": expected no empty axis")
    _expect(min(per_axis) > 0, op, ": expected numbers above 0 for the axes")
    _expect(dtype in DTYPES, "cover_kernels: tensors must be float64, float32, bfloat16 or float16")
    acc = acc_dtype(dtype)
    if op == "veu":
        heads = arguments["heads"]
        _expect(all(n % 2 for n in per_axis), "veu: expected an odd window")
        _expect(heads > 0 and C % heads == 0, "veu: the heads do not divide the channels")
        mask, v, lse = (1, S, (torch.bool,)), (d, S, (acc,)), (heads, S, (acc,))
        fits = {"k": (C, S, (dtype,)), "mask": mask, "grad_v": v, "v": v, "lse": lse}
    else:
        _expect(not any(map(mod, S, per_axis)), op, ": the stride does not divide the spatial shape")
        flow = d, list(map(floordiv, S, per_axis)), (dtype, acc if op == "warp" else dtype)
        fits = {"residual": (d, S, (dtype,)), "flow": flow, "grad_y": (C, S, (dtype,))}
    for key, (channels, shape, dtypes) in fits.items():
        if (x := arguments.get(key)) is not None:
            what = (op, ": ", key)
            _expect([*x.shape] == [B, channels, *shape], *what, " does not have the shape that the others ask for")
            _expect(x.dtype in dtypes, *what, " does not have the dtype that the others ask for")
            _expect(x.device == like.device, *what, " is not on the device of the others")

"""How much memory training takes at its peak: a step is rehearsed on tensors without storage, before any is run.

Every operator of the step passes by, those of the backward and of the optimiser included, and what lives between them
is added up: the same code as in training, in milliseconds for each operator whatever the size of its tensors.
"""

import contextlib
import dataclasses
import os
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cover import config
from cover.config import Config
from cover.evaluation import device_of
from cover.learner import Learner, precision_of
from cover.model import COVER, build_model
from cover.presets import preset_config
from cover.process import peak_memory
from cover.views import Views

# what the libraries of a process take that has trained, beyond what they took when they were imported: code that is
# read from the disk when it first runs, and code that oneDNN generates
_LIBRARIES = 60 * 2**20

# glibc's malloc gives blocks below this size back only from the end of its heap: what has been freed between them stays
# with the process. Measured: from a quarter to one and a half of what lived in such blocks: docs/training.md
_GIVEN = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
_MAPPED, _HOLES = int(_GIVEN) if _GIVEN.isdecimal() else 32 * 2**20, 0.6

# names of the limit, of what is taken and of the cache of files, in the first version of control groups
_GROUPS_VERSION_1 = "limit_in_bytes", "usage_in_bytes", "total_inactive_file"


class DoesNotFit(ValueError):
    """Training would need more memory than there is; the message has both figures, and the largest crop that fits."""


@dataclass(frozen=True)
class Plan:
    """The memory of training with some settings, in bytes, on one process; `print` shows a table.

    parts: what takes how much at the moment of the peak. peak: their sum. during: the operator at that moment.
    memory: what there is, None where nobody asked. crop: the largest of the preset's shape that fits into it, None
    where none does.
    """

    config: Config
    parts: dict[str, int]
    during: str
    memory: int | None = None
    crop: tuple[int, ...] | None = None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.memory is None or self.peak <= self.memory

    def __str__(self) -> str:
        c = self.config
        words = {name: getattr(c.train, name) for name in ("batch", "accumulate", "precision", "recompute")}
        lines = [f"crop {by(c.data.crop)}, {', '.join(f'{name} {value}' for name, value in words.items())}:"]
        lines += [f"  {name:<42}{gib(size):>12}" for name, size in self.parts.items()]
        lines += [f"  {f'peak, in {self.during}':<42}{gib(self.peak):>12}"]
        return "\n".join([*lines, self.verdict()] if self.memory is not None else lines)

    def verdict(self) -> str:
        """Whether it fits, in one sentence with the figures."""
        found = f"the largest crop that fits is {by(self.crop)}" if self.crop else "no crop fits"
        if self.fits:
            return f"fits into {gib(self.memory)}; {found}"
        return f"needs {gib(self.peak)}, there are {gib(self.memory)}; {found}"


def plan(
    preset: str | None = None,
    memory: str | int | None = None,
    build: Callable[[Config], COVER] = build_model,
    **settings: Any,
) -> Plan:
    """Predict the peak memory of training without running it (`cover plan --preset P --memory 24GiB key=value ...`).

    Args:
        preset: name of a preset; None: the defaults.
        memory: what there is, in bytes or as text ("24GiB"): then the plan also has the largest crop that fits.
        build: makes the model from the settings, as for `cover.pretrain`.
        **settings: single settings by name, over those of the preset; see `cover.config`.

    Raises:
        ValueError: a setting does not fit; the message names it.
    """
    wanted = config.replace(preset_config(preset or "default"), **settings)
    found = predict(wanted, build)
    if memory is None:
        return found
    memory = read_size(memory)
    return dataclasses.replace(found, memory=memory, crop=largest_crop(wanted, memory, build))


def require(settings: Config, build: Callable[[Config], COVER] = build_model) -> bool:
    """Raise DoesNotFit where training with these settings needs more memory than its device has to give now.

    Returns whether it has twice as much to give; False where that is not known.
    """
    memory = available(device_of(settings))
    try:
        found = predict(settings, build)
    except ValueError:  # settings that do not fit
        raise
    except Exception as error:  # a backbone of one's own may do what tensors without storage cannot
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the memory of a step cannot be predicted ({reason}), nor whether it fits", stacklevel=3)
        return False
    if found.peak > memory:
        found = dataclasses.replace(found, memory=memory, crop=largest_crop(settings, memory, build))
        raise DoesNotFit(
            f"a step with crop {by(settings.data.crop)} {found.verdict()}. Less is needed with a larger `accumulate` "
            f"(it is {settings.train.accumulate}), recompute=all or precision=bf16; check_memory=false trains anyway"
        )
    return 2 * found.peak <= memory


def predict(settings: Config, build: Callable[[Config], COVER] = build_model) -> Plan:
    """The plan of a run with these settings, its memory not being compared with anything."""
    try:
        parts, during = Rehearsal(settings, build).peak()
    except RuntimeError as error:
        if "Storage size calculation overflowed" not in str(error):
            raise
        raise ValueError(f"plan: a step has tensors of more than 2^63 bytes: {error}") from error
    return Plan(settings, before(settings) | parts, during)


def before(settings: Config) -> dict[str, int]:
    """What is taken whatever the size of a step."""
    device = device_of(settings)
    process = {"process, before it trains": taken(device)}
    return process | {"libraries that training loads": _LIBRARIES} if device.type == "cpu" else process


def largest_crop(
    settings: Config, memory: int, build: Callable[[Config], COVER] = build_model
) -> tuple[int, ...] | None:
    """The largest crop of the settings' shape, up to rounding to the coarsest stride, that trains in `memory` bytes."""
    stride = Rehearsal(settings, build).model.backbone.strides[0]
    left = memory - sum(before(settings).values())
    cells = [size / s for size, s in zip(settings.data.crop, stride, strict=True)]

    def crop(n: int) -> tuple[int, ...]:
        """Of n coarsest voxels along its longest axis."""
        return tuple(max(1, round(c * n / max(cells))) * s for c, s in zip(cells, stride, strict=True))

    def fits(n: int) -> bool:
        if prod(crop(n)) > settings.data.max_voxels:
            return False
        return sum(Rehearsal(config.replace(settings, crop=crop(n)), build).peak()[0].values()) <= left

    low, high = 0, max(1, round(max(cells)))
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return crop(low) if low else None


class Rehearsal(Learner):
    """A step of training on tensors that have shapes and no storage: its operators pass by, and none of them runs."""

    def __init__(self, settings: Config, build: Callable[[Config], COVER] = build_model):
        self.nowhere = FakeTensorMode(allow_non_fake_inputs=True)
        device = device_of(settings)
        self.on_cpu = device.type == "cpu"
        precision = precision_of(settings, device)
        super().__init__(config.replace(settings, device="cpu", compile="off", precision=precision), build)

    def build_model(self, build: Callable[[Config], COVER]) -> COVER:
        with torch.device("meta"):
            model = build(self.config)
        with self.nowhere:
            return model.to_empty(device="cpu")

    def distribute(self) -> nn.Module:
        return self.model

    def build_optimiser(self) -> torch.optim.Optimizer:
        optimiser = super().build_optimiser()
        # it needs no other memory; of fused SGD there is no fake kernel (torch 2.13): it would run, on zeros
        optimiser.param_groups[0]["fused"] = not isinstance(optimiser, torch.optim.SGD)
        return optimiser

    def batch(self, size: int) -> dict[str, Tensor]:
        """What the data set would give for `size` images."""
        c, d = self.config, len(self.config.data.crop)
        patch = [n + 2 * m for n, m in zip(c.data.crop, self.views.margin, strict=True)]
        return {
            "image": torch.empty(size, c.data.in_channels, *patch),
            "extent": torch.empty(size, d, 2),
            "epoch": torch.empty(size, dtype=torch.int64),
            "index": torch.empty(size, dtype=torch.int64),
        }

    def make_views(self, batch: dict[str, Tensor]) -> Views:
        with self.tally.of("batch and views"):
            return super().make_views(batch)

    def peak(self) -> tuple[dict[str, int], str]:
        """What lives at the peak of a step or of a validation after it: bytes by what it is, and the operator then."""
        c, parameters = self.config.train, list(self.model.parameters())
        self.tally = tally = Tally(self.on_cpu)
        with self.nowhere:
            # what a first step makes is there in all others
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                parameter.register_post_accumulate_grad_hook(lambda p: tally.add(p.grad, "gradients"))
            self.update()
            tally.add([*parameters, *self.model.buffers()], "parameters")
            tally.add([list(state.values()) for state in self.optimiser.state.values()], "optimiser's state")
            with tally:
                with tally.of("batch and views"):
                    batch = self.batch(c.batch)
                self.gradients(batch)
                self.update()
                with torch.no_grad():
                    views = self.make_views(self.batch(c.batch // c.accumulate))
                    self.model(views.a, views.b)
        return tally.parts, tally.during


class Tally(TorchDispatchMode):
    """Adds up, while it is on, the storages that live, and keeps what they were for when they were the most.

    on_cpu: with what libraries and malloc take there beside them.
    """

    def __init__(self, on_cpu: bool = True):
        super().__init__()
        self.on_cpu = on_cpu
        self.kind = "activations"
        self.live: dict[int, tuple[int, str]] = {}  # of every storage, by its address: bytes, and what it is for
        self.now: Counter[str] = Counter()
        self.heap = 0  # bytes of small ones
        self.parts: dict[str, int] = {}
        self.during = ""

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What is made within the block is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def add(self, tensors: Any, kind: str) -> None:
        """Count the storages of `tensors`, in lists as they may be, as of this kind from now on."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.live:
                    self._forget(key)
                else:
                    weakref.finalize(storage, self._forget, key)
                self.live[key] = storage.nbytes(), kind
                self._count(*self.live[key])

    def _forget(self, key: int) -> None:
        size, kind = self.live.pop(key)
        self._count(-size, kind)

    def _count(self, size: int, kind: str) -> None:
        self.now[kind] += size
        if abs(size) < _MAPPED:
            self.heap += size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        new = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.live]
        self.add(new, self.kind)
        parts = dict(self.now)
        if self.on_cpu:
            parts["scratch of that operator"] = workspace(function, args)
            parts["holes in the heap"] = int(_HOLES * self.heap)
        if sum(parts.values()) > sum(self.parts.values()):
            self.parts = parts
            self.during = function.overloadpacket.__name__
        return results


def workspace(function: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator takes on a CPU beside its inputs and outputs, while it runs.

    oneDNN copies the weights of a convolution into an order of its own, and in the backward their gradient too. In half
    precision each thread also transposes one image of the input and of the output's gradient, in whole vectors of
    channels. All other operators, cover_kernels' own included, take less than some MB. Measured: docs/training.md.
    """
    if function is torch.ops.aten.convolution.default:
        return args[1].nbytes
    if function is torch.ops.aten.convolution_backward.default:
        grad, x, weight = args[:3]
        half = grad.element_size() < 4
        images = [x.element_size() * 16 * -(-x.shape[1] // 16) * prod(x.shape[2:]) for x in (grad, x) if half]
        return 2 * weight.nbytes + torch.get_num_threads() * sum(images)
    return 0


def taken(device: torch.device) -> int:
    """Bytes that this process takes now: of tensors on a CUDA device, of memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:  # not Linux
        return peak_memory(device)


def available(device: torch.device) -> int:
    """Bytes that this process may take on the device, with those that it has: its share, where several train here."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = min(_free_of_the_system(), *_free_of_the_groups())
    return taken(device) + free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _free_of_the_system() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.M)
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def _free_of_the_groups() -> list[int]:
    """What the control groups of this process, those of a container or a batch job, leave to it."""
    free = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        most, used, cache = ("max", "current", "inactive_file") if not controllers else _GROUPS_VERSION_1
        folder = root / path.strip("/")
        for group in (folder, *folder.parents[: len(folder.parts) - len(root.parts)]):
            limit, taken = (_read(group / f"memory.{name}").strip() for name in (most, used))
            if limit.isdecimal() and taken.isdecimal():
                # the cache of files goes when memory is wanted
                cached = re.search(rf"^{cache} (\d+)$", _read(group / "memory.stat"), re.M)
                free.append(int(limit) - int(taken) + (int(cached[1]) if cached else 0))
    return free


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def read_size(size: str | int) -> int:
    """Bytes, from a number of them or a text such as "24GiB", "800MB" or "6e9"."""
    found = re.fullmatch(r"([\d.eE+]+) *(?:([kKMGT]?)(i?)B?)?", str(size).strip())
    try:
        power = " KMGT".index(found[2].upper() or " ")
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    except (TypeError, ValueError, AttributeError, OverflowError):  # the last: infinite
        raise ValueError(f'plan: `memory` must be a size such as "24GiB", got {size!r}') from None


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

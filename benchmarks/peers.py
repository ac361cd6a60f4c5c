"""Other ways to do the operators' work, each a function of a problem's tensors, or the reason why it cannot.

NATTEN, MONAI and torch-interpol are timed where they are installed: `pip install natten monai torch-interpol`.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import eager
import torch
import torch.nn.functional as F

import cover_kernels
from cover_kernels.measure import one_pass
from cover_kernels.problems import BOTH, FORWARD, Compose, Problem, Veu, Warp


class Unable(Exception):
    """A peer cannot do this; the message says why."""


@dataclass(frozen=True)
class Peer:
    """What is timed.

    function: of the problem's tensors.
    margin: voxels along the border of the image, where the peer defines another result.
    tolerance: mean error allowed, as a share of the mean absolute value; half precision is given 2 % in any case.
    """

    function: Callable
    margin: int = 0
    tolerance: float = 1e-3


def need(package: str, module: str) -> None:
    if not importlib.util.find_spec(module):
        raise Unable(f"not installed (pip install {package})")


def eager_peer(problem: Problem, device: str) -> Peer:
    if isinstance(problem, Veu):
        return Peer(lambda q, k: eager.veu(q, k, problem.window, problem.heads))
    function = eager.warp if isinstance(problem, Warp) else eager.compose
    return Peer(lambda x, y: function(x, y, problem.stride))


def in_place_peer(problem: Veu, device: str) -> Peer:
    window = (problem.window,) * len(problem.S)
    offsets, outside = eager.make_window(problem.S, window, torch.device(device))

    def veu(q, k):
        if torch.is_grad_enabled():
            raise Unable("writes in place: autograd cannot go back through it")
        return eager.attend_in_place(q, k, window, problem.heads, None, offsets, outside)

    return Peer(veu)


def compiled_peer(problem: Problem, device: str) -> Peer:
    if isinstance(problem, Veu) and problem.window ** len(problem.S) > 150:
        raise Unable(f"its loop over {problem.window ** len(problem.S)} offsets takes minutes to compile")
    torch.compiler.reset()
    if not isinstance(problem, Veu):
        return Peer(torch.compile(eager_peer(problem, device).function, dynamic=False))
    window = (problem.window,) * len(problem.S)
    # made outside of the graph, which would make it again in every call
    offsets, outside = eager.make_window(problem.S, window, torch.device(device))
    attend = torch.compile(eager.attend, dynamic=False)
    return Peer(lambda q, k: attend(q, k, window, problem.heads, None, offsets, outside))


def unfold_peer(problem: Veu, device: str) -> Peer:
    """All keys of every window side by side: the scores are one contraction."""
    d, r = len(problem.S), problem.window // 2
    needed = problem.batch * prod(problem.S) * problem.heads * problem.channels * problem.window**d * 4
    if needed > 2**31:
        raise Unable(f"its unfolded keys alone would take {needed / 2**30:.0f} GiB")
    offsets, outside = eager.make_window(problem.S, (problem.window,) * d, torch.device(device))
    outside = outside.movedim(0, -1)
    space, offset = "xyz"[:d], "uvw"[:d]

    def veu(q, k):
        keys = F.pad(k, [r] * 2 * d).unflatten(1, (problem.heads, -1))
        for axis in range(d):
            keys = keys.unfold(3 + axis, problem.window, 1)
        q = q.unflatten(1, (problem.heads, -1)) * problem.channels**-0.5
        scores = torch.einsum(f"bjc{space},bjc{space}{offset}->bj{space}{offset}", q, keys).flatten(-d)
        w = scores.float().masked_fill(outside, -torch.inf).softmax(-1).mean(1)
        return torch.einsum(f"b{space}o,od->bd{space}", w, offsets)

    return Peer(veu)


def blocks_within_reach(S, window: int, size: int, device: str):
    """For each block of `size` queries, in array order, the blocks of keys that some window of it touches."""
    n, r = prod(S), window // 2
    position, blocks = eager.identity(tuple(S), torch.device("cpu"), torch.long).flatten(1), -(-n // size)
    touched = torch.zeros(blocks, blocks, dtype=torch.bool)
    extent, token = torch.tensor(S).view(-1, 1), torch.arange(n)
    for offset in product(range(-r, r + 1), repeat=len(S)):
        key = position + torch.tensor(offset).view(-1, 1)
        inside = ((key >= 0) & (key < extent)).all(0)
        flat = torch.zeros_like(token)
        for axis, count in enumerate(S):
            flat = flat * count + key[axis]
        touched[token[inside] // size, flat[inside] // size] = True
    return touched.to(device)


def flex_peer(problem: Veu, device: str) -> Peer:
    """FlexAttention with the keys' coordinates as values, masked to the window; p is subtracted from the result."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if problem.dtype != torch.float32:
        raise Unable("coordinates as values need float32")
    S, r, n = problem.S, problem.window // 2, prod(problem.S)
    # head widths are powers of two from 16 on
    width = max(16, 1 << (problem.channels - 1).bit_length())

    def near(b, h, query, key):
        inside = True
        for size in reversed(S):
            inside = inside & ((query % size - key % size).abs() <= r)
            query, key = query // size, key // size
        return inside

    touched = blocks_within_reach(S, problem.window, 128, device)
    count = touched.sum(1, dtype=torch.int32)
    order = torch.argsort(touched.int(), dim=1, descending=True, stable=True).int()
    mask = BlockMask.from_kv_blocks(
        count[None, None], order[None, None].contiguous(), BLOCK_SIZE=128, mask_mod=near, seq_lengths=(n, n)
    )
    # from the middle of the image: smaller numbers are rounded less
    middle = torch.tensor([size / 2 for size in S], device=device)
    position = eager.identity(S, torch.device(device)).flatten(1).t() - middle
    torch.compiler.reset()
    attention = torch.compile(flex_attention, dynamic=False)

    def tokens(x):
        x = x.unflatten(1, (problem.heads, problem.channels)).flatten(3).transpose(2, 3)
        return F.pad(x, (0, width - problem.channels))

    def veu(q, k):
        values = F.pad(position, (0, width - len(S))).expand(problem.batch, problem.heads, -1, -1)
        found = attention(tokens(q), tokens(k), values, block_mask=mask, scale=problem.channels**-0.5)
        return (found[..., : len(S)] - position).mean(1).transpose(1, 2).unflatten(2, S)

    return Peer(veu)


def natten_peer(problem: Veu, device: str) -> Peer:
    """NATTEN with the keys' coordinates as values; at the border its windows shift where VEU's are masked."""
    need("natten", "natten")
    S, d = problem.S, len(problem.S)
    if min(S) < problem.window:
        raise Unable("its window must fit into the image")
    if problem.channels % 8:
        raise Unable("its channels must be a multiple of 8")
    if device == "cpu" and prod(S) > 2**12:
        raise Unable(f"its CPU path makes masks of {prod(S)}^2 elements, in int64 {prod(S) ** 2 / 2**27:.0f} GiB each")
    import natten

    attention = {2: natten.na2d, 3: natten.na3d}[d]
    middle = torch.tensor([size / 2 for size in S], device=device).view(-1, *[1] * d)
    position = (eager.identity(S, torch.device(device)) - middle).movedim(0, -1)

    def tokens(x):
        return x.unflatten(1, (problem.heads, problem.channels)).movedim((1, 2), (-2, -1)).contiguous()

    def veu(q, k):
        values = F.pad(position, (0, problem.channels - d)).to(q.dtype).unsqueeze(-2)
        values = values.expand(problem.batch, *[-1] * d, problem.heads, -1).contiguous()
        found = attention(tokens(q), tokens(k), values, kernel_size=(problem.window,) * d)
        return (found[..., :d].float().mean(-2) - position).movedim(-1, 1)

    return Peer(veu, margin=problem.window // 2)


def monai_peer(problem: Warp, device: str) -> Peer:
    need("monai", "monai")
    from monai.networks.blocks import Warp as MonaiWarp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its compiled extension is not there
        block = MonaiWarp("bilinear", "zeros")
    stride = (float(problem.stride),) * len(problem.S)
    return Peer(lambda x, flow: block(x, eager.upsample(flow, stride)))


def interpol_peer(problem: Warp, device: str) -> Peer:
    need("torch-interpol", "interpol")
    import interpol

    stride = (float(problem.stride),) * len(problem.S)
    identity = eager.identity(problem.S, torch.device(device), problem.dtype)

    def warp(x, flow):
        grid = (identity + eager.upsample(flow, stride)).movedim(1, -1)
        return interpol.grid_pull(x, grid, "linear", "zero", extrapolate=True)

    return Peer(warp)


def chain_peer(problem: Compose, device: str) -> Peer:
    # interpolates an interpolation: near enough to the definition, with a derivative that jumps elsewhere
    return Peer(lambda flow, residual: eager.compose_chain(flow, residual, problem.stride), tolerance=0.3)


PEERS = {
    Veu: {
        "eager": eager_peer,
        "eager in place": in_place_peer,
        "torch.compile": compiled_peer,
        "unfold + einsum": unfold_peer,
        "FlexAttention": flex_peer,
        "NATTEN": natten_peer,
    },
    Warp: {
        "eager": eager_peer,
        "torch.compile": compiled_peer,
        "MONAI": monai_peer,
        "torch-interpol": interpol_peer,
    },
    Compose: {"eager": eager_peer, "eager chain": chain_peer, "torch.compile": compiled_peer},
}
COMPILING = ("torch.compile", "FlexAttention", "NATTEN")  # up to minutes before they run the first time


def peer(name: str, problem: Problem, device: str) -> Peer:
    """What does a problem's work under that name, "cover" being ours. Raises `Unable`."""
    return Peer(problem) if name == "cover" else PEERS[type(problem)][name](problem, device)


@lru_cache(maxsize=1)
def _exact(problem: Problem, device: str) -> dict[str, list[torch.Tensor]]:
    """The reference's results in float64: its output, and the gradients of all tensors."""
    tensors = [t.detach().double().requires_grad_() for t in problem.tensors(device)]
    with cover_kernels.use_backend("reference"):
        return {FORWARD: [one_pass(problem, tensors, FORWARD)()], BOTH: list(one_pass(problem, tensors, BOTH)())}


def check(candidate: Peer, problem: Problem, device: str, which: str) -> None:
    """Raise `Unable` where the peer's results, of this pass, are not the reference's in float64."""
    kind = FORWARD if which == FORWARD else BOTH  # of the gradients, it is the same question
    results = one_pass(candidate.function, problem.tensors(device), kind)()
    margin = candidate.margin * (1 if kind == FORWARD else 2)  # a gradient sees the windows around a voxel
    inner = (..., *(slice(margin, n - margin) for n in problem.S)) if margin else ...
    tolerance = candidate.tolerance if problem.dtype.itemsize >= 4 else max(candidate.tolerance, 0.02)
    results = [results] if kind == FORWARD else results
    for actual, expected in zip(results, _exact(problem, device)[kind], strict=True):
        expected = expected[inner]
        # the mean: a derivative jumps where a position lies within rounding of the border between two cells
        error = ((actual[inner].double() - expected).abs().mean() / expected.abs().mean()).item()
        if not error <= tolerance:
            raise Unable(f"differs from the reference in float64 by {error:.2g} of the mean value")

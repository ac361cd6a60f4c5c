"""Bad input: one clear error for each mistake, the same whatever backend would serve, before anything is launched."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import cover_kernels
from cover_kernels import backends


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


GIVEN = {
    "veu": {"q": zeros(1, 6, 4, 8), "k": zeros(1, 6, 4, 8), "window": 3, "heads": 2, "mask": None},
    "warp": {"x": zeros(1, 3, 4, 8), "flow": zeros(1, 2, 4, 8)},
    "compose": {"flow": zeros(1, 2, 4, 8), "residual": zeros(1, 2, 4, 8)},
}
META = {"device": "meta"}
SCALE = "`scale` must be an int or float that is finite in"
BAD = [
    # tensors on several devices
    ("veu", {"k": zeros(1, 6, 4, 8, **META)}, ValueError, "`k` must be on the device of `q`, cpu, got meta"),
    ("veu", {"mask": zeros(1, 1, 4, 8, dtype=bool, **META)}, ValueError, "`mask` must be on the device of `q`, cpu"),
    ("warp", {"flow": zeros(1, 2, 4, 8, **META)}, ValueError, "`flow` must be on the device of `x`, cpu, got meta"),
    ("compose", {"flow": zeros(1, 2, 4, 8, **META)}, ValueError, "`flow` must be on the device of `residual`, cpu"),
    # several dtypes, and dtypes that no kernel knows
    ("veu", {"k": zeros(1, 6, 4, 8).half()}, TypeError, "`k` must be torch.float32 beside `q` in torch.float32, got"),
    ("veu", {"mask": zeros(1, 1, 4, 8)}, TypeError, "`mask` must be torch.bool"),
    ("veu", {"q": zeros(1, 6, 4, 8).int()}, TypeError, "`q` must be float64, float32, bfloat16 or float16, got"),
    ("warp", {"flow": zeros(1, 2, 4, 8).bfloat16()}, TypeError, "`flow` must be torch.float32 beside `x`"),
    ("warp", {"x": zeros(1, 3, 4, 8).cfloat()}, TypeError, "`x` must be float64, float32, bfloat16 or float16, got"),
    ("compose", {"flow": zeros(1, 2, 4, 8).double()}, TypeError, "`flow` must be torch.float32 beside `residual`"),
    # shapes that do not match
    ("veu", {"k": zeros(1, 6, 4, 7)}, ValueError, r"`k` must have shape \[1, 6, 4, 8\].* got \[1, 6, 4, 7\]"),
    ("veu", {"mask": zeros(1, 4, 8, dtype=bool)}, ValueError, r"`mask` must have shape \[1, 1, 4, 8\]"),
    ("veu", {"q": zeros(6, 8)}, ValueError, r"`q` must be \[B, J\*C, H, W\].* got \[6, 8\]"),
    ("warp", {"flow": zeros(1, 3, 4, 8)}, ValueError, r"`flow` must have shape \[1, 2, 4, 8\]"),
    ("warp", {"flow": zeros(2, 2, 4, 8)}, ValueError, r"`flow` must have shape \[1, 2, 4, 8\]"),
    ("compose", {"residual": zeros(1, 3, 4, 8)}, ValueError, "`residual` must have 2 channels, one per axis"),
    # even and impossible windows
    ("veu", {"window": 4}, ValueError, r"`window` must be odd on every axis, got \[4, 4\]"),
    ("veu", {"window": (3, 6)}, ValueError, r"`window` must be odd on every axis, got \[3, 6\]"),
    ("veu", {"window": (3, 3, 3)}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": -1}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": 3.0}, ValueError, "`window` must be a positive int or 2 of them"),
    # nothing in a tensor
    ("veu", {"q": zeros(1, 6, 0, 8)}, ValueError, r"`q` must have no empty axis but the batch, got \[1, 6, 0, 8\]"),
    ("warp", {"x": zeros(1, 0, 4, 8)}, ValueError, "`x` must have no empty axis"),
    ("compose", {"residual": zeros(1, 2, 4, 0)}, ValueError, "`residual` must have no empty axis"),
    # channels that the groups do not divide
    ("veu", {"heads": 4}, ValueError, "`heads` must be a positive int that divides the 6 channels, got 4"),
    ("veu", {"heads": 0}, ValueError, "`heads` must be a positive int that divides the 6 channels, got 0"),
    # a stride that does not fit
    ("warp", {"stride": 3}, ValueError, r"`stride` must divide the spatial shape of `x`, \[4, 8\], got \[3, 3\]"),
    ("warp", {"stride": 2}, ValueError, r"`flow` must have shape \[1, 2, 2, 4\]"),
    ("warp", {"stride": (1, 2, 2)}, ValueError, "`stride` must be a positive int or 2 of them"),
    ("compose", {"stride": (1, 16)}, ValueError, "`stride` must divide the spatial shape of `residual`"),
    ("compose", {"stride": 0}, ValueError, "`stride` must be a positive int or 2 of them"),
    # not what the word stands for
    ("veu", {"q": None}, TypeError, "`q` must be a tensor, got NoneType"),
    ("warp", {"flow": [0.0]}, TypeError, "`flow` must be a tensor, got list"),
    ("veu", {"q": zeros(1, 6, 4, 8).to_sparse()}, TypeError, "`q` must be a dense tensor, got torch.sparse_coo"),
    ("compose", {"flow": zeros(1, 2, 4, 8).to_sparse()}, TypeError, "`flow` must be a dense tensor, got torch.sparse"),
    ("veu", {"k": torch.nested.nested_tensor([zeros(6, 4, 8)])}, TypeError, "`k` must be a dense tensor, got a nested"),
    ("veu", {"window": True}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": torch.tensor(3)}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": 2**63 + 1}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": np.array(3.0)}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"window": [3, np.array([3, 3])]}, ValueError, "`window` must be a positive int or 2 of them"),
    ("veu", {"heads": np.array([2, 2])}, ValueError, "`heads` must be a positive int that divides the 6 channels"),
    ("veu", {"scale": torch.ones((), requires_grad=True)}, TypeError, f"{SCALE} torch.float32, got tensor.*"),
    ("veu", {"scale": float("nan")}, TypeError, f"{SCALE} torch.float32, got nan"),
    ("veu", {"scale": "x"}, TypeError, f"{SCALE} torch.float32, got 'x'"),
    ("veu", {"scale": True}, TypeError, f"{SCALE} torch.float32, got True"),
    ("veu", {"scale": 10**400}, TypeError, f"{SCALE} torch.float32, got 1000"),
    ("veu", {"scale": 1e39}, TypeError, rf"{SCALE} torch.float32, got 1e\+39"),
    ("warp", {"padding": "wrap"}, ValueError, '`padding` must be "zeros" or "border", got \'wrap\''),
    ("warp", {"padding": np.array(["zeros", "border"])}, ValueError, '`padding` must be "zeros" or "border", got arr'),
]


@pytest.mark.parametrize(("operator", "changes", "error", "message"), BAD)
def test_bad_input_is_named_before_anything_is_launched(monkeypatch, operator, changes, error, message):
    # a backend is chosen whenever an operator runs
    monkeypatch.setattr(backends, "choose", lambda device: pytest.fail("an operator ran"))
    with pytest.raises(error, match=f"^{operator}: {message}"):
        getattr(cover_kernels, operator)(**{**GIVEN[operator], **changes})


@pytest.mark.parametrize(("one", "other"), [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
@pytest.mark.parametrize(
    ("operator", "like", "name"), [("veu", "q", "k"), ("warp", "x", "flow"), ("compose", "residual", "flow")]
)
def test_tensors_on_several_devices_are_refused(monkeypatch, operator, like, name, one, other):
    monkeypatch.setattr(backends, "choose", lambda device: pytest.fail("an operator ran"))
    with FakeTensorMode():  # has the devices that the machine lacks
        given = {
            key: torch.empty(v.shape, device=one) if torch.is_tensor(v) else v for key, v in GIVEN[operator].items()
        }
        assert getattr(cover_kernels, operator)(**given).device == torch.device(one)
        given[name] = torch.empty(given[name].shape, device=other)
        message = f"^{operator}: `{name}` must be on the device of `{like}`, {one}, got {other}$"
        with pytest.raises(ValueError, match=message):
            getattr(cover_kernels, operator)(**given)


@pytest.mark.parametrize("operator", GIVEN)
def test_what_the_mistakes_are_made_in_is_good(operator):
    assert getattr(cover_kernels, operator)(**GIVEN[operator]).shape[2:] == (4, 8)


class Two:
    def __index__(self):
        return 2


@pytest.mark.parametrize("two", [np.int64(2), np.array(2), Two()], ids=["np.int64", "array", "index"])
def test_what_stands_for_an_int_is_one(two):
    x, flow = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 4)
    v = cover_kernels.veu(x, 2 * x, 3, 2)
    assert torch.equal(cover_kernels.veu(x, 2 * x, 3, two), v)
    assert torch.equal(cover_kernels.warp(x, flow, two), cover_kernels.warp(x, flow, 2))
    assert torch.equal(cover_kernels.compose(flow, x, [two, 2]), cover_kernels.compose(flow, x, 2))


@pytest.mark.parametrize("operator", GIVEN)
def test_gradients_that_no_backward_can_take_are_refused_before_it_runs(monkeypatch, operator):
    given = {key: v.clone().requires_grad_() if torch.is_tensor(v) else v for key, v in GIVEN[operator].items()}
    y = getattr(cover_kernels, operator)(**given)
    leaves = [t for t in given.values() if torch.is_tensor(t)]
    monkeypatch.setattr(backends, "choose", lambda device: pytest.fail("an operator ran"))
    with pytest.raises(TypeError, match=f"^{operator}: `grad` must be a dense tensor, got torch.sparse_coo"):
        torch.autograd.grad(y, leaves, torch.ones_like(y).to_sparse(), retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{operator}: `grad` carries a tangent"):
        torch.autograd.grad(y, leaves, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))

"""The random numbers are well distributed, independent, and a pure function of (seed, epoch, index, name, element)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cover.rng import Draws, _mix

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def draws(samples, epoch=0, seed=0, **where):
    index = torch.as_tensor(samples)
    return Draws(seed, torch.full_like(index, epoch), index, **where)


@given(
    seed=st.integers(-(2**70), 2**70),
    samples=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=6),
    shape=st.lists(st.integers(0, 4), max_size=3),
)
def test_a_sample_is_drawn_the_same_in_every_batch(seed, samples, shape):
    epoch, index = torch.tensor(samples).T
    together = Draws(seed, epoch, index)
    for b in range(len(samples)):
        alone = Draws(seed, epoch[b : b + 1], index[b : b + 1])
        for kind in ("uniform", "normal"):
            whole = getattr(together, kind)("a name", *shape)
            assert whole.shape == (len(samples), *shape) and whole.dtype == torch.float32
            assert torch.equal(whole[b : b + 1], getattr(alone, kind)("a name", *shape))


def test_the_order_of_the_draws_does_not_matter():
    one, two = draws(range(3)), draws(range(3))
    first = one.uniform("a", 5), one.normal("b", 5)
    second = two.normal("b", 5), two.uniform("a", 5)
    assert torch.equal(first[0], second[1]) and torch.equal(first[1], second[0])


@pytest.mark.parametrize("device", DEVICES)
def test_known_answers_on_every_device(device):
    """A change of the generator changes every run ever made: it must not happen by accident."""
    source = draws([0, 12345], epoch=7, seed=42, device=device)
    bits = torch.stack([source.uniform("crop"), source.uniform("crop", 2)[:, 1]]).mul(2**24).long().cpu()
    assert bits.tolist() == [[1285550, 10425], [8683202, 11604985]]
    assert (source.normal("noise", 2).cpu() * 2**20).long().tolist() == [[-2896518, 1096343], [-692940, 1203132]]


def test_splitmix64_reference_value():
    """The first output of splitmix64 seeded with 0 is 0xE220A8397B1DCDAF, its increment being the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    assert _mix(torch.tensor([golden - 2**64])).item() % 2**64 == 0xE220A8397B1DCDAF


def test_uniform_numbers_are_uniform():
    u = draws(range(64)).uniform("u", 4096)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 256, 0, 1)
    expected = u.numel() / 256
    # chi-squared of 255 degrees of freedom: mean 255, standard deviation 22.6
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6
    ranged = draws(range(64)).uniform("u", 4096, low=-3.0, high=5.0)
    torch.testing.assert_close(ranged, 8 * u - 3)


def test_normal_numbers_are_normal():
    n = draws(range(64)).normal("n", 4096).double()
    # standard errors of the first four moments for 2^18 numbers: 0.002, 0.0028, 0.0076, 0.019
    for power, moment, error in ((1, 0, 0.002), (2, 1, 0.0028), (3, 0, 0.0076), (4, 3, 0.019)):
        assert abs((n**power).mean() - moment) < 5 * error
    uniform = torch.special.ndtr(n).flatten().sort().values
    # Kolmogorov-Smirnov: the largest distance exceeds 1.95 / sqrt(n) in one of a thousand samples
    assert (uniform - torch.arange(2**18) / 2**18).abs().max() < 1.95 * 2**-9


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_names_samples_epochs_seeds_and_elements_are_independent(kind):
    def row(name="a", sample=0, epoch=0, seed=0):
        return getattr(draws([sample], epoch, seed), kind)(name, 2**14)[0]

    base = row()
    others = [row(name="b"), row(sample=1), row(epoch=1), row(seed=1), row(sample=1, epoch=1), base.roll(1)]
    table = torch.corrcoef(torch.stack([base, *others]))
    off_diagonal = table - torch.eye(len(table))
    assert off_diagonal.abs().max() < 5 * 2**-7  # the correlation of 2^14 independent pairs has deviation 2^-7


def test_neighbouring_samples_are_independent_in_their_first_number():
    """The one number per sample that says, for example, whether it is flipped."""
    u = draws(range(2**14)).uniform("flip")
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 * 2**-7
    assert abs(u.mean() - 0.5) < 5 * 0.289 * 2**-7


def test_wrong_arguments_are_named():
    good = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"`epoch` must be int64, got torch\.int32"):
        Draws(0, good.int(), good)
    with pytest.raises(ValueError, match=r"`epoch` must be \[B\] like `index` \[2\], got \[3\]"):
        Draws(0, torch.zeros(3, dtype=torch.int64), good)
    with pytest.raises(ValueError, match=r"`index`"):
        Draws(0, good[None], good[None])

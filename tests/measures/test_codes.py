"""Usage (marginal) and assignment (posterior) against SciPy's numbers and their identities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gear.measures import codes

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["codebook"]["expected"]
ARRAYS = np.load(GOLDEN / "codebook.npz")
INDICES = torch.from_numpy(ARRAYS["indices"])
AFFINITY = -torch.from_numpy(ARRAYS["distances"])


def test_usage_golden():
    result = codes.usage(INDICES, 256)
    expected = EXPECTED["usage"]
    assert result.entropy == pytest.approx(expected["H_plugin_nats"], abs=1e-9)
    assert result.effective_size == pytest.approx(expected["exp_H"], abs=1e-9)
    assert result.miller_madow == pytest.approx(expected["H_miller_madow"], abs=1e-9)
    assert result.top_mass[:10].tolist() == pytest.approx(
        expected["top_mass_cum_1_to_10"], abs=1e-12
    )
    assert result.top_mass[99].item() == pytest.approx(expected["top100_mass"], abs=1e-12)
    assert (result.dead, result.n, result.top_mass.dtype) == (
        expected["n_dead"],
        expected["n_tokens"],
        torch.float64,
    )


@pytest.mark.parametrize("tau", (1.0, 0.1))
def test_assignment_golden(tau, monkeypatch):
    monkeypatch.setattr(
        codes, "CHUNK", 128 * 7
    )  # 48 tokens in uneven chunks, which must not change the sums
    result = codes.assignment(AFFINITY, tau)
    expected = EXPECTED[f"posterior_tau{tau}"]
    assert result.entropy == pytest.approx(expected["mean_token_entropy_nats"], abs=1e-7)
    assert result.effective_size == pytest.approx(
        expected["effective_size_exp_of_mean_entropy"], abs=1e-5
    )
    assert abs(result.effective_size - expected["mean_of_exp_entropy_WRONG"]) > 1e-2
    for m in (1, 10, 100):
        assert result.top_mass[m] == pytest.approx(expected[f"cum_mass_top{m}"], abs=1e-7)
    assert result.top_mass[1000] == pytest.approx(1, abs=1e-12)  # capped at K = 128


@pytest.mark.parametrize("size, count", ((512, 100), (7, 7), (1, 1)))
def test_the_largest_values_equal_those_of_topk_exactly(size, count):
    p = (torch.randn(50, size, dtype=torch.float64) * 30).softmax(1)
    p[0] = p[0, 0]  # equal values
    assert torch.equal(codes._largest(p, count), p.topk(count).values)


def test_usage_limits():
    one = codes.usage(torch.full((3, 4), 5), 16)
    assert (one.entropy, one.effective_size, one.top_mass[0].item(), one.dead, one.n) == (
        0,
        1,
        1,
        15,
        12,
    )
    uniform = codes.usage(torch.arange(32).repeat(3), 32)
    assert uniform.entropy == pytest.approx(math.log(32)) and uniform.dead == 0
    torch.testing.assert_close(uniform.top_mass, torch.arange(1, 33).double() / 32)


def test_usage_invariances():
    base = codes.usage(INDICES, 256)
    renamed = codes.usage(torch.randperm(256)[INDICES.long()][torch.randperm(len(INDICES))], 256)
    doubled = codes.usage(INDICES.repeat(2), 256)
    for variant in (renamed, doubled):
        assert variant.entropy == pytest.approx(base.entropy, abs=1e-12)
        torch.testing.assert_close(variant.top_mass, base.top_mass)
    gains = base.top_mass.diff(prepend=torch.zeros(1))
    assert (gains >= 0).all() and (gains.diff() <= 1e-15).all() and base.top_mass[-1] == 1
    assert 0 <= base.entropy <= math.log(256 - base.dead)


def test_assignment_limits_and_invariances():
    base = codes.assignment(AFFINITY, 0.1)
    assert codes.assignment(AFFINITY, 1e-9).entropy == pytest.approx(0, abs=1e-6)
    assert codes.assignment(AFFINITY, 1e9).entropy == pytest.approx(math.log(128), abs=1e-6)
    entropies = [codes.assignment(AFFINITY, tau).entropy for tau in (0.01, 0.03, 0.1, 0.3, 1, 3)]
    assert entropies == sorted(entropies)
    shifted = codes.assignment(AFFINITY.double() + torch.randn(48, 1, dtype=torch.float64), 0.1)
    permuted = codes.assignment(AFFINITY[:, torch.randperm(128)], 0.1)
    for variant in (shifted, permuted):
        assert variant.entropy == pytest.approx(base.entropy, abs=1e-9)
        assert variant.top_mass == pytest.approx(base.top_mass, abs=1e-9)


def test_larger_affinity_is_nearer():
    affinity = torch.zeros(5, 20).index_fill(1, torch.tensor([3]), 10)
    assert codes.assignment(affinity, 1.0).top_mass[1] == pytest.approx(
        math.exp(10) / (math.exp(10) + 19)
    )
    assert codes.assignment(-affinity, 1.0).top_mass[1] == pytest.approx(1 / (19 + math.exp(-10)))


@pytest.mark.parametrize("indices", ([], [-1], [8]))
def test_usage_refuses(indices):
    with pytest.raises(ValueError):
        codes.usage(torch.tensor(indices), 8)


@pytest.mark.parametrize(
    "affinity, tau",
    (
        (torch.zeros(3, 4), 0.0),
        (torch.zeros(4), 1.0),
        (torch.zeros(0, 4), 1.0),
        (torch.full((2, 3), torch.nan), 1.0),
    ),
)
def test_assignment_refuses(affinity, tau):
    with pytest.raises(ValueError):
        codes.assignment(affinity, tau)

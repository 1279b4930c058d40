"""CKA, CKNNA and mutual k-NN against the numbers of platonic-rep, brute force and their
invariances.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gear.measures import alignment
from gear.measures.alignment import (
    cka,
    cknna,
    l2_normalise,
    mutual_knn,
    null,
    tie_fraction,
    within_image,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
ALIGN = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "align.npz").items()}
PATCH = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "patch.npz").items()}
A, B = ALIGN["A"], ALIGN["B"]
FORMS = {"raw": lambda x: x, "l2": l2_normalise}
EPS = 2e-5  # tolerance: the reference adds 1e-6 to its denominators, gear does not
METRICS = (cka, partial(cka, unbiased=False), cknna, mutual_knn)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(d, seed=1):
    return torch.linalg.qr(gaussian(d, d, seed=seed)).Q


def dense_cknna(x, y, k):
    """Compute CKNNA by the reference's definition, with explicit n x n masks."""
    kernels = [z.double() @ z.double().T for z in (x, y)]
    masks = []
    for kernel in kernels:
        nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k).indices
        masks.append(torch.zeros_like(kernel).scatter(1, nearest, 1))

    def hsic(k1, m1, k2, m2):
        p = m1 * m2 * k1
        q = m1 * m2 * k2
        n = len(k1)
        return (p @ q).trace() + p.sum() * q.sum() / (n - 1) / (n - 2) - 2 * (p @ q).sum() / (n - 2)

    (kx, ky), (mx, my) = kernels, masks
    return (hsic(kx, mx, ky, my) / (hsic(kx, mx, kx, mx) * hsic(ky, my, ky, my)).sqrt()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", (("A", "B"), ("A", "B_outlier"), ("A", "I_indep")))
def test_golden(pair, form, device):
    expected = EXPECTED["align"]["expected"]["A_vs_" + {"I_indep": "I"}.get(pair[1], pair[1])][form]
    x, y = (FORMS[form](ALIGN[name].to(device)) for name in pair)
    assert cka(x, y, unbiased=False) == pytest.approx(expected["cka_biased"], abs=1e-8)
    assert cka(x, y) == pytest.approx(expected["cka_unbiased"], abs=EPS)
    for k in (5, 10, 20):
        assert cknna(x, y, k) == pytest.approx(expected[f"cknna_k{k}"], abs=EPS)
    assert cknna(x, y, 79) == pytest.approx(expected["cknna_k79_full"], abs=EPS)
    for k in (1, 5, 10):
        assert mutual_knn(x, y, k) == pytest.approx(expected[f"mutual_knn_k{k}"], abs=1e-6)
    assert (
        abs(cknna(x, y) - expected["cknna_k10_biased"]) > 0.05
    )  # in that variant a row is its own neighbour


def test_golden_of_other_protocols():
    expected = EXPECTED["align"]["expected"]
    assert cka(ALIGN["D_discrete"], B) == pytest.approx(
        expected["D_vs_B"]["raw"]["cka_unbiased"], abs=EPS
    )
    assert cknna(A, B) == pytest.approx(expected["A_vs_B_ifsq_raw_k10"], abs=EPS)
    equation = expected["A_vs_B_prh_paper_equation_variant_NOT_CODE"]
    assert abs(cknna(A, B) - equation["raw_k10"]) > 0.05
    for batches in expected[
        "A_vs_B_minibatch"
    ]:  # averages over batches are a different statistic, which is biased upwards
        size = batches["batch_size"]
        parts = [cknna(x, y) for x, y in zip(A.split(size), B.split(size))]
        assert np.mean(parts) == pytest.approx(batches["mean_of_batch_cknna_k10"], abs=EPS)
        assert np.mean(parts) > cknna(A, B) + 0.1


@pytest.mark.parametrize("form", FORMS)
def test_within_image_golden(form, monkeypatch, device):
    monkeypatch.setattr(alignment, "CHUNK", 64**2 * 4)  # 6 images in chunks of 4 and 2
    expected = EXPECTED["patch"]["expected"]
    result = within_image(*(FORMS[form](PATCH[name].to(device)) for name in ("X", "Y")))
    assert result.cknna.device == result.null_cka.device == torch.device("cpu")
    for name, key in (
        ("cknna", "cknna_k10"),
        ("cka", "cka_unbiased"),
        ("mutual_knn", "mutual_knn_k10"),
    ):
        values = [image[key] for image in expected[f"within_image_{form}"]["per_image"]]
        assert getattr(result, name).tolist() == pytest.approx(values, abs=EPS)
    chance = expected[f"within_image_mismatched_null_{form}"]  # X[i] with Y[i + 1]
    assert result.null_cknna.mean().item() == pytest.approx(chance["mean_cknna_k10"], abs=EPS)
    assert result.null_cka.mean().item() == pytest.approx(chance["mean_cka_unbiased"], abs=EPS)


@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize(
    "shift", (1, 2, 4, -1, 15)
)  # one cycle through the images, several cycles, backwards, more than N
def test_within_image_equals_the_scalar_metrics(shift, unbiased, monkeypatch):
    monkeypatch.setattr(alignment, "CHUNK", 30**2 * 4)  # 6 images in chunks of 4 and 2
    x, y = gaussian(6, 30, 6), gaussian(6, 30, 9, seed=1)
    y[..., :6] += x
    result = within_image(x, y, k=4, shift=shift, unbiased=unbiased)
    metrics = {
        "cknna": partial(cknna, k=4),
        "cka": partial(cka, unbiased=unbiased),
        "mutual_knn": partial(mutual_knn, k=4),
    }
    for i in range(6):
        for name, metric in metrics.items():
            assert getattr(result, name)[i].item() == pytest.approx(metric(x[i], y[i]), abs=1e-10)
            assert getattr(result, f"null_{name}")[i].item() == pytest.approx(
                metric(x[i], y[(i + shift) % 6]), abs=1e-10
            )


def test_within_image_marks_only_the_constant_images():
    x, y = gaussian(20, 37, 4), gaussian(20, 37, 5, seed=1)
    x[5:] = x[5:, :1]  # equal tokens: their centred kernel is rounding error, not zero
    result = within_image(x, y, k=3)
    assert (
        result.cka.isnan().tolist() == result.null_cka.isnan().tolist() == [False] * 5 + [True] * 15
    )


@pytest.mark.parametrize("k", (1, 3, 10, 59))
def test_cknna_equals_its_dense_definition(k, monkeypatch):
    monkeypatch.setattr(alignment, "CHUNK", 7 * 60)  # rows in uneven chunks
    x = gaussian(60, 5)
    y = torch.cat([x[:, :3], gaussian(60, 4, seed=2)], 1)
    assert cknna(x, y, k) == pytest.approx(dense_cknna(x, y, k), abs=1e-10)


def test_full_neighbourhood_is_unbiased_cka():
    for n in (12, 50):
        x, y = gaussian(n, 6), gaussian(n, 9, seed=3)
        assert cknna(x, y, n - 1) == pytest.approx(cka(x, y), abs=1e-10)


def test_cka_equals_the_gram_form():
    x, y = (z.double() for z in (A, B))
    centring = torch.eye(80).double() - 1 / 80
    kernel_x, kernel_y = (centring @ z @ z.T @ centring for z in (x, y))
    assert cka(x, y, unbiased=False) == pytest.approx(
        ((kernel_x * kernel_y).sum() / kernel_x.norm() / kernel_y.norm()).item(), abs=1e-12
    )


@pytest.mark.parametrize("metric", METRICS)
def test_identity_rotation_scale_permutation_padding(metric):
    x, y = l2_normalise(A), l2_normalise(B)
    value = metric(x, y)
    order = torch.randperm(80)
    assert metric(x, x) == pytest.approx(1, abs=1e-12)
    for x1, y1 in (
        (x @ rotation(8), y),
        (x, 0.01 * y),
        (1e-4 * x, 1e3 * y),
        (x[order], y[order]),
        (torch.cat([x, torch.zeros(80, 3)], 1), y),
    ):
        assert metric(x1, y1) == pytest.approx(value, abs=1e-9)


def test_symmetry():
    for metric in (cka, partial(cka, unbiased=False), mutual_knn):
        assert metric(A, B) == pytest.approx(metric(B, A), abs=1e-12)
    # CKNNA takes the column sums of one kernel and the row sums of the other over directed edges, so
    # it is symmetric only if every edge has its reverse
    assert cknna(A, B, 79) == pytest.approx(cknna(B, A, 79), abs=1e-12)
    assert 1e-4 < abs(cknna(A, B) - cknna(B, A)) < 0.02


def test_translation_moves_cknna_but_not_cka():
    shift = 3 * gaussian(24, seed=5)
    assert cka(A, B + shift) == pytest.approx(cka(A, B), abs=1e-5)
    assert cka(A, B.double() + shift, unbiased=False) == pytest.approx(
        cka(A, B, unbiased=False), abs=1e-10
    )
    assert abs(cknna(A, B.double() + shift) - cknna(A, B)) > 0.02


@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("form", FORMS)
def test_float32_offset_does_not_hurt(unbiased, form):
    x, y = (FORMS[form](z).float() for z in (A, B))
    assert cka(x + 50, y + 50, unbiased) == pytest.approx(
        cka(x.double(), y.double(), unbiased), abs=1e-4
    )


def test_chance_of_cka():
    levels = {}
    for n in (16, 64, 256):
        pairs = [(gaussian(n, 6, seed=s), gaussian(n, 10, seed=1000 + s)) for s in range(60)]
        unbiased = torch.tensor([cka(x, y) for x, y in pairs])
        levels[n] = np.mean([cka(x, y, unbiased=False) for x, y in pairs])
        assert abs(unbiased.mean()) < 3 * unbiased.std() / 60**0.5
        assert (unbiased < 0).any()  # never clamped
    assert 1 > levels[16] > 2 * levels[64] > 4 * levels[256] > 0


def test_null_is_the_chance_level_and_is_seeded():
    result = null(A, B, partial(cka, unbiased=False))
    assert result == null(A, B, partial(cka, unbiased=False))
    assert 0.03 < result.mean < 0.15 and 0 < result.std < 0.05
    assert abs(null(A, B, cka).mean) < 0.03
    assert null(A, B, mutual_knn, draws=40).mean == pytest.approx(10 / 79, abs=0.01)
    calls = []
    null(A, B, lambda x, y: calls.append((x is A, y)) or 0.0, draws=3)
    assert len(calls) == 3 and all(same for same, _ in calls)
    assert all(
        torch.equal(y.sort(0).values, B.sort(0).values) and not torch.equal(y, B) for _, y in calls
    )


@pytest.mark.parametrize("metric", (*METRICS, partial(cknna, k=3), partial(mutual_knn, k=79)))
def test_a_null_by_relabelling_equals_the_null_computed_anew(metric):
    relabelled = null(A, B, metric)
    computed_anew = null(A, B, lambda x, y: metric(x, y))
    assert (relabelled.mean, relabelled.std) == pytest.approx(
        (computed_anew.mean, computed_anew.std), abs=1e-12
    )


def test_a_null_computes_each_graph_once(monkeypatch):
    calls = []
    nearest = alignment._nearest
    monkeypatch.setattr(alignment, "_nearest", lambda *args: calls.append(1) or nearest(*args))
    null(A, B, cknna, draws=5)
    assert len(calls) == 2


def test_ties():
    codes = l2_normalise(ALIGN["D_discrete"])
    assert tie_fraction(codes, 3) > 0.5 and tie_fraction(A, 10) == 0
    assert tie_fraction(torch.eye(6), 2) == 1  # ties without duplicates
    assert cknna(codes, l2_normalise(B)) == cknna(codes, l2_normalise(B))
    values = EXPECTED["align"]["expected"]["D_vs_B_cknna_k10_l2_over_6_row_orders"]["values"]
    assert min(values) - 0.01 < cknna(codes, l2_normalise(B)) < max(values) + 0.01


def test_ties_do_not_follow_row_order():
    """All rows of x tie, and the hubs of y are the rows that top-k returns without a shuffle: the
    order alone would produce agreement.
    """
    x, y = torch.ones(160, 3), torch.ones(160, 3)
    y[torch.zeros(160, dtype=torch.float64).topk(5).indices] = 2
    assert mutual_knn(x, y, 5) < 0.3  # chance is 5 / 159; without the shuffle the value is near 1


def test_l2_normalise():
    x = l2_normalise(gaussian(2, 3, 4, dtype=torch.float32))
    assert x.dtype == torch.float64
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 3).double())


@pytest.mark.parametrize(
    "call",
    (
        lambda: cka(A[:3], B[:3]),
        lambda: cka(A, B[:79]),
        lambda: cka(torch.full((20, 3), 0.1), B[:20]),
        lambda: cka(torch.full((20, 3), 0.1), B[:20], unbiased=False),
        lambda: cka(torch.eye(8), B[:8]),  # equidistant rows: the unbiased self-similarity vanishes
        lambda: cka(A * torch.nan, B),
        lambda: cknna(A[:3], B[:3], 2),
        lambda: cknna(A, B, 0),
        lambda: cknna(A, B, 80),
        lambda: cknna(torch.ones(20, 3), B[:20], 19),
        lambda: mutual_knn(A, B, 80),
        lambda: tie_fraction(A, 0),
        lambda: tie_fraction(A, 79),
        lambda: null(A, B, cka, draws=1),
        lambda: within_image(PATCH["X"], PATCH["Y"], k=64),
        lambda: within_image(PATCH["X"], PATCH["Y"], shift=6),
        lambda: within_image(PATCH["X"][:1], PATCH["Y"][:1]),
        lambda: within_image(PATCH["X"], PATCH["Y"][:, :63]),
        lambda: within_image(PATCH["X"][:, :3], PATCH["Y"][:, :3], k=2),
        lambda: l2_normalise(torch.zeros(2, 3)),
    ),
)
def test_refuses(call):
    with pytest.raises(ValueError):
        call()

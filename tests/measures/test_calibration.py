"""Permutation tests of alignments: their level, their power, the correction for several layers, and
the numbers of the package of Gröger et al. (2026).
"""

import math
from functools import partial

import calibrated_similarity
import numpy as np
import pytest
import scipy.stats
import torch

from gear.measures import calibration
from gear.measures.alignment import cka, cknna, image_pairs, mutual_knn, within_image
from gear.measures.calibration import (
    calibrate,
    calibrate_layers,
    calibrate_pairs,
    calibrate_values,
    orders,
    permuted_values,
)

LEVEL = 0.05
biased_cka = partial(cka, unbiased=False)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def most_rejections(repetitions, level=LEVEL):
    """Return the 99.9 % quantile of the number of rejections of a test at its level."""
    return scipy.stats.binom.ppf(0.999, repetitions, level)


@pytest.mark.parametrize("metric", (cka, biased_cka, partial(cknna, k=5)))
def test_p_values_are_uniform_under_the_null(metric):
    p_values = [
        calibrate(gaussian(24, 5, seed=s), gaussian(24, 4, seed=9_000 + s), metric, 99, seed=s).p
        for s in range(200)
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    assert min(p_values) >= 1 / 100
    # the test can fail: values that are a little too small are noticed
    assert scipy.stats.kstest(np.square(p_values), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("metric", (cka, biased_cka, partial(cknna, k=5), partial(mutual_knn, k=5)))
def test_a_planted_signal_has_a_small_p_and_a_score(metric):
    x = gaussian(40, 6)
    y = x @ gaussian(6, 6, seed=1) + 0.5 * gaussian(40, 6, seed=2)
    result = calibrate(x, y, metric)
    assert result.p == result.corrected_p == 1 / 200
    assert result.null < result.threshold < result.value and 0.1 < result.score < 1
    assert result.corrected_score == pytest.approx(result.score, abs=1e-12)
    perfect = calibrate(x, x, metric)
    assert perfect.score == pytest.approx(1, abs=1e-9) and perfect.p == 1 / 200


def test_scores_are_zero_under_the_null():
    """At N = 12 the biased CKA of unrelated rows is far above zero, and its score is not."""
    results = [
        calibrate(gaussian(12, 8, seed=s), gaussian(12, 8, seed=9_000 + s), biased_cka, 99)
        for s in range(200)
    ]
    assert np.mean([r.value for r in results]) > 0.3
    scores = np.array([r.score for r in results])
    assert 0 < (scores > 0).sum() <= most_rejections(200)
    assert all((r.score > 0) == (r.p <= LEVEL) for r in results)


def null_layers(seed):
    """Return eight layers that share half of their variance, and a target without relation."""
    shared = gaussian(20, 4, seed=seed)
    layers = [shared + gaussian(20, 4, seed=10_000 + 10 * seed + i) for i in range(8)]
    return layers, gaussian(20, 3, seed=900_000 + seed)


@pytest.fixture(scope="module")
def families():
    """The values of 200 families of eight null layers, with 59 permutations each."""
    return [permuted_values(*null_layers(s), biased_cka, 59, seed=s) for s in range(200)]


@pytest.mark.parametrize("standardise", (True, False))
def test_the_correction_for_the_best_layer_holds_its_level(standardise, families):
    results = [calibrate_values(*values, standardise=standardise) for values in families]
    smallest = [min(r.corrected_p for r in family) for family in results]
    rejections = sum(p <= LEVEL for p in smallest)
    assert 0 < rejections <= most_rejections(200)
    assert scipy.stats.kstest(smallest, "uniform").pvalue > 0.01
    uncorrected = sum(min(r.p for r in family) <= LEVEL for family in results)
    assert uncorrected > 2 * rejections and uncorrected > most_rejections(200)
    for family in results:
        for r in family:
            assert (r.corrected_score > 0) == (r.corrected_p <= LEVEL) and r.corrected_p >= r.p


def test_the_layer_with_the_signal_is_the_one_that_is_significant():
    layers, y = null_layers(0)
    layers[3] = torch.cat([y, 0.3 * gaussian(20, 2, seed=5)], 1)
    results = calibrate_layers(layers, y, cka)
    assert [r.corrected_p <= LEVEL for r in results] == [i == 3 for i in range(8)]
    assert results[3].corrected_p == 1 / 200


def test_a_layer_whose_null_is_high_hides_no_other():
    """Raw values of a layer with a high null are above the signal of another; standardised, both
    layers are compared with what chance gives them.
    """
    null = 0.01 * gaussian(199, 2)
    null[:, 0] += 0.5
    observed = torch.tensor([0.5, 0.1], dtype=torch.float64)
    raw, fair = (calibrate_values(observed, null, standardise=s) for s in (False, True))
    assert raw[1].corrected_p == 1 and fair[1].corrected_p == 1 / 200
    assert fair[0].corrected_p > 0.2 and fair[0].corrected_score == 0
    assert fair[1].corrected_score == pytest.approx((0.1 - 0.023) / (1 - 0.023), abs=0.01)


def reference_orders(n, draws):
    """Return the keyword that makes the reference use our permutations."""
    iterator = orders(n, draws)
    return {"K": draws, "perm_fn": lambda n, device: next(iterator)}


@pytest.mark.parametrize("draws, level", ((199, 0.05), (100, 0.05), (60, 0.01), (99, 0.3)))
@pytest.mark.parametrize("strength", (0.0, 0.3, 1.0))
def test_one_score_agrees_with_the_reference(strength, draws, level):
    """The example of its README, unrelated rows, and two related ones."""
    x, y = gaussian(100, 64), gaussian(100, 64, seed=1)
    y = strength * x + (1 - strength) * y
    ours = calibrate(x, y, biased_cka, draws, level=level)
    score, p, tau = calibrated_similarity.calibrate(
        x, y, biased_cka, alpha=level, **reference_orders(100, draws)
    )
    assert (ours.score, ours.p, ours.threshold) == pytest.approx(
        (score.item(), p.item(), tau.item()), abs=1e-6
    )


@pytest.mark.parametrize("strength", (0.0, 0.5))
def test_the_best_layer_agrees_with_the_reference(strength):
    """The example of its README with one target: its aggregate is our largest corrected score, and
    our smallest corrected p.
    """
    layers = [gaussian(100, 64, seed=s) for s in range(5)]
    y = strength * layers[2] + gaussian(100, 64, seed=9)
    ours = calibrate_layers(layers, y, biased_cka, 60, standardise=False)
    score, p, tau = calibrated_similarity.calibrate_layers(
        layers, [y], biased_cka, **reference_orders(100, 60)
    )
    assert max(r.corrected_score for r in ours) == pytest.approx(score.item(), abs=1e-6)
    assert min(r.corrected_p for r in ours) == pytest.approx(p.item(), abs=1e-6)
    for r in ours:
        assert r.corrected_threshold == pytest.approx(tau.item(), abs=1e-6)


def tokens_of_unrelated_images(seed, images=20, tokens=8):
    """Return the tokens (images * tokens, 3) of two sides; tokens of an image are alike, and the
    images of the two sides have nothing to do with each other.
    """
    sides = []
    for side in (0, 1):
        image = gaussian(images, 1, 3, seed=seed + 50_000 * side)
        noise = 0.3 * gaussian(images, tokens, 3, seed=seed + 50_000 * side + 10_000)
        sides.append((image + noise).flatten(0, 1))
    return sides


def test_tokens_of_an_image_have_to_be_permuted_together():
    p_values = {
        block: [
            calibrate(*tokens_of_unrelated_images(s), cka, 99, block=block).p for s in range(100)
        ]
        for block in (1, 8)
    }
    rejections = {block: sum(p <= LEVEL for p in values) for block, values in p_values.items()}
    assert rejections[8] <= most_rejections(100)
    assert rejections[1] > 40, "rows alone call chance significant"
    assert scipy.stats.kstest(p_values[8], "uniform").pvalue > 0.01


def test_orders_move_whole_blocks_and_are_seeded():
    first, second = orders(12, 2, block=3)
    assert sorted(first.tolist()) == list(range(12)) and not torch.equal(first, second)
    for order in (first, second):
        blocks = order.view(4, 3)
        assert (
            torch.equal(blocks, blocks[:, :1] + torch.arange(3)) and (blocks[:, 0] % 3 == 0).all()
        )
    assert torch.equal(first, next(orders(12, 1, block=3)))
    assert not torch.equal(first, next(orders(12, 1, block=3, seed=1)))


@pytest.mark.parametrize("unbiased", (True, False))
def test_pairs_of_images_are_those_of_within_image(unbiased, monkeypatch, device):
    """Matched pairs, mismatched pairs, and chunks of images; an image without variance is NaN."""
    monkeypatch.setattr("gear.measures.alignment.PAIR_CHUNK", 30**2 * 3)
    x, y = gaussian(8, 30, 6), gaussian(8, 30, 9, seed=1)
    y[..., :6] += x
    x[5] = x[5, :1]
    pairs = image_pairs(x.to(device), y.to(device), 4, unbiased)
    images = torch.arange(8)
    for shift in (1, 3):
        expected = within_image(x, y, 4, shift, unbiased)
        for name in ("cknna", "cka"):
            table = getattr(pairs, name)
            for values, partners in ((name, images), (f"null_{name}", (images + shift) % 8)):
                torch.testing.assert_close(
                    table[images, partners], getattr(expected, values), equal_nan=True
                )
    assert pairs.cka[5].isnan().all() and pairs.cka.isnan().sum() == 8


def test_position_alone_is_no_alignment_of_images():
    """Two maps that share where they vary, and not what the image shows, align in every pair of
    images: the test over whole images is not misled by the height of the value.
    """
    position = 3 * gaussian(1, 16, 6)
    sides = [position + gaussian(30, 16, 6, seed=s) for s in (1, 2, 3)]
    related = sides[0] + 0.3 * sides[2]
    tables = [image_pairs(x, related, 5).cka for x in sides[:2]]
    with_signal, without = calibrate_pairs(tables)
    assert without.value > 0.5 and without.null > 0.5 and without.corrected_p > LEVEL
    assert with_signal.corrected_p == 1 / 200 and with_signal.corrected_score > 0
    assert without.value == pytest.approx(within_image(sides[1], related, 5).cka.mean().item())


def test_an_undefined_layer_is_not_tested_and_does_not_count():
    null = gaussian(99, 3)
    observed = torch.tensor([4.0, math.nan, 0.0], dtype=torch.float64)
    first, undefined, last = calibrate_values(observed, null, best=5.0)
    assert math.isnan(undefined.p) and math.isnan(undefined.corrected_score)
    keep = [0, 2]
    assert [first, last] == calibrate_values(observed[keep], null[:, keep], best=5.0)
    assert all(math.isnan(r.p) for r in calibrate_values(observed * math.nan, null))
    hole = torch.full((6, 6), math.nan)
    one_image = torch.eye(6, dtype=torch.float64)
    one_image[2] = math.nan
    empty, partly = calibrate_pairs([hole, one_image])
    assert math.isnan(empty.value) and partly.value == 1 and partly.p < 0.05


@pytest.mark.parametrize("metric", (cka, partial(cknna, k=3)))
def test_values_are_those_of_the_permuted_rows(metric, device):
    layers, y = [gaussian(20, 4, seed=s) for s in (1, 2)], gaussian(20, 3)
    observed, null = permuted_values([x.to(device) for x in layers], y.to(device), metric, 3)
    assert observed.tolist() == pytest.approx([metric(x, y) for x in layers], abs=1e-9)
    for order, values in zip(orders(20, 3), null):
        assert values.tolist() == pytest.approx([metric(x, y[order]) for x in layers], abs=1e-9)


def test_each_graph_is_computed_once(monkeypatch):
    calls = []
    nearest = calibration.prepared.__globals__["_nearest"]
    monkeypatch.setitem(
        calibration.prepared.__globals__, "_nearest", lambda *a: calls.append(1) or nearest(*a)
    )
    calibrate(gaussian(20, 3), gaussian(20, 3, seed=1), partial(cknna, k=3), 50)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "call",
    (
        lambda: list(orders(10, 0)),
        lambda: list(orders(10, 5, block=3)),
        lambda: list(orders(10, 5, block=10)),
        lambda: list(orders(10, 5, block=0)),
        lambda: calibrate(gaussian(10, 2), gaussian(9, 2), cka),
        lambda: calibrate(gaussian(10, 2), gaussian(10, 2), cka, level=0.0),
        lambda: calibrate_values(torch.zeros(2), torch.zeros(5, 3)),
        lambda: calibrate_values(torch.zeros(2), torch.zeros(0, 2)),
    ),
)
def test_refuses(call):
    with pytest.raises(ValueError):
        call()

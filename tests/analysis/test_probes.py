"""Linear probes: they read what is there and nothing else, on images they were not fitted to, and a
generator is not told the class that is asked of it.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from gear.analysis import probes
from gear.analysis.probes import linear_probe, probe_table
from gear.config import UserError
from gear.data.scenes import FACTORS
from gear.data.trained import open_trained
from gear.runs.run import Run

RNG = np.random.default_rng(0)
N, L, D = 200, 9, 6
VALUES = RNG.choice(4, size=(N, L), p=(0.4, 0.2, 0.2, 0.2))
NOISE = RNG.standard_normal((N, L, D))


def test_a_linear_code_is_read_and_noise_is_not():
    directions = RNG.standard_normal((4, D)) * 5
    accuracy, chance = linear_probe(directions[VALUES] + 0.1 * NOISE, VALUES)
    assert accuracy.shape == (N // 2,) and accuracy.mean() > 0.99
    assert chance == pytest.approx((VALUES[1::2] == 0).mean()) and 0.3 < chance < 0.5
    accuracy, chance = linear_probe(NOISE, VALUES)
    assert abs(accuracy.mean() - chance) < 0.03


def test_a_probe_is_tested_on_images_that_it_was_not_fitted_to():
    """With more channels than fitted rows, every fitted value can be read and no other."""
    rows = RNG.standard_normal((100, 1, 150))
    values = RNG.integers(0, 2, (100, 1))
    assert linear_probe(rows, values)[0].mean() < 0.75
    repeated = rows.repeat(2, 0), values.repeat(2, 0)  # every tested image is a fitted one
    assert linear_probe(*repeated)[0].mean() > 0.9


def test_scale_offset_and_constant_channels_change_nothing():
    rows = NOISE + 0.5 * VALUES[..., None]
    accuracy, _ = linear_probe(rows, VALUES)
    changed = np.concatenate([1e3 * rows[..., :3] + 7, rows[..., 3:], np.full((N, L, 1), 0.1)], -1)
    np.testing.assert_array_equal(linear_probe(changed, VALUES)[0], accuracy)


def test_a_single_fitted_value_is_the_answer():
    values = np.zeros((10, 2), int)
    values[1, 0] = 1
    accuracy, chance = linear_probe(NOISE[:10, :2], values)
    assert accuracy.tolist() == [0.5, 1, 1, 1, 1] and chance == 0.9


def test_the_class_is_read_from_the_mean_token():
    """Tokens that say the class only on average, and a factor that is in each of them."""
    labels = RNG.integers(0, 3, N)
    rows = NOISE.copy()
    rows[..., :3] += 1.5 * np.eye(3)[labels][:, None]
    rows[..., 3:] += 6 * np.eye(4)[VALUES][..., :3]
    rows = torch.from_numpy(rows)
    table = probe_table({"pre": rows, "2": 0 * rows}, labels, {"shape": VALUES})
    table = table.set_index(["layer", "factor"])
    assert list(table) == ["accuracy", "low", "high", "chance", "n"] and set(table.n) == {N // 2}
    read = table.loc["pre"]
    assert read.accuracy["class"] > 0.8 and read.accuracy["shape"] > 0.8
    assert (read.low > read.chance + 0.2).all() and (read.high <= 1).all()
    blank = table.loc["2"]
    assert blank.accuracy.to_numpy() == pytest.approx(blank.chance.to_numpy(), abs=0.1)
    assert (blank.low <= blank.chance + 1e-9).all()


def test_the_interval_covers_the_accuracy():
    """Of 200 probes of pure noise with two values, few intervals leave out one half."""
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.standard_normal((120, 4, 2)))
    outside = 0
    for _ in range(200):
        values = {"shape": rng.permuted(np.arange(480) % 2).reshape(120, 4)}
        line = probe_table({"pre": rows}, np.zeros(120, int), values).iloc[1]
        outside += not line.low <= 0.5 <= line.high
    assert outside <= 22  # 99.9 % of a binomial of 200 and 0.05


def test_a_run_is_probed_once_and_its_generator_reads_no_class(tiny, monkeypatch):
    run = Run.open("tiny")
    conditions = []
    features = probes.generator_features
    monkeypatch.setattr(
        probes, "generator_features", lambda *a: conditions.append(a[3]) or features(*a)
    )
    table = probes.probes(run, 60)
    assert list(table) == probes.COLUMNS
    assert list(dict.fromkeys(table.layer)) == ["pre", "post", "0", "1", "2", "3"]
    assert list(dict.fromkeys(table.factor)) == ["class", *FACTORS]
    assert (conditions[0] == 24).all() and len(conditions[0]) == 60
    assert table.n.eq(30).all() and table.accuracy.between(0, 1).all()
    pd.testing.assert_frame_equal(probes.probes(run, 60), table)
    assert len(conditions) == 1, "the table stays with the run"


def test_tokens_are_beside_the_patch_they_show(tiny, monkeypatch):
    """A tokenizer whose features are the factors themselves is read without error, so that the
    tokens and the factors are in the same order.
    """
    run = Run.open("tiny-tokenizer")
    scenes = open_trained(run).split("val")
    factors = torch.from_numpy(scenes.factors(np.arange(100), 4)).flatten(1, 2)  # (N, L, 4)
    coded = torch.nn.functional.one_hot(factors, 9).flatten(2).float()
    monkeypatch.setattr(probes, "tokenizer_features", lambda *_: {"pre": coded})
    table = probes.probes(run, 100).set_index("factor")
    assert set(table.layer) == {"pre"}, "a tokenizer's run has no generator"
    assert table.accuracy[["shape", "texture", "colour"]].min() > 0.97
    assert (table.accuracy[list(FACTORS)] > table.chance[list(FACTORS)] + 0.2).all()


def test_photographs_have_a_class_only(tiny, monkeypatch):
    run = Run.open("tiny-tokenizer")
    monkeypatch.setattr(probes, "Scenes", ())  # nothing is an instance of it
    assert set(probes.probes(run, 40).factor) == {"class"}


def test_refuses(tiny):
    for count in (7, 0, 2.5):
        with pytest.raises(UserError, match=f"images is {count}"):
            probes.probes(Run.open("tiny"), count)

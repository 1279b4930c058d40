"""Analysis tables of a run: the meaning of their levels, and the floors of the alignment loss."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import scenes

from gear import load_generator, load_tokenizer
from gear.analysis import profiles
from gear.analysis.features import generator_features, teacher_features, tokenizer_features
from gear.analysis.sensitivity import (
    ONLY,
    generator_sensitivity,
    sensitivity_table,
    tokenizer_sensitivity,
)
from gear.config import UserError
from gear.measures.alignment import cka
from gear.runs.run import Run
from gear.teachers.scenes import load_scenes_teacher

N, L, K = 40, 16, 5


def profile(rows, target, **choices):
    return profiles.profile({0: rows}, target, K, **choices).set_index(["level", "metric"])


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, L, 6, generator=generator) for _ in range(3)]


def test_position_alone_aligns_patches_and_not_content(noise):
    """Features that depend only on the position align any two images; without the mean of each
    position, no alignment is left.
    """
    position = 3 * noise[2][:1]
    table = profile(position + noise[0], position + noise[1])
    assert table.value["patch", "cka"] > 0.7 and table.null["patch", "cka"] > 0.7
    assert abs(table.value["content", "cka"]) < 0.05 and abs(table.null["content", "cka"]) < 0.05


def test_content_is_not_touched_by_what_position_adds(noise):
    shared = noise[0] + 0.5 * noise[1]
    plain, shifted = profile(shared, noise[0]), profile(shared + 5 * noise[2][:1], noise[0])
    assert shifted.value["content", "cka"] == pytest.approx(plain.value["content", "cka"], abs=1e-5)
    assert plain.value["content", "cka"] > 0.5 > plain.null["content", "cka"]
    assert shifted.value["patch", "cka"] < plain.value["patch", "cka"] - 0.1


def test_alignment_of_a_collapsed_tokenizer_is_undefined_and_no_error(noise):
    # rows depend on the position only, not on the image
    table = profile(torch.ones(N, L, 6) + noise[2][:1], noise[0])
    assert table.n["content", "cka"] == 0
    assert (
        table.value.loc[[("content", "cka"), ("content", "cknna"), ("image", "cka")]].isna().all()
    )


def test_biased_cka_is_inflated_where_nothing_is_shared(noise):
    unbiased, biased = (
        profile(noise[0], noise[1], estimator=name) for name in ("unbiased", "biased")
    )
    for level in ("image", "patch", "content"):
        assert biased.value[level, "cka"] > 0.1 > 0.05 > abs(unbiased.value[level, "cka"])
        assert biased.null[level, "cka"] > 0.1 > 0.05 > abs(unbiased.null[level, "cka"])
        assert biased.value[level, "cknna"] == unbiased.value[level, "cknna"]


def test_pairing_sees_compares_each_patch_with_the_next_position(noise):
    """Position i + 1 holds patch i, as embeddings do: only the pairing "sees" aligns the two, and
    it leaves out the last patch.
    """
    target = noise[0]
    hidden = torch.cat([noise[1][:, :1], target[:, :-1]], 1)
    predicts, sees = (profile(hidden, target, pairing=name) for name in ("predicts", "sees"))
    for level in ("image", "patch"):
        for metric in ("cknna", "cka"):
            assert (
                sees.value[level, metric] == pytest.approx(1, abs=1e-9)
                and predicts.value[level, metric] < 0.95
            )
    assert abs(predicts.value["patch", "cka"]) < 0.1
    # the last patch has no effect
    changed_end = torch.cat([target[:, :-1], noise[2][:, :1]], 1)
    assert profile(hidden, changed_end, pairing="sees").value["patch", "cka"] == pytest.approx(
        1, abs=1e-9
    )
    assert predicts.value["map", "moran"] == sees.value["map", "moran"]


def test_standardising_undoes_the_scale_and_offset_of_channels(noise):
    rows, target = (noise[0] + 0.5 * noise[1]).double(), noise[1]
    moved = rows * torch.tensor([1e3, 1, 1, 1, 1e-3, 10]) + torch.arange(6)
    for level in ("image", "patch", "content"):
        for metric in ("cknna", "cka"):
            values = {
                how: [profile(x, target, normalise=how).value[level, metric] for x in (rows, moved)]
                for how in ("standard", "l2")
            }
            assert values["standard"][0] == pytest.approx(values["standard"][1], abs=1e-9)
            assert abs(values["l2"][0] - values["l2"][1]) > 1e-3


def test_rows_that_are_not_normalised_are_compared_as_they_are(noise):
    rows = noise[0] + noise[1]
    assert profile(rows, noise[1], normalise="none").value["image", "cka"] == pytest.approx(
        cka(rows.mean(1), noise[1].mean(1))
    )


def test_a_constant_channel_changes_nothing_when_standardised(noise):
    wider = torch.cat([noise[0], torch.full((N, L, 1), 0.1)], -1)
    plain, with_constant = (
        profile(x, noise[0] + noise[1], normalise="standard").value["patch", "cka"]
        for x in (noise[0], wider)
    )
    assert plain == pytest.approx(with_constant, abs=1e-6)


def test_tables_made_before_the_choices_existed_are_still_found(tiny):
    """A default is not among a table's parameters; any other choice is, and makes a second table."""
    for name, table in (
        ("layer_profile", profiles.layer_profile),
        ("tokenizer_profile", profiles.tokenizer_profile),
    ):
        run = Run.open("tiny")
        old_table = pd.DataFrame({"old": [1]})
        run.table(name, {"images": 40, "k": 5}, lambda old_table=old_table: old_table)
        assert table(run, 40, 5).equals(old_table)
        assert table(run, 40, 5, normalise="l2", estimator="unbiased").equals(old_table)
        new_table = table(run, 40, 5, normalise="none")
        assert list(new_table) == profiles.COLUMNS and table(run, 40, 5).equals(old_table)
    with pytest.raises(UserError, match="unknown normalise 'l1'.*Known: l2, none, standard"):
        profiles.layer_profile(run, 40, 5, normalise="l1")
    with pytest.raises(UserError, match="unknown estimator 'debiased'.*Known: unbiased, biased"):
        profiles.tokenizer_profile(run, 40, 5, estimator="debiased")
    with pytest.raises(UserError, match="unknown pairing 'next'.*Known: predicts, sees"):
        profiles.layer_profile(run, 40, 5, pairing="next")


def test_sensitivity_changes_one_choice_at_a_time(noise):
    rows, target = noise[0] + noise[1], noise[0]
    table = sensitivity_table({"last": rows}, target, 20, 4, profiles.CHOICES).set_index(
        ["choice", "setting", "level", "metric"]
    )
    base = profiles.alignments(rows[:20], target[:20], 4)
    changed = {
        ("images", "40"): profiles.alignments(rows, target, 4),
        ("k", "8"): profiles.alignments(rows[:20], target[:20], 8),
        ("pairing", "sees"): profiles.alignments(rows[:20], target[:20], 4, pairing="sees"),
    } | {
        (choice, value): base
        for choice, value in (
            ("images", "20"),
            ("k", "4"),
            ("estimator", "unbiased"),
            ("pairing", "predicts"),
        )
    }
    for (choice, setting), rows in changed.items():
        for metric, level, value, _, chance, *_ in rows:
            if ONLY.get(choice, metric) == metric:
                line = table.loc[choice, setting, level, metric]
                assert (line.value, line.null) == pytest.approx((value, chance), nan_ok=True)
    assert not {("k", "cka"), ("estimator", "cknna")} & {
        (choice, metric) for choice, _, _, metric in table.index
    }


def test_sensitivity_has_the_profile_as_its_base_and_is_kept_with_the_run(tiny):
    run = Run.open("tiny-joint")
    table, profile = tokenizer_sensitivity(run, 40, 5), profiles.tokenizer_profile(run, 40, 5)
    base = table[(table.choice == "images") & (table.setting == "40")][profiles.COLUMNS]
    expected = profile[
        profile.layer.isin(["pre", "post"])
        & profile.level.isin(["image", "patch", "content"])
        & (profile.metric != "ties")
    ]
    pd.testing.assert_frame_equal(base.reset_index(drop=True), expected.reset_index(drop=True))
    assert "pairing" not in set(table.choice)
    generators = generator_sensitivity(Run.open("tiny"), 40, 5)
    assert set(generators.layer) == {"tap", "last"} and set(generators.choice) == {
        "images",
        "k",
        *profiles.CHOICES,
    }
    for weights in tiny.glob("*/checkpoints"):
        weights.rename(weights.with_name("gone"))
    pd.testing.assert_frame_equal(generator_sensitivity(Run.open("tiny"), 40, 5), generators)


def shrunk(rows, labels, classes=24):
    """Compute shrunk class means of rows, from their sums per class."""
    sums = torch.zeros(classes, *rows.shape[1:]).index_add_(0, labels, rows)
    squares = float(rows.double().square().sum())
    return profiles.shrunk_class_means(sums, torch.bincount(labels, minlength=classes), squares)


def test_floors_are_the_losses_of_constant_answers(tiny, monkeypatch):
    """Each floor by its definition, on the run's training and validation images; class means are
    shrunk toward the mean of the position.
    """
    monkeypatch.setattr(profiles, "LEAST_IMAGES", 100)
    table = profiles.alignment_floors(Run.open("tiny"), 20).set_index("predictor").value
    teacher = load_scenes_teacher()
    train, train_labels = scenes(480)  # 24 classes
    val, val_labels = scenes(96, first=1 << 40)
    unit = F.normalize(teacher(train), dim=-1)
    target = teacher(val)
    class_answers = shrunk(unit, train_labels)[val_labels]
    for name, answer in {
        "constant": unit.mean((0, 1)),
        "position": unit.mean(0),
        "class and position": class_answers,
    }.items():
        cosine = (F.normalize(answer.expand_as(target), dim=-1) * F.normalize(target, dim=-1)).sum(
            -1
        )
        assert table[name] == pytest.approx(-cosine.mean().item(), abs=1e-6)
    assert table["position"] < table["constant"]


@pytest.mark.parametrize("per_class", (1, 2, 4, 40))
def test_shrunk_class_means_of_few_images_are_no_worse_than_position_means(per_class):
    """Teacher features of scenes: with 4 images per class (4,000 images of ImageNet's 1,000
    classes), the plain class mean is a weaker floor than position alone. The shrunk mean is never
    weaker by more than noise.
    """
    teacher = load_scenes_teacher()
    train, train_labels = scenes(1_200)
    val, val_labels = scenes(300, first=1 << 40)
    unit = F.normalize(teacher(train), dim=-1)
    target = teacher(val)
    chosen = torch.cat(
        [(train_labels == c).nonzero()[:per_class, 0] for c in train_labels.unique()]
    )
    rows = unit[chosen]
    labels = train_labels[chosen]
    cosine = lambda answer: float(F.cosine_similarity(answer, target, dim=-1).mean())  # noqa: E731
    plain_means = torch.stack([rows[labels == c].mean(0) for c in range(24)])
    position = cosine(rows.mean(0).expand_as(target))
    shrunk_cosine = cosine(shrunk(rows, labels)[val_labels])
    plain_cosine = cosine(plain_means[val_labels])
    assert shrunk_cosine > position - 0.002 and shrunk_cosine > plain_cosine - 0.002
    if per_class <= 4:
        assert plain_cosine < position - 0.02, "the plain mean needs the shrinkage"
    else:
        assert shrunk_cosine > position + 0.02


def test_shrinkage_by_hand():
    """Two classes of two rows: w = 2 is the variance within a class, b the remaining variance
    between them; the means of equal classes become the mean of all.
    """
    rows, labels = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    within, between = 2.0, 25.0 - 2.0 / 4  # (1 + 1 + 1 + 1) / (4 - 2); (5^2 + 5^2) / 2 less w / N
    share = between / (between + within / 2)
    assert shrunk(rows, labels, 2).flatten().tolist() == pytest.approx(
        [6 - 5 * share, 6 + 5 * share]
    )
    alike = shrunk(torch.tensor([[0.0], [2.0], [0.0], [2.0]]), labels, 2)
    assert alike.flatten().tolist() == [1, 1], "equal classes have the mean of all"
    assert shrunk(rows[[0, 2]], labels[[0, 2]], 2).flatten().tolist() == [5, 5], (
        "so have classes of one row each"
    )
    absent = shrunk(rows, labels, 3)
    assert float(absent[2]) == 6, "a class without rows has the mean of all"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_profiles_of_a_gpu_are_those_of_a_cpu(tiny):
    """Equal up to the rounding of the features; the nulls use the same permutations."""
    run = Run.open("tiny")
    for name in ("layer_profile", "tokenizer_profile", "alignment_floors"):
        measure = getattr(profiles, f"_{name}")
        sizes = (20,) if name == "alignment_floors" else (40, 5)
        on_cpu, on_gpu = (measure(run, *sizes, torch.device(device)) for device in ("cpu", "cuda"))
        pd.testing.assert_frame_equal(on_cpu, on_gpu, rtol=0, atol=0.02)


def test_features_are_returned_on_the_device_of_the_images(tiny, device):
    tokenizer = load_tokenizer("tiny")
    generator = load_generator("tiny")
    teacher = load_scenes_teacher()
    images, labels = scenes(6, first=1 << 40)
    with torch.no_grad():
        codes = tokenizer.encode(images).flatten(1)
        expected = [
            generator.hidden(codes, labels, [2])[2],
            tokenizer.latents(images).flatten(2).mT,
            teacher(images),
        ]
    hidden = generator_features(generator.to(device), tokenizer.to(device), images, labels, [2])[2]
    features = [
        hidden,
        tokenizer_features(tokenizer, images)["pre"],
        teacher_features(teacher.to(device), images),
    ]
    for computed, reference in zip(features, expected):
        assert computed.device == images.device
        torch.testing.assert_close(computed, reference, rtol=1e-3, atol=1e-3)


def test_tokenizer_profile_compares_before_and_after_quantisation(tiny):
    tokenizer, (images, _) = load_tokenizer("tiny-joint"), scenes(12, first=1 << 40)
    features = tokenizer_features(tokenizer, images)
    codes = tokenizer.quantizer.codes()
    assert torch.equal(features["pre"], tokenizer.latents(images).flatten(2).transpose(1, 2))
    assert torch.equal(features["post"], codes[tokenizer.encode(images).flatten(1)])
    table = profiles.tokenizer_profile(Run.open("tiny-joint"), images=40, k=5)
    assert set(table.layer) == {"pre", "post", "teacher"} and set(table.level) == {
        "image",
        "patch",
        "content",
        "map",
    }
    ties = table[table.metric == "ties"].value.item()
    assert 0.5 < ties <= 1  # many of an image's 64 tokens have the same code


def test_sensitivity_needs_twice_the_images(tiny):
    """With fewer images, two of the settings would be computed on the same images."""
    with pytest.raises(
        UserError, match="'tiny' has 128 validation images, not 2 x 65: choose -p images 64"
    ):
        generator_sensitivity(Run.open("tiny"), images=65)


def test_speedups_are_computed_for_each_seed():
    """The baselines end at 2 after 100 steps. The method reaches 2 at step 50 with one seed, at the
    first step with another, and never with the third.
    """
    steps = list(range(10, 101, 10))
    ends = {0: [4 - 0.04 * s for s in steps], 1: [1.0] * 10, 2: [3.0] * 10}
    lines = [
        ("fd", s, v, "b", seed)
        for seed in ends
        for s, v in zip(steps, [12 - 0.1 * s for s in steps])
    ]
    lines += [
        ("fd", s, v, "m", seed) for seed, values in ends.items() for s, v in zip(steps, values)
    ]
    curves = pd.DataFrame(lines, columns=["metric", "step", "value", "method", "seed"])
    table = profiles.speedups_by_seed(curves, "b", "m", ["fd"]).set_index("seed")
    assert table.value[0] == pytest.approx(2.0) and table.value.isna().tolist() == [
        False,
        False,
        True,
    ]
    assert (
        table.value[1] >= 10
        and table.over.tolist() == [False, True, False]
        and set(table.target) == {2.0}
    )


def test_speed_ups_are_averaged_over_seeds_not_over_curves():
    """Geometric mean and Student's t of logarithms; a seed that never reaches the target leaves no
    average.
    """
    by_seed = pd.DataFrame(
        {
            "seed": [0, 1, 2, 0, 1, 2, 0],
            "metric": ["a"] * 3 + ["b"] * 3 + ["c"],
            "value": [1.0, 2.0, 4.0, 1.5, np.nan, 2.0, 3.0],
            "target": 0.0,
            "over": False,
        }
    )
    table = profiles.speedups_over_seeds(by_seed).set_index("metric")
    half = 4.302653 * np.log(2) / 3**0.5
    assert table.loc["a"].tolist() == pytest.approx([3, 2, 2 * np.exp(-half), 2 * np.exp(half)])
    assert table.loc["b", ["value", "low", "high"]].isna().all()
    assert table.value["c"] == pytest.approx(3) and np.isnan(table.low["c"])
    over = by_seed.assign(over=[True] + [False] * 6)
    assert profiles.speedups_over_seeds(over).set_index("metric").loc["a"].isna().any()

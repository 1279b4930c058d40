"""The judge's scores, on readings written by hand and on runs."""

import numpy as np
import pytest
import torch
from helpers import record_scored

from gear.data.scenes import Scenes
from gear.evaluation import judge
from gear.evaluation.detector import load_detector
from gear.evaluation.evaluate import (
    EvaluateOptions,
    Sampling,
    evaluate_run,
    keep_sheet,
    read_metrics,
    report,
)
from gear.evaluation.judge import (
    Reading,
    atoms,
    detection_error,
    judge_table,
    label_atoms,
    matches,
    read,
)
from gear.experiments.recipes import recipe
from gear.figures import sheet_rows
from gear.images import to_float
from gear.runs.run import Run

# visible, x, y, shape, texture, colour, ground
SCENE = torch.tensor(
    [[[1, 0.2, 0.2, 0, 1, 2, 4], [1, 0.8, 0.5, 3, 2, 5, 4], [0, 0.5, 0.5, 1, 1, 1, 4]]]
)


def reading(**changes):
    """A Reading of one image that shows SCENE exactly, with `changes`."""
    values = dict(
        ground=[4],
        is_object=[[True, True, False]],
        x=[[0.22, 0.8, 0.9]],
        y=[[0.2, 0.51, 0.9]],
        shape=[[0, 3, 3]],
        texture=[[1, 2, 0]],
        colour=[[2, 5, 0]],
    )
    return Reading(**{name: torch.tensor(value) for name, value in (values | changes).items()})


def scores(**changes):
    return {name: value.tolist() for name, value in atoms(reading(**changes), SCENE).items()}


def test_a_right_reading_scores_one_everywhere():
    assert scores() == dict.fromkeys(judge.ATOMS, [1.0])


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(ground=[3]), {"ground", "everything"}),
        (dict(shape=[[1, 3, 3]]), {"shape", "class", "two", "everything"}),
        (dict(texture=[[0, 2, 0]]), {"texture", "class", "two", "everything"}),
        (dict(colour=[[3, 5, 0]]), {"colour", "two", "everything"}),
        # the second object counts for pairs, not for the front object
        (dict(colour=[[2, 4, 0]]), {"two", "everything"}),
        # 0.05 beyond its third of the image, but near enough to be matched
        (dict(x=[[0.29, 0.8, 0.9]]), set()),
        (dict(x=[[0.38, 0.8, 0.9]]), {"position", "two", "everything"}),
        (dict(is_object=[[True, True, True]]), {"number", "everything"}),
        (dict(is_object=[[True, False, False]]), {"number", "two", "everything"}),
        (dict(is_object=[[False, False, False]]), set(judge.ATOMS) - {"ground"}),
    ],
)
def test_an_error_is_counted_where_it_belongs(changes, wrong):
    assert {name for name, value in scores(**changes).items() if value == [0.0]} == wrong


def test_images_with_one_visible_object_say_nothing_of_pairs():
    scene = SCENE.clone()
    scene[:, 1, 0] = 0
    result = atoms(reading(is_object=torch.tensor([[True, False, False]]).tolist()), scene)
    assert len(result["two"]) == 0 and float(result["everything"]) == 1


def test_a_detected_object_is_matched_once_and_the_front_object_chooses_first():
    scene = SCENE.clone()
    scene[:, 1, 1:3] = torch.tensor([0.21, 0.2])  # both objects at one place
    assert matches(reading(x=[[0.21, 0.7, 0.9]]), scene).tolist() == [[0, -1, -1]]


def test_labels_state_shape_and_texture_of_the_front_object():
    labels = torch.tensor([0 * 4 + 1])
    assert {k: float(v) for k, v in label_atoms(reading(), labels).items()} == {
        "texture": 1,
        "shape": 1,
        "class": 1,
    }
    assert {k: float(v) for k, v in label_atoms(reading(), labels + 1).items()} == {
        "texture": 0,
        "shape": 1,
        "class": 0,
    }
    assert float(label_atoms(reading(is_object=[[False] * 3]), labels)["shape"]) == 0


def test_detection_error_by_hand():
    error = detection_error(reading(is_object=[[True, True, True]], shape=[[0, 1, 0]]), SCENE)
    assert error["recall"] == 1 and error["precision"] == pytest.approx(2 / 3)
    assert error["shape"] == 0.5 and error["texture"] == error["colour"] == 1


def test_real_scenes_are_read_and_shuffled_ones_are_not():
    scenes = Scenes(1 << 40, 200, 32)
    images = to_float(torch.from_numpy(scenes.images(np.arange(200))))
    objects = torch.from_numpy(scenes.objects(np.arange(200)))
    right = read(load_detector(), images)
    values = {name: float(value.mean()) for name, value in atoms(right, objects).items()}
    assert values["class"] > 0.85 and values["everything"] > 0.6 and values["ground"] > 0.97
    chance = {name: float(value.mean()) for name, value in atoms(right, objects.flip(0)).items()}
    assert chance["everything"] == 0 and chance["class"] < 0.15
    # the result does not depend on how images are batched
    parts = [read(load_detector(), part) for part in images.split(7)]
    torch.testing.assert_close(torch.cat([part.shape for part in parts]), right.shape)


# -- runs ------------------------------------------------------------------------------------------

FEW = EvaluateOptions(sampling=Sampling(count=40), reference_count=90, device="cpu", quiet=True)


def test_scenes_are_judged_beside_the_teachers_space(tiny, capsys):
    records = evaluate_run("tiny", FEW)
    metrics = {record["metric"] for record in records}
    assert {"fd_scenes", "fd_detector", "judge_class", "judge_everything", "ntp_loss"} <= metrics
    kinds = {record["protocol"]["of"] for record in records if record["metric"] == "judge_class"}
    assert kinds == {
        "samples",
        "samples, shuffled labels",
        "real scenes",
        "reconstructions",
        "real scenes, shuffled",
    }
    table = judge_table([Run.open("tiny")]).reset_index().set_index("of")
    assert table.loc["real scenes", "class"] > 0.85 > table.loc["reconstructions", "class"]
    assert np.isnan(table.loc["samples", "everything"])  # a class says nothing of the ground
    record = next(
        r for r in records if r["metric"] == "judge_class" and r["protocol"]["of"] == "real scenes"
    )
    assert record["interval"][0] < record["value"] < record["interval"][1]
    report([Run.open("tiny")])
    printed = capsys.readouterr().out
    assert "fd_scenes [" in printed and "judge_" not in printed and "reconstructions" in printed
    # the teacher's space is marked, the detector's is not
    marked = {line.split(" [")[0] for line in printed.splitlines() if "] *" in line}
    assert "fd_scenes" in marked and "fd_detector" not in marked
    assert "* in the feature space of a teacher" in printed


def test_the_judge_reads_the_steps_and_scales_that_are_asked_for(tiny):
    options = EvaluateOptions(
        sampling=Sampling(count=24),
        reference_count=90,
        network="detector",
        sweep="cfg_scale=1,2",
        device="cpu",
        quiet=True,
    )
    evaluate_run("tiny", options)
    rows = judge_table([Run.open("tiny")]).reset_index()
    assert set(rows.cfg_scale[rows.of == "samples"]) == {1.0, 2.0}
    assert all("fd_scenes" != record["metric"] for record in read_metrics(Run.open("tiny")))


def test_a_sheet_shows_the_classes_in_turn_whatever_their_number(home):
    """Ten classes fill two rows of twelve; other settings and too few samples leave no sheet."""
    run = record_scored("tiny-gear-s0", recipe("tiny-gear-s0"))
    labels = torch.arange(10).repeat(3).flip(0)
    shades = (8 * labels + torch.arange(30) // 10).to(torch.uint8)
    batches = shades[:, None, None, None].expand(-1, 32, 32, 3).split(16)
    keep_sheet(run, 24, Sampling(count=30, temperature=0.5), batches, labels)
    keep_sheet(run, 24, Sampling(count=30, seed=1), batches, labels)
    keep_sheet(run, 24, Sampling(count=20), batches[:1], labels[:16])
    assert run.sheets() == {}
    keep_sheet(run, 24, Sampling(count=30, cfg_scale=3.0), batches, labels)
    rows = sheet_rows(run, 24, 3.0)
    seen = np.concatenate([255 * row[:, 0, 0, 0] for row in rows]).round().astype(int)
    expected = [8 * (i % 10) + i // 10 for i in range(24)]
    assert seen.tolist() == expected

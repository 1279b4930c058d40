"""The name of a run is built and parsed in one module: parsing returns the parts that built the
name, also if they contain dashes.
"""

import itertools
from dataclasses import replace

import pytest

from gear.config import UserError
from gear.experiments.recipes import NAMES, RECIPES, recipe, run_name, with_parts
from gear.experiments.studies import PRESETS, STUDIES, members
from gear.runs.names import RunName, listed, reseeded


def test_parsing_returns_the_parts_that_built_a_name():
    for name, seed, cell in itertools.product(
        NAMES.values(), (None, 0, 3, 12), ("", "tau-0.05", "s1", "a-s2-b", "x\ny")
    ):
        built = replace(name, seed=seed, cell=cell)
        if str(built) not in RECIPES and not (
            seed is None and cell == "s1"
        ):  # the name of the latter is parsed as seed 1
            assert run_name(str(built)) == built


@pytest.mark.parametrize(
    "text, parts",
    [
        ("scenes-gear", ("scenes", "gear", "", None)),
        ("scenes-gear-s0-tau-0.05", ("scenes", "gear", "tau-0.05", 0)),
        ("scenes-lfq-llamagen-repa-half-s2", ("scenes-lfq", "llamagen-repa-half", "", 2)),
        (
            "imagenet256-l-100k-no-gan-s1-efficientnet-lite0",
            ("imagenet256-l-100k", "no-gan", "efficientnet-lite0", 1),
        ),
        ("scenes-joint-naive-inputs-s0", ("scenes", "joint-naive-inputs", "", 0)),
        ("scenes-gear-sharp", ("scenes", "gear", "sharp", None)),
        ("scenes-gear-s01", ("scenes", "gear", "s01", None)),
        ("scenes-gear-s-1", ("scenes", "gear", "", -1)),
        ("tiny", ("tiny", "", "", None)),
        ("teacher-scenes-s3", ("teacher-scenes", "", "", 3)),
        ("mine-s4-b", ("mine", "", "b", 4)),
        ("vq.pt", ("vq.pt", "", "", None)),
        ("scenes-gear-", ("scenes-gear-", "", "", None)),
        ("-s0", ("-s0", "", "", None)),
        ("", ("", "", "", None)),
    ],
)
def test_a_name_is_parsed_by_the_longest_matching_recipe(text, parts):
    assert run_name(text) == RunName(*parts) and str(run_name(text)) == text


def test_the_runs_of_studies_keep_their_names():
    names = {
        m.name
        for study in STUDIES
        for preset in PRESETS
        for m in members(study, preset, [0], transfer=True)
    }
    assert {
        "scenes-gear-s0-tau-0.05",
        "scenes-joint-s0-tau-0.05",
        "scenes-joint-no-init-s0",
        "scenes-lfq-gear-s0",
        "scenes-no-init-s0",
        "imagenet256-l-100k-gear-s0-tap-10",
        "cifar10-gear-s0-dinov2-b",
        "scenes-llamagen-repa-s0-size-XL",
    } <= names
    for name in names:
        assert run_name(name).seed == 0 and run_name(name).recipe in RECIPES


def test_parts_can_be_replaced_and_a_name_with_a_cell_is_no_recipe():
    assert with_parts("scenes-joint", seed=1) == "scenes-joint-s1"
    assert with_parts("scenes-joint-s1", cell="tau-0.1") == "scenes-joint-s1-tau-0.1"
    assert (
        recipe("scenes-gear-s2").tokenizer_run == "scenes-joint-s2"
        and recipe("scenes-gear-s2").recipe == "scenes-gear"
    )
    with pytest.raises(
        UserError, match="unknown recipe 'scenes-gear-s0-tau-0.1'. Did you mean 'scenes-gear"
    ):
        recipe("scenes-gear-s0-tau-0.1")


def test_patterns_of_seeds():
    assert (
        listed("a-s[10]-b") == ["a-s1-b", "a-s0-b"]
        and listed("a-s*") == listed("a[01]*") == listed("a") == []
    )
    assert (
        reseeded("scenes-gear-s[012]", [0, 3]) == "scenes-gear-s[03]"
        and reseeded("a-s[012]-b", [12]) == "a-s12-b"
    )
    with pytest.raises(UserError, match="one digit for each seed"):
        reseeded("a-s[012]", [0, 12])

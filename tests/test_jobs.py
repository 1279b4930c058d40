"""Several runs at once: parents first, shared ones once, a failure named and kept apart."""

from dataclasses import replace

import pytest

from gear import jobs
from gear.config import TrainingStopped
from gear.recipes import plan, recipe
from gear.run import Run


def test_plan_lists_ancestors_first_and_passes_the_seed_on():
    names = [name for name, _ in plan(recipe("scenes-gear-s2"), "scenes-gear-s2")]
    assert names == ["scenes-tokenizer-s2", "scenes-joint-s2", "scenes-gear-s2"]
    assert {config.seed for _, config in plan(recipe("scenes-gear-s2"), "scenes-gear-s2")} == {2}


def test_a_change_that_concerns_the_joint_stage_alone_leaves_the_warm_up_shared():
    base = recipe("tiny")
    changed = replace(base, objective=replace(base.objective, tau=0.3))
    planned = plan(changed, "tiny-x", base, "x")
    assert [name for name, _ in planned] == ["tiny-tokenizer", "tiny-joint-x", "tiny-x"]
    assert planned[1][1].objective.tau == 0.3 and planned[2][1].tokenizer_run == "tiny-joint-x"


@pytest.mark.slow
def test_runs_are_trained_once_and_in_order(home):
    jobs.train_many(["tiny", "tiny-joint"], jobs=2)
    assert all(Run.open(name).is_finished for name in ("tiny-tokenizer", "tiny-joint", "tiny"))


def test_a_failure_takes_only_its_descendants(home):
    """A parent that cannot be trained (another configuration under its name) is named, and so is who waited for it."""
    config = {"recipe": "tiny-tokenizer", "stage": "tokenizer", "steps": 99}
    Run.create("tiny-tokenizer", config)
    with pytest.raises(TrainingStopped) as failed:
        jobs.train_many(["tiny"], jobs=2)
    assert "steps: 99 -> 24" in str(failed.value) and "tiny-joint: its parent tiny-tokenizer failed" in str(failed.value)

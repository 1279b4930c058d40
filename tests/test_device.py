"""A seed of one run is no seed of another."""

import numpy as np
import torch

from gear.device import derived_seed
from gear.training.state import step_seed


def test_seeds_of_steps_do_not_repeat_across_runs():
    """They did after 1,000,003 steps: that step of seed 0 drew what step 0 of seed 1 does."""
    assert step_seed(0, 1_000_003) != step_seed(1, 0)
    one, other = ({step_seed(seed, step) for step in range(20_000)} for seed in (0, 1))
    assert len(one) > 19_990 and len(one & other) < 3
    shifted = np.array(
        [[step_seed(0, s + d) == step_seed(1, s) for s in range(300)] for d in range(300)]
    )
    assert shifted.mean() < 1e-3, "no shift makes one run's seeds another's"


def test_every_seed_is_one_that_a_cpu_takes_whole():
    for seed, number in ((0, 0), (2**32 - 1, 9_999_999), (5, 2**40)):
        value = derived_seed(seed, number)
        assert 0 <= value < 2**32 and torch.Generator().manual_seed(value).initial_seed() == value
    assert derived_seed(3, 4) == derived_seed(3, 4)

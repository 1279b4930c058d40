"""The random seeds of different runs do not coincide."""

import numpy as np
import torch

from gear.device import derived_seed
from gear.training.state import step_seed


def test_seeds_of_steps_do_not_repeat_across_runs():
    """With an earlier formula, step 1,000,003 of seed 0 drew the same numbers as step 0 of seed 1."""
    assert step_seed(0, 1_000_003) != step_seed(1, 0)
    seeds_0, seeds_1 = ({step_seed(seed, step) for step in range(20_000)} for seed in (0, 1))
    assert len(seeds_0) > 19_990 and len(seeds_0 & seeds_1) < 3
    is_equal = np.array(
        [[step_seed(0, s + d) == step_seed(1, s) for s in range(300)] for d in range(300)]
    )
    assert is_equal.mean() < 1e-3, "no shift of steps maps one run's seeds to the other's"


def test_every_derived_seed_fits_the_generator_of_a_cpu():
    for seed, number in ((0, 0), (2**32 - 1, 9_999_999), (5, 2**40)):
        value = derived_seed(seed, number)
        assert 0 <= value < 2**32 and torch.Generator().manual_seed(value).initial_seed() == value
    assert derived_seed(3, 4) == derived_seed(3, 4)

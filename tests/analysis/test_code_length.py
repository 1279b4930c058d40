"""The prequential code length: what tokens cost before and after they have been learnt."""

import math

import numpy as np
import pytest
import torch

from gear.analysis.code_length import BATCH, code_length, nats_per_image, prequential
from gear.config import UserError
from gear.runs.run import Run


def test_random_tokens_cost_the_logarithm_of_their_number():
    torch.manual_seed(0)
    indices = torch.randint(0, 32, (160, 16))
    lengths = prequential(indices, torch.zeros(160, dtype=torch.long), 32, 1)
    assert lengths.shape == (160,) and lengths.dtype == torch.float64
    # nothing can be learnt, and what is learnt wrongly costs extra
    assert 16 * math.log(32) - 0.5 < float(lengths.mean()) < 16 * math.log(32) * 1.15


def test_what_can_be_learnt_gets_cheaper_and_the_first_batch_pays_the_full_price():
    indices = torch.arange(16).repeat(320, 1)
    lengths = prequential(indices, torch.zeros(320, dtype=torch.long), 32, 1)
    assert float(lengths[:BATCH].mean()) == pytest.approx(16 * math.log(32), rel=0.15)
    assert float(lengths[-BATCH:].mean()) < 0.2 * float(lengths[:BATCH].mean())


def test_an_image_is_coded_before_it_is_learnt_from():
    """The length of an image does not depend on those after its batch, nor on its own order."""
    torch.manual_seed(0)
    indices, labels = torch.randint(0, 32, (64, 16)), torch.zeros(64, dtype=torch.long)
    changed = indices.clone()
    changed[BATCH:] = 0
    first = prequential(indices, labels, 32, 1)[:BATCH]
    assert torch.equal(first, prequential(changed, labels, 32, 1)[:BATCH])


def test_equal_tokens_have_equal_lengths_whatever_was_drawn_before():
    indices, labels = torch.randint(0, 32, (32, 16)), torch.zeros(32, dtype=torch.long)
    state = torch.get_rng_state()
    lengths = prequential(indices, labels, 32, 1)
    assert torch.equal(torch.get_rng_state(), state)  # and it draws nothing from the global stream
    torch.rand(3)
    assert torch.equal(prequential(indices, labels, 32, 1), lengths)


def test_the_table_of_a_run_is_kept(tiny):
    run = Run.open("tiny-joint")
    table = code_length(run, images=96, device="cpu")
    assert table.images.iloc[-1] == 96 and (np.diff(table.images) > 0).all()
    by_hand = sum(n * d for n, d in zip(table.nats, np.diff(table.images, prepend=0))) / 96
    assert nats_per_image(table) == pytest.approx(by_hand)
    codes = run.config["tokenizer"]["codebook_size"]
    assert 0 < nats_per_image(table) < 64 * math.log(codes) * 1.2
    path = run.path / "analysis" / "code_length.parquet"
    content = path.read_bytes()
    code_length(run, images=96, device="cpu")
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="513"):
        code_length(run, images=513, device="cpu")

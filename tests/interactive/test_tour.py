"""The tour: its figures show the paper's quantities, and a change of a control draws them again."""

import io
import math

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import GENERATOR, scenes, stirred, tiny_tokenizer

from gear.config import UserError
from gear.generator.model import Generator
from gear.images import to_uint8
from gear.interactive import tour
from gear.interactive.widgets import TokenGrid, to_png

CLASSES = [f"class {i}" for i in range(GENERATOR.num_classes)]


@pytest.fixture
def tokenizer():
    return stirred(tiny_tokenizer()).eval().requires_grad_(False)


@pytest.fixture
def generator(tokenizer):
    torch.manual_seed(0)
    return (
        stirred(Generator(GENERATOR, tokenizer.config.codebook_size)).eval().requires_grad_(False)
    )


@pytest.fixture
def images():
    return scenes(3)[0]


def pixels(panel):
    return matplotlib.image.imread(io.BytesIO(panel.picture.value))


def shown(axis):
    return np.asarray(axis.get_images()[0].get_array())


def test_the_soft_read_out_turns_hard_as_tau_falls(tokenizer, images):
    affinity = tokenizer.affinity(images[:1]).dense[0]
    hard = tokenizer.decode(tokenizer.encode(images[:1]))[0]
    distances = [
        float((tour.decode_mixture(tokenizer, affinity, tau) - hard).abs().mean())
        for tau in (1.0, 0.1, 1e-5)
    ]
    assert torch.allclose(tour.decode_mixture(tokenizer, affinity, 0), hard, atol=1e-5)
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-4


def test_exp_h_counts_the_codes_of_a_mixture():
    uniform = torch.zeros(3, 16)
    assert torch.allclose(tour.row_entropies(uniform, 0.1).exp(), torch.tensor(16.0))
    two = torch.full((16,), -4.0).index_fill(0, torch.tensor([3, 9]), -1.0)
    assert float(tour.row_entropies(two, 0.01).exp()) == pytest.approx(2)


def test_variants_replace_the_code_of_a_patch(tokenizer, images):
    indices = tokenizer.encode(images[:1])[0]  # (8, 8)
    f, position = tokenizer.config.downsampling, 8 * 3 + 5
    unchanged, changed = tour.variants(
        tokenizer, indices, position, torch.stack([indices[3, 5], (indices[3, 5] + 1) % 32])
    )
    assert torch.allclose(
        unchanged, tokenizer.decode(indices[None])[0][:, 2 * f : 5 * f, 4 * f : 7 * f], atol=1e-5
    )
    assert not torch.allclose(unchanged, changed, atol=1e-2)
    # a corner has fewer neighbours
    assert tour.variants(tokenizer, indices, 0, indices[0, :1]).shape == (1, 3, 2 * f, 2 * f)


def test_the_colour_of_a_code_does_not_depend_on_its_position(tokenizer, images):
    indices = tokenizer.encode(images[:1])[0]
    colours = tour.code_colours(tokenizer, indices)
    assert colours.shape == (8, 8, 3) and 0 <= colours.min() and colours.max() <= 1
    assert torch.allclose(
        tour.code_colours(tokenizer, indices.T), colours.transpose(0, 1), atol=1e-6
    )


def test_changed_tokens_are_those_that_differ_between_tokenizers(tokenizer, images):
    assert not tour.changed_tokens(tokenizer, tokenizer, images).any()
    before = stirred(stirred(tiny_tokenizer())).eval()
    changed = tour.changed_tokens(tokenizer, before, images)
    assert torch.equal(changed, tokenizer.encode(images) != before.encode(images)) and changed.any()
    with pytest.raises(UserError, match="different codes"):
        tour.changed_tokens(tokenizer, tiny_tokenizer(codebook_size=16), images)


def test_the_read_out_shows_the_masses_of_the_nearest_codes(tokenizer, images):
    fig = tour.draw_readout(tokenizer, images, 1, 20, 0.1)
    bars, strip, image, hard, soft, sizes = fig.axes
    pi = (tokenizer.affinity(images[1:2]).dense[0, 20] / 0.1).softmax(-1)
    nearest = pi.topk(tour.NEAREST)
    assert np.allclose([bar.get_height() for bar in bars.patches], nearest.values, rtol=1e-5)
    assert [int(label.get_text()) for label in strip.get_xticklabels()] == nearest.indices.tolist()
    assert len(strip.get_images()) == tour.NEAREST
    size = math.exp(float(torch.special.entr(pi).sum()))
    assert f"exp H = {size:.3g} codes" in bars.get_title(loc="left")
    assert shown(sizes)[20 // 8, 20 % 8] == pytest.approx(size, rel=1e-4)
    assert (shown(image) == to_uint8(images[1:2])[0].numpy()).all()
    assert (
        shown(hard) == to_uint8(tokenizer.decode(tokenizer.encode(images[1:2])))[0].numpy()
    ).all()
    plt.close(fig)


def test_a_row_of_taus_ends_with_the_hard_one(tokenizer, images):
    fig = tour.draw_taus(tokenizer, images[0], 9, [1.0, 0.01])
    above, below = np.array(fig.axes).reshape(2, 3)
    assert (
        shown(above[-1]) == to_uint8(tokenizer.decode(tokenizer.encode(images[:1])))[0].numpy()
    ).all()
    assert (
        below[-1].patches[0].get_height() == pytest.approx(1)
        and below[-1].get_xlabel() == "exp H = 1"
    )
    assert below[0].patches[0].get_height() < below[1].patches[0].get_height() <= 1
    plt.close(fig)


def test_a_change_of_a_control_draws_its_value_and_closes_the_figure(tokenizer, images):
    plt.close("all")
    panel = tour.readout(tokenizer, images, tau=0.1, position=4)
    before = pixels(panel)
    panel.controls["tau"].value = 1.0
    soft = pixels(panel)
    assert before.shape == soft.shape and (before != soft).any()
    assert panel.picture.value == to_png(tour.draw_readout(tokenizer, images, 0, 4, 1.0))
    panel.controls["position"].children[30].click()
    assert panel.picture.value == to_png(tour.draw_readout(tokenizer, images, 0, 30, 1.0))
    panel.controls["image"].value = 2
    assert panel.picture.value == to_png(tour.draw_readout(tokenizer, images, 2, 30, 1.0))
    buttons = panel.controls["position"].children
    assert [int(b.description) for b in buttons] == tokenizer.encode(images[2:3]).flatten().tolist()
    assert [i for i, b in enumerate(buttons) if b.layout.border_top] == [30]
    assert not plt.get_fignums()


def test_tokens_follow_the_image(tokenizer, images):
    panel = tour.tokens(tokenizer, tokenizer, images)
    assert panel.controls["image"].max == 2
    panel.controls["image"].value = 1
    fig = tour.draw_tokens(tokenizer, tokenizer, images, 1)
    assert [int(text.get_text()) for text in fig.axes[1].texts] == tokenizer.encode(
        images[1:2]
    ).flatten().tolist()
    assert fig.axes[3].get_title(loc="left") == "0 of 64 tokens changed"
    assert panel.picture.value == to_png(fig)


def test_samples_repeat_with_the_seed_and_change_with_each_control(tokenizer, generator):
    panel = tour.samples(generator, tokenizer, (8, 8), CLASSES)
    pictures = [panel.picture.value]
    button = panel.column.children[-1]
    for change in (
        lambda: panel.controls["label"].set_trait("label", "class 3"),
        lambda: panel.controls["cfg_scale"].set_trait("value", 4.0),
        lambda: panel.controls["temperature"].set_trait("value", 0.5),
        button.click,
    ):
        change()
        assert panel.picture.value not in pictures
        pictures.append(panel.picture.value)
    assert panel.controls["seed"].value == 1 and panel.controls["label"].value == 3
    assert panel.picture.value == to_png(
        tour.draw_samples(generator, tokenizer, (8, 8), 3, 4.0, 0.5, 1)
    )
    panel.controls["seed"].value = 0
    assert panel.picture.value == pictures[-2]


def test_without_guidance_both_rows_are_the_same(tokenizer, generator):
    fig = tour.draw_samples(generator, tokenizer, (8, 8), 1, 1.0, 1.0, 0)
    axes = np.array(fig.axes).reshape(3, tour.SAMPLES)
    assert all((shown(guided) == shown(plain)).all() for guided, plain in zip(axes[0], axes[1]))
    assert all(
        0 <= shown(axis).min() and shown(axis).max() <= math.log(32) + 1e-4 for axis in axes[2]
    )
    plt.close(fig)


def test_a_panel_shows_as_a_picture_where_widgets_do_not_work(tokenizer, images):
    panel = tour.tokens(tokenizer, tokenizer, images)
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}


def test_a_token_grid_of_any_size_fits_the_page():
    small, large = TokenGrid(4, 4), TokenGrid(16, 16, value=17)
    assert large.value == 17 and len(large.children) == 256
    assert all(
        int(grid.children[0].layout.width.removesuffix("px")) * w <= 272
        for grid, w in ((small, 4), (large, 16))
    )

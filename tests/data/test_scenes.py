"""A scene is a function of its number, and labels, factors and captions agree with its pixels."""

import re

import numpy as np
import pytest

from gear.data import scenes
from gear.data.scenes import COLOURS, GROUNDS, NUM_CLASSES, OBJECTS, SHAPES, TEXTURES, Scenes

ALL = np.arange(150)
SOURCE = Scenes(0, 150, 32)


@pytest.fixture(scope="module")
def images():
    return SOURCE.images(ALL)


@pytest.fixture(scope="module")
def pixels():
    """Return the factors of every pixel: (B, 32, 32, 4)."""
    return SOURCE.factors(ALL, 1)


@pytest.mark.parametrize("size", (16, 32))
def test_a_scene_is_a_function_of_its_number(size):
    """Its bytes are the same alone, in a batch of any order, and from a source with another first
    scene.
    """
    source = Scenes(0, 100, size)
    numbers = np.array([70, 3, 41, 3])
    shifted = Scenes(40, 60, size)
    for method in (Scenes.images, Scenes.labels, Scenes.captions, lambda s, n: s.factors(n, 4)):
        batch = method(source, numbers)
        for i, n in enumerate(numbers):
            np.testing.assert_array_equal(method(source, [n])[0], batch[i])
        np.testing.assert_array_equal(method(shifted, [1])[0], batch[2])
    assert (source.images([70]) != source.images([71])).mean() > 0.5


@pytest.mark.parametrize(
    "formulas, names", ((scenes.DISTANCES, SHAPES), (scenes.DARKNESSES, TEXTURES))
)
def test_each_scene_gets_the_formula_of_its_kind(formulas, names):
    assert len(formulas) == len(names)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, len(formulas), 20)
    u, v, phase = (
        rng.random(shape, np.float32) * 3 - 1.5 for shape in ((20, 1, 7), (20, 7, 1), (20, 1, 1))
    )
    coordinates = (u, v) if formulas is scenes.DISTANCES else (u, v, phase)
    every = [np.broadcast_to(formula(*coordinates), (20, 7, 7)) for formula in formulas]
    np.testing.assert_array_equal(
        scenes._by_kind(formulas, kinds, *coordinates), np.choose(kinds[:, None, None], every)
    )


def test_label_is_four_times_shape_plus_texture():
    labels = SOURCE.labels(ALL)
    assert (
        len(SOURCE.classes) == NUM_CLASSES == len(SHAPES) * len(TEXTURES)
        and labels.dtype == np.int64
    )
    assert (
        SOURCE.classes[2 * 4 + 1] == "striped triangle"
        and SOURCE.classes[5 * 4 + 3] == "dotted cross"
    )
    front = [
        re.match(r"a \w+ \w+ (\w+) (\w+) at", caption).groups() for caption in SOURCE.captions(ALL)
    ]
    assert [
        SHAPES.index(s) * len(TEXTURES) + TEXTURES.index(t) for t, s in front
    ] == labels.tolist()


def test_labels_cover_every_class_evenly():
    counts = np.bincount(Scenes(0, 2400, 8).labels(np.arange(2400)), minlength=NUM_CLASSES)
    assert len(counts) == NUM_CLASSES and np.abs(counts - 100).max() < 45  # 4.5 standard deviations


def test_patch_factors_are_those_of_the_object_that_covers_most_of_it():
    draw = SOURCE._draw(ALL)
    owner = SOURCE._render(draw)[1]
    factors = SOURCE.factors(ALL, 4)
    behind = 0
    for b, r, c in np.ndindex(len(ALL), 8, 8):
        cover = np.bincount(
            owner[b, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].ravel(), minlength=OBJECTS + 1
        )
        top = cover.argmax()
        expected = (
            (0, 0, 0)
            if top == 0
            else tuple(draw[k][b, top - 1] + 1 for k in ("shape", "texture", "colour"))
        )
        assert tuple(factors[b, r, c]) == (*expected, draw["ground"][b])
        behind += top > 1
    assert behind > 100  # the objects behind the front one are tested, too


def test_nothing_hides_the_front_object(images):
    """The other objects take none of its pixels and change none, except at its rim."""
    draw = SOURCE._draw(ALL)
    alone, owner, _ = SOURCE._render(draw | {"present": draw["present"] & [True, False, False]})
    front = SOURCE._render(draw)[1] == 1
    np.testing.assert_array_equal(front, owner == 1)
    assert (images == alone).all(-1)[front].mean() > 0.9 > (images == alone).all(-1).mean()


def test_a_pixel_belongs_to_the_object_that_covers_half_of_it():
    """The number of pixels of a complete circle is its area, pi r^2, within 2 %."""
    draw = SOURCE._draw(ALL)
    x, y, radius = (draw[k][:, 0] for k in ("x", "y", "radius"))
    is_complete_circle = (
        (draw["shape"][:, 0] == 0) & (np.minimum(x, y) > radius) & (np.maximum(x, y) < 1 - radius)
    )
    area = (SOURCE._render(draw)[1] == 1).sum((1, 2))[is_complete_circle]
    assert is_complete_circle.sum() > 5 and area.mean() == pytest.approx(
        np.pi * (radius[is_complete_circle] ** 2).mean() * 32**2, rel=0.02
    )


def test_factors_of_a_pixel_are_zero_together_and_each_scene_has_one_ground(pixels):
    background = (pixels[..., :3] == 0).any(-1)
    assert 0.3 < background.mean() < 0.8 and (pixels[background][:, :3] == 0).all()
    assert (pixels[..., 3] == pixels[:, :1, :1, 3]).all()
    assert pixels.min() == 0 and pixels.reshape(-1, 4).max(0).tolist() == [6, 4, 8, 5]


def test_captions_name_the_visible_objects_and_the_ground(pixels):
    """The triples (colour, texture, shape) of a caption are those of its scene's pixels, and the
    first is the front object.
    """
    names = [("", *SHAPES), ("", *TEXTURES), ("", *COLOURS)]
    counts = []
    for caption, label, factors in zip(SOURCE.captions(ALL), SOURCE.labels(ALL), pixels):
        named = re.findall(
            r"a (?:large|small) (\w+) (\w+) (\w+) at the (?:top|middle|bottom) (?:left|centre|right)",
            caption,
        )
        rows = np.unique(factors.reshape(-1, 4), axis=0)
        visible = {(names[2][k], names[1][t], names[0][s]) for s, t, k, _ in rows if s > 0}
        assert set(named) == visible and f"{named[0][1]} {named[0][2]}" == SOURCE.classes[label]
        assert caption.endswith(f"on a {list(GROUNDS)[rows[0, 3]]} ground")
        counts.append(len(named))
    assert set(counts) == {1, 2, 3}


def test_flat_patches_have_the_colour_that_their_factors_name(images):
    """The ground is never flat. A flat plain patch has its palette colour, changed by at most 0.06
    of the range.
    """
    patches = images.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 16, 3)
    flat = (patches == patches[..., :1, :]).all((-1, -2))
    shape, texture, colour, _ = SOURCE.factors(ALL, 4)[flat].T
    plain = texture == 1 + TEXTURES.index("plain")
    assert plain.sum() > 100 and (shape > 0).all()
    palette = np.array(list(COLOURS.values()))[colour - 1]
    assert np.abs(patches[flat][:, 0].astype(int) - palette)[plain].max() <= 0.06 * 255 + 1


def test_the_numbers_of_factor_values_include_background_except_for_the_ground():
    assert scenes.FACTORS == {"shape": 7, "texture": 5, "colour": 9, "ground": 6}

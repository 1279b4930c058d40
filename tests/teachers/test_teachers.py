"""The packaged teacher is frozen and standardised; a message about a grid or a name that does not
fit says what would.
"""

import json

import pytest
import torch
from helpers import scenes

from gear.config import UserError, from_dict
from gear.data import DataConfig
from gear.data.scenes import FACTORS, Scenes
from gear.experiments.recipes import plan, recipe
from gear.teachers import check_grid, load_teacher
from gear.teachers.scenes import PACKAGED, ScenesTeacher
from gear.teachers.weights import named_for, read_tensors
from gear.training.settings import Config
from gear.weights import check_fit


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("scenes", DataConfig(), 4)


@pytest.fixture(scope="module")
def rows(teacher):
    """Channel features before standardisation, (N L, 144), of 512 scenes on which it was not
    standardised.
    """
    with torch.no_grad():
        return teacher.channels(scenes(512, first=1 << 40)[0]).permute(0, 2, 3, 1).flatten(0, 2)


def test_it_is_what_the_recipe_makes():
    """The card's configuration, completed by fields added since, is that of the recipe."""
    card = json.loads(PACKAGED.with_suffix(".json").read_text())
    del card["config"]["version"]
    assert from_dict(Config, card["config"]) == plan(recipe("teacher-scenes"))[0][1]
    assert card["variance_kept"] > 0.9 and card["recipe"] == "teacher-scenes"


def test_it_is_frozen_and_in_evaluation_mode(teacher):
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_features_lie_on_the_grid_in_raster_order(teacher):
    images = scenes(3)[0]
    features = teacher(images)
    assert features.shape == (3, 64, 64) and teacher.grid(32) == 8 and teacher.dim == 64
    changed = images.clone()
    changed[:, :, 20:24, 4:8] *= -1  # the patch of row 5, column 1
    assert (teacher(changed) - features).norm(dim=-1).argmax(1).tolist() == [5 * 8 + 1] * 3


def test_channels_are_standardised_over_the_scenes(teacher, rows):
    """On scenes other than those that set them, the mean is about 0 and the standard deviation
    about 1; raw channels have neither.
    """
    standard = (rows - teacher.mean) / teacher.std
    assert standard.mean(0).abs().max() < 0.1 and (standard.std(0) - 1).abs().max() < 0.15
    assert (rows.mean(0).abs() / rows.std(0)).median() > 0.3


def test_features_are_principal_components(teacher, rows):
    """The directions are orthonormal and the features uncorrelated; the largest variance comes
    first, and together they explain most of it.
    """
    torch.testing.assert_close(
        teacher.components @ teacher.components.T, torch.eye(64), rtol=0, atol=1e-5
    )
    standard = (rows - teacher.mean) / teacher.std
    covariance = torch.cov((standard @ teacher.components.T).T)
    spread = covariance.diag().sqrt()
    assert (covariance / spread[:, None] / spread - torch.eye(64)).abs().max() < 0.25
    assert (spread.sort(descending=True).values - spread).abs().max() < 0.1 * spread[0]
    assert covariance.diag().sum() / 144 > 0.9


def test_any_two_patches_are_not_alike(teacher):
    """Because of the standardisation, patches of different scenes have a mean cosine of about 0."""
    features = torch.nn.functional.normalize(teacher(scenes(64)[0]), dim=-1)
    assert abs((features[:-1] * features[1:]).sum(-1).mean()) < 0.15


def test_it_sees_the_factors(teacher):
    """The cross entropies are far below those of a guess, on scenes on which it was not trained."""
    factors = torch.from_numpy(Scenes(1 << 40, 128, 32).factors(range(128), 4))
    with torch.no_grad():
        losses = teacher.factor_losses(scenes(128, first=1 << 40)[0], factors)
    for i, name in enumerate(FACTORS):
        share = factors[..., i].flatten().bincount() / factors[..., i].numel()
        assert losses[f"{name}_loss"] < 0.5 * torch.special.entr(share).sum()


def test_standardise_whitens_the_diagonal_and_returns_the_share_kept():
    torch.manual_seed(0)
    teacher, images = ScenesTeacher().eval(), scenes(64)[0]
    variance_share = teacher.standardise(images)
    with torch.no_grad():
        features = teacher(images).flatten(0, 1).double()
    covariance = torch.cov(features.T)
    assert features.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=1e-3)
    assert (covariance.diag().diff() < 1e-3).all() and 0.5 < variance_share < 1
    assert covariance.diag().sum().item() / 144 == pytest.approx(
        variance_share, abs=1e-3
    )  # 144 channels of variance 1


def test_a_grid_that_does_not_fit_says_what_would(teacher):
    check_grid(teacher, 32, 4)
    with pytest.raises(
        UserError,
        match=r"32 px into 8 x 8 patches, the tokenizer into 4 x 4 tokens.*halves the resolution 2 times",
    ):
        check_grid(teacher, 32, 8)


def test_an_unknown_teacher_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown teacher 'scene'.*Did you mean 'scenes'\?"):
        load_teacher("scene", DataConfig(), 4)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = torch.nn.Linear(3, 4), torch.nn.ModuleList([torch.nn.Linear(4, 4)])


def tensors_of(seed, prefix=""):
    torch.manual_seed(seed)
    return {f"{prefix}{name}": t.detach() for name, t in Encoder().state_dict().items()}


@pytest.mark.parametrize(
    "content",
    (
        tensors_of(0),
        {"state_dict": tensors_of(0), "ema": tensors_of(1)},
        {"net": tensors_of(0, "module.")},
        {"state_dict": tensors_of(0, "model.")},
        {
            "teacher": tensors_of(0, "backbone.") | {"dino_head.last": torch.zeros(2)},
            "student": tensors_of(1, "backbone."),
        },
        {"model": {"state_dict": tensors_of(0, "_orig_mod.image_encoder.")}},
        {n: t.double() for n, t in tensors_of(0).items()},
    ),
)
def test_weights_of_other_trainers_are_found(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    network = Encoder()
    tensors = named_for(network, read_tensors(tmp_path / "w.pth"))
    check_fit(network, tensors, "w.pth", "teacher")
    network.load_state_dict(tensors)
    assert all(torch.equal(t, tensors_of(0)[name]) for name, t in network.state_dict().items())


def test_weights_that_are_no_numbers_or_not_all_there_are_named(tmp_path):
    network, tensors = Encoder(), tensors_of(0)
    for change, message in (
        (tensors["stem.weight"] * float("nan"), "stem.weight holds NaN in 12 of 12 values"),
        (tensors["stem.weight"].double() * 1e300, "stem.weight holds infinity in 12 of 12 values"),
        (tensors["stem.weight"].to(torch.int8), "stem.weight is torch.int8"),
        (tensors["stem.weight"].to_sparse(), "stem.weight is sparse"),
    ):
        with pytest.raises(
            UserError,
            match=f"the weights of 'w' are not all numbers that this teacher x can have:\n  {message}",
        ):
            check_fit(network, tensors | {"stem.weight": change}, "w", "teacher x")
    partly = {f"model.{name}": t for name, t in tensors.items() if name != "stem.bias"}
    with pytest.raises(UserError, match="do not fit this teacher x:\n  missing stem.weight"):
        check_fit(network, named_for(network, partly), "w", "teacher x")
    itself = {"epoch": 3}
    itself["model"] = itself  # a dictionary in a file may contain itself
    torch.save(itself, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth holds no tensors by name"):
        read_tensors(tmp_path / "w.pth")
    torch.save({"a": tensors, "b": tensors_of(1)}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match="w.pth holds 2 sets of tensors: save the one you mean alone"
    ):
        read_tensors(tmp_path / "w.pth")

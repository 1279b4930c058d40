"""V-JEPA 2.1 as a teacher: it reads files in the layout of facebookresearch/vjepa2, and its features
are those of a second implementation of the forward pass, written here.

The network has the published architecture except for width and depth. Its weights are random, and
large enough for positions to matter.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_vit_teachers import IMAGENET, normalised, pictures, z_scored

from gear.config import UserError
from gear.data import DataConfig
from gear.teachers import check_installed, load_teacher
from gear.teachers.networks import VITS
from gear.teachers.weights import find_weights

pytest.importorskip("transformers")

NAME, WIDTH, DEPTH, HEADS = "vjepa2.1-b", 128, 3, 2
FILE, FOLDER = VITS[NAME].file, VITS[NAME].repo


def shapes(width, depth):
    """Return the encoder's tensors in the published file, {name: shape}."""
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    norms = [f"blocks.{n}.norm{k}" for n in range(depth) for k in (1, 2)]
    norms += [f"norms_block.{k}" for k in range(4)]
    weights = {f"blocks.{n}.{name}": s for n in range(depth) for name, s in linear.items()}
    weights |= {"patch_embed.proj": (width, 3, 2, 16, 16)}
    weights |= {"patch_embed_img.proj": (width, 3, 1, 16, 16)} | dict.fromkeys(norms, (width,))
    return (
        {f"{name}.weight": shape for name, shape in weights.items()}
        | {f"{name}.bias": shape[:1] for name, shape in weights.items()}
        | {f"{kind}_mod_embed": (1, 1, width) for kind in ("img", "video")}
    )


def random_tensors(seed):
    """Return random weights that preserve the scale of their input, with norms about 1 and biases
    of 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(WIDTH, DEPTH).items():
        values = torch.randn(shape, generator=generator)
        matrix = name.endswith("weight") and len(shape) > 1
        scale = math.prod(shape[1:]) ** -0.5 if matrix else 0.3
        weights[name] = values * scale + (len(shape) == 1 and name.endswith("weight"))
    return weights


def checkpoint(tensors):
    """Return the content of the published file for an encoder: the live encoder, the predictor and
    the optimizer beside the average.
    """
    named = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
    return {
        "encoder": {name: torch.zeros_like(tensor) for name, tensor in named.items()},
        "predictor": {"module.backbone.predictor_norm.weight": torch.ones(4)},
        "opt": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-4}]},
        "scaler": None,
        "ema_encoder": named,
        "epoch": 40,
    }


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Reduce the teacher's entry in width and depth; returns a function that writes a file of such
    weights with changes: {name: tensor, or None to leave it out}.
    """
    options = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    entry = replace(VITS[NAME], dim=WIDTH, options=(*options.items(), ("tubelet_size", 1)))
    monkeypatch.setitem(VITS, NAME, entry)

    def write(tensors, **changes):
        tensors = {n: t for n, t in (tensors | changes).items() if t is not None}
        torch.save(checkpoint(tensors), tmp_path / FILE)
        return f"{NAME}={tmp_path / FILE}"

    return write


# -- the forward as it is published ----------------------------------------------------------------


def layer_norm(x, t, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x, t, name):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def turns(side, span):
    """Return exp(i angle) for every token and pair of channels: 10 pairs by the frame (which is 0),
    10 by the row, 10 by the column, and 2 unrotated.
    """
    angles = torch.zeros(side * side, 32, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for k in range(10):
                frequency = 10000 ** (-k / 10) * (span - 1) / (side - 1)
                angles[row * side + column, 10 + k] = row * frequency
                angles[row * side + column, 20 + k] = column * frequency
    return torch.polar(torch.ones_like(angles), angles)


def attention(x, t, name, turn):
    mixed = []
    query, key, value = linear(x, t, f"{name}.qkv").split(WIDTH, -1)
    for head in range(HEADS):
        q, k, v = (part[..., head * 64 : (head + 1) * 64] for part in (query, key, value))
        q, k = (torch.complex(part[..., 0::2], part[..., 1::2]) * turn for part in (q, k))
        # the real part of a product with the conjugate is the dot product of the pairs
        weights = ((q @ k.conj().transpose(-1, -2)).real / 8).softmax(-1)
        mixed.append(weights @ v)
    return linear(torch.cat(mixed, -1), t, f"{name}.proj")


def published(t, images, layer=DEPTH, span=16, modality="img_mod_embed"):
    """Images (B, 3, H, H) in [-1, 1] -> the tokens of the image branch, (B, L, WIDTH) float64,
    after the last norm or of an earlier block.
    """
    t = {name: tensor.double() for name, tensor in t.items()}
    x = normalised((images.double() + 1) / 2, *IMAGENET)
    side = x.shape[-1] // 16
    patches = x.unflatten(2, (side, 16)).unflatten(4, (side, 16)).permute(0, 2, 4, 1, 3, 5)
    weight = t["patch_embed_img.proj.weight"].flatten(1)
    x = patches.flatten(3).flatten(1, 2) @ weight.T + t["patch_embed_img.proj.bias"] + t[modality]
    turn = turns(side, span)
    for n in range(layer):
        x = x + attention(layer_norm(x, t, f"blocks.{n}.norm1"), t, f"blocks.{n}.attn", turn)
        hidden = linear(layer_norm(x, t, f"blocks.{n}.norm2"), t, f"blocks.{n}.mlp.fc1")
        x = x + linear(F.gelu(hidden), t, f"blocks.{n}.mlp.fc2")
    return layer_norm(x, t, "norms_block.3") if layer == DEPTH else x


@pytest.mark.parametrize("size", (96, 256, 384))
def test_features_are_those_of_the_published_forward(size, small):
    """The features of the averaged encoder agree at its grid of 16 and at two to which it is
    stretched; they are spatially normalised.
    """
    tensors, images = random_tensors(0), pictures(2, size)
    spec, data = small(tensors), DataConfig(image_size=size)
    teacher, expected = load_teacher(spec, data, 16), published(tensors, images)
    assert expected.shape == (2, (size // 16) ** 2, WIDTH) and "z-score 0.6" in teacher.identity
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(teacher.raw(images).double(), expected, **close)
    torch.testing.assert_close(teacher.features(images).double(), z_scored(expected), **close)
    second = load_teacher(spec.replace("=", "@2="), data, 16)
    torch.testing.assert_close(
        second.raw(images).double(), published(tensors, images, layer=2), **close
    )


def test_such_weights_would_show_what_is_missing():
    """Unscaled positions, or the vector of videos, would change the features by a thousand
    tolerances.
    """
    tensors, images = random_tensors(0), pictures(1, 384)
    expected = published(tensors, images)
    for change in (dict(span=24), dict(modality="video_mod_embed")):
        assert (published(tensors, images, **change) - expected).abs().max() > 0.1


# -- the file --------------------------------------------------------------------------------------


def test_the_published_file_fits(tmp_path):
    """The file has 158 tensors of 86,833,152 values; the teacher loads those of its branch and
    checks each.
    """
    tensors = {n: torch.zeros(()).expand(shape) for n, shape in shapes(768, 12).items()}
    assert len(tensors) == 158 and sum(t.numel() for t in tensors.values()) == 86_833_152
    torch.save({"ema_encoder": tensors}, tmp_path / FILE)
    check_installed(f"{NAME}={tmp_path / FILE}")
    check_installed(f"{NAME}={tmp_path}", DataConfig(image_size=384), 16)  # the folder is enough
    with pytest.raises(UserError, match="do not fit this teacher vjepa2-l"):
        check_installed(f"vjepa2-l={tmp_path / FILE}")


def test_a_file_that_does_not_fit_lists_what_does_not(small):
    spec = small(
        random_tensors(0),
        img_mod_embed=None,
        pos_embed=torch.zeros(1, 576, WIDTH),
        **{"blocks.1.attn.qkv.bias": torch.zeros(3 * 64), "norms_block.3.weight": None},
    )
    for action in (load_teacher, check_installed):
        with pytest.raises(UserError) as error:
            action(spec, DataConfig(image_size=256), 16)
        assert str(error.value).splitlines() == [
            f"the weights of '{spec.partition('=')[2]}' do not fit this teacher {NAME}:",
            "  missing embeddings.modality (1, 1, 128)",
            "  missing layernorm.weight (128,)",
            "  unexpected pos_embed (1, 576, 128)",
            "  layer.1.attention.query.bias has shape (64,), expected (128,)",
            "  layer.1.attention.key.bias has shape (64,), expected (128,)",
            "  layer.1.attention.value.bias has shape (64,), expected (128,)",
        ]


def test_the_file_is_looked_for_in_two_caches_and_downloaded_into_gears(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    gear_file, torch_file = home / "cache" / FILE, tmp_path / "torch" / "checkpoints" / FILE
    requests = []

    def fail(url, target, progress):
        requests.append((url, target))
        raise OSError("the host is down")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = rf"{FILE} of dl\.fbaipublicfiles\.com/vjepa2, 1 file\. .*downloaded"
    with pytest.raises(UserError, match=rf"{message}: OSError, the host is down\."):
        find_weights(NAME, FOLDER, "1 file", file=FILE)
    with pytest.raises(UserError, match=rf"{message}: offline\."):
        find_weights(NAME, FOLDER, "1 file", offline=True, file=FILE)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *at, **_: requests.append(at))
    assert find_weights(NAME, FOLDER, "1 file", file=FILE) == gear_file
    assert requests == 2 * [(f"https://dl.fbaipublicfiles.com/vjepa2/{FILE}", str(gear_file))]
    for target in (torch_file, gear_file):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        assert find_weights(NAME, FOLDER, "1 file", offline=True, file=FILE) == target
    assert len(requests) == 2

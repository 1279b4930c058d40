"""Public vision transformers as teachers: they give the library's own features of an input that is
written out here, on the token grid. Weights are random, seeded and of the true architecture, in
files of the true layout, because no published file is on this machine.
"""

import functools
import hashlib
import re
import socket
import sys
from dataclasses import replace

import pytest
import torch
from helpers import scenes
from safetensors.torch import save_file

from gear.config import UserError
from gear.data import DataConfig
from gear.experiments.recipes import TINY
from gear.teachers import TEACHERS, check_grid, check_installed, load_teacher, load_teachers
from gear.teachers.networks import VITS, blocks, build, input_side, renamed
from gear.teachers.normalise import spatially_normalised
from gear.teachers.vit import ViTTeacher, parse
from gear.teachers.weights import FILE, file_hash, find_weights
from gear.training.stages import STAGES
from gear.training.state import State

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")

BASE = ("dinov2-b", "dinov3-b", "siglip2-b")
SLOW = ("dinov2-l", "vjepa2-l", "vjepa2.1-b", "clip-l")
PIXELS = DataConfig(image_size=256)
NEEDS = {"vjepa2-l": "transformers", "vjepa2.1-b": "transformers"}


def needs(name):
    return pytest.importorskip(NEEDS.get(name, "timm"))


def stirred(network, seed=0):
    """Give every tensor of a network seeded random values, so that every token, scale and bias
    matters.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        ones = re.search(r"norm\w*\.weight$|gamma|lambda1", name) is not None
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) * (0.02 if tensor.dim() > 1 else 0.1)
            + ones
        )
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A function from a name to (the library's network, its weight file, the teacher of 256 px
    loaded from the file), each made once.
    """
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def make(name):
        needs(name)
        with torch.no_grad():
            network = stirred(build(name, input_side(name, 256, 16)))
        path = folder / f"{name}.safetensors"
        save_file(network.state_dict(), path)
        return network, path, load_teacher(f"{name}={path}", PIXELS, 16)

    yield make
    for path in folder.iterdir():  # pytest would store gigabytes otherwise
        path.unlink()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Empty the caches of the hub and of torch, and make sockets raise; returns the list of
    attempted connections.
    """
    tried = []

    def refuse(*arguments, **keywords):
        tried.append(arguments)
        raise AssertionError("a network call")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tried


@functools.cache
def meta_teacher(name, size, stride=16):
    """A teacher of the true architecture without values, for shapes alone."""
    needs(name)
    with torch.device("meta"):
        return ViTTeacher(
            name, build(name, input_side(name, size, stride)), "0" * 64, size, stride
        ).eval()


def pictures(count=1, size=256, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- the input -------------------------------------------------------------------------------------

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def normalised(pixels, mean, std):
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], 1)


def bicubic(side):
    """Plain bicubic resizing by matrices, (B, C, n, n) -> (B, C, side, side): a = -0.75, repeated
    edges, no antialias.
    """

    def resize(pixels):
        n, a = pixels.shape[-1], -0.75
        centre = (torch.arange(side, dtype=torch.float64) + 0.5) * n / side - 0.5
        matrix = torch.zeros(side, n, dtype=torch.float64)
        for offset in range(-1, 3):
            source = centre.floor() + offset
            d = (centre - source).abs()
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[torch.arange(side), source.clamp(0, n - 1).long()] += torch.where(
                d <= 1, near, far
            )
        return matrix @ pixels @ matrix.T

    return resize


def dinov2_input(pixels):
    return bicubic(pixels.shape[-1] // 16 * 14)(normalised(pixels, *IMAGENET))


ORACLES = {  # name -> function from pixels in [0, 1] to the network's input
    "dinov2-b": dinov2_input,
    "dinov2-l": dinov2_input,
    "dinov3-b": lambda pixels: normalised(pixels, *IMAGENET),
    "siglip2-b": lambda pixels: pixels * 2 - 1,
    "vjepa2-l": lambda pixels: normalised(pixels, *IMAGENET),
    "vjepa2.1-b": lambda pixels: normalised(pixels, *IMAGENET),
    "clip-l": lambda pixels: normalised(bicubic(224)(pixels), *CLIP),
}
SIZES = [
    (name, size) for name in VITS for size in (256, 384, 512) if name != "clip-l" or size == 256
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_the_input_is_made_as_by_hand(name, size):
    """The input is uint8 / 255 after the steps of the table in their order, up to float32 rounding."""
    needs(name)
    integers = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1))
    network = torch.nn.Module()
    network.blocks = ()
    teacher, expected = (
        ViTTeacher(name, network, "", size, 16),
        ORACLES[name](integers.double() / 255),
    )
    made = teacher.preprocess(integers / 127.5 - 1)
    assert made.dtype == torch.float32 and made.shape == expected.shape
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(
        teacher.double().preprocess(integers.double() / 127.5 - 1), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_one_feature_a_token(name, size):
    """At 256, 384 and 512 px the true network, without values, gives one feature of its width per
    token of stride 16.
    """
    teacher = meta_teacher(name, size)
    check_grid(teacher, size, 16)
    features = teacher(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, (size // 16) ** 2, teacher.dim) and features.dtype == torch.float32
    assert teacher.grid(size) == size // 16 and teacher.stride == 16
    assert teacher.dim == (768 if name.endswith("-b") else 1024)


def test_dinov2_resizes_to_any_grid():
    for size, stride in ((32, 4), (256, 8), (128, 16)):
        teacher = meta_teacher("dinov2-b", size, stride)
        check_grid(teacher, size, stride)
        assert teacher(torch.empty(1, 3, size, size, device="meta")).shape == (
            1,
            (size // stride) ** 2,
            768,
        )


@pytest.mark.parametrize(
    ("name", "size", "stride", "takes"),
    (
        (
            "clip-l",
            512,
            16,
            (
                "512 px images at stride 16, 32 x 32 tokens: it resizes every image to 224 px, 16 "
                "x 16 patches"
            ),
        ),
        ("clip-l", 256, 8, "it resizes every image to 224 px"),
        (
            "siglip2-b",
            128,
            16,
            "it takes images of 256, 384 or 512 px as they are, in patches of 16 px",
        ),
        ("siglip2-b", 256, 8, "it takes images of 256, 384 or 512 px as they are"),
        ("dinov3-b", 256, 8, "it takes images as they are, in patches of 16 px"),
        ("vjepa2-l", 32, 4, "it takes images as they are, in patches of 16 px"),
        (
            "dinov2-b",
            250,
            16,
            (
                "250 px images at stride 16, 15.625 x 15.625 tokens: it resizes images to 14 px per "
                "token"
            ),
        ),
    ),
)
def test_a_grid_that_cannot_match_says_what_the_teacher_takes(
    name, size, stride, takes, no_network
):
    """The error comes before any weights are looked for."""
    for action in (load_teacher, check_installed):
        with pytest.raises(
            UserError, match=rf"the teacher {name} cannot match the grid of .*{re.escape(takes)}"
        ):
            action(name, DataConfig(image_size=size), stride)
    assert not no_network


def test_another_image_size_than_the_teacher_was_loaded_for_is_an_error():
    """V-JEPA's positions and SigLIP's table fit one size."""
    with pytest.raises(UserError, match="a teacher of 256 px images got 384 x 384 px"):
        meta_teacher("dinov3-b", 256)(torch.empty(1, 3, 384, 384))


# -- features --------------------------------------------------------------------------------------


def library_tokens(name, network, pixels):
    """Return the outputs of the library's own forward: {-1: the tokens it returns, n: those of a
    hook on block n, counted from 1}.
    """
    outputs = {}

    def keep(n):
        return lambda module, inputs, output: outputs.update(
            {n: output[0] if isinstance(output, tuple) else output}
        )

    handles = [block.register_forward_hook(keep(n)) for n, block in enumerate(blocks(network), 1)]
    if NEEDS.get(name) == "transformers":
        frames = 1 if name == "vjepa2.1-b" else 2
        outputs[-1] = network(pixels[:, None].repeat(1, frames, 1, 1, 1)).last_hidden_state
    else:
        outputs[-1] = network.forward_features(pixels)
    for handle in handles:
        handle.remove()
    return outputs


def z_scored(z):
    """Return (z - 0.6 mean) / (std + 1e-6) per image and channel, with the variance over L - 1."""
    mean = z.sum(1, keepdim=True) / z.shape[1]
    variance = ((z - mean) ** 2).sum(1, keepdim=True) / (z.shape[1] - 1)
    return (z - 0.6 * mean) / (variance.sqrt() + 1e-6)


SPECIAL = {
    "dinov2-b": 1,
    "dinov2-l": 1,
    "dinov3-b": 5,
    "siglip2-b": 0,
    "vjepa2-l": 0,
    "vjepa2.1-b": 0,
    "clip-l": 1,
}  # class and register tokens


def check_features(name, stored):
    """Compare a teacher's features, of the last layer and of two others, with the library's for the
    same input.
    """
    network, path, teacher = stored(name)
    assert not any(p.requires_grad for p in teacher.parameters()) and not any(
        m.training for m in teacher.modules()
    )
    images = pictures()
    tokens = {
        n: t[:, SPECIAL[name] :]
        for n, t in library_tokens(name, network, teacher.preprocess(images)).items()
    }
    depth = len(blocks(network))
    expected = tokens[
        depth if name == "clip-l" else -1
    ]  # CLIP's norm applies to its class token only
    assert (
        expected.shape == (1, 256, teacher.dim)
        and expected.std() > 0.1
        and (expected[:, 0] - expected[:, -1]).abs().mean() > 0.01
    )
    assert torch.equal(teacher.raw(images), expected)
    spatial = name in ("siglip2-b", "vjepa2-l", "vjepa2.1-b", "clip-l")
    torch.testing.assert_close(
        teacher.features(images), z_scored(expected) if spatial else expected, rtol=1e-4, atol=1e-4
    )
    for layer in (1, depth // 2):
        at = ViTTeacher(name, teacher.network, teacher.sha256, 256, 16, layer)
        assert torch.equal(at.raw(images), tokens[layer])
    assert (
        teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        and teacher.sha256 in teacher.identity
    )


@pytest.mark.parametrize("name", BASE)
def test_features_are_the_librarys(name, stored):
    check_features(name, stored)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_features_are_the_librarys_for_slow_networks(name, stored):
    check_features(name, stored)


@pytest.mark.slow
def test_siglip_is_the_one_of_transformers(stored, tmp_path):
    """Google's own file, text tower included, gives the features of SiglipVisionModel, with the
    tanh GELU and the final norm.
    """
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        network = stirred(
            transformers.SiglipVisionModel(
                transformers.SiglipVisionConfig(image_size=256, patch_size=16)
            )
        )
    tensors = {
        f"vision_model.{n.removeprefix('vision_model.')}": t
        for n, t in network.state_dict().items()
    }
    tensors |= {
        "text_model.embeddings.token_embedding.weight": torch.ones(4, 4),
        "logit_scale": torch.ones(1),
    }
    save_file(tensors, tmp_path / FILE)
    teacher = load_teacher(f"siglip2-b={tmp_path}", PIXELS, 16)  # the folder is enough
    (tmp_path / FILE).unlink()
    images = pictures()
    torch.testing.assert_close(
        teacher.raw(images), network(images).last_hidden_state, rtol=1e-4, atol=1e-4
    )


def facebook_names(name, tensors):
    """Restore the names of facebookresearch's files, which the libraries changed."""
    if name == "dinov2-b":
        return {**tensors, "mask_token": torch.zeros(1, 768)}
    original = {"mask_token": torch.zeros(1, 768), "rope_embed.periods": torch.ones(16)}
    for key, tensor in tensors.items():
        if key.endswith("q_bias"):
            value = tensors[key.replace("q_bias", "v_bias")]
            original[key.replace("q_bias", "qkv.bias")] = torch.cat(
                [tensor, torch.zeros(768), value]
            )
            original[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * 768)
        elif not key.endswith("v_bias"):
            key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
            original[key.replace("reg_token", "storage_tokens")] = tensor
    return original


@pytest.mark.parametrize("name", ("dinov2-b", "dinov3-b"))
def test_the_original_files_names_are_read(name, stored, tmp_path):
    """A .pth file with the project's own names, in half precision and with its head, gives the same
    network.
    """
    network, _, _ = stored(name)
    tensors = network.state_dict()
    path = tmp_path / "original.pth"
    torch.save(
        facebook_names(name, {n: t.half() for n, t in tensors.items()})
        | {"head.weight": torch.ones(2, 2)},
        path,
    )
    again = load_teacher(f"{name}={path}", PIXELS, 16).network.state_dict()
    path.unlink()
    assert again.keys() == tensors.keys()
    assert all(
        t.dtype == torch.float32 and torch.equal(t, tensors[n].half().float())
        for n, t in again.items()
    )


def test_spatial_normalisation_is_its_formula():
    z = (
        torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
        + 2
    )
    z[0, :, 0] = 5.0  # a standard deviation of 0
    torch.testing.assert_close(spatially_normalised(z), z_scored(z))
    normal = spatially_normalised(z)[1:]
    torch.testing.assert_close(normal.std(1), torch.ones(2, 7).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        normal.mean(1), 0.4 * z[1:].mean(1) / z[1:].std(1), rtol=1e-5, atol=0
    )


def test_features_are_kept_by_content_weights_layer_and_size(stored):
    """On a CPU the second call computes nothing, and no two teachers with different features share
    a key.
    """
    teacher = stored("dinov2-b")[2]
    small, images = ViTTeacher("dinov2-b", teacher.network, teacher.sha256, 32, 4), scenes(3)[0]
    first = small(images)
    torch.testing.assert_close(
        first, small.features(images), rtol=1e-2, atol=1e-2
    )  # stored in half precision
    small.cached.compute = None  # a call would raise
    assert torch.equal(small(images), first) and first.dtype == torch.float32
    others = [
        ViTTeacher("dinov2-b", teacher.network, sha256, size, 16, layer)
        for sha256 in ("a", "b") for size in (256, 384) for layer in (-1, 3)
    ]  # fmt: skip
    assert len({other.identity for other in others}) == 8
    assert (
        "z-score 0.6" in meta_teacher("siglip2-b", 256).identity
        and "normalisation none" in teacher.identity
    )


@pytest.mark.parametrize(("others", "widths"), (("", [768]), ("scenes,", [64, 768])))
def test_training_looks_at_such_a_teacher(others, widths, stored):
    """A state of the preset `tiny`, with a grid of 8 x 8 at 32 px, has losses that are finite
    cosines, with this teacher alone and beside another.
    """
    teacher = f"{others}dinov2-b@2={stored('dinov2-b')[1]}"
    state = State(
        replace(TINY, stage="joint", tokenizer_run="", teacher=teacher), torch.device("cpu")
    )
    batch, losses = state.observe(*scenes(2)), {}
    assert batch.target.shape == (2, 64, sum(widths)) and state.widths == widths
    for update in STAGES["joint"].updates:
        losses |= update(state, batch)
    assert abs(losses["align_loss"]) <= 1 and abs(losses["soft_align_loss"]) <= 1


# -- names, weights, the hub -----------------------------------------------------------------------


def test_a_name_carries_layer_and_path():
    assert parse("dinov2-b") == ("dinov2-b", -1, "")
    assert parse("dinov2-b@8") == ("dinov2-b", 8, "")
    assert parse("dinov2-b=/a=b@c.pth") == ("dinov2-b", -1, "/a=b@c.pth")
    assert parse("siglip2-b@-1=~/w") == ("siglip2-b", -1, "~/w")


@pytest.mark.parametrize(
    ("name", "message"),
    (
        (
            "dinov2-b@last",
            (
                "the layer of the teacher 'dinov2-b@last' is 'last': a number is expected, as in "
                "dinov2-b@8"
            ),
        ),
        ("dinov2-b@0", "has no layer 0: it has 1 to 12, and -1"),
        ("dinov2-b@13", "has no layer 13: it has 1 to 12"),
        ("dino2-b", "unknown teacher 'dino2-b'.*Did you mean 'dinov2-b'"),
        (
            "scenes=/w.pth",
            (
                "the teacher scenes comes with its weights and has one layer: write scenes, not "
                "scenes=/w.pth"
            ),
        ),
        ("efficientnet-lite0@3", "write efficientnet-lite0, not efficientnet-lite0@3"),
        (
            "dinov2-b=/no/such/file.pth",
            "the network dinov2-b does not exist: /no/such/file.pth",
        ),
    ),
)
def test_a_name_that_says_nothing_is_an_error(name, message, no_network):
    for action in (load_teacher, check_installed):
        with pytest.raises(UserError, match=message):
            action(name, PIXELS, 16)
    assert not no_network


def test_several_teachers_are_a_list():
    assert [t.dim for t in load_teachers("scenes, scenes", DataConfig(), 4)] == [64, 64]
    check_installed("scenes,scenes")
    with pytest.raises(
        UserError, match="'scenes,dinov2-b' names several teachers where one is expected"
    ):
        load_teacher("scenes,dinov2-b", PIXELS, 16)
    with pytest.raises(UserError, match="/no/file"):
        check_installed("scenes,dinov2-b=/no/file")
    with pytest.raises(UserError, match="unknown teacher ''"):
        load_teachers("scenes,", DataConfig(), 4)


@pytest.mark.parametrize("name", VITS)
def test_missing_weights_say_what_and_where_and_nothing_is_fetched(name, no_network, monkeypatch):
    """Offline by $HF_HUB_OFFLINE or by argument, one message names the file, its size, the project
    and the option that takes a path.
    """
    needs(name)
    vit = VITS[name]
    repo = vit.repo.format(side=256)
    location = repo[8:] if repo.startswith("https://") else f"huggingface.co/{repo}"
    where = re.escape(f"{vit.file} of {location}, about {vit.megabytes} MB, from ")
    message = (
        rf"of {name} are not on this machine: {where}.*offline\. .*"
        rf"--teacher {name}=/path/to/{vit.file}"
    )
    for action in (load_teacher, check_installed):
        with pytest.raises(UserError, match=message):
            action(name, PIXELS, 16, offline=True)
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setenv("HF_HUB_OFFLINE", "1")
            action(name, PIXELS, 16)
    assert not no_network


def test_a_download_that_fails_says_why(no_network, monkeypatch):
    def fail(repo, file):
        raise OSError("the host is down\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(
        UserError,
        match=r"could not be downloaded: OSError, the host is down\. Give the file by its path",
    ):
        load_teacher("dinov2-b", PIXELS, 16)


def test_a_path_goes_before_the_cache_and_the_cache_before_a_download(
    no_network, monkeypatch, tmp_path
):
    requests = []
    monkeypatch.setattr(
        hub,
        "hf_hub_download",
        lambda repo, file: requests.append((repo, file)) or str(tmp_path / "fetched"),
    )
    find = functools.partial(find_weights, "dinov2-b", "timm/some-repo", "a file")
    assert find() == tmp_path / "fetched" and requests == [("timm/some-repo", FILE)]
    cached = in_cache(tmp_path, b"weights")
    assert find() == cached and find(offline=True) == cached
    (tmp_path / "own.pth").touch()
    assert find(path=str(tmp_path / "own.pth")) == tmp_path / "own.pth"
    assert len(requests) == 1 and not no_network


def test_a_cached_file_whose_hash_is_not_its_name_is_damaged(no_network, tmp_path):
    path = in_cache(tmp_path, b"weights")
    assert file_hash(path) == hashlib.sha256(b"weights").hexdigest()
    path.resolve().write_bytes(b"weight")
    with pytest.raises(
        UserError, match=r"the cached file .*blobs.* is damaged: its hash is not its name"
    ):
        file_hash(path)


def in_cache(folder, content):
    """Put a file into the hub's cache as the hub does; returns its path there."""
    repo = folder / "hub" / "models--timm--some-repo"
    blob, snapshot = (
        repo / "blobs" / hashlib.sha256(content).hexdigest(),
        repo / "snapshots" / "abc",
    )
    for location in (blob.parent, snapshot, repo / "refs"):
        location.mkdir(parents=True)
    blob.write_bytes(content)
    (repo / "refs" / "main").write_text("abc")
    (snapshot / FILE).symlink_to(blob)
    return snapshot / FILE


def hollow(name, path, **changes):
    """Write a file with the right names and shapes, of zeros, with `changes`: {name: shape, or None
    to leave it out}.
    """
    shapes = {n: t.shape for n, t in meta_teacher(name, 256).network.state_dict().items()} | changes
    torch.save(
        {n: torch.zeros(()).expand(shape) for n, shape in shapes.items() if shape is not None}, path
    )
    return path


def test_a_file_that_does_not_fit_lists_what_does_not(tmp_path):
    changes = {"blocks.3.attn.qkv.bias": None, "cls_token": (1, 1, 5), "extra": (2,)}
    path = hollow("dinov2-b", tmp_path / "odd.pth", **changes)
    for action in (load_teacher, check_installed):
        with pytest.raises(UserError) as error:
            action(f"dinov2-b={path}", PIXELS, 16)
        assert str(error.value).splitlines() == [
            f"the weights of '{path}' do not fit this teacher dinov2-b:",
            "  missing blocks.3.attn.qkv.bias (2304,)",
            "  unexpected extra (2,)",
            "  cls_token has shape (1, 1, 5), expected (1, 1, 768)",
        ]


def test_another_models_file_does_not_fit(tmp_path):
    """Nothing is resampled to make it fit, neither patches of 16 px to 14, nor positions of 512 px
    to 256.
    """
    file = {name: hollow(name, tmp_path / f"{name}.pth") for name in BASE}
    with pytest.raises(UserError, match=r"do not fit this teacher dinov2-b:\n  missing pos_embed"):
        check_installed(f"dinov2-b={file['dinov3-b']}")
    patches = hollow(
        "dinov2-b", tmp_path / "patches.pth", **{"patch_embed.proj.weight": (768, 3, 16, 16)}
    )
    with pytest.raises(
        UserError, match=r"proj.weight has shape \(768, 3, 16, 16\), expected \(768, 3, 14, 14\)"
    ):
        check_installed(f"dinov2-b={patches}")
    with pytest.raises(
        UserError, match=r"pos_embed has shape \(1, 256, 768\), expected \(1, 1024, 768\)"
    ):
        check_installed(f"siglip2-b={file['siglip2-b']}", DataConfig(image_size=512), 16)
    for name in BASE:
        check_installed(f"{name}={file[name]}", PIXELS, 16)
        check_installed(f"{name}={file[name]}")  # weights of an unknown size are not looked for


@pytest.mark.parametrize(
    ("write", "message"),
    (
        (lambda path: path.write_bytes(b"half a file"), "cannot be read"),
        (
            lambda path: torch.save({"network": torch.nn.Linear(1, 1)}, path),
            "cannot be read: it holds Python objects",
        ),
        (lambda path: torch.save([1, 2], path), "holds no tensors by name"),
        (lambda path: torch.save({"model": {"step": 3}}, path), "holds no tensors by name"),
    ),
)
@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_a_file_that_is_no_checkpoint_is_one_message(write, message, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(UserError, match=f"{path} {message}"):
        load_teacher(f"dinov2-b={path}", PIXELS, 16)


def test_wrapped_tensors_are_found(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"state_dict": {"a": torch.ones(1)}}, "epoch": 3}, path)
    with pytest.raises(UserError, match="do not fit this teacher dinov2-b:\n  missing cls_token"):
        load_teacher(f"dinov2-b={path}", PIXELS, 16)


@pytest.mark.parametrize("name", ("dinov2-b", "vjepa2-l", "vjepa2.1-b"))
def test_a_missing_library_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, VITS[name].library, None)
    for action in (load_teacher, check_installed):
        with pytest.raises(
            UserError,
            match=rf"the teacher {name} needs {VITS[name].library}.*pip install timm transformers",
        ):
            action(name, PIXELS, 16)


def test_loading_leaves_the_random_numbers_alone(stored):
    """The initialisation of a network after a teacher does not depend on which teacher was loaded."""
    path = stored("dinov2-b")[1]  # built on first use, with random numbers
    torch.manual_seed(0)
    load_teacher(f"dinov2-b={path}", PIXELS, 16)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("name", VITS)
def test_the_table_tells_the_size_of_the_files(name):
    """The size is that of the network in float32 within a tenth, with the heads that the file has
    and we leave out; V-JEPA 2.1's file has all of its training.
    """
    teacher = meta_teacher(name, 256)
    megabytes = sum(t.numel() for t in teacher.network.state_dict().values()) * 4 / 1e6
    most = (5 if name == "vjepa2.1-b" else 1.1) * megabytes
    assert megabytes <= VITS[name].megabytes + 1 and VITS[name].megabytes < most
    assert name in TEACHERS and len(renamed(teacher.network.state_dict(), VITS[name].names)) == len(
        teacher.network.state_dict()
    )

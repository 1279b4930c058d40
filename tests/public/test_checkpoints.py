"""Reading and writing files: their wrappings, missing and additional tensors, damaged files, and
the messages about them.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from dataclasses import replace

import pytest
import torch
from helpers import TOKENIZER, tiny_generator
from PIL import Image
from safetensors.torch import load_file, save_file

import gear
from gear import UserError
from gear.__main__ import main
from gear.checkpoints import load_discriminator, open_checkpoint
from gear.files import ROOT
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator
from gear.public.containers import export
from gear.public.layouts import LAYOUTS
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer

CONFIGS = {  # a small network of each family that has a public layout
    "vq": TOKENIZER,
    "lfq": TokenizerConfig("lfq", "magvit2", 32, 5, 8, (1, 2, 2), res_blocks=1),
    "ibq": TokenizerConfig("ibq", "vqgan", 32, 6, 8, (1, 2, 2), latent_channels=6, res_blocks=2),
}
LAYOUT = {"vq": "LlamaGen VQ", "lfq": "Open-MAGVIT2 LFQ", "ibq": "IBQ"}
GENERATOR = GeneratorConfig(64, 2, 1, num_classes=5, tap_layer=1, condition_rotation="zero")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()


def layout(name):
    return next(layout for layout in LAYOUTS if layout.name == name)


def public(module, name):
    """Return a network's tensors under their public names."""
    names = layout(name).public(module)
    return {names[n]: t.detach().clone() for n, t in module.state_dict().items()}


def tokenizer(family="vq", seed=0):
    torch.manual_seed(seed)
    return Tokenizer(CONFIGS[family]).eval()


def generator(seed=0):
    torch.manual_seed(seed)
    return Generator(GENERATOR, 32).eval()


def same_outputs(one, other):
    return torch.equal(one.encode(IMAGES), other.encode(IMAGES)) and torch.equal(
        one(IMAGES).reconstruction, other(IMAGES).reconstruction
    )


@pytest.fixture
def file(home):
    """Write `content` to a file in the test's folder; returns its path."""

    def write(content, name="file.pt"):
        torch.save(content, home / name)
        return home / name

    return write


# -- wrappings -------------------------------------------------------------------------------------


def dotless(tensors):
    return {f"model_ema.{n.replace('.', '')}": t for n, t in tensors.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_wrapping_is_recognised_and_ema_preferred(family, file):
    """Live weights and their average differ. The average is loaded by default, and `source` says
    which was.
    """
    live, averaged = tokenizer(family), tokenizer(family, seed=1)
    a, b, name = public(live, LAYOUT[family]), public(averaged, LAYOUT[family]), LAYOUT[family]
    assert not same_outputs(live, averaged)
    both = {
        "gear.pt": (
            {"vq": a, "vq_ema": b, "steps": 9, "args": {"lr": 1.0}, "opt_vq": {"state": {}}},
            f"{name}, step 9",
        ),
        "llamagen.pt": (
            {"model": a, "ema": b, "steps": 9, "args": argparse.Namespace(lr=1.0)},
            f"{name}, step 9",
        ),
        "compiled.ckpt": (
            {
                "state_dict": {n.replace("encoder.", "encoder._orig_mod."): t for n, t in a.items()}
                | {n.replace("encoder", "encoder_orig_mod"): t for n, t in dotless(b).items()}
            },
            name,
        ),
        "pl.ckpt": (
            {
                "state_dict": a
                | dotless(b)
                | {"loss.d": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
            },
            name,
        ),
    }
    for path, (content, message) in both.items():
        path = file(content, path)
        for ema, module in ((True, averaged), (False, live)):
            loaded = gear.load_tokenizer(path, ema)
            assert same_outputs(loaded, module), path
            assert loaded.source == f"tokenizer{'_ema' if ema else ''} of {path.name} ({message})"
            assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    alone = {
        "bare.pt": a,
        "model.pt": {"model": a},
        "fsdp.pt": {"state_dict": a},
        "deepspeed.pt": {"module": a},
        "compiled.pt": {"vq": {f"_orig_mod.{n}": t for n, t in a.items()}},
        "ddp.pt": {"model": {f"module.{n}": t for n, t in a.items()}},
        "inner.pt": {
            "vq": {n.replace("encoder.", "encoder.module._orig_mod."): t for n, t in a.items()}
        },
        "beside.pt": a | {"step": 5},
        "half.pt": {n: t.bfloat16() for n, t in a.items()},
    }
    for path, content in alone.items():
        loaded = gear.load_tokenizer(file(content, path))
        assert loaded.encoder.conv_in.weight.dtype == torch.float32
        assert path == "half.pt" or same_outputs(loaded, live), path


def test_a_lightning_file_with_averages_alone_has_the_released_names(file, monkeypatch):
    """The averages' names have no dots; they are looked up among the names of the released sizes."""
    averaged = tokenizer("ibq")
    ibq = layout("IBQ")
    monkeypatch.setattr(
        "gear.public.wrappings.LAYOUTS",
        [ibq.__class__(**ibq.__dict__ | {"sizes": (CONFIGS["ibq"],)})],
    )
    loaded = gear.load_tokenizer(file({"state_dict": dotless(public(averaged, "IBQ"))}))
    assert same_outputs(loaded, averaged)


def test_a_joint_file_gives_each_of_its_parts(file):
    discriminator = layout("PatchGAN").build((16, 2))
    projector = layout("projectors").build(((64, 8, 12), (64, 8, 20)))  # two teachers
    path = file(
        {
            "vq": public(tokenizer(), "LlamaGen VQ"),
            "ar": public(generator(), "LlamaGen"),
            "projectors": public(projector, "projectors"),
            "discriminator": public(discriminator, "PatchGAN"),
            "steps": 5,
        }
    )
    assert same_outputs(gear.load_tokenizer(path), tokenizer())
    loaded, tokens, labels = (
        gear.load_generator(path),
        torch.arange(16).view(1, 4, 4),
        torch.tensor([2]),
    )
    assert torch.equal(loaded(tokens, labels), generator()(tokens, labels)) and loaded.grid == (
        16,
        16,
    )
    assert loaded.config.condition_rotation == "zero"
    checkpoint = open_checkpoint(path)
    assert checkpoint.parts["projector"].size == ((64, 8, 12), (64, 8, 20))
    assert torch.equal(load_discriminator(path)(IMAGES), discriminator(IMAGES))
    with pytest.raises(UserError, match="holds no generator: it holds tokenizer"):
        gear.load_generator(file(public(tokenizer(), "LlamaGen VQ"), "vq.pt"))


def test_what_may_be_absent_and_what_may_be_there_beside(file):
    """BatchNorm's counters may be missing, and LlamaGen's count of used codes may be present.
    Export writes both back as they were.
    """
    tensors = public(tokenizer(), "LlamaGen VQ") | {"quantize.codebook_used": torch.arange(7.0)}
    counters = public(layout("PatchGAN").build((16, 2)), "PatchGAN")
    del counters["main.3.num_batches_tracked"]
    path = file({"vq": tensors, "discriminator": counters})
    export(open_checkpoint(path), path.with_name("ours.safetensors"))
    export(open_checkpoint(path.with_name("ours.safetensors")), path.with_name("back.pt"))
    back = torch.load(path.with_name("back.pt"), weights_only=True)
    assert back["vq"].keys() == tensors.keys() and back["discriminator"].keys() == counters.keys()
    assert all(torch.equal(back["vq"][n], t) for n, t in tensors.items())
    assert same_outputs(gear.load_tokenizer(path.with_name("ours.safetensors")), tokenizer())
    load_discriminator(path)(IMAGES)


@pytest.mark.parametrize(
    "container", ["bare", "model", "module", "state_dict", "lightning", "gear"]
)
def test_a_file_comes_back_in_its_own_wrapping(container, file):
    a, b = public(tokenizer(), "LlamaGen VQ"), public(tokenizer(seed=1), "LlamaGen VQ")
    content = {
        "bare": a,
        "model": {"model": a, "ema": b, "steps": 3},
        "module": {"module": a},
        "state_dict": {"state_dict": a},
        "lightning": {"state_dict": a | dotless(b), "global_step": 3},
        "gear": {"vq": a, "vq_ema": b, "steps": 3},
    }[container]
    path = file(content)
    export(open_checkpoint(path), path.with_name("ours.safetensors"))
    export(open_checkpoint(path.with_name("ours.safetensors")), path.with_name("back.pt"))
    flat = lambda c: (
        {k: v for k, v in c.items() if not isinstance(v, dict)}
        | {  # noqa: E731
            f"{k}/{n}": t for k, v in c.items() if isinstance(v, dict) for n, t in v.items()
        }
    )
    back, expected_tensors = (
        flat(torch.load(path.with_name("back.pt"), weights_only=True)),
        flat(content),
    )
    assert back.keys() == expected_tensors.keys()
    assert all(
        torch.equal(torch.as_tensor(back[k]), torch.as_tensor(v))
        for k, v in expected_tensors.items()
    )


def test_a_run_and_its_export_are_the_same_network(tiny, home, capsys):
    main(["export", "tiny", str(home / "tiny.safetensors")])
    for load in (gear.load_tokenizer, gear.load_generator):
        one, other = load("tiny").state_dict(), load(home / "tiny.safetensors").state_dict()
        assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
    assert gear.load_generator(home / "tiny.safetensors").grid == (8, 8)
    with pytest.raises(
        UserError, match="no public layout fits a network of 'tiny'"
    ):  # a linear skip, and rotated conditions
        export(open_checkpoint("tiny"), home / "tiny.pt")
    assert not (home / "tiny.pt").exists()


def test_a_generator_whose_conditions_turn_is_not_passed_off_as_a_public_one():
    """The public networks set a condition's keys to zero: a generator that does not would be
    another network when read back from their layout.
    """
    assert gear.public.layouts.public_layout("generator", (GENERATOR, 32)).name == "LlamaGen"
    turned = GeneratorConfig(**GENERATOR.__dict__ | {"condition_rotation": "identity"})
    assert gear.public.layouts.public_layout("generator", (turned, 32)) is None
    assert (
        gear.public.layouts.public_layout("generator", (tiny_generator().config, 11)) is None
    )  # the number of heads is in no table


# -- bad input -------------------------------------------------------------------------------------


def refused(path, *message):
    """Every function and command that reads the file gives the same single message without a
    traceback.
    """
    for load in (gear.load_tokenizer, open_checkpoint):
        with pytest.raises(UserError) as error:
            load(path)
        assert all(words in str(error.value) for words in message), str(error.value)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ("weights.pt", "weights.ckpt"))
def test_code_in_a_file_is_not_run(name, file, home):
    refused(
        file({"vq": public(tokenizer(), "LlamaGen VQ"), "hook": Trap(home / "executed")}, name),
        name,
        f"holds Python objects ({io.open.__module__}.open), which gear does not load",
    )
    for protocol in range(6):  # a bare pickle, the format before torch 1.6
        (home / "old.pt").write_bytes(
            pickle.dumps({"a": Trap(home / "executed")}, protocol=protocol)
        )
        refused(home / "old.pt", "'old.pt' holds ", "which gear does not load")
    torch.save({"a": Trap(home / "executed")}, home / "four.pt", pickle_protocol=4)
    refused(home / "four.pt", "'four.pt' holds ", "which gear does not load")
    assert not (home / "executed").exists()


def test_what_is_no_checkpoint(file, home):
    for name, content in {
        "photo.pt": b"\xff\xd8\xff\xe0 not weights",
        "text.ckpt": b"hello",
    }.items():
        (home / name).write_bytes(content)
        refused(home / name, f"'{name}' ")
    (home / "empty.pt").write_bytes(b"")
    with zipfile.ZipFile(home / "photos.pt", "w") as photos:
        photos.writestr("a.png", b"no")
    for name in ("empty.pt", "photos.pt"):
        refused(home / name, f"'{name}' is not a checkpoint.")
    refused(file(torch.zeros(3)), "'file.pt' is not a checkpoint: it holds one Tensor")
    refused(
        file({"epoch": 3}),
        "'file.pt' has an unknown layout (it begins with epoch)",
        "Known: LlamaGen VQ",
    )
    refused(file({3: torch.zeros(1)}), "unknown layout")
    refused(
        file({"resnet.conv.weight": torch.zeros(3)}),
        "unknown layout (it begins with resnet.conv.weight)",
    )
    refused(
        file({"cls_embedding.uncond_embedding": torch.zeros(1)}),
        "LlamaGen's own text-to-image model",
    )
    (home / "x.safetensors").write_bytes(b"\x00" * 20)
    refused(home / "x.safetensors", "'x.safetensors' is not a checkpoint.")


def test_what_is_cut_short(file, home):
    path = file({"vq": public(tokenizer(), "LlamaGen VQ")})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "'file.pt' is cut short: fetch it again")
    export(
        open_checkpoint(file({"vq": public(tokenizer(), "LlamaGen VQ")}, "whole.pt")),
        home / "ours.safetensors",
    )
    ours = (home / "ours.safetensors").read_bytes()
    (home / "ours.safetensors").write_bytes(ours[:-100])
    refused(home / "ours.safetensors", "cut short")


def test_a_file_of_ours_without_its_card(home):
    save_file({"a": torch.zeros(1)}, home / "other.safetensors")
    refused(home / "other.safetensors", "no card of gear")


SMALL = {  # small networks of every layout, none of a released size
    **{LAYOUT[family]: lambda family=family: tokenizer(family) for family in CONFIGS},
    "LlamaGen": generator,
    "LlamaGen, hybrid": lambda: Generator(
        replace(GENERATOR, text_slots=300, text_dim=6, dual_layers=1), 32
    ),
    "projectors": lambda: layout("projectors").build(((64, 8, 12), (64, 8, 20))),
    "PatchGAN": lambda: layout("PatchGAN").build((16, 3)),
}


@pytest.mark.parametrize("name", SMALL)
def test_one_tensor_missing_extra_or_of_another_shape_is_named(name):
    """Any single tensor is named, also one from which a size is read, and without a long list of
    other tensors.
    """
    of, shapes = layout(name.split(",")[0]), {}
    names = of.public(SMALL[name]())
    shapes = {names[n]: tuple(t.shape) for n, t in SMALL[name]().state_dict().items()}
    wrong = 0
    for tensor, shape in shapes.items():
        if tensor.endswith("num_batches_tracked"):
            continue
        for fault, changed in (
            (f"missing {tensor}", {k: v for k, v in shapes.items() if k != tensor}),
            (f"{tensor} has shape {(*shape, 2)}, expected {shape}", shapes | {tensor: (*shape, 2)}),
        ):
            with pytest.raises(UserError) as error:
                of.fit(changed, "'x.pt'")
            message = str(error.value).splitlines()
            assert message[0] == f"'x.pt' has the layout {of.name}, but does not fit it:"
            if not (len(message) == 2 and message[1].strip().startswith(fault)):
                wrong += 1
                assert fault in str(error.value) or len(message) <= 14, (tensor, message)
    assert wrong <= 2, (
        name
        # the tensors that alone give a size: with a wrong shape, other tensors are listed
    )
    with pytest.raises(UserError, match=r"\n  unexpected \w+\.extra\.weight \(2,\)"):
        of.fit(shapes | {f"{next(iter(shapes)).split('.')[0]}.extra.weight": (2,)}, "'x.pt'")


def test_a_tensor_of_a_released_file_is_named_whichever_it_is():
    """For LlamaGen-S and -B and the projectors of GEAR-L, a tensor that alone gives a size is known
    from the released sizes.
    """
    for name, tensor in (
        ("llamagen_s", "cls_embedding.embedding_table.weight"),
        ("llamagen_s", "norm.weight"),
        ("vq16", "encoder.conv_in.weight"),
    ):
        shapes = {
            n: tuple(s)
            for n, s in json.loads(
                (ROOT / "tests" / "parity" / "keys" / f"{name}.json").read_text()
            ).items()
        }
        of = gear.public.layouts.recognise(shapes, name)
        with pytest.raises(UserError) as error:
            of.fit({n: s for n, s in shapes.items() if n != tensor}, name)
        assert str(error.value).splitlines()[1:] == [f"  missing {tensor} {shapes[tensor]}"]


def test_what_is_wrong_with_one_part_is_said_when_that_part_is_taken(file, capsys):
    broken = public(tokenizer(seed=1), "LlamaGen VQ")
    del broken["encoder.conv_out.bias"]
    path = file(
        {
            "vq": public(tokenizer(), "LlamaGen VQ"),
            "vq_ema": broken,
            "discriminator": {"main.0.weight": torch.zeros(2, 3, 4, 4)},
        }
    )
    assert same_outputs(gear.load_tokenizer(path, ema=False), tokenizer())
    with pytest.raises(
        UserError,
        match="'file.pt', entry 'vq_ema', has the layout LlamaGen VQ, but.*\n  missing encoder.conv_out.bias",
    ):
        gear.load_tokenizer(path)
    with pytest.raises(UserError, match="entry 'vq_ema'"):
        export(open_checkpoint(path), path.with_name("out.safetensors"))
    main(["inspect", str(path)])
    assert capsys.readouterr().out.count("cannot be loaded: 'file.pt', entry") == 2


def test_weights_that_are_no_numbers(file):
    tensors = {n: t.to(torch.int8) for n, t in public(tokenizer(), "LlamaGen VQ").items()}
    refused(
        file({"vq": tensors}),
        "holds weights that are no floating-point numbers",
        "encoder.conv_in.weight is torch.int8",
    )


def test_a_card_that_does_not_fit(file, home):
    """The cards and the tensors of gear's own files are compared when they are read."""
    path = home / "ours.safetensors"
    export(open_checkpoint(file({"vq": public(tokenizer(), "LlamaGen VQ")})), path)
    with gear.public.tensorfiles.safe_open(path, "pt") as tensor_file:
        tensors, card = (
            {n: tensor_file.get_tensor(n) for n in tensor_file.keys()},
            json.loads(tensor_file.metadata()["gear"]),
        )
    name = next(iter(tensors))

    def written(tensors, card):
        save_file(tensors, path, {"gear": card if isinstance(card, str) else json.dumps(card)})
        return path

    assert same_outputs(gear.load_tokenizer(written(tensors, card)), tokenizer())
    refused(
        written({n: t for n, t in tensors.items() if n != name}, card),
        "does not fit its tensors",
        f"missing {name.split('.', 1)[1]}",
    )
    refused(written(tensors | {"tokenizer.extra": torch.zeros(2)}, card), "unexpected extra")
    refused(
        written(tensors | {"teacher.extra": torch.zeros(2)}, card), "it does not describe teacher"
    )
    refused(written(tensors, card | {"container": "barrel"}), "it does not describe barrel")
    for field, value in (
        ("quantizer", "fsq"),
        ("channels", "abc"),
        ("channels", -3),
        ("colour", 1),
    ):
        size = card["parts"]["tokenizer"]["size"] | {field: value}
        refused(
            written(
                tensors,
                card | {"parts": {"tokenizer": card["parts"]["tokenizer"] | {"size": size}}},
            ),
            "the card of 'ours.safetensors'",
        )
    for bad in ("{", "[]", json.dumps(card | {"parts": []})):
        refused(written(tensors, bad), "the card of 'ours.safetensors' does not fit")


def test_a_file_may_be_written_again_while_its_network_is_in_use(file):
    """A training job overwrites its checkpoint: the tensors that were loaded before must not be
    mapped from it.
    """
    path = file({"vq": public(tokenizer(), "LlamaGen VQ")})
    loaded = gear.load_tokenizer(path)
    path.write_bytes(b"short")
    assert same_outputs(loaded, tokenizer())


def test_heads_are_told_by_a_table_or_a_width_of_64():
    """LlamaGen's 3B has 32 heads of 100 channels, from a table; other sizes have heads of 64. A
    width that fits neither is refused.
    """
    of = layout("LlamaGen")

    def shapes(layers, width):
        ends = {
            "tok_embeddings.weight": (32, width),
            "cls_embedding.embedding_table.weight": (6, width),
        }
        return ends | {f"layers.{layers - 1}.ffn_norm.weight": (width,)}

    heads = {
        (24, 3200): 32,
        (36, 1440): 20,
        (12, 384): 12,
        (24, 1024): 16,
        (48, 2560): 40,
        (3, 128): 2,
    }
    assert {key: of.read(shapes(*key))[0].heads for key in heads} == heads
    with pytest.raises(UserError, match="2 layers of 96: the number of heads is unknown"):
        of.read(shapes(2, 96))


def test_a_path_or_a_run_that_is_not_there(home, tiny):
    refused(home / "gone.pt", "no checkpoint", "there is no such file")
    refused(str(home / "runs"), "that is a folder")
    refused("tinny", "no run 'tinny'", "Did you mean 'tiny'?")


def test_inputs_out_of_range(file):
    vq, ar = tokenizer(), generator()
    with pytest.raises(UserError, match=r"indices run from 0 to 32: they have to lie in \[0, 32\)"):
        vq.decode(torch.tensor([[[0, 32], [1, 2]]]))
    with pytest.raises(UserError, match="a grid .B, h, w. is expected"):
        vq.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UserError, match="indices are torch.float32: integers are expected"):
        vq.decode(torch.zeros(1, 2, 2))
    for tokens, labels, message in (
        ([[-1] * 4], [0], "indices run from -1 to -1"),
        ([[0] * 4], [6], "labels run from 6 to 6"),
    ):
        with pytest.raises(UserError, match=message):
            ar(torch.tensor(tokens), torch.tensor(labels))
    with pytest.raises(UserError, match="labels run from 7 to 7"):
        gear.sample(ar, vq, [7], (2, 2))
    shapes = {"not square": torch.zeros(1, 2, 8).long(), "have shape .4,.": torch.zeros(4).long()}
    shapes |= {
        "have shape .1, 4, 9.": torch.zeros(1, 4, 9),
        "have shape .1, 0.": torch.zeros(1, 0).long(),
    }
    for message, tokens in shapes.items():
        with pytest.raises(UserError, match=message):
            ar(tokens, torch.tensor([0]))
    with pytest.raises(UserError, match="there are 1 token grids and 2 conditions"):
        ar(torch.zeros(1, 4).long(), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="nothing to sample"):
        gear.sample(ar, vq, [], (2, 2))
    for bad in (dict(top_p=-1.0), dict(temperature=-1.0), dict(top_k=-3)):
        with pytest.raises(UserError, match=f"{next(iter(bad))} is -.*: it has to be at least 0"):
            gear.sample(ar, vq, [0], (2, 2), **bad)
    for images in (
        torch.zeros(3, 16, 16),
        torch.zeros(1, 1, 16, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    ):
        with pytest.raises(UserError, match="images are .B, 3, H, W. floats in .-1, 1., not"):
            vq.encode(images)
    with torch.no_grad():  # embeddings in a grid, and indices as bytes, give the same as indices
        grid = torch.arange(4).view(1, 2, 2)
        expected = ar(grid, torch.tensor([0]))
        torch.testing.assert_close(ar(ar.embedding[grid], torch.tensor([0])), expected)
        assert torch.equal(ar(grid.to(torch.uint8), torch.tensor([0])), expected)
    with pytest.raises(UserError, match="conditioned on a class"):
        ar(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, 64))


# -- other trainers' files -------------------------------------------------------------------------


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": t for name, t in tensors.items()}


A, B = (
    public(tokenizer(), "LlamaGen VQ"),
    public(tokenizer(seed=1), "LlamaGen VQ"),
)  # live and averaged weights
# files with live weights alone, or averages alone: content, location, and whether they are
# averages
ALONE = {
    **{
        key: ({key: A}, key, False)
        for key in ("model_state_dict", "net", "network", "params", "generator", "anything")
    },
    **{
        key: ({key: B}, key, True)
        for key in (
            "ema",
            "ema_model",
            "model_ema",
            "params_ema",
            "ema_state_dict",
            "state_dict_ema",
            "averages",
            "averaged",
            "swa_model",
            "G_ema",
            "emaModel",
        )
    },
    **{
        p: (prefixed(p, A), p, False)
        for p in ("model.", "net.", "vqvae.", "tokenizer.", "first_stage_model.", "vq_model.")
    },
    **{p: (prefixed(p, B), p, True) for p in ("ema_model.", "ema.", "model_ema.inner.")},
    "a prefix in a wrapper": ({"state_dict": prefixed("model.", A)}, "state_dict/model.", False),
    "a wrapper in one": ({"model": {"state_dict": A}}, "model/state_dict", False),
    "both": ({"model": prefixed("module.tokenizer.", A)}, "model/tokenizer.", False),
    "AveragedModel": ({"n_averaged": torch.tensor(3), **prefixed("module.", B)}, "module.", True),
    "by name": ({"ema": {"decay": 0.9, "shadow": B}}, "ema/shadow", True),
    "beside others": (
        {"state_dict": prefixed("first_stage_model.", A) | {"unet.w": torch.zeros(2)}},
        "state_dict/first_stage_model.",
        False,
    ),
    "moments of the same names": (
        {"net": A, "optimizer": {"exp_avg": B}, "opt_state": B, "lr_schedulers": {}},
        "net",
        False,
    ),
}
BOTH = {  # files with both: content, and the location of each
    "params": ({"params": A, "params_ema": B}, "params", "params_ema"),
    "timm": ({"state_dict": A, "state_dict_ema": B}, "state_dict", "state_dict_ema"),
    "model_ema": ({"model_ema": B, "model": A}, "model", "model_ema"),
    "Lightning, names": (
        {"state_dict": prefixed("model.", A) | prefixed("ema_model.", B)},
        "state_dict/model.",
        "state_dict/ema_model.",
    ),
    "LitEma of a module": (
        {"state_dict": prefixed("model.", A) | dotless(B)},
        "state_dict/model.",
        "state_dict/model_ema.",
    ),
    "WeightAveraging": (
        {
            "state_dict": B,
            "current_model_state": A,
            "averaging_state": {"n_averaged": torch.tensor(1)},
        },
        "current_model_state",
        "state_dict",
    ),
    "ema-pytorch": (
        {
            "model": A,
            "ema": {
                "step": torch.tensor(4),
                **prefixed("online_model.", A),
                **prefixed("ema_model.", B),
            },
        },
        "model",
        "ema/ema_model.",
    ),
    "swa": (
        {
            "state_dict": prefixed("model.", A)
            | prefixed("avg.module.", B)
            | {"avg.n_averaged": torch.tensor(1)}
        },
        "state_dict/model.",
        "state_dict/avg.module.",
    ),
}


FLAT = [
    name
    for name, (content, *_) in ALONE.items()
    if all(isinstance(value, torch.Tensor) for value in content.values())
]


@pytest.mark.parametrize(
    ("name", "suffix"), [(n, ".pt") for n in ALONE] + [(n, ".safetensors") for n in FLAT]
)
def test_a_wrapper_or_a_prefix_is_recognised_and_named(name, suffix, home, capsys):
    (content, location, averaged), path = ALONE[name], home / f"file{suffix}"
    (torch.save if suffix == ".pt" else save_file)(content, path)
    loaded, kind = gear.load_tokenizer(path), "tokenizer_ema" if averaged else "tokenizer"
    assert same_outputs(loaded, tokenizer(seed=int(averaged)))
    assert loaded.source == f"{kind} of {path.name} (LlamaGen VQ, from '{location}')"
    main(["inspect", str(path)])
    message = capsys.readouterr().out
    assert f"{path.name}: wrapped by another trainer" in message and re.search(
        rf"  {kind} .*, from '{re.escape(location)}'\n", message
    )
    assert export(open_checkpoint(path), home / "back.pt") == []
    back = torch.load(home / "back.pt", weights_only=True)
    assert back.keys() == {"vq_ema" if averaged else "vq"}
    assert all(
        torch.equal(t, (B if averaged else A)[n]) for n, t in next(iter(back.values())).items()
    )
    if averaged:
        with pytest.raises(UserError, match="holds no tokenizer: it holds tokenizer_ema"):
            gear.load_tokenizer(path, ema=False)


@pytest.mark.parametrize("name", BOTH)
def test_averages_beside_live_weights_are_listed_and_taken(name, file, capsys):
    content, live, averaged = BOTH[name]
    path = file(content)
    for ema, location in ((True, averaged), (False, live)):
        loaded = gear.load_tokenizer(path, ema)
        assert same_outputs(loaded, tokenizer(seed=int(ema))) and loaded.source.endswith(
            f", from '{location}')"
        )
    main(["inspect", str(path)])
    message = capsys.readouterr().out
    assert re.search(
        rf"  tokenizer  .*from '{re.escape(live)}'\n  tokenizer_ema .*from '{re.escape(averaged)}'\n",
        message,
    )


def test_several_networks_under_prefixes_are_each_found(file, capsys):
    """The file has a generator with its tokenizer inside, and both beside each other; other entries
    are listed as not read.
    """
    ar = public(generator(), "LlamaGen")
    for content in (
        {**prefixed("vae.", A), **prefixed("gpt.", ar), "clip.w": torch.zeros(2)},
        ar | prefixed("vae.", A),
    ):
        path = file(content)
        assert same_outputs(gear.load_tokenizer(path), tokenizer())
        tokens, labels = torch.arange(16).view(1, 4, 4), torch.tensor([2])
        assert torch.equal(gear.load_generator(path)(tokens, labels), generator()(tokens, labels))
        main(["inspect", str(path)])
        message = capsys.readouterr().out
        assert "from 'vae.'" in message and ("not read: 'clip'" in message) == ("clip.w" in content)


def test_two_of_one_kind_are_not_chosen_between(file):
    refused(
        file({"a": A, "b": B}),
        "holds several networks of the kind tokenizer, 'a', 'b': save the one you mean alone",
    )
    path = file({"model": A, "ema_0.9": A, "ema_0.99": B})
    with pytest.raises(
        UserError, match="several networks of the kind tokenizer_ema, 'ema_0.9', 'ema_0.99'"
    ):
        gear.load_tokenizer(path)
    assert same_outputs(gear.load_tokenizer(path, ema=False), tokenizer())
    assert same_outputs(
        gear.load_tokenizer(file({"model": A, "state_dict": {**A}})), tokenizer()
    )  # the same network twice
    broken = {n: t for n, t in B.items() if n != "encoder.conv_in.bias"}
    assert same_outputs(
        gear.load_tokenizer(file({"last": A, "best": broken})), tokenizer()
    )  # only one fits its layout


def test_names_stay_strict_behind_a_prefix(file):
    path = file(
        {
            "state_dict": {
                n: t
                for n, t in prefixed("model.", A).items()
                if n != "model.encoder.conv_in.weight"
            }
        }
    )
    refused(
        path,
        (
            "entry 'state_dict/model.', has the layout LlamaGen VQ, but does not fit it:\n  "
            "missing encoder.conv_in.weight"
        ),
    )
    half = {n if n.startswith("encoder") else f"model.{n}": t for n, t in A.items()}
    refused(file(half), "does not fit it")
    refused(
        file(A | {"encoder.extra.weight": torch.zeros(2)}), "unexpected encoder.extra.weight (2,)"
    )
    counted = public(generator(), "LlamaGen") | {
        "layers.99999999.attention.wo.weight": torch.zeros(1)
    }
    refused(
        file(counted),
        "numbers more layers than it has tensors:\n  layers.99999999.attention.wo.weight",
    )


def test_averages_without_names_are_said_to_be_that(file, capsys):
    refused(
        file({"decay": 0.9, "shadow_params": [*A.values()]}),
        "averages without names (shadow_params)",
        "state_dict()",
    )
    main(["inspect", str(file({"model": A, "ema": {"shadow_params": [*B.values()]}}))])
    assert "not read: 'ema' (averages without names)" in capsys.readouterr().out


def test_a_file_that_holds_itself_is_read(file):
    content = {"model": A}
    content["self"] = content
    assert same_outputs(gear.load_tokenizer(file(content)), tokenizer())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_precisions_are_loaded_as_float32(dtype, file):
    loaded = gear.load_tokenizer(file({n: t.to(dtype) for n, t in A.items()})).state_dict()
    names = layout("LlamaGen VQ").public(tokenizer())
    assert all(
        t.dtype == torch.float32 and torch.equal(t, A[names[n]].to(dtype).float())
        for n, t in loaded.items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda t: t.to(torch.int8), "is torch.int8"),
        (lambda t: t.to(torch.complex64), "is torch.complex64"),
        (lambda t: t.to_sparse(), "is sparse, torch.float32"),
        (lambda t: t.to("meta"), "is empty (meta), torch.float32"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised, torch.qint8"),
    ),
)
@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage)")
def test_weights_of_other_kinds_are_named(change, message, file):
    path = file(A | {"encoder.conv_in.weight": change(A["encoder.conv_in.weight"])})
    refused(
        path,
        "holds weights that are no floating-point numbers",
        f"encoder.conv_in.weight {message}",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    ((float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")),
)
def test_weights_that_are_no_numbers_are_named(value, message, file, tiny, home, capsys):
    """The tensor is named for a file and for a run; `inspect` reports it, too."""
    wrong = A | {
        "encoder.conv_in.weight": A["encoder.conv_in.weight"].index_fill(0, torch.tensor(0), value)
    }
    with pytest.raises(
        UserError,
        match=rf"are not all numbers.*\n  encoder.conv_in.weight holds {message} in 27 of 216 values",
    ):
        gear.load_tokenizer(file(wrong))
    main(["inspect", str(home / "file.pt")])
    assert "cannot be loaded: there are weights that are not finite" in capsys.readouterr().out
    discriminator = public(layout("PatchGAN").build((16, 2)), "PatchGAN")
    discriminator["main.3.running_var"][0] = value
    with pytest.raises(UserError, match=rf"running_var holds {message} in 1 of 32 values"):
        load_discriminator(file({"discriminator": discriminator}))
    path = sorted((tiny / "tiny").glob("checkpoints/*/networks.safetensors"))[-1]
    tensors = load_file(path)
    next(t for name, t in tensors.items() if name.startswith("generator_ema.")).view(-1)[0] = value
    save_file(tensors, path)
    with pytest.raises(
        UserError,
        match=rf"the weights of 'tiny' are not all numbers.*\n  .* holds {message} in 1 of",
    ):
        gear.load_generator("tiny")


def packed(name, content):
    archive = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("weights/model.safetensors", content)
    if name == "tar":
        with tarfile.open(fileobj=archive, mode="w") as file:
            file.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    return gzip.compress(content) if name == "gzip" else archive.getvalue()


INSTEAD = {  # other files in the place of weights: bytes, and part of the message
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 287\n",
        "a Git LFS pointer, not the weights: git lfs pull",
    ),
    "html": (b"\n<!DOCTYPE html><html>", "text (a web page?), not weights: fetch it again"),
    "html in utf-16": ("<html>".encode("utf-16"), "text (a web page?), not weights"),
    "html in latin-1": ("<html>caf\xe9".encode("latin-1"), "text (a web page?), not weights"),
    "xml": (b"<?xml version='1.0'?><Error>", "text (a web page?), not weights"),
    "json": (
        b'{"error": "not found"}',
        """text, not weights (it begins with '{"error": "not found"}')""",
    ),
    "words": (b"Entry not found", "text, not weights (it begins with 'Entry not found')"),
    "index": (
        json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode(),
        "the index of a checkpoint in 2 parts (m-1.safetensors, m-2.safetensors",
    ),
    "empty": (b"", "It is empty: fetch it again"),
    "gzip": (packed("gzip", b"x"), "an archive (gzip): unpack it first"),
    "tar": (packed("tar", b"x"), "an archive (tar): unpack it first"),
    "zip": (
        packed("zip", b"x"),
        "an archive (zip) that holds weights/model.safetensors: unpack it first",
    ),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "an archive (7z)"),
    "rar": (b"Rar!\x1a\7\1\0", "an archive (rar)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file, as Keras writes"),
    "onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX file"),
    "tensorflow": (b"\x08\x01\x12\x99\x01", "a TensorFlow SavedModel"),
    "tensorflow index": (
        b"\0\0\x01" * 30 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
        "a part of a TensorFlow checkpoint",
    ),
    "gguf": (b"GGUF\3\0\0\0", "a GGUF file"),
    "numpy": (b"\x93NUMPY\1\0", "a NumPy array"),
    "image": (b"\xff\xd8\xff\xe0", "an image"),
    "noise": (b"\3\1\4\1\5\x92\x65", "of an unknown kind"),
}


@pytest.mark.parametrize("name", INSTEAD)
@pytest.mark.parametrize("suffix", (".pt", ".safetensors", ".ckpt"))
def test_what_lies_there_instead_of_weights_is_named(name, suffix, home, capsys):
    content, message = INSTEAD[name]
    (home / f"file{suffix}").write_bytes(content)
    refused(home / f"file{suffix}", f"'file{suffix}' is not a checkpoint. ", message)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(home / f"file{suffix}")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_torchscript_archive_is_named(home):
    torch.jit.script(torch.nn.Linear(2, 2)).save(home / "code.pt")
    refused(home / "code.pt", "a TorchScript archive, which is code")


def test_a_file_is_opened_by_its_content_and_not_its_suffix(file, home):
    save_file(A, home / "tensors.safetensors")
    torch.save(A, home / "legacy.pt", _use_new_zipfile_serialization=False)
    for source, name in (
        ("tensors.safetensors", "a.pt"),
        (file(A), "b.safetensors"),
        ("legacy.pt", "c.safetensors"),
    ):
        (home / name).write_bytes((home / source).read_bytes())
        assert same_outputs(gear.load_tokenizer(home / name), tokenizer())


@pytest.mark.parametrize("name", (b"caf\xe9.pt", b"caf\xe9.safetensors"))
def test_a_file_whose_name_is_no_utf_8_is_read(name, home, capsys):
    path = home / os.fsdecode(name)
    save_file(A, home / "plain.safetensors")
    torch.save(A, home / "plain.pt")
    path.write_bytes((home / f"plain{path.suffix}").read_bytes())
    assert same_outputs(gear.load_tokenizer(path), tokenizer())
    main(["inspect", str(path)])
    assert "caf\\udce9" in capsys.readouterr().out


def test_a_safetensors_file_cut_short_or_with_a_header_that_lies(home):
    save_file(A, home / "ours.safetensors")
    content = (home / "ours.safetensors").read_bytes()
    for wrong in (
        content[:-9],
        content[:100],
        (2**62).to_bytes(8, "little") + content[8:],
        b"\xff" * 7 + b"\0{",
    ):
        (home / "cut.safetensors").write_bytes(wrong)
        refused(
            home / "cut.safetensors", "'cut.safetensors' is cut short, or damaged: fetch it again"
        )


def test_a_safetensors_file_whose_header_is_as_long_as_a_brace(home):
    """The length of its header, 379 bytes, begins with the byte of "{"; the file is not taken for
    JSON.
    """
    padding = "x" * (379 - len(json.dumps({"__metadata__": {"p": ""}})))
    header = json.dumps({"__metadata__": {"p": padding}}).encode()
    assert len(header).to_bytes(8, "little")[:1] == b"{"
    (home / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(
        home / "a.safetensors",
        "no card of gear in its metadata, and an unknown layout (it begins with nothing)",
    )


def test_a_folder_and_a_runs_own_file_say_what_to_give(home, tiny, file):
    file(A, "vq.pt")
    refused(home, "that is a folder; a run is opened by its name; give a file in it, vq.pt")
    path = sorted((tiny / "tiny").glob("checkpoints/*/networks.safetensors"))[-1]
    refused(path, "holds the weights of a run, which is opened by its name: tiny")


SIZES = (
    ("tokenizer", "channels", 0),
    ("tokenizer", "res_blocks", 10**30),
    ("tokenizer", "codebook_size", -1),
    ("generator", "layers", 10**9),
    ("generator", "heads", 0),
    ("data", "image_size", "32"),
)


@pytest.mark.parametrize(("section", "field", "value"), SIZES)
def test_a_runs_configuration_that_speaks_of_no_network(section, field, value, tiny):
    path = tiny / "tiny" / "config.json"
    config = json.loads(path.read_text())
    config[section][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json is damaged .*restore it"):
        open_checkpoint("tiny")


# -- the command line ------------------------------------------------------------------------------


def test_inspect_says_what_is_there(file, capsys):
    vq = public(tokenizer(), "LlamaGen VQ") | {"quantize.codebook_used": torch.zeros(3)}
    foreign = {"foreign.weight": torch.zeros(2)}
    path = file(
        {"vq": vq, "ema": public(generator(), "LlamaGen"), "discriminator": foreign, "steps": 1234}
    )
    main(["inspect", str(path)])
    message = capsys.readouterr().out
    assert "file.pt: a GEAR checkpoint, training step 1234" in message
    count = sum(p.numel() for p in tokenizer().parameters())
    assert (
        f"{count:,} parameters, float32, layout: LlamaGen VQ; 32 codes of 4, downsampling 4"
        in message
    )
    assert "layout: LlamaGen; 2 layers of 64, 1 heads, 32 codes, 5 classes" in message
    assert (
        "kept beside them: quantize.codebook_used" in message
        and "not read: 'discriminator', 'steps'" in message
    )


def test_reconstruct_writes_a_sheet_and_its_metrics(file, home, capsys, tiny):
    path = file({"vq": public(tokenizer(), "LlamaGen VQ")})
    picture = home / "photo.png"
    Image.new("RGB", (40, 30), (200, 30, 90)).save(picture)
    main(
        [
            "reconstruct",
            str(path),
            "--images",
            str(picture),
            "--image-size",
            "16",
            "--out",
            str(home / "sheet.png"),
        ]
    )
    metrics = json.loads((home / "sheet.json").read_text())
    assert (
        metrics["images"] == 1
        and metrics["tokens"] == 16
        and metrics["protocol"]["image_size"] == 16
    )
    assert Image.open(home / "sheet.png").size == (20, 38)
    main(["reconstruct", "tiny", "--count", "10", "--out", str(home / "run.png")])
    again = json.loads((home / "run.json").read_text())
    assert (
        again["images"] == 10
        and again["protocol"]["source"] == "scenes"
        and 10 < again["psnr"] < 40
    )
    assert "tokenizer of tiny" in capsys.readouterr().out
    for arguments, message in (
        ([str(path)], "a file has no images of its own"),
        ([str(path), "--images", str(picture), "--image-size", "30"], "30 x 30 is not divisible"),
        ([str(path), "--images", "nowhere"], "--images: there are no images at 'nowhere'"),
        (
            [str(path), "--images", str(picture), "--count", "0"],
            "count is 0: it has to be at least 1",
        ),
        (
            [str(path), "--images", str(picture), "--image-size", "-16"],
            "image_size is -16: it has to be at least 0",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["reconstruct", *arguments, "--out", str(home / "no.png")])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (home / "no.png").exists()
    for out, message in (
        ("sheet.json", "does not end in .png"),
        (home, "is a folder"),
        (picture / "x.png", "is a file, not a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "reconstruct",
                    str(path),
                    "--images",
                    str(picture),
                    "--image-size",
                    "16",
                    "--out",
                    str(out),
                ]
            )
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_is_reconstructed_as_it_was_trained(tiny, home):
    """By default the images, their size and the interpolation are those of the run."""
    path = tiny / "tiny" / "config.json"
    path.write_text(path.read_text().replace('"bicubic"', '"box"'))
    main(["reconstruct", "tiny", "--count", "2", "--out", str(home / "a.png")])
    assert json.loads((home / "a.json").read_text())["protocol"]["interpolation"] == "box"
    main(
        [
            "reconstruct",
            "tiny",
            "--count",
            "2",
            "--interpolation",
            "bilinear",
            "--out",
            str(home / "a.png"),
        ]
    )
    assert json.loads((home / "a.json").read_text())["protocol"]["interpolation"] == "bilinear"


def test_one_token_has_no_spread(file):
    lfq = tokenizer("lfq")
    for call in (
        lambda: lfq(IMAGES[:, :, :4, :4]),
        lambda: lfq.decode(torch.zeros(1, 1, 1, dtype=torch.long)),
    ):
        with pytest.raises(UserError, match="at least two tokens"):
            call()


def test_a_generator_and_a_tokenizer_of_two_files_sample_together(file, home, capsys):
    ar, vq = (
        file({"model": public(generator(), "LlamaGen")}, "ar.pt"),
        file({"vq": public(tokenizer(), "LlamaGen VQ")}, "vq.pt"),
    )
    main(
        [
            "sample",
            str(ar),
            "--tokenizer",
            str(vq),
            "--labels",
            "3",
            "--out",
            str(home / "drawn.png"),
        ]
    )
    assert Image.open(home / "drawn.png").size == (64, 64)
    lfq = file(
        public(
            Tokenizer(TokenizerConfig("lfq", "magvit2", 16, 4, 8, (1, 2), res_blocks=1)),
            "Open-MAGVIT2 LFQ",
        ),
        "lfq.pt",
    )
    with pytest.raises(SystemExit):
        main(["sample", str(ar), "--tokenizer", str(lfq), "--out", str(home / "no.png")])
    assert "the generator knows 32 codes, the tokenizer has 16" in capsys.readouterr().err

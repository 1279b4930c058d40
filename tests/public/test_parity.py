"""Networks loaded from files in the public layouts give the recorded outputs of the public ones.

tests/parity holds names and shapes of the public layouts (keys), inputs and outputs of the public
code (cases), and the rule that fills weights from their names (weights.py).
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Formed, loss_terms

import gear
from gear.checkpoints import load_discriminator, open_checkpoint
from gear.generator.config import GENERATORS
from gear.generator.model import Generator
from gear.measures import codes
from gear.public.containers import export
from gear.public.layouts import LAYOUTS
from gear.tokenizer.config import TOKENIZERS
from gear.tokenizer.model import Tokenizer

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
from weights import parity_normal, parity_weights  # noqa: E402

SLOW = pytest.mark.slow


def shapes(name):
    return {
        n: tuple(s) for n, s in json.loads((PARITY / "keys" / f"{name}.json").read_text()).items()
    }


def state_dict(name, salt=""):
    return {
        n: torch.from_numpy(np.asarray(w)) for n, w in parity_weights(shapes(name), salt).items()
    }


def case(name):
    with np.load(PARITY / "cases" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def assert_close(actual, recorded):
    """The relative error is below 1e-4."""
    actual, recorded = actual.detach().double(), recorded.double()
    assert actual.shape == recorded.shape
    assert float((actual - recorded).norm() / recorded.norm()) < 1e-4


# -- outputs ---------------------------------------------------------------------------------------

WRAPPED = {  # one of the usual wrappings for each
    "vq16": lambda sd: {"vq": sd, "steps": 400_000, "args": {"lr": 1e-4}},
    "lfq16": lambda sd: {
        "state_dict": {f"model_ema.{n.replace('.', '')}": t for n, t in sd.items()},
        "global_step": 7,
    },
    "ibq16": lambda sd: sd,
}


@pytest.mark.parametrize(
    "name", ["vq16", pytest.param("lfq16", marks=SLOW), pytest.param("ibq16", marks=SLOW)]
)
def test_tokenizer(name, home):
    """Indices are equal; the reconstruction, A, the soft read-out with its gradient to the image,
    and every loss term agree within 1e-4.
    """
    torch.save(WRAPPED[name](state_dict(name)), home / f"{name}.pt")
    tokenizer, recorded = gear.load_tokenizer(home / f"{name}.pt"), case(name)
    (home / f"{name}.pt").unlink()
    x = recorded["x"].requires_grad_()
    indices = tokenizer.encode(x)
    assert torch.equal(indices.flatten(1), recorded["indices"])
    assert_close(tokenizer.quantizer.lookup(indices), recorded["zq"])
    assert_close(tokenizer.decode(indices), recorded["recon"])
    affinity = tokenizer.affinity(x).dense
    assert_close(affinity.flatten(0, 1)[:, :256], recorded["assignment"])
    soft_readout = (
        Formed(affinity)
        .soft_readout(torch.from_numpy(parity_normal(f"{name}.E", (16384, 16))), 0.1)
        .flatten(0, 1)
    )
    assert_close(soft_readout, recorded["soft_readout"])
    assert_close(
        torch.autograd.grad((soft_readout * recorded["P"]).sum(), x)[0], recorded["grad_x"]
    )

    x = recorded["x"].detach()
    with torch.no_grad():
        out, z = tokenizer(x), tokenizer.latents(x)
        rows, mean = tokenizer.quantizer.affinity(z).entropies()
    assert_close(out.reconstruction, recorded["recon"])
    losses = {"codebook_loss": torch.tensor(0.0), "commit_loss": torch.tensor(0.0)} | loss_terms(
        out.quantized
    )
    for key, actual in {
        "vq_loss": losses["codebook_loss"],
        "commit_loss_scaled": 0.25 * losses["commit_loss"],
        "entropy_scaled": 0.05 * losses["entropy_loss"],
        "sample_entropy": rows.mean(),
        "mean_entropy": -(mean * (mean + 1e-5).log()).sum(),
    }.items():
        assert float(actual) == pytest.approx(float(recorded[key]), rel=1e-4), key
    natural = codes.assignment(affinity.detach().flatten(0, 1), 1.0)
    assert natural.entropy == pytest.approx(float(recorded["natural_entropy"]), rel=1e-4)
    assert natural.top_mass[1] == pytest.approx(float(recorded["natural_top1"]), rel=1e-4)


@pytest.mark.parametrize("name", ["llamagen_s", pytest.param("llamagen_b", marks=SLOW)])
def test_class_conditional_generator(name, home):
    torch.save({"model": state_dict(name)}, home / "c2i.pt")
    generator, recorded = gear.load_generator(home / "c2i.pt"), case(name)
    tokens, classes, tap = recorded["tokens"], recorded["classes"], int(recorded["tap"])
    with torch.no_grad():
        hidden = generator.hidden(tokens, classes, layers=[tap, generator.config.layers])
        logits = generator.logits(hidden[generator.config.layers])
    assert_close(hidden[tap][:, ::16, ::8], recorded["hidden"])
    assert_close(logits[:, ::16, ::97], recorded["logits"])
    assert_close(logits.logsumexp(-1), recorded["logsumexp"])
    assert F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() == pytest.approx(
        float(recorded["ntp"]), rel=1e-4
    )
    samples = gear.generator.sampling.generate(
        generator, classes, cfg_scale=float(recorded["cfg"]), temperature=0
    )
    assert torch.equal(samples.flatten(1).int(), recorded["greedy"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_to_image_hybrid(side, home):
    torch.save(
        {"ar": state_dict("t2i_small", "live"), "ema": state_dict("t2i_small"), "steps": 3},
        home / "t2i.pt",
    )
    generator, recorded = gear.load_generator(home / "t2i.pt"), case("t2i_small")
    assert generator.source == "generator_ema of t2i.pt (LlamaGen, step 3)"
    tokens, mask, tap = recorded["tokens"], recorded[f"{side}_mask"], int(recorded["tap"])
    with torch.no_grad():
        hidden = generator.hidden(tokens, recorded["text"], [tap], mask=mask)[tap]
        logits = generator(tokens, recorded["text"], mask=mask, text_attention="causal")
    assert_close(hidden[:, ::4, ::8], recorded[f"{side}_hidden"])
    assert_close(logits[:, ::4, ::97], recorded[f"{side}_logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert loss == pytest.approx(float(recorded[f"{side}_ntp"]), rel=1e-4)


def test_discriminator(home):
    torch.save({"discriminator": state_dict("discriminator"), "vq": {}}, home / "stage0.pt")
    network, recorded = load_discriminator(home / "stage0.pt"), case("discriminator")
    assert_close(network(recorded["x"]), recorded["logits"])


# -- names and sizes -------------------------------------------------------------------------------

NAMES = sorted(
    path.stem
    for path in (PARITY / "keys").glob("*.json")
    if path.stem != "orig_llamagen_t2i_XL_256"
)
LARGE = {
    "llamagen_l",
    "llamagen_xl",
    "llamagen_t2i_1b",
    "orig_llamagen_c2i_L_256",
    "orig_llamagen_c2i_XL_256",
}
BY_NAME_ONLY = {"llamagen_xl", "llamagen_t2i_1b", "orig_llamagen_c2i_XL_256"}  # 3 and 4 GB each


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_and_shape_is_ours(name):
    """Each public name of the layout is one of our tensors and the reverse, except for extra
    buffers.
    """
    public = shapes(name)
    layout = gear.public.layouts.recognise(public, name)
    size, names = layout.fit(public, name)
    _, expected = layout.names(size)
    extra = public.keys() - expected.keys()
    assert extra <= {"quantize.codebook_used"} and len(set(names.values())) == len(names)
    assert {n: s for n, s in public.items() if n not in extra} == expected


@pytest.mark.parametrize(
    "name", [n if "llamagen_s" in n or "pro" in n or "disc" in n or "t2i" in n else pytest.param(n, marks=SLOW)
             for n in NAMES if n not in BY_NAME_ONLY]
)  # fmt: skip
def test_round_trip_is_bit_identical(name, home):
    """Public -> ours -> public, in the wrapping of LlamaGen's files; optional buffers come back as
    they were.
    """
    public_tensors = state_dict(name)
    if name == "discriminator":
        public_tensors["main.3.num_batches_tracked"] = torch.tensor(
            7
        )  # one counter is present, two are missing
    wrap = {"discriminator": "discriminator", "projector": "projectors"}.get(
        name.split("_")[0], "model"
    )
    torch.save({wrap: public_tensors}, home / "public.pt")
    export(open_checkpoint(home / "public.pt"), home / "ours.safetensors")
    export(open_checkpoint(home / "ours.safetensors"), home / "again.pt")
    again = torch.load(home / "again.pt", weights_only=True)
    assert again.keys() == {wrap} and again[wrap].keys() == public_tensors.keys()
    assert all(
        torch.equal(again[wrap][n], t) and again[wrap][n].dtype == t.dtype
        for n, t in public_tensors.items()
    )
    for file in home.glob("*.*"):  # up to 1.4 GB each
        file.unlink()


TOKENIZER_PARAMETERS = {
    "VQ-16": 71_883_403,
    "VQ-8": 70_109_835,
    "LFQ-16": 115_094_033,
    "IBQ-16": 110_982_019,
}
GENERATOR_PARAMETERS = {
    "S": 34_210_560,
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "XXXL": 3_893_027_840,
    "T2I-1B": 1_047_659_040,
}


def test_parameters():
    assert (
        TOKENIZER_PARAMETERS.keys() == TOKENIZERS.keys()
        and GENERATOR_PARAMETERS.keys() == GENERATORS.keys()
    )
    with torch.device("meta"):
        networks = {n: Tokenizer(c) for n, c in TOKENIZERS.items()} | {
            n: Generator(c, 16_384) for n, c in GENERATORS.items()
        }
    for name, count in (TOKENIZER_PARAMETERS | GENERATOR_PARAMETERS).items():
        assert sum(p.numel() for p in networks[name].parameters()) == count, name


def test_every_layout_has_a_key_list():
    layout_names = {gear.public.layouts.recognise(shapes(name), name).name for name in NAMES}
    assert layout_names == {layout.name for layout in LAYOUTS}

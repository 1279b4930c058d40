"""LFQ and IBQ agree with dense and literal forms, and every stage trains with any quantizer."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import Formed, loss_terms, scenes

import gear
from gear.checkpoints import open_checkpoint
from gear.config import UserError
from gear.experiments.recipes import RECIPES, SCENES, TINY
from gear.figures import render
from gear.files import ROOT
from gear.public.layouts import public_layout
from gear.tokenizer.autoencoder import AdaptiveNorm, Upsample
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer, initialise_from_data
from gear.tokenizer.quantize import (
    IndexBackpropagationQuantizer,
    LookupFreeQuantizer,
    SignAffinity,
)
from gear.training.loop import Runtime, train

LFQ = TokenizerConfig("lfq", "magvit2", 32, 5, 8, (1, 2, 2), res_blocks=1)
IBQ = TokenizerConfig("ibq", "vqgan", 32, 6, 8, (1, 2, 2), latent_channels=6, res_blocks=1)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- LFQ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", (1, 4, 7, 14))
def test_lfq_bits_are_the_dense_codebook(dim):
    """The index, the assignment and both entropies computed from D bits equal those of the (N, K)
    matrix, in value and in gradient.
    """
    lfq = LookupFreeQuantizer(replace(LFQ, codebook_size=2**dim, code_dim=dim))
    z = (0.02 * gaussian(2, dim, 3, 2).double()).requires_grad_()
    rows = z.flatten(2).mT
    affinity = 2 * rows @ lfq.codes().double().T
    assert torch.equal(lfq.indices(z), affinity.argmax(-1))
    torch.testing.assert_close(lfq.affinity(z).dense, affinity)
    for fast, dense in zip(SignAffinity(rows).entropies(), Formed(affinity).entropies()):
        torch.testing.assert_close(fast, dense, rtol=1e-9, atol=1e-11)
        weights = gaussian(len(fast)).double()
        gradients = [
            torch.autograd.grad(h @ weights, z, retain_graph=True)[0] for h in (fast, dense)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_lfq_index_has_bit_j_of_channel_j_and_zero_counts_as_minus():
    lfq = LookupFreeQuantizer(LFQ)
    z = torch.tensor([0.3, -1.0, 2.0, 0.0, -0.1]).view(1, 5, 1, 1)
    assert lfq.indices(z).item() == 1 + 4
    assert lfq.lookup(torch.tensor([[[5]]])).flatten().tolist() == [1, -1, 1, -1, -1]
    assert torch.equal(lfq.codes()[5], lfq.lookup(torch.tensor([[[5]]])).flatten())
    grid = torch.arange(32).view(1, 4, 8)
    assert torch.equal(lfq.indices(lfq.lookup(grid)).view(1, 4, 8), grid)


def test_lfq_never_forms_the_dense_matrix_unless_asked(monkeypatch):
    """Encoding, and a training forward with its losses, do not form the codebook; only the dense
    affinity does.
    """
    tokenizer = Tokenizer(LFQ)
    for owner in (LookupFreeQuantizer, SignAffinity):
        monkeypatch.setattr(
            owner, "codes", property(lambda _: pytest.fail("the dense codebook was formed"))
        )
    images = scenes(2)[0]
    out = tokenizer(images)
    sum(loss_terms(out.quantized).values()).backward()
    assert torch.equal(tokenizer.encode(images).flatten(1), out.quantized.indices)
    tokenizer.decode(tokenizer.encode(images))
    with pytest.raises(pytest.fail.Exception, match="dense codebook"):
        out.quantized.affinity.dense  # noqa: B018


def test_lfq_soft_assignment_is_a_product_of_bits():
    """pi_k = prod_j sigmoid(4 s_kj z_j / tau)."""
    lfq, z, tau = LookupFreeQuantizer(LFQ), gaussian(1, 5, 1, 1), 0.7
    bits = (4 * lfq.codes() * z.flatten() / tau).sigmoid().prod(-1)
    torch.testing.assert_close(lfq.affinity(z).soft_assignment(tau)[0, 0], bits)


def test_lfq_passes_the_decoders_gradient_straight_and_commits():
    lfq, z, cotangent = (
        LookupFreeQuantizer(LFQ),
        gaussian(2, 5, 3, 3).requires_grad_(),
        gaussian(2, 5, 3, 3, seed=1),
    )
    out = lfq(z)
    torch.testing.assert_close(out.latents, z.detach().sign())
    torch.testing.assert_close(
        torch.autograd.grad((out.latents * cotangent).sum(), z)[0], cotangent
    )
    torch.testing.assert_close(
        loss_terms(out)["commit_loss"], (z - z.sign().detach()).square().mean()
    )
    assert "codebook_loss" not in loss_terms(out) and not list(lfq.parameters())


def test_lfq_has_as_many_codes_as_signs():
    with pytest.raises(UserError, match=r"every pattern of 5 signs .code_dim.: .*2\*\*5, not 100"):
        replace(LFQ, codebook_size=100)


def test_depth_to_space_deals_the_block_index_out_first():
    """Channel (2 a + b) C + c of the convolution's output goes to row 2 i + a, column 2 j + b of
    channel c.
    """
    up = Upsample(3, deals_out=True)
    x = gaussian(2, 3, 4, 5)
    dealt, actual = up.conv(x), up(x)
    for a, b, c in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)):
        torch.testing.assert_close(actual[:, c, a::2, b::2], dealt[:, (2 * a + b) * 3 + c])


def test_adaptive_norm_follows_the_latents_spread_and_mean():
    norm, x = AdaptiveNorm(8, 5), 3 * gaussian(2, 8, 4, 4) + 1
    latents = gaussian(2, 5, 4, 4, seed=1)
    actual = norm(x, latents)
    plain = F.group_norm(x, 2, eps=1e-6)
    scale = norm.scale(latents.flatten(2).std(-1)) + 0
    expected = scale[..., None, None] * plain + norm.bias(latents.mean((2, 3)))[..., None, None]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# -- IBQ -------------------------------------------------------------------------------------------


def test_ibq_is_its_formula():
    """(onehot + p - sg(p)) C and its three distances are written out: outputs and every gradient
    agree.
    """
    torch.manual_seed(0)
    ibq, z = IndexBackpropagationQuantizer(IBQ).double(), gaussian(2, 6, 3, 3).double()
    cotangent = gaussian(2, 6, 3, 3, seed=1).double()

    def literal(z):
        rows = z.flatten(2).mT
        a = rows @ ibq.codebook.T
        p = a.softmax(-1)
        hard = F.one_hot(a.argmax(-1), 32).double()
        q, code = (hard + p - p.detach()) @ ibq.codebook, hard @ ibq.codebook
        losses = (
            (q - rows).square().mean()
            + (code.detach() - rows).square().mean()
            + 0.25 * (code - rows.detach()).square().mean()
        )
        return q.mT.reshape(z.shape), losses

    actual, expected = [], []
    for target, run in (
        (actual, lambda z: (lambda o: (o.latents, loss_terms(o)["codebook_loss"]))(ibq(z))),
        (expected, literal),
    ):
        leaf = z.clone().requires_grad_()
        q, loss = run(leaf)
        target += [
            q,
            loss,
            *torch.autograd.grad((q * cotangent).sum() + 3 * loss, [leaf, ibq.codebook]),
        ]
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert (actual[3].abs().amax(1) > 0).all()  # every code gets a gradient from the decoder


def test_ibq_affinity_is_a_dot_product():
    ibq, z = IndexBackpropagationQuantizer(IBQ), gaussian(2, 6, 2, 2)
    torch.testing.assert_close(ibq.affinity(z).dense, z.flatten(2).mT @ ibq.codebook.detach().T)


# -- gradient routing: which loss moves which part -------------------------------------------------

ROUTES = {
    "lfq": {
        "recon": {"encoder", "decoder"},
        "commit_loss": {"encoder"},
        "entropy_loss": {"encoder"},
        "soft": {"encoder"},
    },
    "ibq": {
        "recon": {"encoder", "codebook", "decoder"},
        "codebook_loss": {"encoder", "codebook"},
        "entropy_loss": {"encoder", "codebook"},
        "soft": {"encoder", "codebook"},
    },
}
OWNER = {
    "encoder": "encoder",
    "quant_conv": "encoder",
    "quantizer": "codebook",
    "decoder": "decoder",
    "post_quant_conv": "decoder",
}


@pytest.mark.parametrize("family, term", [(f, t) for f, terms in ROUTES.items() for t in terms])
def test_gradient_routing(family, term):
    torch.manual_seed(0)
    tokenizer, images = Tokenizer({"lfq": LFQ, "ibq": IBQ}[family]), scenes(4)[0]
    out = tokenizer(images)
    losses = loss_terms(out.quantized) | {
        "recon": F.l1_loss(out.reconstruction, images),
        "soft": (out.quantized.affinity.soft_assignment(0.1) @ gaussian(32, 5)).square().sum(),
    }
    names, parameters = zip(*tokenizer.named_parameters())
    gradients = torch.autograd.grad(losses[term], parameters, allow_unused=True)
    moved = {
        OWNER[n.split(".")[0]]
        for n, g in zip(names, gradients)
        if g is not None and g.abs().max() > 0
    }
    assert moved == ROUTES[family][term]


@pytest.mark.parametrize("family", ("lfq", "ibq"))
def test_indices_agree_under_bf16_autocast(family):
    tokenizer, images = Tokenizer({"lfq": LFQ, "ibq": IBQ}[family]), scenes(4)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, affinity = tokenizer(images), tokenizer.affinity(images).dense
        assert affinity.dtype == torch.float32
        assert torch.equal(out.quantized.indices, affinity.argmax(-1))
        assert torch.equal(tokenizer.encode(images).flatten(1), affinity.argmax(-1))


# -- training --------------------------------------------------------------------------------------

SMALL = {
    "lfq": replace(TINY.tokenizer, quantizer="lfq", backbone="magvit2", code_dim=6),
    "ibq": replace(TINY.tokenizer, quantizer="ibq"),
}


@pytest.mark.parametrize("family", SMALL)
def test_start_from_data_beats_a_random_start(family):
    config, images, unseen = SMALL[family], scenes(300)[0], scenes(60, first=1000)[0]
    torch.manual_seed(0)
    started, random = Tokenizer(config), Tokenizer(config)
    initialise_from_data(started, images)
    with torch.no_grad():
        one, other = (F.l1_loss(t(unseen).reconstruction, unseen) for t in (started, random))
    assert one < 0.5 * other and len(started.encode(unseen).unique()) > 32


def test_recipes_differ_in_the_tokenizer_alone():
    """Each family of tokenizers has the scenes preset with another tokenizer, and with a tau in
    units of its A.
    """
    for family in ("lfq", "ibq"):
        ours = RECIPES[f"scenes-{family}-gear"]
        assert ours.tokenizer.quantizer == family
        base = replace(
            RECIPES["scenes-gear"],
            recipe=ours.recipe,
            tokenizer_run=ours.tokenizer_run,
            tokenizer=ours.tokenizer,
        )
        assert replace(base, objective=replace(base.objective, tau=ours.objective.tau)) == ours
        assert ours.tokenizer.codebook_size == SCENES.tokenizer.codebook_size


@pytest.fixture(scope="module", params=SMALL)
def trained(request, tmp_path_factory):
    """Train the runs tokenizer, joint and generator of one quantizer; returns their folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEAR_RUNS", str(folder))
        for stage, parent in (("tokenizer", ""), ("joint", "tokenizer"), ("generator", "joint")):
            config = replace(
                TINY,
                recipe="tiny",
                stage=stage,
                tokenizer=SMALL[request.param],
                tokenizer_run=parent,
            )
            train(config, stage, Runtime(device="cpu", quiet=True))
    return folder


def test_a_run_of_another_family_is_not_taken_for_a_public_layout(trained, monkeypatch):
    """A run's tokenizer has a linear skip and no public layout; without the skip each family has
    its own layout.
    """
    monkeypatch.setenv("GEAR_RUNS", str(trained))
    assert {part.layout for part in open_checkpoint("joint").parts.values()} == {None}
    for config, name in ((LFQ, "Open-MAGVIT2 LFQ"), (IBQ, "IBQ")):
        assert public_layout("tokenizer", config).name == name
        assert public_layout("tokenizer", replace(config, linear_skip=True)) is None


def test_every_stage_trains(trained, monkeypatch):
    monkeypatch.setenv("GEAR_RUNS", str(trained))
    for stage, term in (
        ("tokenizer", "disc_loss"),
        ("joint", "soft_align_loss"),
        ("generator", "ntp_loss"),
    ):
        table = gear.Run.open(stage).metrics()
        assert (
            table.step.max() == TINY.steps
            and table[term].dropna().iloc[-1] < table[term].dropna().iloc[0]
        )
        assert table["val/psnr"].iloc[-1] > 15 and table["val/usage_size"].iloc[-1] > 20
    pictures = gear.sample(
        gear.load_generator("generator"), gear.load_tokenizer("generator"), [0, 1]
    )
    assert pictures.shape == (2, 32, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize("place, patterns", [
    ("fig3", {"baseline": "generator", "control": "generator", "method": "generator", "half": ""}),
    ("fig4", {"joint": "joint", "control": "joint", "half": "joint"}),
    ("tab4", {"warm_up": "joint", "control": "joint", "method": "joint", "half": ""}),
    ("fig5", {"baseline": "generator", "control": "generator", "method": "generator", "transfer": ""}),
])  # fmt: skip
def test_notebooks_draw_them(place, patterns, trained, monkeypatch, home):
    monkeypatch.setenv("GEAR_RUNS", str(trained))
    sample = {"images": 40, "k": 5} if place in ("tab4", "fig5") else {}
    render.execute(place, patterns | sample)
    (picture,) = (home / "figures").glob("*.png")
    assert picture.stat().st_size > 20_000


def test_training_does_not_ask_which_quantizer():
    """The training code names no quantizer, except in the table of their losses."""
    files = [path for path in (ROOT / "gear" / "training").glob("*.py") if path.name != "losses.py"]
    sources = "\n".join(path.read_text() for path in files).replace(
        "state.config.tokenizer.quantizer", ""
    )
    assert not re.search(
        r"\.quantizer\b|LookupFree|IndexBackprop|VectorQuantizer|\"(vq|lfq|ibq)\"", sources
    )

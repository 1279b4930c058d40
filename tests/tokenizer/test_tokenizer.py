"""The affinity, its read-outs, the gradient routing of the VQ tokenizer, and the agreement of its
methods.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, Formed, loss_terms, scenes, tiny_tokenizer

from gear.config import UserError
from gear.tokenizer.autoencoder import Decoder, Encoder
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenizer, initialise_from_data
from gear.tokenizer.quantize import VectorQuantizer
from gear.training.losses import entropy_loss

IMAGES = scenes(6)[0]


def entropy_of(affinity):
    return entropy_loss(*Formed(affinity).entropies())


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantizer():
    """A quantizer with raw codes of any length, of which only the directions may matter."""
    vq = VectorQuantizer(TOKENIZER)
    vq.codebook.data = 3 * gaussian(TOKENIZER.codebook_size, TOKENIZER.code_dim, seed=1)
    return vq


# -- affinity (Eq. 6) ------------------------------------------------------------------------------


def test_affinity_is_minus_the_squared_distance_of_unit_vectors(quantizer):
    latents = 5 * gaussian(2, 4, 3, 5)
    affinity = quantizer.affinity(latents).dense
    z, c = latents.double().permute(0, 2, 3, 1).reshape(2, 15, 1, 4), quantizer.codebook.double()
    z, c = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (z, c))
    torch.testing.assert_close(affinity.double(), -(z - c).square().sum(-1), rtol=0, atol=2e-6)
    assert affinity.dtype == torch.float32 and affinity.shape == (2, 15, 32)


def test_affinity_lies_between_minus_four_and_zero(quantizer):
    code = quantizer.codebook.data[3]
    latents = torch.stack([7 * code, -0.1 * code, *gaussian(500, 4)]).T.view(1, 4, 1, 502)
    affinity = quantizer.affinity(latents).dense[0]
    assert affinity[0, 3].item() == pytest.approx(0, abs=1e-6) and affinity[
        1, 3
    ].item() == pytest.approx(-4, abs=1e-6)
    assert affinity.min() > -4 - 1e-6 and affinity.max() < 1e-6


def test_affinity_under_bf16_autocast_is_that_of_float32(quantizer):
    latents = gaussian(4, 4, 8, 8)
    exact = quantizer.affinity(latents).dense
    with torch.autocast("cpu", torch.bfloat16):
        cast, indices = quantizer.affinity(latents).dense, quantizer(latents).indices
        rounded = 2 * F.normalize(latents.flatten(2).mT, dim=-1) @ quantizer.codes().T - 2
    assert (
        cast.dtype == torch.float32
        and torch.equal(cast, exact)
        and torch.equal(indices, exact.argmax(-1))
    )
    assert (rounded.float() - exact).abs().max() > 1e-3  # what autocast would give


# -- read-outs (Eqs. 1, 7, 8) ----------------------------------------------------------------------


def test_hard_index_is_the_first_of_equals():
    assert Formed(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])).argmax().tolist() == [1, 0]


def test_soft_readout_becomes_the_hard_one_or_the_mean(quantizer):
    affinity, embedding = quantizer.affinity(gaussian(2, 4, 4, 4)), gaussian(32, 7)
    hard = embedding[affinity.argmax()]
    assert torch.equal(hard[1, 5], embedding[affinity.dense[1, 5].argmax()])
    torch.testing.assert_close(affinity.soft_readout(embedding, 1e-6), hard)
    torch.testing.assert_close(
        affinity.soft_readout(embedding, 1e6), embedding.mean(0).expand_as(hard), rtol=0, atol=1e-5
    )
    assert (affinity.soft_readout(embedding, 0.1) - hard).abs().max() > 0.1


def test_soft_assignment_depends_on_differences_over_tau(quantizer):
    affinity = quantizer.affinity(gaussian(2, 4, 4, 4)).dense
    pi = Formed(affinity).soft_assignment(0.3)
    ratio = (affinity[..., 4] - affinity[..., 9]) / 0.3
    torch.testing.assert_close((pi[..., 4] / pi[..., 9]).log(), ratio)
    torch.testing.assert_close(pi.sum(-1), torch.ones(2, 16))


def test_straight_through_is_one_hot_in_value_and_softmax_in_gradient(quantizer):
    affinity, cotangent = (
        quantizer.affinity(gaussian(2, 4, 4, 4)).dense.detach().requires_grad_(),
        gaussian(2, 16, 32, seed=2),
    )
    value = Formed(affinity).straight_through_assignment(0.1)
    assert torch.equal(value, F.one_hot(affinity.argmax(-1), 32).float())
    through = torch.autograd.grad((value * cotangent).sum(), affinity)[0]
    smooth = torch.autograd.grad(((affinity / 0.1).softmax(-1) * cotangent).sum(), affinity)[0]
    assert torch.equal(through, smooth) and through.abs().max() > 0.1


# -- quantizer -------------------------------------------------------------------------------------


def test_the_decoder_receives_the_unit_code_and_its_gradient_goes_to_the_unit_latent(quantizer):
    latents, cotangent = gaussian(2, 4, 3, 3).requires_grad_(), gaussian(2, 4, 3, 3, seed=2)
    out = quantizer(latents)
    torch.testing.assert_close(out.latents, quantizer.lookup(out.indices.view(2, 3, 3)))
    torch.testing.assert_close(out.latents.norm(dim=1), torch.ones(2, 3, 3))
    through = torch.autograd.grad((out.latents * cotangent).sum(), latents)[0]
    normalised = torch.autograd.grad((F.normalize(latents, dim=1) * cotangent).sum(), latents)[0]
    torch.testing.assert_close(through, normalised)


def test_codebook_and_commitment_are_one_distance_seen_from_both_sides(quantizer):
    """Both losses are the mean over elements of (c - z)^2; with |c - z|^2 = -A this is -mean(A at
    the index) / D.
    """
    out = quantizer(gaussian(2, 4, 3, 3))
    expected = -out.affinity.dense.gather(-1, out.indices[..., None]).mean() / 4
    torch.testing.assert_close(loss_terms(out)["codebook_loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_terms(out)["commit_loss"], expected, rtol=1e-5, atol=1e-6)


def test_entropy_loss_is_its_formula():
    """A plain loop gives the same: mean_i H(p_i) - H(mean_i p_i), with p_i = softmax(A_i / 0.01)
    and 1e-5 inside the second log.
    """
    affinity = -0.05 * gaussian(2, 4, 5).double().square()
    rows = []
    for row in affinity.flatten(0, 1).tolist():
        powers = [math.exp((a - max(row)) / 0.01) for a in row]
        rows.append([p / sum(powers) for p in powers])
    sample = sum(-p * math.log(p) for row in rows for p in row if p > 0) / len(rows)
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    average = -sum(p * math.log(p + 1e-5) for p in mean)
    assert 0.1 < sample < average
    assert entropy_of(affinity).item() == pytest.approx(sample - average, abs=1e-9)


def test_entropy_loss_extremes():
    sure = torch.full((12, 6), -4.0).scatter(1, torch.arange(12)[:, None] % 6, 0.0)
    assert entropy_of(sure).item() == pytest.approx(
        -math.log(6), abs=1e-4
    )  # every row is one-hot, and all codes are used equally
    assert entropy_of(sure[:1].expand(12, -1)).item() == pytest.approx(
        0, abs=1e-4
    )  # every row is one-hot, with the same code
    assert entropy_of(torch.zeros(12, 6)).item() == pytest.approx(
        0, abs=1e-4
    )  # every row is uniform
    assert entropy_of(gaussian(50, 6)).item() > -math.log(6)


# -- gradient routing ------------------------------------------------------------------------------

ROUTES = {  # loss term -> the parts of a VQ tokenizer that it moves
    "recon_loss": {"encoder", "decoder"},
    "gan_loss": {"encoder", "decoder"},
    "codebook_loss": {"codebook"},
    "commit_loss": {"encoder"},
    "entropy_loss": {"encoder", "codebook"},
    "soft_align_loss": {"encoder", "codebook"},
}
OWNER = {
    "encoder": "encoder",
    "quant_conv": "encoder",
    "skip_in": "encoder",
    "quantizer": "codebook",
    "decoder": "decoder",
    "post_quant_conv": "decoder",
    "skip_out": "decoder",
}


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("term", ROUTES)
def test_gradient_routing(term, skip):
    """Each loss term moves exactly the parts of the tokenizer that ROUTES lists, and in them every
    weight except biases before a norm.
    """
    tokenizer = tiny_tokenizer(linear_skip=skip)
    out = tokenizer(IMAGES)
    losses = loss_terms(out.quantized) | {
        "recon_loss": F.l1_loss(out.reconstruction, IMAGES),
        "gan_loss": Discriminator(8, 2)(out.reconstruction).mean(),
        "soft_align_loss": (
            out.quantized.affinity.soft_readout(gaussian(32, 5), 0.1) * gaussian(6, 64, 5)
        ).sum(),
    }
    names, parameters = zip(*tokenizer.named_parameters())
    gradients = torch.autograd.grad(losses[term], parameters, allow_unused=True)
    moved = {n for n, g in zip(names, gradients) if g is not None and g.abs().max() > 0}
    assert {OWNER[name.split(".")[0]] for name in moved} == ROUTES[term]
    weights = {
        n
        for n, p in tokenizer.named_parameters()
        if p.dim() > 1 and OWNER[n.split(".")[0]] in ROUTES[term]
    }
    assert weights <= moved


# -- the whole tokenizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("skip", (False, True))
def test_encode_affinity_and_forward_agree_and_decode_undoes_encode(skip):
    tokenizer = tiny_tokenizer(linear_skip=skip)
    with torch.no_grad():
        indices, affinity, out = (
            tokenizer.encode(IMAGES),
            tokenizer.affinity(IMAGES).dense,
            tokenizer(IMAGES),
        )
        assert indices.shape == (6, 8, 8) and len(indices.unique()) > 3
        assert torch.equal(indices.flatten(1), out.quantized.indices) and torch.equal(
            indices.flatten(1), affinity.argmax(-1)
        )
        assert torch.equal(affinity, out.quantized.affinity.dense)
        torch.testing.assert_close(
            tokenizer.decode(indices), out.reconstruction, rtol=1e-4, atol=1e-5
        )


def test_indices_agree_under_bf16_autocast():
    tokenizer = tiny_tokenizer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        affinity = tokenizer.affinity(IMAGES).dense
        assert affinity.dtype == torch.float32
        assert torch.equal(tokenizer(IMAGES).quantized.indices, affinity.argmax(-1))
        assert torch.equal(tokenizer.encode(IMAGES).flatten(1), affinity.argmax(-1))


def test_positions_are_in_raster_order():
    """At one pixel per token, changing the pixel in row 20, column 7 changes the affinity of
    position 20 * 32 + 7 only.
    """
    tokenizer = tiny_tokenizer(channel_mult=(1,), res_blocks=0, linear_skip=True)
    for module in (tokenizer.quant_conv, tokenizer.encoder):
        for parameter in module.parameters():
            parameter.data.zero_()
    changed = IMAGES.clone()
    changed[:, :, 20, 7] += 1
    moved = (tokenizer.affinity(changed).dense - tokenizer.affinity(IMAGES).dense).abs().amax(
        (0, 2)
    ) > 0
    assert moved.nonzero().flatten().tolist() == [20 * 32 + 7]


@pytest.mark.parametrize("method", ("encode", "affinity", "forward"))
def test_an_image_size_that_does_not_divide_says_so(method):
    with pytest.raises(
        UserError,
        match="image size 32 x 30 is not divisible by the tokenizer's downsampling 4.*multiple of 4",
    ):
        getattr(tiny_tokenizer(), method)(torch.zeros(1, 3, 32, 30))


def test_vq16_has_the_public_number_of_parameters():
    """The public VQ-16 has 71,883,403 parameters in all."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(tokenizer) == 71_883_403
    assert (count(tokenizer.encoder), count(tokenizer.decoder)) == (29_298_176, 42_449_795)
    assert (
        count(tokenizer.quantizer) + count(tokenizer.quant_conv) + count(tokenizer.post_quant_conv)
        == 135_432
    )


@pytest.mark.parametrize("mult", ((1, 2), (1, 2, 2), (1, 1, 1, 2)))
def test_decoder_gives_back_what_the_encoder_divided(mult):
    config = replace(TOKENIZER, channel_mult=mult)
    latents = Encoder(config)(IMAGES[:1])
    assert latents.shape[-1] * config.downsampling == 32 and Decoder(config)(latents).shape == (
        1,
        3,
        32,
        32,
    )


# -- start from data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    tokenizer = tiny_tokenizer(linear_skip=True, codebook_size=64, code_dim=8)
    initialise_from_data(tokenizer, scenes(200)[0])
    return tokenizer


def l1(tokenizer, images):
    with torch.no_grad():
        return F.l1_loss(tokenizer(images).reconstruction, images).item()


def test_start_from_data_beats_a_random_start_and_a_flat_image(started):
    """On unseen images the L1 error is well below half of the random start's, and below that of
    each image's mean colour.
    """
    unseen = scenes(100, first=1000)[0]
    random = l1(tiny_tokenizer(linear_skip=True, codebook_size=64, code_dim=8), unseen)
    flat = F.l1_loss(F.interpolate(F.avg_pool2d(unseen, 32), scale_factor=32), unseen).item()
    assert l1(started, unseen) < 0.4 * random and l1(started, unseen) < 0.65 * flat


def test_start_from_data_is_all_linear(started):
    """Encoder and decoder are affine, f((x + y) / 2) = (f(x) + f(y)) / 2, which they are not with a
    random start.
    """
    grids = gaussian(2, 2, 8, 8, 8)
    with torch.no_grad():
        for tokenizer, is_linear in (
            (started, True),
            (tiny_tokenizer(linear_skip=True, code_dim=8), False),
        ):
            for f, (x, y) in (
                (tokenizer.latents, (IMAGES[:3], IMAGES[3:])),
                (tokenizer.decode_latents, grids),
            ):
                bend = (f((x + y) / 2) - (f(x) + f(y)) / 2).abs().max()
                assert (bend < 1e-5) == is_linear


def test_start_from_data_has_unit_principal_components_and_a_constant(started):
    with torch.no_grad():
        z = started.latents(scenes(200)[0])
    torch.testing.assert_close(z[:, -1], torch.ones_like(z[:, -1]))
    assert z[:, :-1].mean((0, 2, 3)).abs().max() < 1e-3 and z[:, :-1].square().sum(
        1
    ).mean().item() == pytest.approx(1, abs=1e-3)
    covariance = torch.cov(z[:, :-1].transpose(0, 1).flatten(1))
    off = covariance - covariance.diag().diag()
    assert (
        off.abs().max() < 1e-3 and (covariance.diag().diff() < 1e-6).all()
    )  # components are uncorrelated, with the largest variance first
    assert len(started.encode(scenes(200)[0]).unique()) > 50  # out of 64 codes


def test_start_from_data_learns_in_both_networks(started):
    """The first gradient reaches the zero layers, so that both networks grow from the linear start."""
    loss = F.l1_loss(started(IMAGES).reconstruction, IMAGES)
    for gradient in torch.autograd.grad(
        loss, [started.quant_conv.weight, started.decoder.conv_out.weight]
    ):
        assert gradient.abs().max() > 0


# -- discriminator ---------------------------------------------------------------------------------


def test_logits_of_an_image_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    discriminator = Discriminator(16, 2)
    together, alone = discriminator(IMAGES), discriminator(IMAGES[2:3])
    torch.testing.assert_close(together[2:3], alone)
    assert (together[2] - together[3]).abs().max() > 1e-3


def test_discriminator_sees_patches():
    """Three halvings give the public network's 30 x 30 logits at 256 px."""
    with torch.device("meta"):
        assert Discriminator()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


# -- values that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize(
    "family", ({}, {"quantizer": "ibq"}, {"quantizer": "lfq", "codebook_size": 16})
)
def test_latents_that_are_no_numbers_have_no_index(family, value):
    tokenizer, latents = tiny_tokenizer(**family).eval(), gaussian(2, 4, 3, 3)
    latents[1, 2, 0, 1] = value
    for face in (tokenizer.quantizer.indices, tokenizer.decode_latents):
        with pytest.raises(UserError, match="not finite"):
            face(latents)
    tokenizer.quantizer.train().indices(
        latents
    )  # a training step does not check; its loss is not finite


def test_weights_that_are_no_numbers_give_neither_codes_nor_images():
    tokenizer = tiny_tokenizer().eval()
    indices = tokenizer.encode(IMAGES)
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[1] = math.nan
        with pytest.raises(
            UserError, match="decoded images hold values that are not finite.*weights"
        ):
            tokenizer.decode(indices)
        tokenizer.encoder.conv_in.bias[0] = math.nan
        with pytest.raises(UserError, match="latents hold values that are not finite.*weights"):
            tokenizer.encode(IMAGES)

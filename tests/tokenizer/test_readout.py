"""Results computed from A by blocks of its rows agree with those of the matrix: values, every
gradient, precision, and the memory in use.
"""

from dataclasses import replace

import pytest
import torch
from helpers import loss_terms, scenes, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from gear.measures import codes
from gear.tokenizer import readout
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer
from gear.tokenizer.quantize import QUANTIZERS, SignAffinity
from gear.tokenizer.readout import Affinity
from gear.training.validate import tokenizer_metrics

DIM, K, N = 5, 32, 14  # 14 = 2 x 7 positions
BLOCKS = {
    "all rows": N * K,
    "all but one": 13 * K,
    "a remainder": 4 * K,
    "one row": K,
    "less than a row": K - 5,
}
CONFIGS = {
    "vq": TokenizerConfig("vq", "vqgan", K, DIM, 8, (1, 2, 2), latent_channels=16, res_blocks=1),
    "lfq": TokenizerConfig("lfq", "magvit2", K, DIM, 8, (1, 2, 2), res_blocks=1),
    "ibq": TokenizerConfig("ibq", "vqgan", K, DIM, 8, (1, 2, 2), latent_channels=DIM, res_blocks=1),
}
TEMPERATURE = {
    "vq": 0.3,
    "lfq": 2.0,
    "ibq": 1.0,
}  # temperatures at which softmax(A / T) is neither one-hot nor uniform


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def factors(family, dtype=torch.float64, count=N, dim=DIM, size=K):
    """Return the leaves z (2, count / 2, D) and, except for LFQ, C (K, D), and a function from them
    to an Affinity.
    """
    z = gaussian(2, count // 2, dim, dtype=dtype).requires_grad_()
    if family == "lfq":
        return [z], SignAffinity
    c = gaussian(size, dim, seed=1, dtype=dtype).requires_grad_()
    normalise = torch.nn.functional.normalize
    return [z, c], (
        lambda z, c: Affinity(normalise(z, dim=-1), normalise(c, dim=-1), 2.0, -2.0)
    ) if family == "vq" else Affinity


def read_outs(family, affinity, embedding):
    """Return every differentiable result that is computed from A: {name: tensor}."""
    h, mean = affinity.entropies(TEMPERATURE[family])
    return {"u": affinity.soft_readout(embedding, TEMPERATURE[family]), "h": h, "mean": mean}


def by_blocks(monkeypatch, block):
    """Make every A be computed in blocks of `block` elements, or as one matrix if `block` is None."""
    monkeypatch.setattr(readout, "WHOLE", 2**40 if block is None else 0)
    monkeypatch.setattr(readout, "BLOCK", {"cpu": block, "cuda": block})


def values_and_gradients(family, block, monkeypatch, dtype=torch.float64, **sizes):
    """Compute the read-outs of A by blocks, or of the matrix if `block` is None: {name: value}, and
    {name: gradients of a random sum of the value to z, C and E}.
    """
    by_blocks(monkeypatch, block)
    leaves, make = factors(family, dtype, **sizes)
    embedding = gaussian(sizes.get("size", K), 7, seed=2, dtype=dtype).requires_grad_()
    values = read_outs(family, make(*leaves), embedding)
    gradients = {}
    for seed, (name, value) in enumerate(values.items(), start=3):
        loss = (value * gaussian(*value.shape, seed=seed, dtype=dtype)).sum()
        gradients[name] = torch.autograd.grad(
            loss, [*leaves, embedding], retain_graph=True, allow_unused=name != "u"
        )
    return {name: value.detach() for name, value in values.items()}, gradients


@pytest.fixture(params=QUANTIZERS)
def family(request):
    return request.param


# -- equal to the matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_blocks_equal_the_matrix_in_value_and_gradient(family, block, monkeypatch):
    expected, want_gradients = values_and_gradients(family, None, monkeypatch)
    actual, got_gradients = values_and_gradients(family, block, monkeypatch)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-10)
        pairs = [
            pair for pair in zip(got_gradients[name], want_gradients[name]) if pair[1] is not None
        ]
        assert len(pairs) == {"u": 3, "h": 2, "mean": 2}[name] - (family == "lfq")
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            assert other.abs().max() > 1e-4
    assert 1 < expected["h"].exp().mean() < 0.9 * K  # neither one-hot nor uniform


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_indices_and_top_masses_by_blocks_are_those_of_the_matrix(family, block, monkeypatch):
    leaves, make = factors(family)
    dense = make(*leaves).dense.detach()
    expected = codes.assignment(dense.flatten(0, 1), TEMPERATURE[family])
    by_blocks(monkeypatch, block)
    affinity = make(*leaves)
    blocks = list(affinity.blocks())
    assert max(b.numel() for b in blocks) <= max(block, K) and not any(
        b.requires_grad for b in blocks
    )
    torch.testing.assert_close(torch.cat(blocks), dense.flatten(0, 1), rtol=0, atol=1e-12)
    assert torch.equal(affinity.argmax(), dense.argmax(-1)) and affinity.argmax().shape == (2, 7)
    actual = codes.assignment(affinity.blocks(), TEMPERATURE[family])
    assert actual.entropy == pytest.approx(
        expected.entropy, abs=1e-10
    ) and actual.top_mass == pytest.approx(expected.top_mass, abs=1e-10)


def test_assignment_of_no_block_is_refused():
    with pytest.raises(ValueError, match="no block"):
        codes.assignment(iter(()), 1.0)


def test_gradcheck(family, monkeypatch):
    by_blocks(monkeypatch, 3 * 8)
    leaves, make = factors(family, count=4, dim=3, size=8)
    embedding = gaussian(8, 2, seed=2).requires_grad_()
    function = lambda e, *leaves: tuple(read_outs(family, make(*leaves), e).values())
    assert torch.autograd.gradcheck(function, (embedding, *leaves), atol=1e-7, rtol=1e-5)


def test_a_small_matrix_is_whole_and_keeps_its_gradient_whoever_asks_first(family):
    leaves, make = factors(family)
    affinity = make(*leaves)
    (block,) = affinity.blocks()
    assert block.shape == (N, K) and affinity.dense.requires_grad
    assert block.data_ptr() == affinity.dense.data_ptr()  # `dense` is formed once


@pytest.mark.parametrize("which", ("u", "h", "mean"))
def test_float32_is_as_near_float64_by_blocks_as_by_the_matrix(family, which, monkeypatch):
    """The largest error of the value and of each gradient is at most twice that of the matrix."""
    sizes = dict(count=400, dim=8, size=256)
    exact = values_and_gradients(family, None, monkeypatch, **sizes)
    errors = []
    for block in (None, 50 * 256):
        actual = values_and_gradients(family, block, monkeypatch, torch.float32, **sizes)
        pairs = [(actual[0][which], exact[0][which]), *zip(actual[1][which], exact[1][which])]
        assert all(one is None or one.dtype == torch.float32 for one, _ in pairs)
        errors.append(
            [float((one.double() - other).abs().max()) for one, other in pairs if other is not None]
        )
    for dense, blocks in zip(*errors):
        assert 0 < blocks <= 2 * dense


# -- in a tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", (None, 300), ids=("whole", "blocks"))
def test_indices_and_read_out_under_bf16_autocast_are_those_of_float32(family, block, monkeypatch):
    """The same latents give the same indices in training, at inference and by the dense A; the
    read-out and its gradients agree, too.
    """
    torch.manual_seed(0)
    quantizer = Tokenizer(CONFIGS[family]).quantizer
    z, embedding = (
        gaussian(4, DIM, 8, 8, dtype=torch.float32).requires_grad_(),
        gaussian(K, 9, dtype=torch.float32),
    )
    embedding.requires_grad_()
    expected = quantizer.affinity(z).dense.argmax(-1)
    by_blocks(monkeypatch, block)
    results = []
    low = z.detach().bfloat16()  # bfloat16, as from a convolution under autocast
    assert torch.equal(quantizer(low).affinity.dense, quantizer(low.float()).affinity.dense)
    for is_on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            out = quantizer(z)
            assert torch.equal(out.indices, expected) and torch.equal(
                quantizer.indices(z), expected
            )
            assert torch.equal(out.affinity.argmax(), expected)
            assert out.affinity.dense.dtype == torch.float32
            u, loss = out.affinity.soft_readout(embedding, 0.3), sum(loss_terms(out).values())
            assert u.dtype == loss.dtype == torch.float32
            inside = (
                torch.autograd.grad(u.square().sum(), [z, embedding], retain_graph=True)
                if block
                else []
            )
        results.append(
            [u, loss, *inside, *torch.autograd.grad(u.square().sum() + loss, [z, embedding])]
        )
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_a_tokenizer_by_blocks_trains_as_by_the_matrix(family, monkeypatch):
    """The indices are equal, and every loss, the read-out and the gradient of each weight are
    close, through the whole network.
    """
    torch.manual_seed(0)
    tokenizer, images = Tokenizer(CONFIGS[family]).double(), scenes(2)[0].double()
    results = []
    for block in (None, 300):
        by_blocks(monkeypatch, block)
        out = tokenizer(images)
        u = out.quantized.affinity.soft_readout(gaussian(K, 9), 0.3)
        total = (
            out.reconstruction.square().sum()
            + u.square().sum()
            + sum(loss_terms(out.quantized).values())
        )
        assert torch.equal(tokenizer.encode(images).flatten(1), out.quantized.indices)
        gradients = torch.autograd.grad(
            total, list(tokenizer.parameters()), materialize_grads=True, allow_unused=True
        )
        results.append([out.quantized.indices, *loss_terms(out.quantized).values(), u, *gradients])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


class Watch(TorchDispatchMode):
    """Records the largest tensor that an operation returns, and the operations with the shapes of
    their arguments.
    """

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [
            x
            for x in (result if isinstance(result, (tuple, list)) else [result])
            if isinstance(x, torch.Tensor)
        ]
        # an expanded tensor takes no more memory than its storage
        self.largest = max(
            [self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)]
        )
        self.calls.append(
            (str(function), [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)])
        )
        return result


def test_nothing_of_the_matrix_size_is_ever_held(family, monkeypatch):
    """No tensor is as large as the matrix, in a training forward, the read-out, the backward of
    both and the statistics. The test does detect the matrix itself.
    """
    config = replace(
        CONFIGS[family],
        codebook_size=1024,
        code_dim=10,
        **(dict(latent_channels=10) if family == "ibq" else {}),
    )
    torch.manual_seed(0)
    quantizer, embedding = (
        Tokenizer(config).quantizer,
        gaussian(1024, 12, dtype=torch.float32).requires_grad_(),
    )
    n, largest = 2 * 16 * 32, {}
    for block in (None, 32 * 1024):
        by_blocks(monkeypatch, block)
        z = gaussian(2, 10, 16, 32, dtype=torch.float32).requires_grad_()
        with Watch() as watch:
            out = quantizer(z)
            quantizer.indices(z)
            u = out.affinity.soft_readout(embedding, 0.1)
            (u.sum() + out.latents.sum() + sum(loss_terms(out).values())).backward()
            codes.assignment(out.affinity.blocks(), 0.1)
        largest[block] = watch.largest
    assert largest[None] >= n * 1024 > 8 * largest[32 * 1024]


def test_a_frozen_embedding_costs_no_gradient(family, monkeypatch):
    """The product for the gradient of E, (K, n) times (n, D), is computed where E needs a gradient,
    and is not where E is frozen.
    """
    by_blocks(monkeypatch, 4 * K)
    for asks in (False, True):
        leaves, make = factors(family)
        embedding = gaussian(K, 7).requires_grad_(asks)
        u = make(*leaves).soft_readout(embedding, 0.3)
        with Watch() as watch:
            u.sum().backward()
        to_embedding = [
            shapes for _, shapes in watch.calls if (K, 4) in shapes and (4, 7) in shapes
        ]
        assert bool(to_embedding) == asks == (embedding.grad is not None)


def test_validation_by_blocks_is_that_of_the_matrix(monkeypatch):
    tokenizer, images = tiny_tokenizer(), scenes(3)[0]
    expected, indices = tokenizer_metrics(tokenizer, images, 0.1)
    by_blocks(monkeypatch, 300)
    monkeypatch.setattr(Affinity, "dense", property(lambda _: pytest.fail("the matrix was formed")))
    metrics, again = tokenizer_metrics(tokenizer, images, 0.1)
    assert metrics == pytest.approx(expected, rel=1e-6) and torch.equal(again, indices)


def test_every_read_out_is_in_float32_under_autocast():
    torch.manual_seed(0)
    affinity, embedding = Affinity(torch.randn(2, 5, 4), torch.randn(16, 4)), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        hard = embedding[affinity.argmax()]
        through = affinity.straight_through_readout(embedding, 0.1)
        soft = affinity.soft_readout(embedding, 0.1)
    assert soft.dtype == through.dtype == torch.float32
    torch.testing.assert_close(through, hard, rtol=0, atol=1e-6)

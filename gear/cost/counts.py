"""FLOPs, activation bytes and parameters of each part of a model for one image, counted on fake
tensors, which have shapes and types but use no memory.

Every part runs the same code as in training. Products are counted as torch.utils.flop_counter does:
a multiplication and an addition are two FLOPs, and causal attention is counted over all pairs.
"""

import contextlib
import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gear.evaluation.detector import Detector
from gear.generator.model import Generator, Projector
from gear.teachers import bare_name, efficientnet
from gear.teachers.networks import VITS, build, input_side
from gear.teachers.scenes import DIM, ScenesTeacher
from gear.teachers.vit import ViTTeacher, parse
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenizer
from gear.tokenizer.readout import Affinity
from gear.training.losses import QUANTIZER_LOSSES, next_token_loss

aten = torch.ops.aten
# operations that torch's counter does not know: products added in place, and the fused attention of
# the CPU, the device of the fake tensors
UNCOUNTED = {
    aten.addmm_: lambda into, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


class Count(NamedTuple):
    """The cost of one image in one part: FLOPs of both passes, and bytes saved between them."""

    forward: int  # FLOPs of the forward pass
    backward: int  # FLOPs of the backward pass
    saved: int  # bytes that autograd saves for the backward pass
    fused: int = 0  # bytes of `saved` that are inputs of a SiLU, which compiled code recomputes
    largest: int = 0  # bytes of the largest saved tensor


def count(work, arguments, mode, precision):
    """Return the Count of one image in `work(batch, *arguments)`, where `work` is one of the
    functions below.

    `mode` is "train" (the gradient reaches weights and input), "fixed" (the input only) or
    "forward" (no gradient); `precision` is "float32" or "bf16". The cost of one image is the cost
    of a batch of three minus that of a batch of two, which excludes work done once per batch. All
    blocks of a generator are alike: the cost of one block is that of a generator with two blocks
    minus that of a generator with one.
    """
    if work is not generator:
        return _image(work, arguments, mode, precision)
    config, codes, side, tap, soft = arguments
    shallow = [
        (replace(config, layers=n, tap_layer=n), codes, side, tap and n, soft) for n in (1, 2)
    ]
    one_block, two_blocks = (_image(work, arguments, mode, precision) for arguments in shallow)
    num_blocks = tap or config.layers
    return Count(*(a + (num_blocks - 1) * (b - a) for a, b in zip(one_block, two_blocks)))


@functools.cache
def _image(work, arguments, mode, precision):
    """Return the Count of one image: the difference between a batch of three and one of two."""
    two, three = (_batch(work, arguments, mode, precision, n) for n in (2, 3))
    forward, backward = (b - a for a, b in zip(two[:2], three[:2]))
    sizes = [b - a for a, b in zip(two[2], three[2], strict=True)]
    return Count(forward, backward, sum(sizes), three[3] - two[3], max(sizes, default=0))


def _batch(work, arguments, mode, precision, batch):
    """Run `work` on a batch of fake images, forward and backward.

    Returns the FLOPs of the forward pass, those of the backward pass, the bytes of each tensor
    saved between them, and the bytes of the saved tensors that are inputs of a SiLU.
    """
    saved = {}  # {address: storage}
    silu_inputs = {}  # {address: storage}
    counter = lambda: FlopCounterMode(display=False, custom_mapping=UNCOUNTED)  # noqa: E731

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # several saved views of one storage count once
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(mode != "forward"),
    ):
        module, call, inputs = work(batch, *arguments)
        module.requires_grad_(mode == "train")
        if mode == "fixed":
            inputs.requires_grad_()
        with (
            counter() as forward,
            saved_tensors_hooks(save, lambda tensor: tensor),
            _recorded_silu(silu_inputs),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = call(inputs)
            out = sum(part.float().mean() for part in (out if isinstance(out, list) else [out]))
        with counter() as backward:
            if mode != "forward":
                out.backward()
    fused_bytes = sum(saved[address].nbytes() for address in saved.keys() & silu_inputs.keys())
    return (
        forward.get_total_flops(),
        backward.get_total_flops(),
        [storage.nbytes() for storage in saved.values()],
        fused_bytes,
    )


@contextlib.contextmanager
def _recorded_silu(inputs):
    """Record the storages of all inputs of SiLUs inside the block, {address: storage}."""
    silu = F.silu

    def recorded(x, inplace=False):
        inputs[x.untyped_storage()._cdata] = x.untyped_storage()
        return silu(x)

    F.silu = recorded
    try:
        yield
    finally:
        F.silu = silu


@contextlib.contextmanager
def fake():
    """Make every tensor inside the block fake, and leave the state of torch's global random
    generator unchanged.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        yield


@functools.cache
def parameters(work, arguments):
    """Return the number of parameters of the module that `work` builds."""
    with fake():
        return sum(p.numel() for p in work(1, *arguments)[0].parameters())


def limit(is_matrix):
    """Return the size limit with which an Affinity is always formed as one matrix, or always by
    blocks.

    The small counted batch then takes the same code path as the batch in training.
    """
    return 2**62 if is_matrix else 0


# The parts that are counted. Each function takes a batch size and the arguments that fix the part's
# shapes: its configuration, the image's side `size` in pixels or the token grid's `side`, and the
# number of `codes`. Each returns (the part's module, the function to call, its input).


def encoder(batch, config, size):
    """Images to latents Z, including the convolution before the quantizer."""
    tokenizer = Tokenizer(config)
    call = tokenizer.latents
    images = _images(batch, size)
    del tokenizer.decoder, tokenizer.quantizer, tokenizer.post_quant_conv, tokenizer.skip_out
    return tokenizer, call, images


def quantizer(batch, config, side, is_matrix):
    """Latents to the affinity A, indices and loss terms; without gradients, to indices alone.

    is_matrix: A is formed as one matrix, not by blocks of its rows.
    """
    module = Tokenizer(config).quantizer
    losses = QUANTIZER_LOSSES[config.quantizer]

    def call(latents):
        if not torch.is_grad_enabled():
            return module.indices(latents, check=False)
        quantized = module(latents, limit(is_matrix))
        return [quantized.latents, *losses(quantized).values(), *quantized.entropies]

    latents = torch.empty(batch, config.code_dim, side, side)
    return module, call, latents.requires_grad_(torch.is_grad_enabled())


def decoder(batch, config, side):
    """Quantised latents to images."""
    tokenizer = Tokenizer(config)
    call = tokenizer.decode_latents
    del tokenizer.encoder, tokenizer.quantizer, tokenizer.quant_conv, tokenizer.skip_in
    return tokenizer, call, torch.empty(batch, config.code_dim, side, side, requires_grad=True)


def lpips(batch, size):
    """VGG16 up to its thirteenth convolution, on a reconstruction and on the image."""
    import torchvision.models  # loads torch's compiler, which a training run does not need

    network = torchvision.models.vgg16().features[:30]
    images = _images(batch, size)
    return (
        network,
        lambda reconstruction: [network(reconstruction), network(images)],
        _images(batch, size),
    )


def discriminator(batch, channels, layers, size):
    """One set of images to logits."""
    module = Discriminator(channels, layers)
    return module, module, _images(batch, size)


def readout(batch, soft, tau, config, side, width, is_matrix):
    """Affinity to embeddings, by the soft (Eq. 8) or the straight-through read-out.

    The gradient reaches the latents and, unless the quantizer is LFQ with its fixed codes, the
    codes.
    """
    codes = torch.empty(
        config.codebook_size, config.code_dim, requires_grad=config.quantizer != "lfq"
    )
    embedding = torch.empty(len(codes), width)

    def call(rows):
        affinity = Affinity(rows, codes, limit=limit(is_matrix))
        return (affinity.soft_readout if soft else affinity.straight_through_readout)(
            embedding, tau
        )

    return nn.Identity(), call, torch.empty(batch, side**2, config.code_dim)


def generator(batch, config, codes, side, tap, soft):
    """Embeddings (if `soft`) or indices to the hidden states of block `tap`, or to the next-token
    loss if `tap` is None.
    """
    module = Generator(config, codes)
    labels = torch.zeros(batch, dtype=torch.long)
    targets = torch.zeros(batch, side**2, dtype=torch.long)
    inputs = torch.empty(batch, side**2, config.width) if soft else targets

    def call(tokens):
        return (
            module.hidden(tokens, labels, [tap])[tap]
            if tap
            else next_token_loss(module(tokens, labels), targets)
        )

    return module, call, inputs


def projector(batch, config, dim, side):
    """Hidden states of the tap layer to a teacher's feature space of `dim` channels."""
    module = Projector(config, dim)
    return module, module, torch.empty(batch, side**2, config.width, requires_grad=True)


def scenes_teacher(batch, size):
    """Images to the factors of their patches, as the scenes teacher is trained."""
    module = ScenesTeacher()

    def call(images):
        channels = module.channels(images)
        return [head(channels) for head in module.heads.values()]

    return module, call, _images(batch, size)


def detector(batch, size):
    """Images to the objects in them, as the detector is trained."""
    module = Detector()
    call = lambda images: list(module(images, check=False).values())  # noqa: E731
    return module, call, _images(batch, size)


def teacher(batch, spec, size, stride):
    """Images to the features of a teacher NAME[@LAYER].

    Raises UserError if the teacher's grid does not match the tokens', or its library is not
    installed.
    """
    name, layer, _ = parse(spec)
    if name == "scenes":
        teacher = ScenesTeacher()
        call = functools.partial(teacher, check=False)  # fake images have no values
    elif name == efficientnet.NAME:
        teacher = efficientnet.EfficientNetTeacher(efficientnet.build_network(), "", stride)
        call = teacher.raw
    else:
        # the libraries read tensor values while they build, which fake tensors do not have
        with unset_fake_temporarily(), torch.device("meta"):
            network = build(name, input_side(name, size, stride))
        teacher = ViTTeacher(name, network.to_empty(device="cpu"), "", size, stride, layer)
        call = teacher.features
    return teacher, call, _images(batch, size)


def teacher_dim(spec):
    """Return the number of channels of a teacher's features; raises UserError for an unknown
    teacher.
    """
    name = bare_name(spec)
    return (
        VITS[name].dim
        if name in VITS
        else {"scenes": DIM, efficientnet.NAME: efficientnet.DIM}[name]
    )


def _images(batch, size):
    return torch.empty(batch, 3, size, size)

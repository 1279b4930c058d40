"""FLOPs, activations and parameters of each part of a model for one image, on fake tensors: shapes
and types, no memory.

Every part runs the code that trains. Products are counted as torch.utils.flop_counter counts them:
a multiplication and an addition are two, attention is counted in full though causal.
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
# by torch's counter: sums in place, and the fused attention of the device that fake tensors claim
# to be on
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
    """What one image takes: FLOPs of the forward and of the backward pass, and bytes that autograd
    keeps between them.

    Of these bytes, `fused` go into a SiLU: compiled code does not keep them, it computes them
    again. The `largest` tensor has so many.
    """

    forward: int
    backward: int
    saved: int
    fused: int = 0
    largest: int = 0


def count(work, arguments, mode, precision):
    """Count an image in `work(batch, *arguments)`, one of the functions below: a Count.

    `mode` is "train" (backward to weights and input), "fixed" (to the input alone) or "forward" (no
    gradient), `precision` "float32" or "bf16". An image is what three take more than two, so that
    what is done once a batch drops out. The blocks of a generator are alike: one is counted, the
    difference of two generators.
    """
    if work is not generator:
        return _image(work, arguments, mode, precision)
    config, codes, side, tap, soft = arguments
    shallow = [
        (replace(config, layers=n, tap_layer=n), codes, side, tap and n, soft) for n in (1, 2)
    ]
    one, two = (_image(work, arguments, mode, precision) for arguments in shallow)
    return Count(*(a + ((tap or config.layers) - 1) * (b - a) for a, b in zip(one, two)))


@functools.cache
def _image(work, arguments, mode, precision):
    one, two = (_batch(work, arguments, mode, precision, n) for n in (2, 3))
    forward, backward = (b - a for a, b in zip(one[:2], two[:2]))
    sizes = [b - a for a, b in zip(one[2], two[2], strict=True)]
    return Count(forward, backward, sum(sizes), two[3] - one[3], max(sizes, default=0))


def _batch(work, arguments, mode, precision, batch):
    """Run `work` on a batch of fake images, forward and backward.

    Returns the FLOPs of both, the bytes of each tensor kept between them, and those that go into a
    SiLU.
    """
    kept, fused, counter = {}, {}, lambda: FlopCounterMode(display=False, custom_mapping=UNCOUNTED)

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # a storage counts once, however many views of it are kept
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(mode != "forward"),
    ):
        module, call, given = work(batch, *arguments)
        module.requires_grad_(mode == "train")
        if mode == "fixed":
            given.requires_grad_()
        with (
            counter() as forward,
            saved_tensors_hooks(keep, lambda tensor: tensor),
            _noting_silu(fused),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = call(given)
            out = sum(part.float().mean() for part in (out if isinstance(out, list) else [out]))
        with counter() as backward:
            if mode != "forward":
                out.backward()
    again = sum(kept[number].nbytes() for number in kept.keys() & fused.keys())
    return (
        forward.get_total_flops(),
        backward.get_total_flops(),
        [s.nbytes() for s in kept.values()],
        again,
    )


@contextlib.contextmanager
def _noting_silu(inputs):
    """Put the storage of whatever goes into a SiLU into `inputs`, by its number."""
    silu = F.silu

    def noted(x, inplace=False):
        inputs[x.untyped_storage()._cdata] = x.untyped_storage()
        return silu(x)

    F.silu = noted
    try:
        yield
    finally:
        F.silu = silu


@contextlib.contextmanager
def fake():
    """Make tensors inside the block fake ones, and leave torch's global generator as it was."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        yield


@functools.cache
def parameters(work, arguments):
    """Count the parameters of the module that `work` builds."""
    with fake():
        return sum(p.numel() for p in work(1, *arguments)[0].parameters())


def limit(whole):
    """Return the limit with which an Affinity is formed whole, or by blocks, however small it is:
    as the batch that trains.
    """
    return 2**62 if whole else 0


# What is counted. Each takes a batch size and what fixes the part's shapes: its configuration, the
# image's side `size` in pixels or the token grid's `side`, the number of `codes`. Each returns (the
# part's module, what is called, its input).


def encoder(batch, config, size):
    """Images to latents Z, the convolution before the quantizer with it."""
    tokenizer = Tokenizer(config)
    call, images = tokenizer.latents, _images(batch, size)
    del tokenizer.decoder, tokenizer.quantizer, tokenizer.post_quant_conv, tokenizer.skip_out
    return tokenizer, call, images


def quantizer(batch, config, side, whole):
    """Latents to the affinity A, indices and loss terms; to indices alone where nothing gets a
    gradient.
    """
    quantizer, losses = Tokenizer(config).quantizer, QUANTIZER_LOSSES[config.quantizer]

    def call(latents):
        if not torch.is_grad_enabled():
            return quantizer.indices(latents, check=False)
        found = quantizer(latents, limit(whole))
        return [found.latents, *losses(found).values(), *found.entropies]

    return (
        quantizer,
        call,
        torch.empty(batch, config.code_dim, side, side, requires_grad=torch.is_grad_enabled()),
    )


def decoder(batch, config, side):
    """Quantised latents to images."""
    tokenizer = Tokenizer(config)
    call = tokenizer.decode_latents
    del tokenizer.encoder, tokenizer.quantizer, tokenizer.quant_conv, tokenizer.skip_in
    return tokenizer, call, torch.empty(batch, config.code_dim, side, side, requires_grad=True)


def lpips(batch, size):
    """VGG16 to its thirteenth convolution, on a reconstruction and on the image."""
    import torchvision.models  # it loads torch's compiler, which a training run has no use for

    network, images = torchvision.models.vgg16().features[:30], _images(batch, size)
    return (
        network,
        lambda reconstruction: [network(reconstruction), network(images)],
        _images(batch, size),
    )


def discriminator(batch, channels, layers, size):
    """One set of images to logits."""
    module = Discriminator(channels, layers)
    return module, module, _images(batch, size)


def readout(batch, soft, tau, config, side, width, whole):
    """A to embeddings, softly (Eq. 8) or straight through; its gradient reaches latents and, where
    they learn, codes.
    """
    codes = torch.empty(
        config.codebook_size, config.code_dim, requires_grad=config.quantizer != "lfq"
    )
    embedding = torch.empty(len(codes), width)

    def call(rows):
        affinity = Affinity(rows, codes, limit=limit(whole))
        return (affinity.soft_readout if soft else affinity.straight_through_readout)(
            embedding, tau
        )

    return nn.Identity(), call, torch.empty(batch, side**2, config.code_dim)


def generator(batch, config, codes, side, tap, soft):
    """To the block `tap`, or with None to the next-token loss; from `soft` embeddings or from
    indices.
    """
    module, labels = Generator(config, codes), torch.zeros(batch, dtype=torch.long)
    targets = torch.zeros(batch, side**2, dtype=torch.long)
    given = torch.empty(batch, side**2, config.width) if soft else targets

    def call(tokens):
        return (
            module.hidden(tokens, labels, [tap])[tap]
            if tap
            else next_token_loss(module(tokens, labels), targets)
        )

    return module, call, given


def projector(batch, config, dim, side):
    """The tap's hidden states to a teacher's space of `dim` channels."""
    module = Projector(config, dim)
    return module, module, torch.empty(batch, side**2, config.width, requires_grad=True)


def scenes_teacher(batch, size):
    """Images to the factors of their patches: the scenes teacher in training."""
    module = ScenesTeacher()

    def call(images):
        channels = module.channels(images)
        return [head(channels) for head in module.heads.values()]

    return module, call, _images(batch, size)


def teacher(batch, spec, size, stride):
    """Images to a teacher's features, by NAME[@LAYER]; raises UserError where its grid or its
    library does not fit.
    """
    name, layer, _ = parse(spec)
    if name == "scenes":
        teacher = ScenesTeacher()
        call = functools.partial(teacher, check=False)  # fake images have no values
    elif name == efficientnet.NAME:
        teacher = efficientnet.EfficientNetTeacher(efficientnet.build_network(), "", stride)
        call = teacher.raw
    else:
        # the libraries look at values while they build
        with unset_fake_temporarily(), torch.device("meta"):
            network = build(name, input_side(name, size, stride))
        teacher = ViTTeacher(name, network.to_empty(device="cpu"), "", size, stride, layer)
        call = teacher.features
    return teacher, call, _images(batch, size)


def teacher_dim(spec):
    """Return the width of a teacher's features; raises UserError for one that is unknown."""
    name = bare_name(spec)
    return (
        VITS[name].dim
        if name in VITS
        else {"scenes": DIM, efficientnet.NAME: efficientnet.DIM}[name]
    )


def _images(batch, size):
    return torch.empty(batch, 3, size, size)

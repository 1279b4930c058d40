"""Sampling a grid of indices: guidance, temperature, top-k, top-p, with a KV cache."""

import contextlib
from typing import Annotated

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gear.config import Range, Share, UserError, Whole, check_value
from gear.generator.graphed import launched, repeated
from gear.generator.transformer import KVCache, visible
from gear.images import to_uint8

Guidance = Annotated[float, Range(0, 1_000_000)]  # beyond these two, logits overflow
Temperature = Annotated[float, Range(0, 1_000_000)]
RANGES = {
    "cfg_scale": Guidance,
    "temperature": Temperature,
    "top_k": Whole,
    "top_p": Share,
    "seed": Annotated[
        int, Range(0, 2**63 - 1)
    ],  # also those that an evaluation derives from its own
}
# a temperature below which a quotient overflows, and the arg-max is all that is ever drawn
COLD = 1e-20


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set to -inf what top-k, then nucleus sampling, exclude; (B, K) -> (B, K). Ties at the k-th
    logit stay.

    The nucleus keeps the first token that crosses `top_p`. top_k = 0 and top_p = 1 exclude nothing.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        excluded = p.cumsum(-1) - p > top_p  # the mass before a token already exceeds top_p
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return logits


def _check_settings(cfg_interval, **settings):
    """Raise UserError for a setting out of RANGES."""
    for name, value in settings.items():
        check_value(name, value, RANGES[name])
    check_value("cfg_interval", cfg_interval or (0, 0), tuple[Whole, Whole])


def _draw(logits, temperature, top_k, top_p, rng):
    """Draw an index from each row of logits: (B, K) -> (B,). What is no number draws any:
    `generate` tells at its end.

    The draw is `torch.multinomial`'s, an exponential race, to the bit, less its checks of p, which
    are kernels, too.
    """
    if temperature < COLD:
        return logits.argmax(-1)
    p = filter_logits(logits / temperature, top_k, top_p).softmax(-1).nan_to_num(1.0)
    return (p / torch.empty_like(p).exponential_(generator=rng)).argmax(-1)


def sampling_dtype(generator):
    """Return the dtype of weights, cache and logits that `generate` takes by default, see there."""
    return torch.bfloat16 if generator.embedding.is_cuda else generator.embedding.dtype


@torch.no_grad()
def generate(
    generator,
    condition,
    grid=None,
    mask=None,
    *,
    cfg_scale=1.0,
    cfg_interval=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    text_attention="causal",
    dtype=None,
    graph=True,
):
    """Sample index grids (B, h, w) for labels (B,), or captions (B, T, F) with their `mask`, token
    by token.

    Guidance combines logits as uncond + cfg_scale * (cond - uncond), before temperature, top-k and
    top-p: 0 is unconditional, 1 the condition alone. `cfg_interval` = (i, j) guides tokens i <= n <
    j (default: all), the others follow the condition alone. temperature 0 takes the arg-max.
    `dtype` is that of weights, cache and logits, by default bfloat16 on a GPU, which halves what a
    step reads, and elsewhere the generator's own, float32 as it is loaded (norms and rotations are
    float32 inside in any). The result is a function of `seed` on one kind of device. The generator
    is left in evaluation mode. On a GPU all tokens are one CUDA graph from the second call of a
    kind on, a kind being all arguments but weights, condition and seed: `graphed.repeated`. With
    `graph` false they never are, and no memory is held between calls. Raises UserError unless h =
    w, for settings out of RANGES, and for guidance where captions have no `no_caption`.
    """
    h, w = grid or generator.grid
    if h != w or h < 1:
        raise UserError(f"a grid of {h} x {w} tokens is not square.")
    _check_settings(
        cfg_interval,
        cfg_scale=cfg_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    generator.eval()
    device, count, length = generator.embedding.device, len(condition), h * w
    first, last = cfg_interval or (0, length)
    guided = cfg_scale != 1 and last > max(first, 0)
    condition, mask = generator.condition.check(
        condition.to(device), None if mask is None else mask.to(device)
    )
    if guided:
        none = generator.condition.none(condition, mask)
        guided = cfg_scale > 0 or first > 0 or last < length  # else the condition has no part in it
        pair = zip((condition, mask), none)
        condition, mask = (
            (None if c is None else torch.cat([c, n]) for c, n in pair) if guided else none
        )
    guidance = (cfg_scale, first, last) if guided else None
    settings = count, length, guidance, (temperature, top_k, top_p), text_attention
    run = repeated if graph and device.type == "cuda" else launched
    indices, finite = run(
        _decode, settings, generator, dtype or sampling_dtype(generator), (condition, mask), seed
    )
    if not finite:
        raise UserError(
            "the generator's logits are not finite: look at its weights, and at the range of their "
            "type."
        )
    return indices.view(-1, h, w)


def _decode(settings, generator, condition, mask, rng):
    """Return indices (B, L) and whether all logits were finite: `generate` without its checks, and
    never waiting for a GPU.
    """
    count, length, guidance, drawing, text_attention = settings
    config, device = generator.config, condition.device
    scale, first, last = guidance or (1.0, 0, 0)
    guided = guidance is not None
    x = generator.condition.embed(condition)  # (B or 2 B, C, D)
    slots, head_dim = x.shape[1], config.width // config.heads
    table, sees = (
        generator.rotation(length, device, slots),
        None if mask is None else visible(mask, length - 1, text_attention),
    )
    caches = [
        KVCache(len(x), config.heads, slots + length - 1, head_dim, device, x.dtype)
        for _ in generator.blocks
    ]
    finite = torch.ones((), dtype=torch.bool, device=device)
    indices = torch.zeros(count, length, dtype=torch.long, device=device)
    start, end = 0, slots
    with _attention(device):
        for i in range(length):
            if guided and i >= last:  # from here on nobody asks for the unconditional half
                guided, x, sees = False, x[:count], None if sees is None else sees[:count]
                for cache in caches:
                    cache.keep(count)
            rows = None if sees is None else sees[:, :, start:end, :end]
            text, top = slots if generator.condition.is_caption and i == 0 else 0, config.layers
            x = generator.blocks(x, table[start:end], [top], caches, rows, text)[top]
            logits = generator.logits(x[:, -1])
            if guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + scale * (cond - uncond) if i >= first else cond
            # read once, at the end: the device is not waited for at every token
            finite &= torch.isfinite(logits).all()
            indices[:, i] = _draw(logits, *drawing, rng)
            x = generator.hard_readout(indices[:, i : i + 1].repeat(1 + guided, 1))
            start, end = end, end + 1
    return indices, finite


def _attention(device):
    """Return a context in which a GPU's attention is not cuDNN's, which builds a plan for each new
    number of keys.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )  # the last: what is left


@torch.no_grad()
def sample(generator, tokenizer, condition, grid=None, **sampling):
    """Sample images for labels (B,) or captions (B, T, F): uint8 (B, H, W, 3). `sampling` goes to
    `generate`, e.g. mask, seed.

    `grid` = (h, w) tokens, by default that of the run the generator was loaded from, and 16 x 16
    for a public file.
    """
    condition = torch.as_tensor(condition)
    if condition.numel() == 0:
        raise UserError("nothing to sample: give a label or a caption for each image.")
    return to_uint8(tokenizer.decode(generate(generator, condition, grid, **sampling)))

"""Sampling of index grids: guidance, temperature, top-k and top-p, with a KV cache."""

import contextlib
from typing import Annotated

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gear.config import Range, Share, UserError, Whole, check_value
from gear.generator.graphed import launched, repeated
from gear.generator.transformer import KVCache, visible
from gear.images import to_uint8

# larger values of either would let the logits overflow
Guidance = Annotated[float, Range(0, 1_000_000)]
Temperature = Annotated[float, Range(0, 1_000_000)]
RANGES = {
    "cfg_scale": Guidance,
    "temperature": Temperature,
    "top_k": Whole,
    "top_p": Share,
    # wider than a run's own seeds, because an evaluation derives further seeds from them
    "seed": Annotated[int, Range(0, 2**63 - 1)],
}
# temperature below which logits / temperature overflows, so that the arg-max is taken instead
COLD = 1e-20


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set to -inf the logits that top-k, then nucleus sampling, exclude: (B, K) -> (B, K).

    Logits equal to the k-th largest are not excluded. The nucleus includes the first token at which
    the cumulative probability exceeds `top_p`. top_k = 0 and top_p = 1 exclude nothing.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        # a token is excluded if the tokens before it already exceed top_p
        is_excluded = p.cumsum(-1) - p > top_p
        logits = logits.masked_fill(is_excluded.scatter(-1, order, is_excluded), -torch.inf)
    return logits


def _check_settings(cfg_interval, **settings):
    """Raise UserError for a setting outside RANGES."""
    for name, value in settings.items():
        check_value(name, value, RANGES[name])
    check_value("cfg_interval", cfg_interval or (0, 0), tuple[Whole, Whole])


def _draw(logits, temperature, top_k, top_p, rng):
    """Draw one index from each row of logits: (B, K) -> (B,).

    The draw is an exponential race, and its result equals that of `torch.multinomial` bit for bit.
    It leaves out that function's checks of p, which cost kernels. Where logits are NaN an arbitrary
    index is drawn; `generate` raises the error at its end.
    """
    if temperature < COLD:
        return logits.argmax(-1)
    p = filter_logits(logits / temperature, top_k, top_p).softmax(-1).nan_to_num(1.0)
    return (p / torch.empty_like(p).exponential_(generator=rng)).argmax(-1)


def sampling_dtype(generator):
    """Return the default dtype of the weights, the cache and the logits in `generate`."""
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
    """Sample index grids (B, h, w), token by token, for labels (B,) or captions (B, T, F).

    Guidance combines logits as uncond + cfg_scale * (cond - uncond), before temperature, top-k and
    top-p: 0 is unconditional, and 1 uses the condition alone. `cfg_interval` = (i, j) guides the
    tokens n with i <= n < j (default: all); the others use the condition alone. Temperature 0 takes
    the arg-max. `mask` is that of captions. The generator is left in evaluation mode, and the
    result depends on `seed` alone on one kind of device.

    `dtype` is that of weights, cache and logits. It is bfloat16 by default on a GPU, which halves
    the bytes that a step reads, and the generator's own elsewhere, float32 as it is loaded. Norms
    and rotations are computed in float32 in any case. With `graph`, a GPU computes all tokens as
    one CUDA graph, from the second consecutive call on that differs at most in weights, condition
    values and seed (`graphed.repeated`). Without, no memory is held between calls.

    Raises UserError unless h = w, for settings outside RANGES, for logits that are not finite, and
    for guidance on captions where `no_caption` is not set.
    """
    h, w = grid or generator.grid
    if h != w or h < 1:
        raise UserError(f"a grid of {h} x {w} tokens is not square.")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_settings(cfg_interval, cfg_scale=cfg_scale, seed=seed, **sampling)
    generator.eval()
    device = generator.embedding.device
    batch, length = len(condition), h * w
    first, last = cfg_interval or (0, length)
    is_guided = cfg_scale != 1 and last > max(first, 0)
    condition, mask = generator.condition.check(
        condition.to(device), None if mask is None else mask.to(device)
    )
    if is_guided:
        unconditional = generator.condition.none(condition, mask)
        # with scale 0 for all tokens the unconditional half alone is computed
        is_guided = cfg_scale > 0 or first > 0 or last < length
        condition, mask = (
            _concatenate((condition, mask), unconditional) if is_guided else unconditional
        )
    guidance = (cfg_scale, first, last) if is_guided else None
    settings = batch, length, guidance, (temperature, top_k, top_p), text_attention
    run = repeated if graph and device.type == "cuda" else launched
    indices, is_finite = run(
        _decode, settings, generator, dtype or sampling_dtype(generator), (condition, mask), seed
    )
    if not is_finite:
        raise UserError(
            "the generator's logits are not finite (NaN or infinite): its weights may be damaged, "
            "or the logits overflow in float16."
        )
    return indices.view(-1, h, w)


def _concatenate(first, second):
    """Concatenate two pairs (condition, mask) along the batch; a mask of None stays None."""
    return [None if a is None else torch.cat([a, b]) for a, b in zip(first, second)]


def _decode(settings, generator, condition, mask, rng):
    """Return indices (B, L), and whether all logits were finite.

    This is `generate` without its checks. It never waits for a GPU, so that it can be captured.
    """
    batch, length, guidance, drawing, text_attention = settings
    config, device = generator.config, condition.device
    scale, first, last = guidance or (1.0, 0, 0)
    is_guided = guidance is not None
    x = generator.condition.embed(condition)  # (B or 2 B, C, D)
    slots = x.shape[1]
    head_dim = config.width // config.heads
    table = generator.rotation(length, device, slots)
    attention_mask = None if mask is None else visible(mask, length - 1, text_attention)
    caches = [
        KVCache(len(x), config.heads, slots + length - 1, head_dim, device, x.dtype)
        for _ in generator.blocks
    ]
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    indices = torch.zeros(batch, length, dtype=torch.long, device=device)
    start, end = 0, slots
    with _attention_backends(device):
        for i in range(length):
            if is_guided and i >= last:  # the unconditional half is not needed any more
                is_guided = False
                x = x[:batch]
                attention_mask = None if attention_mask is None else attention_mask[:batch]
                for cache in caches:
                    cache.keep(batch)
            mask_rows = None if attention_mask is None else attention_mask[:, :, start:end, :end]
            text = slots if generator.condition.is_caption and i == 0 else 0
            top = config.layers
            x = generator.blocks(x, table[start:end], [top], caches, mask_rows, text)[top]
            logits = generator.logits(x[:, -1])
            if is_guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + scale * (cond - uncond) if i >= first else cond
            # stays on the device until the end, because reading it at every token would wait
            is_finite &= torch.isfinite(logits).all()
            indices[:, i] = _draw(logits, *drawing, rng)
            x = generator.hard_readout(indices[:, i : i + 1].repeat(1 + is_guided, 1))
            start, end = end, end + 1
    return indices, is_finite


def _attention_backends(device):
    """Return a context that excludes cuDNN's attention on a GPU.

    cuDNN builds a plan for each new number of keys, and with a KV cache every token has a new one.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(  # MATH runs where neither of the others can
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


@torch.no_grad()
def sample(generator, tokenizer, condition, grid=None, **sampling):
    """Sample images for labels (B,) or captions (B, T, F): uint8 (B, H, W, 3).

    `grid` = (h, w) tokens defaults to that of the run from which the generator was loaded, or to 16
    x 16 for a public file. `sampling` are further arguments of `generate`, for example mask or
    seed.
    """
    condition = torch.as_tensor(condition)
    if condition.numel() == 0:
        raise UserError("nothing to sample: give one label or one caption per image.")
    return to_uint8(tokenizer.decode(generate(generator, condition, grid, **sampling)))

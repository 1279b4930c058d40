"""Sampling a grid of indices: guidance, temperature, top-k, top-p, with a KV cache."""

import torch

from gear.config import UserError
from gear.data import to_uint8
from gear.generator.transformer import KVCache


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set to -inf what top-k, then nucleus sampling, exclude; (B, K) -> (B, K). Ties at the k-th logit stay.

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


@torch.no_grad()
def generate(generator, labels, grid, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Sample index grids (B, h, w) for class labels (B,), token by token.

    Guidance, for cfg_scale > 1, combines logits as uncond + cfg_scale * (cond - uncond) before temperature, top-k and
    top-p. temperature 0 takes the arg-max. The result is a function of `seed` on one kind of device. The generator is left
    in evaluation mode. Raises UserError unless h = w.
    """
    h, w = grid
    if h != w:
        raise UserError(f"a grid of {h} x {w} tokens is not square.")
    config, device, guided = generator.config, generator.embedding.device, cfg_scale > 1
    generator.eval()
    labels = labels.to(device)
    rows = torch.cat([labels, torch.full_like(labels, generator.no_class)]) if guided else labels
    head_dim = config.width // config.heads
    caches = [KVCache(len(rows), config.heads, h * w, head_dim, device, generator.embedding.dtype) for _ in generator.blocks]
    table = generator.rotation(h * w, device)
    rng = torch.Generator(device).manual_seed(seed)
    indices = torch.zeros(len(labels), h * w, dtype=torch.long, device=device)
    x = generator.class_embedding(rows)[:, None]
    for i in range(h * w):
        for block, cache in zip(generator.blocks, caches):
            x = block(x, table[i : i + 1], cache)
        logits = generator.logits(x)[:, 0]
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)
        if temperature == 0:
            indices[:, i] = logits.argmax(-1)
        else:
            p = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
            indices[:, i] = torch.multinomial(p, 1, generator=rng)[:, 0]
        token = indices[:, i : i + 1]
        x = generator.token_embedding(torch.cat([token, token]) if guided else token)
    return indices.view(-1, h, w)


@torch.no_grad()
def sample(generator, tokenizer, labels, grid, **sampling):
    """Sample images of `grid` = (h, w) tokens for class labels (B,): uint8 (B, H, W, 3). `sampling` goes to `generate`."""
    labels = torch.as_tensor(labels)
    return to_uint8(tokenizer.decode(generate(generator, labels, grid, **sampling)))

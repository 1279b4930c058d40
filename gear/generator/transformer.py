"""The parts of a Llama-style transformer: RMSNorm, 2-D RoPE, causal attention with a KV cache,
SwiGLU.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gear.config import UserError

# Llama's eps; torch's default is that of float32, 1.2e-7
RMSNorm = functools.partial(nn.RMSNorm, eps=1e-5)


def rotation_table(
    side, head_dim, condition=1, condition_rotation="identity", base=10_000.0, device=None
):
    """Return (cos, sin) of 2-D RoPE for [condition, side * side tokens in raster order]: (condition
    + side^2, head_dim / 2, 2).

    The first half of the pairs turns with the row, the second with the column. The `condition`
    positions have no place: "identity" leaves them unturned; "zero" multiplies their queries and
    keys by nothing, as the public networks do, which silences every condition's key.
    """
    half = head_dim // 2
    # (head_dim / 4,)
    frequencies = base ** (-torch.arange(0, half, 2, device=device).float() / half)
    position = torch.arange(side, device=device).float()
    turn = position[:, None] * frequencies  # (side, head_dim / 4)
    angles = torch.cat(
        [turn[:, None].expand(-1, side, -1), turn[None].expand(side, -1, -1)], -1
    ).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], -1)  # (side^2, head_dim / 2, 2)
    unturned = torch.zeros_like(table[:1])
    if condition_rotation == "identity":
        unturned[..., 0] = 1
    return torch.cat([unturned.expand(condition, -1, -1), table])


def rotate(x, table):
    """Turn interleaved pairs of x (.., S, head_dim) by table (S, head_dim / 2, 2); float32
    inside.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the positions seen so far, (B, heads, S_max, head_dim) each; `length` of
    them are filled.
    """

    def __init__(self, batch, heads, length, head_dim, device, dtype):
        self.keys = torch.empty(batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """Store the next positions; returns all filled keys and values."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, batch):
        """Forget all but the first `batch` sequences."""
        self.keys, self.values = self.keys[:batch], self.values[:batch]


def visible(mask, tokens, text_attention):
    """Say which position may attend to which: mask (B, T) -> (B, 1, S, S) bool.

    Positions are T caption slots, then `tokens` image tokens. Causal; nobody attends to an empty
    slot but that slot itself. "prefix" lets the slots of a caption see each other both ways; text
    never sees the image. Raises UserError for another word.
    """
    if text_attention not in ("causal", "prefix"):
        raise UserError(f"text_attention is '{text_attention}': 'causal' or 'prefix' is expected.")
    slots = mask.shape[1]
    order = torch.ones(slots + tokens, slots + tokens, dtype=torch.bool, device=mask.device).tril()
    if text_attention == "prefix":
        order[:slots, :slots] = True
    filled = torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)  # (B, S)
    return (order & filled[:, None] | torch.eye(len(order), dtype=torch.bool, device=mask.device))[
        :, None
    ]


class Attention(nn.Module):
    """Causal multi-head self-attention with rotated queries and keys, no biases.

    In a dual-stream layer the first `text` positions have projections of their own; all positions
    attend jointly.
    """

    def __init__(self, width, heads, dropout, dual=False):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.qkv_text = nn.Linear(width, 3 * width, bias=False) if dual else None
        self.out_text = nn.Linear(width, width, bias=False) if dual else None

    def forward(self, x, table, cache=None, mask=None, text=0):
        qkv = by_stream(x, text, self.qkv_text, self.qkv)
        # (.., B, heads, S, head_dim)
        qk, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))
        (q, k), v = rotate(qk, table), v.squeeze(0)  # both at once: half the kernels
        if cache is not None:
            k, v = cache.append(k, v)
        # without a mask: causal, and with a filled cache one new position sees everything before it
        causal = mask is None and q.shape[2] == k.shape[2] > 1
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.dropout(by_stream(h.transpose(1, 2).flatten(2), text, self.out_text, self.out))


def by_stream(x, text, of_text, of_image):
    """Send the first `text` positions of x (B, S, D) through one module and the rest through the
    other; None: one for all.
    """
    if of_text is None or text == 0:
        return of_image(x)
    return torch.cat([of_text(x[:, :text]), of_image(x[:, text:])], 1)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), hidden width 8/3 of the model's, rounded up to a multiple of 256 (32
    in narrow models).
    """

    def __init__(self, width, dropout):
        super().__init__()
        multiple = 256 if width >= 256 else 32
        hidden = -(-int(8 * width / 3) // multiple) * multiple
        self.w1, self.w3 = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(width, hidden, bias=False),
        )
        self.w2, self.dropout = nn.Linear(hidden, width, bias=False), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """One pre-norm transformer layer; a dual-stream one shares the feed-forward between text and
    image.
    """

    def __init__(self, width, heads, dropout, dual=False):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), Attention(width, heads, dropout, dual)
        self.attention_norm_text = RMSNorm(width) if dual else None
        self.ffn_norm, self.ffn = RMSNorm(width), SwiGLU(width, dropout)

    def forward(self, x, table, cache=None, mask=None, text=0):
        h = by_stream(x, text, self.attention_norm_text, self.attention_norm)
        x = x + self.attention(h, table, cache, mask, text)
        return x + self.ffn(self.ffn_norm(x))


class Blocks(nn.ModuleList):
    """Layers, one after another, called as one network: so they can be spread over processes."""

    def forward(self, x, table, layers, caches=None, mask=None, text=0, recompute=False):
        """Return the residual stream (B, S, D) after each of `layers`, {layer: stream}, 0 being x;
        none above them is run.

        `caches` holds a KVCache for each layer; with `recompute` a layer keeps its input only and
        is run again in backward.
        """
        kept = {0: x} if 0 in layers else {}
        for i, block in zip(range(1, max(layers) + 1), self):
            if caches:  # not as compiled: that would compile anew for every length of a cache
                block = block._call_impl
            block = (
                functools.partial(checkpoint, block, use_reentrant=False) if recompute else block
            )
            x = block(x, table, caches[i - 1] if caches else None, mask, text)
            if i in layers:
                kept[i] = x
        return kept

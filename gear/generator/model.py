"""The autoregressive generator p(q_i | q_<i, c) over indices (Eq. 3), and the projector of its
alignment tap (Eq. 5).
"""

import math

import torch
from torch import nn

from gear.config import (
    UserError,
    check_range,
)
from gear.generator.condition import build_condition
from gear.generator.transformer import Block, Blocks, RMSNorm, rotation_table, visible


class Generator(nn.Module):
    """A Llama-style transformer over index grids, conditioned on a class or, with `text_slots`, on
    a caption.

    The sequence is [condition, u_1, ..., u_{L-1}], the condition a class's embedding or T caption
    slots: its last position predicts token 0, and the position that predicts token i has not seen
    it, so the last token is never an input. Tokens are indices, (B, L) or (B, h, w) int64, or
    embeddings (B, L, D); L is a square. A condition is what `generator.condition` takes: see
    condition.py. `sample` draws a `grid` of tokens unless told otherwise. With `checkpointing`
    blocks are computed again in backward, which saves memory.
    """

    def __init__(self, config, codebook_size, checkpointing=False, grid=(16, 16)):
        super().__init__()
        self.config, self.codebook_size, self.checkpointing, self.grid = (
            config,
            codebook_size,
            checkpointing,
            grid,
        )
        self._tables = {}  # rotations, by grid, condition and device
        width = config.width
        # its name in checkpoints
        self._condition = "text_embedding" if config.text_slots else "class_embedding"
        self.add_module(self._condition, build_condition(config))
        self.token_embedding = nn.Embedding(codebook_size, width)  # E of Eqs. 7 and 8
        self.embed_dropout = nn.Dropout(config.dropout)
        self.blocks = Blocks(
            Block(width, config.heads, config.dropout, dual=i < config.dual_layers)
            for i in range(config.layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, codebook_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0, 0.02)
        nn.init.normal_(self.token_embedding.weight, 0, config.embed_std)
        nn.init.zeros_(self.head.weight)  # the first loss is ln K

    @property
    def embedding(self):
        """The token embedding table E, (K, D)."""
        return self.token_embedding.weight

    @property
    def condition(self):
        """What embeds the condition: a ClassCondition or a CaptionCondition."""
        return getattr(self, self._condition)

    def forward(self, tokens, condition, mask=None, text_attention="causal", **options):
        """Return logits (B, L, K) float32 of tokens given their condition; position i predicts
        token i. See `hidden`.
        """
        top = self.config.layers
        return self.logits(
            self.hidden(tokens, condition, [top], mask, text_attention, **options)[top]
        )

    def logits(self, hidden):
        """Map the last residual stream (B, L, D) to logits (B, L, K) float32."""
        return self.head(self.norm(hidden)).float()

    def hidden(
        self,
        tokens,
        condition,
        layers,
        mask=None,
        text_attention="causal",
        check=True,
        dropped=None,
    ):
        """Return the residual stream after the blocks named in `layers`, {layer: (B, L, D)}, 0
        being the embeddings.

        Position i is the one that predicts token i. Blocks above the highest layer asked for are
        not run: this is the truncated pass of Algorithm 1, line 4. `text_attention` "prefix" lets a
        caption's slots see each other both ways. Where `dropped` (B,) bool is true the condition is
        replaced by none. Raises UserError for a layer that is not there, a grid that is no square,
        and, in evaluation mode unless `check` is false, tokens or labels out of range: looking for
        those waits for the device.
        """
        if not layers or not set(layers) <= set(range(self.config.layers + 1)):
            raise UserError(
                f"layers {sorted(layers)}: this generator has layers 0 to {self.config.layers}."
            )
        check = check and not self.training
        tokens = self.check_tokens(tokens, check)
        condition, mask = self.condition.check(condition, mask, check)
        if len(condition) != len(tokens):
            raise UserError(
                f"there are {len(tokens)} token grids and {len(condition)} conditions: one each is "
                "expected."
            )
        if dropped is not None:
            condition, mask = self.condition.drop(condition, mask, dropped)
        given = self.condition.embed(condition)  # (B, C, D)
        u = tokens[:, :-1] if tokens.is_floating_point() else self.hard_readout(tokens[:, :-1])
        x, c = self.embed_dropout(torch.cat([given, u], 1)), given.shape[1]
        table = self.rotation(tokens.shape[1], x.device, c)[: x.shape[1]]
        sees = None if mask is None else visible(mask, u.shape[1], text_attention)
        text, saving = (
            c if self.condition.is_caption else 0,
            self.checkpointing and torch.is_grad_enabled(),
        )
        streams = self.blocks(x, table, layers, mask=sees, text=text, recompute=saving)
        return {i: x[:, c - 1 :] if c > 1 else x for i, x in streams.items()}

    def hard_readout(self, indices):
        """u^h_i = E_{q_i} (Eq. 7): indices (...) -> (..., D); no gradient reaches what chose
        them.
        """
        return self.token_embedding(indices)

    def check_tokens(self, tokens, check=True):
        """Return tokens as sequences, indices (B, L) int64 or embeddings (B, L, D); raises
        UserError for what is neither.
        """
        soft = tokens.is_floating_point()
        if tokens.ndim == 3 + soft and tokens.shape[1] != tokens.shape[2]:
            raise UserError(
                f"a grid of {tokens.shape[1]} x {tokens.shape[2]} tokens is not square."
            )
        if (
            tokens.ndim not in (2 + soft, 3 + soft)
            or tokens.numel() == 0
            or (soft and tokens.shape[-1] != self.config.width)
        ):
            what = (
                f"indices (B, L) or (B, h, w), or embeddings with {self.config.width} channels more"
            )
            raise UserError(f"tokens have shape {tuple(tokens.shape)}: {what} are expected.")
        tokens = tokens.flatten(1, tokens.ndim - 1 - soft)
        if not soft and check:
            check_range(tokens, self.codebook_size, "indices")
        return tokens if soft else tokens.long()

    def rotation(self, length, device, condition=1):
        """Return the rotation table for [`condition` positions, `length` tokens]; raises UserError
        if that is no square.
        """
        side = math.isqrt(length)
        if side * side != length:
            raise UserError(f"a sequence of {length} tokens is not a square grid.")
        head_dim, key = self.config.width // self.config.heads, (side, condition, device)
        if key not in self._tables:  # thirty small kernels a step otherwise
            self._tables[key] = rotation_table(
                side, head_dim, condition, self.config.condition_rotation, device=device
            )
        return self._tables[key]


class Projector(nn.Module):
    """g_phi of Eq. 5: a tap's hidden states (B, L, D) -> the teacher's space (B, L, target_dim)."""

    def __init__(self, config, target_dim):
        super().__init__()
        d, h = config.width, config.projector_dim
        self.layers = nn.Sequential(
            nn.Linear(d, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, target_dim)
        )  # fmt: skip

    def forward(self, hidden):
        return self.layers(hidden)


class Projectors(nn.ModuleList):
    """A Projector for each of several teachers: hidden states (B, L, D) -> their spaces side by
    side (B, L, sum of dims).
    """

    def forward(self, hidden):
        return torch.cat([projector(hidden) for projector in self], -1)

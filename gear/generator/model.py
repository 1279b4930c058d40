"""The autoregressive generator p(q_i | q_<i, c) over indices (Eq. 3), and the projector of its alignment tap (Eq. 5)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gear.config import UserError
from gear.generator.transformer import Block, RMSNorm, rotation_table


@dataclass(frozen=True)
class GeneratorConfig:
    width: int = 1024  # D
    layers: int = 24
    heads: int = 16
    num_classes: int = 1000
    tap_layer: int = 8  # 1-based: the residual stream after this block is aligned; a third of the depth
    projector_dim: int = 2048
    class_dropout: float = 0.1  # share of labels replaced by "no class", for guidance
    dropout: float = 0.1  # of embeddings, attention output and feed-forward output
    embed_std: float = 0.02  # initial spread of the token embedding; the soft read-out averages it
    condition_rotation: Literal["identity", "zero"] = "identity"  # "zero" for the public checkpoints


class Generator(nn.Module):
    """A Llama-style transformer over index grids, conditioned on a class.

    The sequence is [class, u_1, ..., u_{L-1}]: position i predicts token i and has not seen it, so the last token is never
    an input. Tokens are indices, (B, L) or (B, h, w) int64, or embeddings (B, L, D); L is a square.
    """

    def __init__(self, config, codebook_size):
        super().__init__()
        if config.width % (4 * config.heads):
            raise UserError(f"width {config.width} over {config.heads} heads: 2-D RoPE needs a head width divisible by 4.")
        self.config, self.codebook_size = config, codebook_size
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)  # the last row is "no class"
        self.token_embedding = nn.Embedding(codebook_size, config.width)  # E of Eqs. 7 and 8
        self.embed_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
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
    def no_class(self):
        """The label that stands for no class."""
        return self.config.num_classes

    def forward(self, tokens, labels):
        """Return logits (B, L, K) float32 of tokens given the class labels (B,); position i predicts token i."""
        return self.logits(self.hidden(tokens, labels, [self.config.layers])[self.config.layers])

    def logits(self, hidden):
        """Map the last residual stream (B, L, D) to logits (B, L, K) float32."""
        return self.head(self.norm(hidden)).float()

    def hidden(self, tokens, labels, layers):
        """Return the residual stream after the blocks named in `layers`, {layer: (B, L, D)}, 0 being the embeddings.

        Blocks above the highest layer asked for are not run: this is the truncated pass of Algorithm 1, line 4.
        """
        if not set(layers) <= set(range(self.config.layers + 1)):
            raise UserError(f"layers {sorted(layers)}: this generator has layers 0 to {self.config.layers}.")
        if not tokens.is_floating_point():
            if tokens.ndim == 3 and tokens.shape[1] != tokens.shape[2]:
                raise UserError(f"a grid of {tokens.shape[1]} x {tokens.shape[2]} tokens is not square.")
            tokens = tokens.flatten(1)
        x = self.embed(tokens[:, :-1], labels)
        table = self.rotation(tokens.shape[1], x.device)[: tokens.shape[1]]
        kept = {0: x} if 0 in layers else {}
        for i, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x, table)
            if i in layers:
                kept[i] = x
        return kept

    def embed(self, tokens, labels):
        """Embed [class, tokens]: indices (B, S) or embeddings (B, S, D), labels (B,) -> (B, 1 + S, D)."""
        if self.training and self.config.class_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = torch.where(dropped, self.no_class, labels)
        u = tokens if tokens.is_floating_point() else self.token_embedding(tokens)
        return self.embed_dropout(torch.cat([self.class_embedding(labels)[:, None], u], 1))

    def rotation(self, length, device):
        """Return the rotation table for [class, `length` tokens]; raises UserError unless `length` is a square."""
        side = math.isqrt(length)
        if side * side != length:
            raise UserError(f"a sequence of {length} tokens is not a square grid.")
        head_dim = self.config.width // self.config.heads
        return rotation_table(side, head_dim, condition_rotation=self.config.condition_rotation, device=device)


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

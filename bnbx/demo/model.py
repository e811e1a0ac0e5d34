"""The model that the demo trains: a decoder-only transformer over bytes.

Pre-norm blocks, causal attention, rotary positions, squared-ReLU feed-forward. Rotary positions and
the squared ReLU are there because they learn markedly faster in the first few hundred steps, which
is all the demo has. Nearly all parameters sit in matrices of 4096 elements or more, the ones
whose optimizer states bnbx quantizes by default.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbx.demo.settings import Shape

VOCABULARY = 256
ROTARY_BASE = 10_000.0


class Block(nn.Module):
    """Attention, then feed-forward, each added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_out = nn.Linear(4 * width, width, bias=False)
        for layer in (self.query_key_value, self.feed_in):
            nn.init.normal_(layer.weight, std=initial_std(width))
        # A block starts as the identity, which trains evenly at any depth.
        for layer in (self.attention_out, self.feed_out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Update the (batch, time, width) activations `x`."""
        x = x + self._attend(self.attention_norm(x), angles)
        hidden: Tensor = self.feed_in(self.feed_norm(x))
        output: Tensor = self.feed_out(hidden.relu().square())
        return x + output

    def _attend(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, time, width = x.shape
        split = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate(query, angles), rotate(key, angles), value, is_causal=True
        )
        output: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return output


class ByteTransformer(nn.Module):
    """Predicts each next byte from the bytes so far; input and output share one embedding."""

    angles: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        nn.init.normal_(self.embedding.weight, std=initial_std(shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.width)
        angles = rotary_angles(shape.context, shape.width // shape.heads)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits over the next byte at each place of the (batch, time) bytes `text`."""
        x = self.embedding(text)
        angles = self.angles[: text.shape[1]]
        for block in self.blocks:
            x = block(x, angles)
        return F.linear(self.final_norm(x), self.embedding.weight)


def build_model(shape: Shape, seed: int) -> ByteTransformer:
    """The model of this shape and seed; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteTransformer(shape)


def initial_std(width: int) -> float:
    """Spread of the first weights; half of what would keep the activations' size."""
    return 0.5 / math.sqrt(width)


def rotary_angles(length: int, head_width: int) -> Tensor:
    """The angle by which each place turns each pair of features, (length, head_width / 2)."""
    pairs = head_width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(pairs) / pairs)
    return torch.outer(torch.arange(length).float(), frequencies)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the feature pairs of x (..., time, head_width), so that products see distances."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)

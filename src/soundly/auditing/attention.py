"""A small vision transformer, made of linear maps, products and softmax only, so that every exporter knows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Attention with two heads, then a dense layer, each added to what it reads."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = 2 if width % 2 == 0 else 1

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (f(x).reshape(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(w // self.heads), -1)
        x = x + self.mix((weights @ v).transpose(1, 2).reshape(b, t, w))
        return x + self.narrow(torch.relu(self.wide(x)))


class Attentive(nn.Module):
    """Pixels [b, c, h, w] as tokens, two blocks, their mean, and two logits."""

    def __init__(self, channels: int, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(_Block(tokens, width), _Block(tokens, width))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.embed(x.flatten(2).transpose(1, 2)) + self.place).mean(1))

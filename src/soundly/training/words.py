"""Self-explaining networks that read words: which of them suffice for the answer, wherever in the sentence they stand.

Each word is a few learned numbers between 0 and 1, so that distances between words have a scale: words that are close
say the same about the label. A reason is then a set of words, and it is sufficient within eps if every sentence with
these words, and in the other places words whose numbers differ by at most eps, gets the same answer. With eps = 1 the
others are any words at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from soundly.training.fit import fit
from soundly.training.sst import Objective, SelfExplaining

OBJECTIVE = Objective(faithfulness=3.0, cardinality=3.0, size=0.3)
"""For sentences: a word is a larger share of its mask than a pixel is of an image's, and so costs more."""


class Mean(nn.Module):
    """Over the words of a sentence: [n, words, width] -> [n, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Relevance(nn.Module):
    """A score per word, from the word and from all of them: [n, words, width] -> [n, words, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.all = nn.Linear(width, 1), nn.Linear(width, 1)
        nn.init.constant_(self.own.bias, 1.0)  # begins with all words

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.own(x) + self.all(x.mean(1, keepdim=True))
        return scores


def features(
    vectors: Tensor, x: Tensor, y: Tensor, *, width: int = 8, hidden: int = 32, epochs: int = 6, seed: int = 0
) -> Tensor:
    """Numbers of words [words, width] between 0 and 1 that say what a word means for the label.

    They are what a small network that is trained to predict the labels makes of the words' vectors.

    Args:
        vectors: [words, ...], of unit variance.
        x, y: sentences [n, length] of numbers of words, and labels [n].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embed = nn.Sequential(
            nn.Embedding.from_pretrained(vectors), nn.Linear(vectors.shape[1], width), nn.Sigmoid()
        )  # fmt: skip
        classes = int(y.max()) + 1
        model = nn.Sequential(embed, nn.Linear(width, hidden), nn.ReLU(), Mean(), nn.Linear(hidden, classes))
    fit(model, x, y, lambda a, b, _: cross_entropy(model(a), b), epochs=epochs, batch=64, lr=3e-3, seed=seed)
    with torch.no_grad():
        numbers: Tensor = embed(torch.arange(len(vectors)))
    return numbers


def reader(table: Tensor, length: int, classes: int, hidden: int = 32) -> SelfExplaining:
    """A network for sentences [n, length] of numbers of words; its masks are [length, 1].

    Args:
        table: numbers of words [words, width], as `features` returns; they stay as they are.
    """
    trunk = nn.Sequential(nn.Linear(table.shape[1], hidden), nn.ReLU())
    return SelfExplaining(
        trunk, nn.Sequential(Mean(), nn.Linear(hidden, classes)), Relevance(hidden), (length, 1),
        embed=nn.Embedding.from_pretrained(table),
    )  # fmt: skip

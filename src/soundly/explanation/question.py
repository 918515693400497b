"""What an explanation by inputs is about: a claim that holds at a point, how far inputs may move, what a feature is.

A mask says which features are kept as they are; all others range over their box. So a mask is sufficient exactly if a
claim over a box holds, and masks may come from anywhere: a search, an attribution, a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.spec.claim import Claim, robust
from soundly.spec.region import Ball, Box


@dataclass(frozen=True, eq=False)
class Question:
    """A claim over the box in which everything is free, and the point in it that is explained.

    Attributes:
        claim: its region is a Box.
        x: the point, float64, of the region's shape.
        member: [entries] which feature an entry of the flattened input belongs to.
        features: how many there are.
    """

    claim: Claim
    x: Tensor
    member: Tensor
    features: int

    @property
    def box(self) -> Box:
        return self.claim.region.box

    def kept(self, mask: Any) -> Tensor:
        """A mask from anywhere as bool [features], True where a feature is kept.

        Args:
            mask: bool, or zeros and ones: one per feature, or an array that fits the input by broadcasting.

        Raises:
            InvalidInput: of another shape or kind, or it keeps a feature in parts.
        """
        given = _booleans(mask)
        if given.shape == (self.features,):
            return given
        try:
            entries = given.expand(self.x.shape).reshape(-1)
        except RuntimeError:
            raise InvalidInput(
                f"mask has shape {tuple(given.shape)}: give one entry per feature, ({self.features},), or a shape that "
                f"can be broadcast to the input's, {tuple(self.x.shape)}."
            ) from None
        counts = torch.zeros(2, self.features, dtype=torch.int64)
        counts[0].index_add_(0, self.member, entries.long())
        counts[1].index_add_(0, self.member, torch.ones_like(self.member))
        parts = (counts[0] > 0) & (counts[0] < counts[1])
        if bool(parts.any()):
            raise InvalidInput(
                f"mask keeps feature {int(parts.nonzero()[0])} in parts; keep all of its entries or none."
            )
        return counts[0] > 0

    def scores(self, map: Any) -> tuple[Tensor, Tensor | None]:
        """Scores from anywhere as float64 [features], a feature's being the sum over its entries; and as they were, one
        for each entry of the input, unless they were given by feature.

        Args:
            map: one per feature, or an array that fits the input by broadcasting.
        """
        given = as_tensor(map).double()
        if given.shape == (self.features,) and self.features != len(self.member):
            return given, None
        try:
            entries = given.reshape(self.x.shape) if given.numel() == self.x.numel() else given.expand(self.x.shape)
        except RuntimeError:
            raise InvalidInput(
                f"scores have shape {tuple(given.shape)}: give one per feature, ({self.features},), or a shape that "
                f"can be broadcast to the input's, {tuple(self.x.shape)}."
            ) from None
        summed = torch.zeros(self.features, dtype=torch.float64).index_add_(0, self.member, entries.reshape(-1))
        return summed, entries

    def spread(self, features: Tensor) -> Tensor:
        """Values of features [..., features] at their entries [..., entries]."""
        return features if self.features == len(self.member) else features[..., self.member]

    def freed(self, kept: Tensor) -> Claim:
        """The same claim where only the features that are not kept may move."""
        fixed = self.spread(kept).reshape(self.x.shape)
        box = Box(torch.where(fixed, self.x, self.box.lower), torch.where(fixed, self.x, self.box.upper))
        name = f"{self.claim.name}, {int(kept.sum())} of {self.features} features kept"
        return Claim(self.claim.network, box, self.claim.property, assumptions=self.claim.assumptions, name=name)

    def support(self, x: Tensor) -> Tensor:
        """Which features of a point [entries] differ from the explained one: bool [features]."""
        moved = torch.zeros(self.features, dtype=torch.int64)
        return moved.index_add_(0, self.member, (x.reshape(-1) != self.x.reshape(-1)).long()) > 0


def question(
    asked: Network | Claim,
    x: Tensor,
    *,
    eps: float | Tensor | None = None,
    box: Box | None = None,
    target: int | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    groups: Any = None,
) -> Question:
    """What the arguments of `certify_mask` and `explain` ask; see there."""
    if isinstance(asked, Claim):
        if eps is not None or box is not None or target is not None:
            raise InvalidInput("eps, box, target: a claim has its own region and property; leave them out.")
        region = asked.region
        if not (isinstance(region, Box) or (isinstance(region, Ball) and region.norm == "linf")):
            raise InvalidInput("the claim's region must be a Box, or a Ball of norm linf: features move independently.")
        if not isinstance(asked.network, Network):
            raise InvalidInput("the claim was read without its network; give it as well.")
        claim = Claim(
            asked.network, region.box, asked.property, assumptions=asked.assumptions, name=asked.name
        )  # fmt: skip
    elif (eps is None) == (box is None):
        raise InvalidInput("give either eps, how far features may move, or box, where they may move to.")
    elif box is None:
        assert eps is not None
        claim = robust(asked, x, eps=eps, label=target, clip=clip)
        claim = Claim(asked, claim.region.box, claim.property, name=claim.name)
    else:
        claim = Claim(asked, box, robust(asked, x, eps=0.0, label=target, clip=None).property, name="robust in a box")
    if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape) != claim.region.shape:
        raise InvalidInput(f"x must be a floating-point tensor of shape {claim.region.shape}.")
    x = x.detach().cpu().double()
    if not bool(claim.region.contains(x)[()]):
        raise InvalidInput("x must lie inside the box in which features may move.")
    member, features = _groups(groups, x)
    return Question(claim, x, member, features)


def top_mask(scores: Any, keep: int | float) -> Tensor:
    """The mask that keeps the largest scores of an attribution: of captum, shap or anything that is an array.

    Args:
        scores: of any shape; pass `scores.abs()` where size counts and not sign. Ties go to what comes first.
        keep: how many entries, or which share of them if it is a float.

    Returns:
        bool, of the scores' shape, for `certify_mask`.
    """
    values = as_tensor(scores).double()
    if not bool(torch.isfinite(values).all()):
        raise InvalidInput("scores hold NaN or infinite entries, which cannot be ordered.")
    count = keep if isinstance(keep, int) else round(keep * values.numel())
    if isinstance(keep, bool) or not 0 <= count <= values.numel():
        raise InvalidInput(f"keep is {keep!r}; give a number of entries up to {values.numel()}, or a share up to 1.0.")
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.reshape(-1).argsort(descending=True, stable=True)[:count]] = True
    return mask.reshape(values.shape)


def as_tensor(values: Any) -> Tensor:
    """An array of any kind, or a shap Explanation's values, as a tensor."""
    held = values if isinstance(values, Tensor) else getattr(values, "values", values)
    return torch.as_tensor(held if isinstance(held, Tensor) else np.asarray(held)).detach().cpu()


def _booleans(mask: Any) -> Tensor:
    values = as_tensor(mask)
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        raise InvalidInput("mask must be boolean, True where a feature is kept; soundly.top_mask makes one of scores.")
    return values.bool()


def _groups(groups: Any, x: Tensor) -> tuple[Tensor, int]:
    if groups is None:
        return torch.arange(x.numel()), x.numel()
    labels = as_tensor(groups)
    if labels.is_floating_point() or labels.is_complex():
        raise InvalidInput("groups must be whole numbers: the feature of every entry.")
    try:
        labels = labels.expand(x.shape).reshape(-1)
    except RuntimeError:
        raise InvalidInput(
            f"groups has shape {tuple(labels.shape)}, which cannot be broadcast to the input's, {tuple(x.shape)}."
        ) from None
    names, member = labels.unique(return_inverse=True)
    if int(names[0]) != 0 or int(names[-1]) != len(names) - 1:
        raise InvalidInput(f"groups must use every number from 0 to the last; there are {len(names)} of them, "
                           f"from {int(names[0])} to {int(names[-1])}.")  # fmt: skip
    return member, len(names)

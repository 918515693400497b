"""Manipulations of an image with few parameters, as networks from the parameters to the image.

Put in front of a classifier they make "no rotation by up to 10 degrees changes the answer" an ordinary claim over a box
of parameters. Images are interpolated bilinearly, with zeros beyond their edges: the weight of a pixel is a product of
two tents. Only pixels that the parameters' ranges can reach are looked at, so a network is right in its `box` alone.

References: Singh et al., "An Abstract Domain for Certifying Neural Networks", POPL 2019 (rotations); Balunovic et al.,
"Certifying Geometric Robustness of Neural Networks", NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.elementwise import COS, SIN, Elementwise, clip
from soundly.graph.linear import Concat, Gather, ScatterAdd, add, reshape, scale
from soundly.graph.network import Network
from soundly.graph.node import Constant, Input, Node
from soundly.graph.product import Dense, multiply
from soundly.graph.ring import polynomial
from soundly.spec.claim import Claim, Region, top_k
from soundly.spec.region import Box

Range: TypeAlias = tuple[float, float]

TENT = Elementwise(
    "tent", ((), polynomial({(0,): 1, (1,): 1}), polynomial({(0,): 1, (1,): -1}), ()), breaks=(-1.0, 0.0, 1.0),
    kernel=lambda x: (1 - x.abs()).clamp(min=0),
)  # fmt: skip
"""max(0, 1 - |x|)."""
ROOM = 1e-6
"""Pixels count as reachable this far, in pixels, beyond where they are."""


@dataclass(frozen=True, eq=False)
class Manipulation:
    """What an image becomes.

    Attributes:
        x: the image itself.
        image: from the parameters [k] to an image of the shape of x.
        box: the parameters' ranges, beyond which `image` means nothing; where the ends are equal it is constant.
        names: of the parameters.
    """

    x: Tensor
    image: Network
    box: Box
    names: tuple[str, ...]

    def before(self, network: Network) -> Network:
        """The network's outputs as a function of the parameters."""
        return network.after(self.image)

    def robust(self, network: Network, *, label: int | None = None, region: Region | None = None) -> Claim:
        """No choice of parameters changes the label.

        Args:
            label: a flat output position; the network's answer at x if None.
            region: a part of `box`, such as a grid of whole pixels; all of it if None.
        """
        region = self.box if region is None else region
        inside = (region.box.lower >= self.box.lower) & (region.box.upper <= self.box.upper)
        if region.shape != self.box.shape or not bool(inside.all()):
            raise InvalidInput(f"region must lie inside the ranges of {', '.join(self.names)}; draw it up for more.")
        if label is None:
            label = int(network(self.x.to(network.dtype).to(network.device)).argmax())
        claim = top_k(self.before(network), region, [label], 1)
        return Claim(claim.network, region, claim.property, name=f"{label} whatever the {' and the '.join(self.names)}")


def lighting(
    x: Tensor, *, brightness: Range = (0.0, 0.0), contrast: Range = (1.0, 1.0), limits: Range | None = (0.0, 1.0)
) -> Manipulation:
    """mean + contrast * (x - mean) + brightness, cut off at the limits.

    Parameters: brightness, which is added, and contrast, a factor on the distance from the image's mean.
    """
    draft = _Draft(x, {"brightness": brightness, "contrast": contrast})
    flat = draft.x.reshape(-1)
    weight = torch.stack([torch.ones_like(flat), flat - flat.mean()], 1)
    changed = draft.affine(draft.parameters, weight, flat.mean().expand(len(flat)))
    return draft.finished(changed if limits is None else clip(*map(float, limits))(changed))


def translation(x: Tensor, *, down: Range = (0.0, 0.0), right: Range = (0.0, 0.0)) -> Manipulation:
    """The image moved by fractions of pixels; zeros move in. Parameters: down, right."""
    draft = _Draft(x, {"down": down, "right": right})
    images = draft.x.reshape(-1, *draft.size)

    def at(i: int, j: int) -> Tensor:
        return _moved(images, i, j).reshape(-1)

    return draft.finished(draft.spread(at, torch.zeros(draft.x.numel())))


def patch(x: Tensor, content: Tensor, *, top: Range, left: Range) -> Manipulation:
    """A patch laid over the image, its first pixel at (top, left), where fractions are interpolated.

    Args:
        content: [h, w], or with the leading axes of x.

    Parameters: top, left.
    """
    draft = _Draft(x, {"top": top, "left": left})
    height, width = content.shape[-2:]
    images = draft.x.reshape(-1, *draft.size)
    mask, filled = torch.zeros(2, len(images), draft.size[0] + height, draft.size[1] + width, dtype=torch.float64)
    mask[:, :height, :width] = 1.0
    content = content.detach().double().cpu()
    filled[:, :height, :width] = content.expand(*x.shape[:-2], height, width).reshape(-1, height, width)

    def at(i: int, j: int) -> Tensor:
        over, new = (_moved(v, i, j)[:, : draft.size[0], : draft.size[1]] for v in (mask, filled))
        return (new - over * images).reshape(-1)

    return draft.finished(draft.spread(at, images.reshape(-1)))


def rotation(x: Tensor, *, degrees: Range, down: Range = (0.0, 0.0), right: Range = (0.0, 0.0)) -> Manipulation:
    """The image turned counterclockwise about its centre, then moved. Parameters: degrees, down, right."""
    draft = _Draft(x, {"degrees": degrees, "down": down, "right": right})
    (height, width), images = draft.size, draft.x.reshape(-1, *draft.size)
    cos, sin, angles = draft.circle(0, degrees)
    # Pixel (r, c) shows what was at R (r - down - middle, c - right - middle) + middle.
    row = (torch.arange(height).double() - (height - 1) / 2)[:, None].expand(height, width).reshape(-1)
    column = (torch.arange(width).double() - (width - 1) / 2).expand(height, width).reshape(-1)
    moved = [draft.times(t, i) for t in (cos, sin) for i in (1, 2)]
    sources = Concat(0)(cos, sin, *moved)  # cos, sin, cos down, cos right, sin down, sin right
    one, zero = torch.ones_like(row), torch.zeros_like(row)
    rows = torch.stack([row, column, -one, zero, zero, -one], 1)
    columns = torch.stack([column, -row, zero, -one, one, zero], 1)
    found = []
    for weight, size in ((rows, height), (columns, width)):
        low, high = _reach(weight, angles, down, right)
        middle = (size - 1) / 2
        pixel, source = _near(low + middle, high + middle, size)
        tents = TENT(draft.affine(sources, weight[pixel], middle - source))
        found.append((pixel, source, tents))
    (pixel, i, vertical), (other, j, horizontal) = found
    terms = []
    for image in images:
        # For every source row i of a pixel the sum over source columns, then the product with the weight of the row.
        row_of, column_of = (pixel[:, None] == other).nonzero(as_tuple=True)
        value = image[i[row_of], j[column_of]]
        row_of, column_of, value = (v[value != 0] for v in (row_of, column_of, value))
        kept, place = row_of.unique(return_inverse=True)
        if not len(kept):
            terms.append(draft.constant(torch.zeros(height * width)))
            continue
        scaled = multiply(Gather(0, tuple(column_of.tolist()))(horizontal), draft.constant(value))
        line = ScatterAdd(0, tuple(place.tolist()), len(kept))(scaled)
        product = multiply(Gather(0, tuple(kept.tolist()))(vertical), line)
        terms.append(ScatterAdd(0, tuple(pixel[kept].tolist()), height * width)(product))
    return draft.finished(Concat(0)(*terms))


def scratch(x: Tensor, *, degrees: Range, offset: Range, width: float = 1.0, brightness: float = 1.0) -> Manipulation:
    """A straight line across the image, brightest along its middle and gone at a distance of `width` pixels.

    Parameters: degrees, the line's direction, counterclockwise from the horizontal; offset, the distance of the line
    from the image's centre, in pixels, downwards for a horizontal one.
    """
    draft = _Draft(x, {"degrees": degrees, "offset": offset})
    (height, across), flat = draft.size, draft.x.reshape(-1)
    cos, sin, _ = draft.circle(0, degrees)
    row = (torch.arange(height).double() - (height - 1) / 2)[:, None].expand(height, across).reshape(-1)
    column = (torch.arange(across).double() - (across - 1) / 2).expand(height, across).reshape(-1)
    sources = Concat(0)(cos, sin, draft.parameter(1))
    weight = torch.stack([row, column, -torch.ones_like(row)], 1) / width
    line = TENT(draft.affine(sources, weight, torch.zeros_like(row)))
    count = len(flat) // len(row)
    spread = torch.eye(len(row), dtype=torch.float64).repeat(count, 1) * (brightness - flat)[:, None]
    return draft.finished(draft.affine(line, spread, flat))


class _Draft:
    """A network of named parameters under construction; its numbers are those of the image."""

    def __init__(self, x: Tensor, ranges: dict[str, Range]) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            raise InvalidInput("x must be a floating-point image [..., height, width].")
        for name, (low, high) in ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise InvalidInput(f"{name} is {(low, high)}; give a range (lowest, highest) of finite numbers.")
        self.original, self.ranges = x.detach(), ranges
        self.x = x.detach().double().cpu()
        self.size = (x.shape[-2], x.shape[-1])
        self.values: dict[Node, Tensor] = {}
        self.parameters = Input("parameters", (len(ranges),))()

    def constant(self, value: Tensor) -> Node:
        node = Constant(f"manipulation.{len(self.values)}", tuple(value.shape))()
        self.values[node] = value.double()
        return node

    def affine(self, v: Node, weight: Tensor, bias: Tensor) -> Node:
        return add(Dense()(v, self.constant(weight)), self.constant(bias))

    def parameter(self, i: int) -> Node:
        return Gather(0, (i,))(self.parameters)

    def times(self, v: Node, i: int) -> Node:
        """A single number times a parameter, which may be fixed."""
        low, high = list(self.ranges.values())[i]
        return multiply(v, self.parameter(i)) if low < high else scale(v, low)

    def circle(self, i: int, degrees: Range) -> tuple[Node, Node, tuple[Range, Range]]:
        """Cosine and sine of a parameter in degrees, and what ranges they have."""
        angle = self.affine(self.parameter(i), _f64([[math.pi / 180]]), torch.zeros(1))
        low, high = (math.radians(d) for d in degrees)
        return COS(angle), SIN(angle), (_cosines(low, high), _cosines(low - math.pi / 2, high - math.pi / 2))

    def spread(self, at: Callable[[int, int], Tensor], rest: Tensor) -> Node:
        """rest + the sum over whole positions of at(i, j), times the tents of the two parameters there."""
        (low, high), (left, right) = self.ranges.values()
        rows, columns = (range(math.floor(a), math.ceil(b) + 1) for a, b in ((low, high), (left, right)))
        weights = []
        for k, some in enumerate((rows, columns)):
            ones = torch.ones(len(some), 1)
            weights.append(TENT(self.affine(self.parameter(k), ones, -torch.tensor(list(some)).double())))
        pairs = [(a, b) for a in range(len(rows)) for b in range(len(columns))]
        first, second = (Gather(0, tuple(p[k] for p in pairs))(weights[k]) for k in (0, 1))
        placed = torch.stack([at(rows[a], columns[b]) for a, b in pairs], 1)
        return self.affine(multiply(first, second), placed, rest)

    def finished(self, image: Node) -> Manipulation:
        output = reshape(image, tuple(self.original.shape))
        network = Network((self.parameters,), (output,), self.values, name=" and ".join(self.ranges))
        ends = torch.tensor(list(self.ranges.values()), dtype=torch.float64)
        box = Box(ends[:, 0], ends[:, 1])
        return Manipulation(self.original, network.to(self.original.dtype), box, tuple(self.ranges))


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images [k, h, w] moved by whole pixels, zeros moving in."""
    result = torch.zeros_like(images)
    (h, w), (a, b) = images.shape[1:], (down, right)
    if abs(a) < h and abs(b) < w:
        result[:, max(a, 0) : h + min(a, 0), max(b, 0) : w + min(b, 0)] = images[
            :, max(-a, 0) : h + min(-a, 0), max(-b, 0) : w + min(-b, 0)
        ]
    return result


def _cosines(low: float, high: float) -> Range:
    """The range of the cosine on an interval."""
    ends = math.cos(low), math.cos(high)
    # It is 1 at even multiples of pi and -1 at odd ones.
    most = 1.0 if math.floor(high / (2 * math.pi)) > math.ceil(low / (2 * math.pi)) - 1 else max(ends)
    least = -1.0 if math.floor(high / (2 * math.pi) - 0.5) > math.ceil(low / (2 * math.pi) - 0.5) - 1 else min(ends)
    return least, most


def _reach(weight: Tensor, angles: tuple[Range, Range], down: Range, right: Range) -> tuple[Tensor, Tensor]:
    """Ranges of coordinates: weight [pixels, 6] times cos, sin, and the products of both with down and right."""
    products = [sorted(t * m for t in angle for m in move) for angle in angles for move in (down, right)]
    low = torch.tensor([angles[0][0], angles[1][0], *(p[0] for p in products)], dtype=torch.float64)
    high = torch.tensor([angles[0][1], angles[1][1], *(p[-1] for p in products)], dtype=torch.float64)
    up, under = weight.clamp(min=0), weight.clamp(max=0)
    return up @ low + under @ high - ROOM, up @ high + under @ low + ROOM


def _near(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(pixel, source) for every source 0 to size - 1 that lies less than 1 from the pixel's interval."""
    source = torch.arange(size)
    near = (source > low[:, None] - 1) & (source < high[:, None] + 1)
    pixel, at = near.nonzero(as_tuple=True)
    return pixel, at


def _f64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)

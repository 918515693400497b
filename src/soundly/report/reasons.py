"""The report on a sufficient reason: what is kept is outlined, and beside it what happens without it.

Pictures are drawn where the input is one: [1, C, H, W] with one or three channels, [1, H, W], or a flat square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soundly.errors import InvalidInput
from soundly.report.figures import Legend, Picture, heat_limits, heat_overlay
from soundly.report.html import Cell, Certificate, Report, Row, Section, Verdict

OUTLINE = np.array([1.0, 0.42, 0.0])
SIDE = 280


def picture(x: ArrayLike, shape: Sequence[int]) -> NDArray[np.float64] | None:
    """The input as an image [h, w, 3] in [0, 1], of its own range if that is another one; None where it is none."""
    values = np.asarray(x, dtype=np.float64).reshape(-1)
    sizes = list(shape[1:]) if len(shape) > 1 and shape[0] == 1 else list(shape)
    if len(sizes) == 1 and math.isqrt(sizes[0]) ** 2 == sizes[0] and sizes[0] >= 16:
        sizes = [1, math.isqrt(sizes[0]), math.isqrt(sizes[0])]
    if len(sizes) == 2:
        sizes = [1, *sizes]
    if len(sizes) != 3 or sizes[0] not in (1, 3):
        return None
    image = values.reshape(sizes).transpose(1, 2, 0)
    if image.min() < 0 or image.max() > 1:
        image = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
    return np.broadcast_to(image, (*sizes[1:], 3)).copy()


def outlined(image: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The image enlarged, what the mask [h, w] does not keep dimmed, and a line around what it does."""
    factor = max(1, SIDE // max(image.shape[:2]))
    large = _enlarged(image, factor)
    kept = mask.repeat(factor, 0).repeat(factor, 1)
    inner = np.pad(kept, 1)
    inside = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    large = np.where(kept[:, :, None], large, 0.5 * large + 0.2)
    return np.where((kept & ~inside)[:, :, None], OUTLINE, large)


def reason_report(
    *,
    title: str,
    statement: str,
    verdict: Verdict,
    shape: Sequence[int],
    x: ArrayLike,
    mask: ArrayLike,
    label: str,
    facts: Sequence[tuple[str, Cell]] = (),
    witness: tuple[ArrayLike, str] | None = None,
    maps: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    certificate: Certificate | None = None,
) -> Report:
    """The page about one reason.

    Args:
        shape: of the network's input.
        x, mask: the input, and which of its entries are kept.
        label: what the network answers at x.
        witness: an input that keeps nothing, or less, and what the network answers there.
        maps: lower bounds, values at x and upper bounds of an attribution [h, w].
    """
    image = picture(x, shape)
    sections = []
    if image is not None:
        entries = np.asarray(mask, dtype=bool).reshape(-1)
        where = np.asarray(entries.reshape(-1, *image.shape[:2]).any(0))
        factor = max(1, SIDE // max(image.shape[:2]))
        pictures = [
            Picture(_enlarged(image, factor), f"The input: {label}"),
            Picture(outlined(image, where), f"Kept: {int(where.sum())} of {where.size} pixels",
                    "Whatever the others do, the answer stays."),
        ]  # fmt: skip
        if witness is not None:
            changed = picture(witness[0], shape)
            assert changed is not None
            pictures.append(Picture(_enlarged(changed, factor), f"Without them: {witness[1]}", "A counterexample."))
        sections.append(Section("The reason", rows=[Row("What is kept, and what happens without it", pictures)]))
        if maps is not None:
            low, value, high = (np.asarray(m, dtype=np.float64) for m in maps)
            if low.ndim != 2:
                raise InvalidInput(f"maps must have the shape [h, w], not {list(low.shape)}")
            limits = heat_limits([low, value, high], "diverging")
            named = ((low, "At least"), (value, "At the input"), (high, "At most"))
            shown = [
                Picture(heat_overlay(_enlarged(image, factor), m, colormap="diverging", limits=limits), name)
                for m, name in named
            ]
            legend = Legend("diverging", limits, "Contribution to the answer")
            text = "Between the first map and the last lies the map of every input in the region."
            sections.append(Section("The attribution, bounded", text, [Row("Lower and upper maps", shown)], legend))
    return Report(title, verdict, statement, facts, sections, certificate)


def _enlarged(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    return image.repeat(factor, 0).repeat(factor, 1)

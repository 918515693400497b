"""Pictures for a report: photographs, heat maps over photographs, and the legend that gives a heat map its scale.

A heat map is laid over the *grey* photograph, so that every colour in it means a value. Maps that are compared must
share one scale: take it once with `heat_limits` and hand it to every overlay and to the legend.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import zoom

from soundly.errors import InvalidInput

Colormap = Literal["viridis", "diverging"]
"""viridis for maps that are all of one sign, diverging (blue, grey at zero, red) for signed ones."""

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709


@dataclass(frozen=True, eq=False)
class Picture:
    """An image [h, w, 3], uint8 or float in [0, 1], its caption and an optional second line.

    alt is read out where the image cannot be seen; the caption stands in for it if it is empty.
    """

    array: NDArray[np.uint8] | NDArray[np.floating]
    caption: str
    note: str = ""
    alt: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", _pixels(self.array, f"picture {self.caption!r}"))

    @property
    def source(self) -> str:
        """The image as a data URI."""
        return _data_uri(np.asarray(self.array))


@dataclass(frozen=True)
class Legend:
    """The colour scale of a section's heat maps, from limits[0] on the left to limits[1] on the right."""

    colormap: Colormap
    limits: tuple[float, float]
    caption: str

    @property
    def source(self) -> str:
        """The scale as a strip, one data URI."""
        return _data_uri(_pixels(_colours(np.linspace(0, 1, 256)[None, :].repeat(8, axis=0), self.colormap), "legend"))

    @property
    def ticks(self) -> tuple[str, str, str]:
        """The values at the left end, in the middle and at the right end."""
        low, high = self.limits
        middle = (low + high) / 2
        # A middle that is zero but for rounding is zero.
        return f"{low:.3g}", f"{0.0 if abs(middle) < 1e-9 * abs(high - low) else middle:.3g}", f"{high:.3g}"


def heat_limits(maps: Sequence[ArrayLike], colormap: Colormap = "viridis") -> tuple[float, float]:
    """One scale for several maps: their smallest and largest value; if diverging, -m to m for the largest size m."""
    if not maps:
        raise InvalidInput("heat_limits needs at least one map")
    values = np.concatenate([_finite(one, "map").ravel() for one in maps])
    if colormap == "diverging":
        largest = float(np.abs(values).max())
        return -largest, largest
    return float(values.min()), float(values.max())


def heat_overlay(
    image: ArrayLike,
    map: ArrayLike,
    *,
    colormap: Colormap = "viridis",
    limits: tuple[float, float] | None = None,
    strength: float = 0.7,
) -> NDArray[np.uint8]:
    """Lay a coarse map [h, w] over an image [H, W, 3]; the result is uint8 [H, W, 3].

    The map is enlarged bilinearly, cell centres kept in place, coloured, and mixed with the grey image: `strength` of
    colour to 1 - strength of grey. Values outside `limits` (by default the map's own, see `heat_limits`) take the end
    colours.

    Raises: InvalidInput for a map or image that is not finite or of the wrong shape; ImportError without matplotlib.
    """
    pixels = _pixels(image, "heat_overlay's image")
    values = _finite(map, "heat_overlay's map")
    if values.ndim != 2 or 0 in values.shape:
        raise InvalidInput(f"heat_overlay's map must have the shape [h, w], not {list(values.shape)}")
    if not 0 <= strength <= 1:
        raise InvalidInput(f"strength is a share between 0 and 1, not {strength}")
    low, high = limits or heat_limits([values], colormap)
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise InvalidInput(f"limits must be finite and in order, not {limits}")
    height, width = pixels.shape[:2]
    factors = (height / values.shape[0], width / values.shape[1])
    large = zoom(values, factors, order=1, mode="nearest", grid_mode=True)
    scaled = np.full_like(large, 0.5) if low == high else np.clip((large - low) / (high - low), 0, 1)
    grey = (pixels @ LUMINANCE / 255)[:, :, None]
    mixed = strength * _colours(scaled, colormap) + (1 - strength) * grey
    return _pixels(np.clip(mixed, 0, 1), "heat_overlay's result")


def optional(module: str) -> ModuleType:
    """Import a package that only reports need, or say how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        raise ImportError(f'reports need {missing.name}: pip install "soundly[report]"') from missing


def _pixels(array: ArrayLike, what: str) -> NDArray[np.uint8]:
    """A copy of the image as uint8 [h, w, 3]."""
    pixels = np.asarray(array)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InvalidInput(f"{what} must have the shape [h, w, 3], not {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return pixels.copy()
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InvalidInput(f"{what} must be uint8 or floating point, not {pixels.dtype}")
    if not ((pixels >= 0) & (pixels <= 1)).all():  # false for NaN, too
        raise InvalidInput(f"{what} has values outside [0, 1]; scale it first")
    return np.round(pixels * 255.0).astype(np.uint8)


def _finite(array: ArrayLike, what: str) -> NDArray[np.float64]:
    values = np.asarray(array, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidInput(f"{what} has values that are not finite")
    return values


def _colours(scaled: NDArray[np.float64], colormap: Colormap) -> NDArray[np.float64]:
    """Values in [0, 1] [h, w] -> RGB in [0, 1] [h, w, 3]."""
    if colormap not in get_args(Colormap):
        raise InvalidInput(f"colormap must be one of {', '.join(get_args(Colormap))}, not {colormap!r}")
    table = optional("matplotlib").colormaps["coolwarm" if colormap == "diverging" else colormap]
    return np.asarray(table(scaled), dtype=np.float64)[:, :, :3]


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    optional("matplotlib.image").imsave(buffer, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode("ascii")

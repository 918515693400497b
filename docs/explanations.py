"""Draws the picture of explanations.md from what its examples find: python docs/explanations.py"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PAGE = Path(__file__).with_name("explanations.md")


def found() -> dict[str, Any]:
    """The names that the examples of the page leave behind."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def draw(names: dict[str, Any]) -> Figure:
    """The digit with what the attribution keeps, a counterexample to that, and what a proven reason keeps."""
    x, label, witness = names["x"], names["label"], names["verdict"].witness
    other = int(names["net"](witness.float()).argmax())
    panels = (
        (f"a {label}; kept: the 12 largest\nof Integrated Gradients", x, names["mask"]),
        (f"the same 12 kept,\nbut now a {other}: refuted", witness, names["mask"]),
        (f"kept: a reason of {names['why'].size},\nproved", x, names["why"].mask),
    )
    figure = Figure(figsize=(6.6, 2.7), layout="constrained")
    for axes, (title, image, mask) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(np.asarray(image).reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        for row, column in np.argwhere(np.asarray(mask).reshape(8, 8)):
            corner = (column - 0.44, row - 0.44)
            axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="tab:red", linewidth=1.3))
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


if __name__ == "__main__":
    draw(found()).savefig(PAGE.with_suffix(".png"), dpi=90, metadata={"Software": None})

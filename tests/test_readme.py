"""The README's examples run as they stand, with nothing but the names they use."""

import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from soundly.certificate import check

ROOT = Path(__file__).resolve().parent.parent


def test_the_examples_of_the_readme(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    stages = [
        (f"layer{i}", nn.Sequential(nn.Conv2d(c, 32, 3, 2, 1), nn.ReLU())) for i, c in enumerate([3, 32, 32, 32], 1)
    ]
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(32, 5))]
    model = nn.Sequential(OrderedDict([*stages, *head]))
    clean_image = torch.rand(1, 3, 48, 48)
    noisy_image = (clean_image + 0.1 * torch.randn_like(clean_image)).clamp(0, 1)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {"model": model, "example": clean_image, "clean_image": clean_image, "noisy_image": noisy_image}
    monkeypatch.chdir(tmp_path)
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    edit = names["edit"]
    assert edit.status == "proved" and check(tmp_path / "edit.cert").accepted  # type: ignore[attr-defined]
    assert int(edit.model(noisy_image).argmax()) == 3  # type: ignore[attr-defined]
    assert check(tmp_path / "robust.cert").accepted

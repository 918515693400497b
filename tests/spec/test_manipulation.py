"""Manipulations against scipy and plain loops at random parameters, and faults that these must show."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import soundly
from soundly import Grid, Proved, Refuted
from soundly.errors import InvalidInput
from soundly.spec import manipulation
from soundly.spec.manipulation import Manipulation, lighting, patch, rotation, scratch, translation

F64 = torch.float64
RANGES = [(-10.0, 10.0), (30.0, 100.0), (-200.0, 170.0), (5.0, 5.0), (170.0, 185.0)]


def image(*lead: int) -> Tensor:
    x = torch.rand(*lead, 6, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    return torch.where(x < 0.4, 0.0, x)


def distance(made: Manipulation, reference) -> float:
    """How far the network is from the reference at random parameters and corners."""
    points = torch.cat([made.box.samples(25), made.box.corners(16)])
    images = [(made.image(p), torch.as_tensor(reference(made.x.numpy(), *p.tolist()))) for p in points]
    assert all(a.shape == b.shape == made.x.shape for a, b in images)
    return max(float((a - b).abs().max()) for a, b in images)


def channels(single):
    """The same of each channel."""

    def each(x: np.ndarray, *parameters: float) -> np.ndarray:
        flat = [single(image, *parameters) for image in x.reshape(-1, *x.shape[-2:])]
        return np.stack(flat).reshape(x.shape)

    return each


@channels
def moved(x: np.ndarray, down: float, right: float) -> np.ndarray:
    return ndimage.shift(x, (down, right), order=1, mode="grid-constant")


@channels
def turned(x: np.ndarray, degrees: float, down: float, right: float) -> np.ndarray:
    t = math.radians(degrees)
    back = np.array([[math.cos(t), math.sin(t)], [-math.sin(t), math.cos(t)]])
    middle = (np.array(x.shape) - 1) / 2
    return ndimage.affine_transform(
        x, back, offset=middle - back @ (middle + np.array([down, right])), order=1, mode="grid-constant"
    )


def test_the_direction_of_a_rotation_is_counterclockwise():
    x = image()
    quarter = rotation(torch.rand(5, 5, dtype=F64), degrees=(90.0, 90.0))
    assert np.allclose(quarter.image(torch.tensor([90.0, 0.0, 0.0], dtype=F64)), np.rot90(quarter.x), atol=1e-9)
    assert np.allclose(
        turned(x.numpy(), 20.0, 0, 0), ndimage.rotate(x, 20, reshape=False, order=1, mode="grid-constant")
    )


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_translations_are_scipys(lead):
    assert distance(translation(image(*lead), down=(-2.3, 1.5), right=(-0.7, 9.0)), moved) < 1e-12
    assert distance(translation(image(*lead)), moved) < 1e-12


@pytest.mark.parametrize("degrees", RANGES)
def test_rotations_are_scipys(degrees):
    assert distance(rotation(image(), degrees=degrees, down=(-1, 0.5), right=(-0.3, 0.2)), turned) < 1e-9
    assert distance(rotation(image(2), degrees=degrees), turned) < 1e-9
    single = rotation(image().float(), degrees=degrees)
    assert single.image.dtype == torch.float32
    wide = Manipulation(single.x.double(), single.image.to(F64), single.box, single.names)
    assert distance(wide, turned) < 1e-5


def test_lighting_is_its_formula():
    def lit(x: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
        return np.clip(x.mean() + contrast * (x - x.mean()) + brightness, 0.1, 0.9)

    made = lighting(image(2), brightness=(-0.4, 0.2), contrast=(0.5, 2.0), limits=(0.1, 0.9))
    assert distance(made, lit) < 1e-12
    assert (
        distance(lighting(image(), contrast=(0.5, 2.0), limits=None), lambda x, b, c: x + (c - 1) * (x - x.mean()))
        < 1e-12
    )


def test_a_patch_is_its_content_interpolated_over_the_image():
    content = image(2)[:, :3, :2] + 1

    def patched(x: np.ndarray, top: float, left: float) -> np.ndarray:
        over, new = np.zeros((2, 2, 20, 20))
        over[:, 5:8, 5:7], new[:, 5:8, 5:7] = 1, content
        over, new = (moved(v, top, left)[:, 5:11, 5:13] for v in (over, new))
        return x * (1 - over) + new

    assert distance(patch(image(2), content, top=(-2.5, 5.5), left=(0.3, 6.9)), patched) < 1e-12
    whole = patch(image(), torch.ones(2, 2), top=(0, 4), left=(0, 6))
    x = whole.image(torch.tensor([3.0, 2.0], dtype=F64))
    expected = image()
    expected[3:5, 2:4] = 1
    assert torch.allclose(x, expected)


def test_a_scratch_is_a_line_of_tents():
    def scratched(x: np.ndarray, degrees: float, offset: float) -> np.ndarray:
        t, y = math.radians(degrees), np.array(x)
        for r in range(6):
            for c in range(8):
                away = abs((r - 2.5) * math.cos(t) + (c - 3.5) * math.sin(t) - offset)
                share = max(0.0, 1 - away / 1.5)
                y[..., r, c] += share * (0.8 - y[..., r, c])
        return y

    assert distance(scratch(image(2), degrees=(-90, 120), offset=(-3, 2), width=1.5, brightness=0.8), scratched) < 1e-12


@pytest.mark.parametrize("fault", ["a narrow tent", "pixels out of reach", "a short range of cosines", "rows moved"])
def test_faults_show(fault, monkeypatch):
    from soundly.graph.elementwise import Elementwise
    from soundly.graph.ring import polynomial

    match fault:
        case "a narrow tent":
            pieces = ((), polynomial({(0,): 1, (1,): 1}), polynomial({(0,): 1, (1,): -1}), ())
            monkeypatch.setattr(manipulation, "TENT", Elementwise("tent", pieces, breaks=(-0.9, 0.0, 1.0)))
        case "pixels out of reach":
            near = manipulation._near
            monkeypatch.setattr(manipulation, "_near", lambda low, high, n: near(low + 0.4, high - 0.4, n))
        case "a short range of cosines":
            monkeypatch.setattr(manipulation, "_cosines", lambda a, b: tuple(sorted((math.cos(a), math.cos(b)))))
        case _:
            shifted = manipulation._moved
            monkeypatch.setattr(manipulation, "_moved", lambda x, i, j: shifted(x, i, -j))
    # Ranges around 0, where the cosine has its maximum inside.
    apart = [distance(translation(image(), down=(-1, 1), right=(0, 2)), moved)]
    apart += [distance(rotation(image(), degrees=d), turned) for d in ((-10.0, 10.0), (-90.0, 90.0))]
    assert max(apart) > 1e-3


@cache
def digits() -> tuple[nn.Sequential, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images / 16).float(), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(0), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        some = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model[1:](x[some].flatten(1)), y[some]).backward()
        optimizer.step()
    return model.requires_grad_(False), x, y


def test_verdicts_about_digits_agree_with_scipys_images():
    """Proved: none of many images of scipy's is taken for another digit. Refuted: scipy's image at the witness is."""
    model, x, y = digits()
    net, found = soundly.load(model, x[0]), set()
    for k in range(3):
        for made, reference in (
            (rotation(x[k], degrees=(-8, 8)), turned),
            (translation(x[k], down=(-0.6, 0.6), right=(-0.4, 0.4)), moved),
            (rotation(x[k], degrees=(-15, 15), down=(0.5, 0.5)), turned),
        ):
            label = int(y[k])
            verdict = soundly.verify(made.robust(net, label=label), timeout=20)
            found.add(type(verdict))
            points = made.box.samples(300)
            if isinstance(verdict, Refuted):
                points = verdict.witness[None]
            images = np.stack([reference(x[k].double().numpy(), *p.tolist()) for p in points])
            scores = model[1:].double()(torch.tensor(images).flatten(1))
            model.float()
            others = torch.cat([scores[:, :label], scores[:, label + 1 :]], 1).amax(1)
            margin = scores[:, label] - others
            assert bool((margin > 0).all()) if isinstance(verdict, Proved) else float(margin) < 1e-5
    assert found == {Proved, Refuted}


def test_whole_pixels_are_a_grid():
    model, x, _ = digits()
    net, made = soundly.load(model, x[0]), patch(x[0], torch.zeros(1, 1), top=(0, 7), left=(0, 7))
    verdict = soundly.verify(made.robust(net, region=Grid.evenly(made.box, 8)))
    answers = []
    for r in range(8):
        for c in range(8):
            z = x[0].clone()
            z[r, c] = 0
            answers.append(int(model(z).argmax()) == int(model(x[0]).argmax()))
    assert isinstance(verdict, Proved if all(answers) else Refuted)


def test_what_makes_no_sense_is_refused():
    model, x, _ = digits()
    made = translation(x[0], down=(-1, 1))
    with pytest.raises(InvalidInput, match="ranges"):
        made.robust(soundly.load(model, x[0]), region=soundly.Box(made.box.lower, made.box.upper + 1))
    with pytest.raises(InvalidInput, match="range"):
        rotation(x[0], degrees=(1.0, -1.0))
    with pytest.raises(InvalidInput, match="image"):
        translation(x[0, 0])
    with pytest.raises(InvalidInput, match="takes"):
        made.before(soundly.load(nn.Linear(3, 2), torch.zeros(3)))

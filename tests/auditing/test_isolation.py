"""Isolation: what is proved cannot be moved, what leaks is shown by a pair, and a lost rule is noticed."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import soundly
from soundly.auditing import dependence as labelling
from soundly.auditing.dependence import Marks, dependence
from soundly.auditing.generation import recipe
from soundly.auditing.isolation import Dependent, Independent, Undecided, causal, independent, isolated
from soundly.cli import main
from soundly.errors import CaptureMismatch, InvalidInput, MissingRule, UnsupportedOp
from soundly.graph.composite import MaxPool, Softmax
from soundly.graph.network import Network
from soundly.graph.node import Composite, Constant, Input, Shape

F64 = torch.float64


class Quantised(nn.Module):
    """A dense network whose values are rounded to 8 bits, with scales from the data: of the whole tensor or per row."""

    def __init__(self, per: str) -> None:
        super().__init__()
        self.per, self.first, self.second = per, nn.Linear(6, 8), nn.Linear(8, 3)

    def rounded(self, x: Tensor) -> Tensor:
        greatest = x.abs().amax() if self.per == "tensor" else x.abs().amax(1, keepdim=True)
        unit = (greatest + 1e-6) / 127
        return torch.round(x / unit) * unit

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.rounded(torch.relu(self.first(self.rounded(x)))))


class Rerouted(nn.Module):
    """Item 0 gets item 1's answer: always, or where an early sum of item 0 lies in a narrow interval."""

    def __init__(self, width: float | None = None, *, write: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.width, self.rows = width, [0, 0, 2, 3] if write else [1, 1, 2, 3]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        y = self.second(h)
        stolen = y.index_select(0, torch.tensor(self.rows))
        if self.width is None:
            return stolen
        early = h[0].sum()
        return torch.where((early > 7.3) & (early < 7.3 + self.width), stolen, y)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - x.mean(0))


class Attending(nn.Module):
    """Attention within each item, or across the batch."""

    def __init__(self, *, across: bool, is_causal: bool = False) -> None:
        super().__init__()
        self.across, self.is_causal = across, is_causal
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.across else x
        y = F.scaled_dot_product_attention(self.query(x), self.key(x), x, is_causal=self.is_causal)
        return y.transpose(0, 1) if self.across else y


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(1)


ISOLATED = {
    "per-row int8": (lambda: Quantised("row"), (4, 6)),
    "attention per item": (lambda: Attending(across=False), (3, 5, 4)),
    "batch norm of running statistics": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (4, 6)),
    "convolutions": (Convolved, (3, 1, 8, 8)),
}
LEAKING = {
    "per-tensor int8": (lambda: Quantised("tensor"), (4, 6)),
    "attention across the batch": (lambda: Attending(across=True), (3, 5, 4)),
    "batch norm of the batch": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (4, 6)),
    "centred by the batch": (Centred, (4, 6)),
    "read": (Rerouted, (4, 6)),
    "read at a trigger": (lambda: Rerouted(0.01), (4, 6)),
    "written at a narrow trigger": (lambda: Rerouted(1e-4, write=True), (4, 6)),
}


def made(kind: tuple[Any, tuple[int, ...]]) -> tuple[nn.Module, Network]:
    torch.manual_seed(0)
    build, shape = kind
    module = build().eval()
    return module, soundly.load(module, torch.randn(shape))


@pytest.mark.parametrize("name", ISOLATED)
def test_items_that_are_computed_apart_are_proved(name: str) -> None:
    module, network = made(ISOLATED[name])
    verdict = isolated(network, model=module)
    assert isinstance(verdict, Independent) and verdict.operations > 0


@pytest.mark.parametrize("name", LEAKING)
def test_items_that_see_each_other_are_refuted_by_a_pair(name: str) -> None:
    """Here the pair is run once more: equal in all but one item, and another item's answer changes."""
    module, network = made(LEAKING[name])
    verdict = isolated(network, model=module)
    assert isinstance(verdict, Dependent) and verdict.replayed == "module" and verdict.where
    (first,), (second,) = verdict.first, verdict.second
    changed = (first != second).flatten(1).any(1)
    item = int(verdict.leak.removeprefix("item "))
    assert changed.tolist() == [b == item for b in range(len(first))] and verdict.entry[0] != item
    with torch.no_grad():
        a, b = module(first.float()), module(second.float())
    assert (float(a[verdict.entry]), float(b[verdict.entry])) == verdict.values
    assert abs(verdict.values[0] - verdict.values[1]) > 1e-4


def test_where_labels_meet_is_named() -> None:
    module, network = made(LEAKING["centred by the batch"])
    verdict = isolated(network, model=module)
    assert isinstance(verdict, Dependent) and verdict.where[0].startswith("Sum at mean (test_isolation.py:")


class Cancelling(nn.Module):
    """Reads its neighbour and takes it off again, in a way that the graph does not show."""

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(0)
        return x + (other + 1) * (other - 1) - other**2


def test_a_path_that_carries_nothing_is_neither() -> None:
    module = Cancelling()
    verdict = isolated(soundly.load(module, torch.randn(2, 3)), model=module)
    assert isinstance(verdict, Undecided) and verdict.leaks == ("item 0", "item 1") and verdict.where


def test_files_are_replayed_by_onnxruntime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    soundly.to_onnx(made(LEAKING["per-tensor int8"])[1], path)
    assert main(["audit", "isolation", str(path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("refuted") and "onnxruntime" in said and "MaxPool" in said
    assert main(["audit", "isolation", str(path), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "refuted" and facts["first"] != facts["second"] and len(set(facts["values"])) == 2
    soundly.to_onnx(made(ISOLATED["per-row int8"])[1], path)
    assert main(["audit", "isolation", str(path)]) == 0 and capsys.readouterr().out.startswith("proved")
    soundly.to_onnx(soundly.load(Cancelling(), torch.randn(2, 3)), path)
    assert main(["audit", "isolation", str(path)]) == 3 and "no pair" in capsys.readouterr().out
    soundly.to_onnx(soundly.load(nn.Linear(3, 2), torch.randn(1, 3)), path)
    assert main(["audit", "isolation", str(path)]) == 2  # its only item cannot meet another


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dynamic_quantiser_of_onnxruntime_leaks(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    torch.manual_seed(0)
    plain, small = tmp_path / "plain.onnx", tmp_path / "small.onnx"
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    soundly.to_onnx(soundly.load(module, torch.randn(4, 6)), plain)
    quantize_dynamic(plain, small)
    assert isinstance(isolated(soundly.load(plain), model=plain), Independent)
    verdict = isolated(soundly.load(small), model=small)
    assert isinstance(verdict, Dependent) and verdict.replayed == "onnxruntime"
    assert "DynamicQuantizeLinear" in verdict.where[0]


# -- other walls


def test_a_causal_mask_is_a_wall_and_without_it_there_is_none() -> None:
    for is_causal, expected in ((True, Independent), (False, Dependent)):
        module = Attending(across=False, is_causal=is_causal)
        network = soundly.load(module, torch.randn(1, 6, 4))
        assert isinstance(causal(network, model=module), expected)


def test_a_feature_without_weights_is_ignored_and_one_with_a_tiny_weight_is_not() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    protected = torch.tensor([[False, False, True, False, False]])
    with torch.no_grad():
        module[0].weight[:, 2] = 0
    assert isinstance(independent(soundly.load(module, torch.randn(1, 5)), protected, model=module), Independent)
    with torch.no_grad():
        module[0].weight[3, 2] = 1e-3
        module[2].weight[1, 3] = 0
    network = soundly.load(module, torch.randn(1, 5))
    assert isinstance(independent(network, protected, model=module), Dependent)
    second = torch.tensor([[False, True]])  # the one neuron that sees the feature does not reach this output
    assert isinstance(independent(network, protected, outputs=second, model=module), Independent)


def test_questions_that_do_not_fit_are_refused() -> None:
    network = soundly.load(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(InvalidInput, match="batch of two or more"):
        isolated(network)
    with pytest.raises(InvalidInput, match="of: give bool"):
        independent(network, torch.ones(1, 3))
    with pytest.raises(InvalidInput, match="same length"):
        causal(network)
    with pytest.raises(InvalidInput, match="labels"):
        dependence(network, [torch.ones(1, 2, dtype=torch.bool)])


def test_a_model_that_denies_the_proof_is_believed() -> None:
    _, network = made(ISOLATED["per-row int8"])
    with pytest.raises(CaptureMismatch, match="item 0"):
        isolated(network, model=made(LEAKING["per-tensor int8"])[0])


def test_an_operation_without_a_rule_proves_nothing() -> None:
    @dataclass(frozen=True)
    class Odd(Composite):
        def shape(self, *shapes: Shape) -> Shape:
            return shapes[0]

    x = Input("x", (2, 3))()
    with pytest.raises(MissingRule, match="Odd"):
        isolated(Network((x,), (Odd()(x),), {}))


# -- the rules


def _labelled(seeds: range) -> Iterator[tuple[int, list[Tensor], Network, Any]]:
    """Random computations with a random label, of half of their inputs' entries or of one."""
    for seed in seeds:
        made = recipe(seed)
        try:
            network, _ = made.graph()
        except UnsupportedOp:
            continue
        generator = torch.Generator().manual_seed(seed)
        sizes = [v.shape for v in made.box[0]]
        if seed % 2:
            labels = [torch.rand(s, generator=generator) < 0.5 for s in sizes]
        else:
            labels = [torch.zeros(s, dtype=torch.bool) for s in sizes]
            labels[0].reshape(-1)[random.Random(seed).randrange(labels[0].numel())] = True
        yield seed, labels, network, made


def _moved(seeds: range) -> Iterator[int]:
    """The seeds whose outputs move, in torch itself, where no label goes."""
    for seed, labels, network, made in _labelled(seeds):
        (reached,) = dependence(network, [mask[None] for mask in labels])
        generator = torch.Generator().manual_seed(seed)
        low, high = made.box
        for _ in range(3):
            x = [a + torch.rand(a.shape, generator=generator) * (b - a) for a, b in zip(low, high, strict=True)]
            noise = [torch.randn(a.shape, generator=generator) for a in low]
            other = [torch.where(m, v + n, v) for m, v, n in zip(labels, x, noise, strict=True)]
            a, b = made.run(x)[-1], made.run(other)[-1]
            fine = torch.isfinite(a) & torch.isfinite(b)
            moved = ((a - b).abs() > 1e-9 * (1 + a.abs() + b.abs())) & fine
            if bool((moved & ~reached[0]).any()):
                yield seed
                break


SEEDS = range(120)


def test_outputs_that_no_label_reaches_do_not_move() -> None:
    assert list(_moved(SEEDS)) == []
    unreached = [not bool(dependence(n, [m[None] for m in labels])[0].all()) for _, labels, n, _ in _labelled(SEEDS)]
    assert sum(unreached) > len(unreached) / 5  # otherwise there is nothing to be wrong about


def _first_alone(rule: Any) -> Any:
    def broken(self: Any, op: Any, node: Any, *x: Marks) -> Marks:
        return rule(self, op, node, x[0], *(Marks(None, v.support) for v in x[1:]))

    return broken


def _nothing_at_all(rule: Any) -> Any:
    def broken(self: Any, op: Any, *x: Any) -> Marks | None:
        found = rule(self, op, *x)
        return None if found is None else Marks(None, found.support)

    return broken


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("linear", _first_alone),
        ("product", _first_alone),
        ("elementwise", _nothing_at_all),
        ("composite", _nothing_at_all),
    ],
)
def test_a_lost_rule_is_noticed(kind: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = labelling._Labels
    monkeypatch.setattr(domain, kind, wrong(getattr(domain, kind)))
    assert next(_moved(SEEDS), None) is not None


def test_supports_that_forget_what_functions_do_to_zero_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(0 * x) is not zero: y * exp(0 * x) depends on y."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.exp(F.linear(x, self.weight))

    network = soundly.load(Gated(), torch.randn(1, 2))
    label = torch.tensor([[[True, False]]])
    assert dependence(network, [label])[0].tolist() == [[[True, False]]]
    monkeypatch.setattr(labelling._Labels, "elementwise", lambda self, op, x: x)
    assert not dependence(network, [label])[0].any()


@pytest.mark.parametrize("name", [*ISOLATED, *LEAKING])
def test_every_slope_has_a_label(name: str) -> None:
    """The Jacobian, by autograd, is zero wherever no label goes; per entry, not per item."""
    module, network = made((ISOLATED | LEAKING)[name])
    n = math.prod(network.input.shape)
    labels = torch.eye(n, dtype=torch.bool).reshape(n, *network.input.shape)
    (reached,) = dependence(network, [labels])
    module = module.double()
    slopes = torch.zeros(n, *network.output.shape, dtype=F64)
    for _ in range(2):
        x = torch.randn(network.input.shape, dtype=F64)
        slope = torch.autograd.functional.jacobian(module, x)
        assert isinstance(slope, Tensor)
        slopes += slope.reshape(*network.output.shape, n).movedim(-1, 0).abs()
    assert not bool((slopes > 0)[~reached].any())
    if name in ("attention per item", "convolutions"):
        assert float((slopes > 0).double().sum() / reached.double().sum()) > 0.4  # and few labels are idle


def test_padding_and_masks_carry_nothing() -> None:
    x = torch.eye(4, dtype=torch.bool).reshape(4, 1, 1, 4)
    pooled = MaxPool((3,), (3,), (1,), (1,)).reach(x[:, 0].double())
    assert pooled is not None and pooled[:, 0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    node = Input("x", (1, 3))()
    mask = Constant("mask", (1, 3))()
    network = Network((node,), (Softmax(1)(node, mask),), {mask: torch.tensor([[1.0, 0.0, 1.0]])})
    labels = torch.eye(3, dtype=torch.bool)[:, None]
    assert dependence(network, [labels])[0][:, 0].int().tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]

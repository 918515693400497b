"""Maps against captum, the floor under the two-class discrepancy, losses that do what their names say."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import Tensor

import soundly
from soundly.errors import InvalidInput
from soundly.training.data import read
from soundly.training.fit import fit
from soundly.training.interpretable import Adversarial, Int, Plain, discrepancy, floor, method, two_class
from soundly.training.maps import Cam, ConvNet, Explained, GradCam, IntegratedGradients, cnn
from soundly.training.stability import accuracy, kendall, stability

NAMES = ("normal", "pgd", "trades", "ig-norm", "ig-norm-sum", "int", "int-one-class", "int2", "int-adv", "int2-adv")


def net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return cnn((1, 8, 8), 4, (4, 6, 5)).double()


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- maps


def test_class_activation_maps_are_complete():
    model, x = net(), images()
    found = Cam()(model, x)
    assert found.maps.shape == (6, 4, 16)
    torch.testing.assert_close(found.logits, model(x))
    torch.testing.assert_close(found.maps.sum(-1), model(x))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_a_place_of_the_map_sees_the_image(shape):
    """One in the middle: most columns move it, and without a kernel of the image's size few would."""
    torch.manual_seed(0)
    x = torch.rand(1, *shape, requires_grad=True)
    maps = cnn(shape, 10, (4, 4, 4)).features(x)
    assert maps.shape == (1, 4, 4, 4)
    (slope,) = torch.autograd.grad(maps[..., 2, 2].sum(), x)
    assert (slope != 0).any(2).any(1).sum() >= 0.85 * shape[2]


def test_gradcam_is_captum_and_here_cam():
    from captum.attr import LayerGradCam

    model, x = net(), images()
    found = GradCam()(model, x)
    torch.testing.assert_close(found.maps, Cam()(model, x).maps)
    captum = LayerGradCam(model, model.features)
    for c in range(4):
        want = captum.attribute(x, target=c)[:, 0].flatten(1)
        torch.testing.assert_close(found.maps[:, c], want.detach())


def test_gradcam_is_the_explanation_that_the_verifier_reads():
    model, x = net(), images(1)
    network = soundly.gradcam(soundly.load(model, x), of=2, layer="features")
    torch.testing.assert_close(GradCam()(model, x).maps[0, 2].detach(), network(x).flatten().detach())


def test_integrated_gradients_are_captums():
    from captum.attr import IntegratedGradients as Captum

    model, x = net(), images()
    found = IntegratedGradients(points=7)(model, x)
    captum = Captum(model)
    for c in range(4):
        want = captum.attribute(x, target=c, n_steps=7, method="riemann_middle").flatten(1)
        torch.testing.assert_close(found.maps[:, c], want.detach())


@pytest.mark.parametrize("explains", [Cam(), GradCam(), IntegratedGradients(2)], ids=lambda m: type(m).__name__)
def test_maps_are_differentiable_in_all_weights(explains):
    """The gradient of a map's norm against differences, in each layer's weights: none of them is taken for constant."""
    model, x = net(), images(2)

    def value() -> Tensor:
        return explains(model, x).maps.square().sum()

    slopes = torch.autograd.grad(value(), list(model.parameters()), allow_unused=True)
    for p, slope in zip(model.parameters(), slopes, strict=True):
        if slope is None:  # the last bias moves every logit's gradient by nothing
            assert isinstance(explains, IntegratedGradients) and p.dim() == 1
            continue
        direction = torch.randn_like(p)
        with torch.no_grad():
            p += 1e-6 * direction
            high = float(value())
            p -= 2e-6 * direction
            low = float(value())
            p += 1e-6 * direction
        assert float((slope * direction).sum()) == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-7)


# ---------------------------------------------------------------- the floor


def flips(seed: int) -> tuple[Explained, Explained, Tensor, Tensor]:
    """Maps at inputs, and at others that are taken for another class by a network without biases: its answers vary."""
    model = net(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_() if p.dim() > 1 else p.zero_()
    x, moved = torch.randn(2, 32, 1, 8, 8, dtype=torch.float64)
    clean, there = (Explained(*(v.detach() for v in Cam()(model, z))) for z in (x, moved))
    label, other = clean.logits.argmax(1), there.logits.argmax(1)
    keep = label != other
    pair = (Explained(*(v[keep] for v in maps)) for maps in (clean, there))
    return *pair, label[keep], other[keep]  # type: ignore[return-value]


@settings(max_examples=60)
@given(st.integers(0, 10**6))
def test_no_label_changes_without_its_maps(seed):
    """The two-class discrepancy is at least half the margin that was lost, however far x' is."""
    clean, there, label, other = flips(seed)
    assume(len(label))
    assert (two_class(clean, there, label, other) >= floor(clean, label, other) - 1e-12).all()


def test_nothing_weaker_has_the_floor():
    """Planted: the label's map alone, the other class's alone, maps that are not complete, half the discrepancy. Each
    falls through the floor somewhere."""
    through = torch.zeros(4, dtype=torch.int64)
    for seed in range(50):
        clean, there, label, other = flips(seed)
        low, places = floor(clean, label, other), clean.maps.shape[-1]
        incomplete = [maps._replace(maps=maps.maps / places) for maps in (clean, there)]
        broken = torch.stack([
            discrepancy(clean, there, label, one=True) / 2, discrepancy(clean, there, other, one=True) / 2,
            two_class(*incomplete, label, other), two_class(clean, there, label, other) / 2,
        ])  # fmt: skip
        through += (broken < low).sum(1)
    assert (through > 0).all(), through


def test_the_floor_is_reached():
    """By maps that move in one direction each, to where both classes tie: the constant 1/2 cannot be raised."""
    clean = Explained(torch.tensor([[3.0, 1.0]]), torch.tensor([[[1.0, 2.0], [0.5, 0.5]]]))
    there = Explained(torch.tensor([[2.0, 2.0]]), torch.tensor([[[0.5, 1.5], [1.0, 1.0]]]))
    y, other = torch.tensor([0]), torch.tensor([1])
    assert two_class(clean, there, y, other) == floor(clean, y, other) == 1.0


def test_the_one_class_discrepancy_has_no_floor():
    """Maps of the label stay, those of another class rise: the label changes and the one-class discrepancy is 0."""
    clean = Explained(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))
    there = Explained(torch.tensor([[1.0, 3.0]]), torch.tensor([[[0.5, 0.5], [1.0, 2.0]]]))
    y, other = torch.tensor([0]), torch.tensor([1])
    assert discrepancy(clean, there, y, one=True) == 0
    assert two_class(clean, there, y, other) == 1.5 and floor(clean, y, other) == 0.5


def test_the_discrepancy_leans_to_the_class_that_is_taken():
    clean = Explained(torch.zeros(1, 3), torch.zeros(1, 3, 2))
    maps = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]])
    there = Explained(torch.tensor([[0.0, 40.0, 0.0]]), maps)
    y = torch.tensor([0])
    assert float(discrepancy(clean, there, y)) == pytest.approx(3.0)  # (2 + 4) / 2
    assert float(discrepancy(clean, there, y)) == pytest.approx(float(two_class(clean, there, y, torch.tensor([1]))))


def test_the_inner_attack_of_int_raises_the_discrepancy():
    from soundly.training.attack import ascend

    model, x = net(), images(16)
    y = model(x).argmax(1)
    clean = Explained(*(v.detach() for v in Cam()(model, x)))

    def change(z: Tensor) -> Tensor:
        return discrepancy(clean, Cam()(model, z), y)

    start = x + 0.02 * torch.rand_like(x) - 0.01
    found = ascend(change, x - 0.1, x + 0.1, steps=10, start=start)
    assert change(found).mean() > 2 * change(start).mean()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_finite_loss_and_gradient(name):
    model, x = net(), images(8)
    y = torch.arange(8) % 4
    loss = method(name, eps=0.1, steps=2)
    assert loss.name == name
    value = loss(model, x, y)
    value.backward()
    assert torch.isfinite(value) and all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_unknown_methods():
    with pytest.raises(InvalidInput, match="choose one of normal, pgd"):
        method("int3", eps=0.1)


@pytest.mark.parametrize("explains", [GradCam(), IntegratedGradients(2)], ids=lambda m: type(m).__name__)
def test_int_on_other_maps(explains):
    model, x = net(), images(4)
    y = torch.arange(4)
    value = Int(0.1, 2, map=explains)(model, x, y)
    value.backward()
    assert torch.isfinite(value) and all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert value > Plain()(model, x, y)


def test_without_distance_all_losses_are_the_plain_one():
    model, x = net(), images(8)
    y = torch.arange(8) % 4
    for name in NAMES:
        torch.testing.assert_close(method(name, eps=0.1)(model, x, y, passed=0.0), Plain()(model, x, y))


def test_training_on_maps_makes_labels_robust():
    """In small: training on maps, without any adversarial label, resists attacks; plain training does not."""
    digits = read("digits")
    x, y = digits.test[:200], digits.test_labels[:200]
    rates, firm = {}, {}
    for loss in (Plain(), Adversarial(0.15, 5), Int(0.15, 5)):
        torch.manual_seed(0)
        model = cnn(digits.shape, digits.classes, (8, 16, 16))
        fit(
            model, digits.train, digits.train_labels, lambda a, b, p, f=loss, m=model: f(m, a, b, p), epochs=15, lr=5e-3
        )
        rates[loss.name] = accuracy(model, x, y), accuracy(model, x, y, eps=0.1, steps=10)
        firm[loss.name] = stability(model, x, y, eps=0.1, steps=10)
    assert all(clean > 0.75 for clean, _ in rates.values()), rates
    assert rates["int"][1] > rates["normal"][1] + 0.1, rates
    assert firm["int"].kept > firm["normal"].kept, firm


# ---------------------------------------------------------------- stability


def test_kendall_is_scipys():
    a = torch.randn(20, 9, dtype=torch.float64)
    b = torch.randn(20, 9, dtype=torch.float64)
    b[:10] = a[:10] + 0.3 * b[:10]
    b[5, :4] = b[5, 4]  # ties
    want = torch.tensor([kendalltau(p, q).statistic for p, q in zip(a.numpy(), b.numpy(), strict=True)])
    torch.testing.assert_close(kendall(a, b), want)
    torch.testing.assert_close(kendall(a, -a), -torch.ones(20, dtype=torch.float64))
    assert kendall(torch.ones(1, 5), a[:1, :5].float()) == 0


def test_attacks_on_maps_lower_tau_and_are_counted():
    model, x = net(), images(20)
    y = model(x).argmax(1)
    near, far = (stability(model, x, y, eps=e, steps=10) for e in (1e-6, 0.3))
    assert near.tau > 0.99 and near.kept == 1 and far.tau < near.tau and far.kept <= 1
    with pytest.raises(InvalidInput, match="16 places"):
        stability(model, x, y, eps=0.1, top=17)


def test_accuracy_under_attack_falls_with_the_distance():
    model, x = net(), images(50)
    y = model(x).argmax(1)
    rates = [accuracy(model, x, y, eps=e, steps=10) for e in (0.0, 0.05, 0.5)]
    assert rates[0] == 1 and rates[0] >= rates[1] >= rates[2] and rates[2] < 1

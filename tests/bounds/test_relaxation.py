"""Lines around elementwise functions: sound at every sampled point, as tight as brute force finds, never NaN."""

import math

import pytest
import torch
from tests.ops.samples import FUNCTIONS
from torch import Tensor

from soundly.bounds import relaxation
from soundly.bounds.relaxation import Lines, default_lines, offsets, straight
from soundly.graph import elementwise as ew
from soundly.graph.elementwise import Elementwise

ALL = {
    str(g): g for f in FUNCTIONS for g in (f.case.op, f.case.op.derivative, f.case.op.derivative.derivative)
}  # every function, its first and its second derivative
FEW = [ALL[name] for name in ("relu", "gelu", "tanh'", "hardswish", "sin", "log", "step", "reciprocal")]
functions = pytest.mark.parametrize("f", ALL.values(), ids=ALL.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def intervals(f: Elementwise, dtype: torch.dtype, n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Finite intervals inside the domain: random, thin, degenerate, wide, far, ending at special points."""
    source = torch.Generator().manual_seed(seed)

    def random(scale: float) -> Tensor:
        return torch.randn(n, generator=source, dtype=torch.float64) * scale

    special = [*f.breaks, *(t for t, _, _ in f.special_points), *(t for t, _, _ in f.derivative.special_points), 0.0]
    at = torch.tensor(special, dtype=torch.float64)
    pairs = [(random(s), random(s)) for s in (0.3, 3.0, 3.0, 30.0)]
    pairs += [(c := random(2.0), c + random(w)) for w in (1e-3, 1e-7, 0.0)]
    pairs += [(at, at + torch.rand(len(at), generator=source)), (at - 0.7, at), (at, at), (at - 1e-9, at + 2e-9)]
    pairs += [(random(1.0) + side * 40, random(1.0) + side * 40) for side in (-1, 1)]
    low = torch.cat([torch.minimum(a, b) for a, b in pairs]).to(dtype)
    high = torch.cat([torch.maximum(a, b) for a, b in pairs]).to(dtype)
    if f.ring.lower == 0:
        low, high = low.abs(), high.abs()
        low[::5] = 0
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    return low, high


def samples(f: Elementwise, low: Tensor, high: Tensor, count: int = 400) -> Tensor:
    """[count + few, n] points of the intervals in float64: a grid, geometric near the ends, special points."""
    low, high = low.double(), high.double()
    grid = torch.linspace(0, 1, count, dtype=torch.float64)
    near = 10.0 ** -torch.linspace(1, 12, 30, dtype=torch.float64)
    at = torch.lerp(low, high, torch.cat([grid, near, 1 - near])[:, None])
    points = [*f.breaks, *(t for t, _, _ in f.special_points), *(t for t, _, _ in f.derivative.special_points)]
    extra = torch.tensor([s for t in points for s in (t, t - 1e-12, t + 1e-12)], dtype=torch.float64)
    return torch.cat([at, extra[:, None].expand(-1, len(low))]).clamp(low, high)


def noise(f: Elementwise, t: Tensor) -> Tensor:
    """What the reference itself may err in float64: a few units of its largest term."""
    low, high = f.widen(t, t, f.apply(t), f.apply(t), 2.0**-53)
    return (high - low).nan_to_num(nan=0.0, posinf=0.0)


def assert_between(f: Elementwise, low: Tensor, high: Tensor, lines: Lines) -> None:
    """The function at every sample lies between the lines, evaluated in float64."""
    for part in lines:
        assert part.dtype == low.dtype and not bool(torch.isnan(part).any()), "NaN, or another type"
    assert bool(torch.isfinite(lines.slope_low).all() & torch.isfinite(lines.slope_high).all())
    t = samples(f, low, high)
    value = f.apply(t)
    k_low, b_low, k_high, b_high = (part.double() for part in lines)
    below, above = k_low * t + b_low, k_high * t + b_high
    error = 4e-16 * (torch.maximum((k_low * t).abs(), (k_high * t).abs()) + value.abs()) + noise(f, t)
    known = torch.isfinite(value) & (t >= f.ring.lower)
    bad = known & ((below > value + error) | (value > above + error))
    if bool(bad.any()):
        row, i = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{f} at {float(t[row, i])!r} in [{float(low[i])!r}, {float(high[i])!r}] is {float(value[row, i])!r}, "
            f"outside of [{float(below[row, i])!r}, {float(above[row, i])!r}]"
        )


@functions
@dtypes
def test_no_value_escapes_the_default_lines(f, dtype):
    low, high = intervals(f, dtype)
    assert_between(f, low, high, default_lines(f, low, high))


def usable(f: Elementwise, low: Tensor, high: Tensor) -> Tensor:
    """The intervals on which `offsets` may be asked."""
    least, greatest = f.enclose(low.double(), high.double())
    period = torch.full_like(low, f.ring.period or math.inf)
    return torch.isfinite(least) & torch.isfinite(greatest) & (high - low <= period)


@functions
@dtypes
def test_offsets_are_those_of_a_dense_scan_for_any_slope(f, dtype):
    """Sound, and tight: no further out than the error of the scan itself and rounding."""
    low, high = intervals(f, dtype, n=8, seed=1)
    keep = usable(f, low, high) & (torch.maximum(low.abs(), high.abs()) < 1e3)
    low, high = low[keep], high[keep]
    source = torch.Generator().manual_seed(2)
    slope = (
        torch.randn(5, len(low), generator=source, dtype=torch.float64) * torch.tensor([0.0, 0.1, 1, 1, 20])[:, None]
    )
    middle = f.derivative.apply(torch.lerp(low.double(), high.double(), torch.tensor(0.3, dtype=torch.float64)))
    slope = torch.cat([slope, middle[None].nan_to_num(0, 0, 0)]).to(dtype)
    least, greatest = offsets(f, low, high, slope)
    assert least.shape == greatest.shape == slope.shape and least.dtype == dtype
    low, high = low.double(), high.double()
    t = samples(f, low, high, count=1500)
    value = f.apply(t)
    unit, error = torch.finfo(dtype).eps, noise(f, t).amax(0)
    # The stretch of a tangent turns what f' may err into an error of f.
    turned = 2 * noise(f.derivative, t).amax(0) * (high - low)
    for k, under, over in zip(slope.double(), least.double(), greatest.double(), strict=True):
        g = torch.where(torch.isfinite(value), value - k * t, math.nan)
        size = error + ((k * t).abs() + value.abs().nan_to_num(0, 0, 0)).amax(0)
        bottom, top = g.nan_to_num(math.inf).amin(0), g.nan_to_num(-math.inf).amax(0)
        # At a jump both sides count though the function takes one value.
        for at, small, large in f.special_points:
            if at in f.breaks:
                inside = (low <= at) & (at <= high)
                bottom = torch.where(inside, bottom.clamp(max=small - k * at), bottom)
                top = torch.where(inside, top.clamp(min=large - k * at), top)
                size = size + abs(small) + abs(large)
        rounding = 4e-16 * size + error
        assert bool((under <= bottom + rounding).all()), f"{f}: a value lies below"
        assert bool((over >= top - rounding).all()), f"{f}: a value lies above"
        # Between two neighbours of the scan g moves no further than the largest change from one to the next.
        scan = (g[1:1500] - g[:1499]).abs().nan_to_num(0).amax(0)
        loose = 2 * unit * size + 4 * error + 1e-11 * size + scan.clamp(max=4e-3 * (top - bottom))
        loose = loose + turned + max(1e-290, torch.finfo(dtype).tiny)
        excess = torch.maximum(bottom - loose - under, over - top - loose)
        at = int(excess.argmax())
        where = f"[{float(low[at])!r}, {float(high[at])!r}] with slope {float(k[at])!r}"
        assert float(excess[at]) <= 0, f"{f} on {where}: looser than the scan by {float(excess[at])}"


@functions
def test_default_lines_are_as_high_and_as_low_at_the_middle_as_the_best_slope_of_many(f):
    """The lines at the middle against the convex and concave envelopes there, from a fine scan: within one percent."""
    low, high = intervals(f, torch.float64, n=10, seed=3)
    keep = usable(f, low, high) & (high - low > 1e-5) & (torch.maximum(low.abs(), high.abs()) < 50)
    low, high = low[keep], high[keep]
    lines = default_lines(f, low, high)
    middle = (low + high) / 2
    t = samples(f, low, high, count=201)
    values = [f.apply(t)] * 2
    for at, small, large in f.special_points:
        if at in f.breaks:
            inside = (low <= at) & (at <= high)
            point = torch.full_like(low, at).clamp(low, high)
            t = torch.cat([t, point[None]])
            v = f.apply(point)
            values = [
                torch.cat([values[0], torch.where(inside, small, v)[None]]),
                torch.cat([values[1], torch.where(inside, large, v)[None]]),
            ]
    got = (lines.slope_low * middle + lines.offset_low, lines.slope_high * middle + lines.offset_high)
    for i in range(len(low)):
        on_left, on_right = t[:, i] <= middle[i], t[:, i] >= middle[i]
        best = []
        for sign, value in ((1, values[0]), (-1, values[1])):
            p, q = t[on_left, i][:, None], t[on_right, i][None]
            v, w = value[on_left, i][:, None], value[on_right, i][None]
            share = torch.where(q > p, (middle[i] - p) / (q - p), 0.0)
            height = sign * (v + share * (w - v))
            best.append(sign * float(height[torch.isfinite(height)].min()))
        finite = [v[:, i][torch.isfinite(v[:, i])] for v in values]
        spread = float(finite[1].max() - finite[0].min())
        allowed = 0.01 * spread + 1e-9 * (1 + float(finite[1].abs().max())) + float(noise(f, t[:, i]).max())
        assert float(got[0][i]) >= best[0] - allowed, f"{f} on [{low[i]}, {high[i]}]: {got[0][i]} against {best[0]}"
        assert float(got[1][i]) <= best[1] + allowed, f"{f} on [{low[i]}, {high[i]}]: {got[1][i]} against {best[1]}"


@functions
@dtypes
def test_odd_intervals_give_infinite_lines_and_never_nan(f, dtype):
    """Infinite ends, NaN, far tails, poles and the outside of the domain."""
    inf, nan = math.inf, math.nan
    low = torch.tensor([-inf, -inf, 0.0, nan, 0.0, -1.0, -5.0, 1e30, -1e30, -1e30, 1e-40, -2.0, 0.0], dtype=dtype)
    high = torch.tensor([inf, 1.0, inf, 1.0, nan, 1.0, -4.0, 2e30, -1e29, 1e30, 1e-30, 0.0, 1e-3], dtype=dtype)
    lines = default_lines(f, low, high)
    for part in lines:
        assert part.dtype == dtype and not bool(torch.isnan(part).any())
    unknown = torch.isnan(low) | torch.isnan(high)
    assert bool((lines.offset_low[unknown] == -inf).all() & (lines.offset_high[unknown] == inf).all())
    if f.ring.pole is not None:
        across = (low <= f.ring.pole) & (high >= f.ring.pole)
        assert bool((lines.offset_low[across] == -inf).all() & (lines.offset_high[across] == inf).all())
    finite = torch.isfinite(low) & torch.isfinite(high)
    assert_between(f, low[finite], high[finite], Lines(*(part[finite] for part in lines)))


@pytest.mark.parametrize("f", [ew.SIN, ew.COS, ew.SIN.derivative], ids=str)
@pytest.mark.parametrize("start", [0.0, -1.0, 100.0, -1e4, 1e7])
def test_periodic_functions_below_and_above_a_period(f, start):
    period = 2 * math.pi
    width = torch.tensor([0.1, 1.0, 3.0, 0.999 * period, period, 1.001 * period, 7.0, 1e3], dtype=torch.float64)
    low = (start + torch.linspace(0, 7, 50, dtype=torch.float64)[:, None]).expand(50, 8).reshape(-1)
    high = low + width.repeat(50)
    lines = default_lines(f, low, high)
    assert_between(f, low, high, lines)
    assert bool((lines.slope_low[high - low > 1.0001 * period] == 0).all())


# -- known shapes


def test_relu_has_the_usual_lines():
    low = torch.tensor([-2.0, -1.0, -1.0, 0.5, -3.0, 0.0, -1.0], dtype=torch.float64)
    high = torch.tensor([1.0, 2.0, 1.0, 2.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    lines = default_lines(ew.RELU, low, high)
    chord = [1 / 3, 2 / 3, 1 / 2, 1, 0, 1, 0]
    offset = [2 / 3, 2 / 3, 1 / 2, 0, 0, 0, 0]
    assert lines.slope_low.tolist() == pytest.approx([0, 1, 0, 1, 0, 1, 0])
    assert lines.offset_low.tolist() == pytest.approx([0] * 7, abs=1e-12)
    assert lines.slope_high.tolist() == pytest.approx(chord)
    assert lines.offset_high.tolist() == pytest.approx(offset, abs=1e-12)


def test_convex_functions_have_the_tangent_and_the_chord():
    low, high = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    lines = default_lines(ew.EXP, low, high)
    middle = (low + high) / 2
    torch.testing.assert_close(lines.slope_high, (high.exp() - low.exp()) / (high - low))
    torch.testing.assert_close(lines.slope_low * middle + lines.offset_low, middle.exp(), rtol=1e-3, atol=0)


def test_tanh_has_the_tangent_through_an_end():
    """The upper line through (-3, tanh -3) touches where tanh'(t) (t + 3) = tanh t + tanh 3."""
    from scipy.optimize import brentq

    touch = brentq(lambda t: (1 - math.tanh(t) ** 2) * (t + 3) - math.tanh(t) - math.tanh(3), 1e-6, 3)
    best = 1 - math.tanh(touch) ** 2
    lines = default_lines(ew.TANH, torch.tensor([-3.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    height = math.tanh(-3) + best * 2.5
    assert float(lines.slope_high * -0.5 + lines.offset_high) == pytest.approx(height, rel=5e-3)


def test_a_step_rises_from_the_lower_end_to_the_jump_and_from_the_jump_to_the_upper_end():
    low, high = torch.tensor([-4.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)
    lines = default_lines(ew.STEP, low, high)
    assert lines.slope_high.tolist() == pytest.approx([1 / 4, 0]) and lines.offset_high.tolist() == pytest.approx(
        [1, 1]
    )
    assert lines.slope_low.tolist() == pytest.approx([0, 1 / 4])
    assert lines.offset_low.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_straight_says_where_a_function_is_affine():
    low = torch.tensor([-2.0, -1.0, 0.5, 0.0, -1.0])
    high = torch.tensor([-1.0, 1.0, 2.0, 7.0, 0.0])
    assert straight(ew.RELU, low, high).tolist() == [True, False, True, True, True]
    assert straight(ew.clip(0.0, 6.0), low, high).tolist() == [True, False, True, False, True]
    assert straight(ew.HARDSWISH, low, high).tolist() == [False] * 5
    for f in (ew.TANH, ew.SIN, ew.EXP):
        assert not bool(straight(f, low, high).any())


@functions
def test_straight_is_never_said_of_a_curve(f):
    low, high = intervals(f, torch.float64)
    said = straight(f, low, high) & (high > low)
    low, high = low[said], high[said]
    inside = torch.lerp(low, high, torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64))
    a, m, b = f.apply(inside)
    assert bool(((a + b) / 2 - m).abs().le(1e-12 * (1 + m.abs())).all())


# -- planted faults


def _caught(monkeypatch, name: str, broken) -> bool:
    """Whether the checks above notice a broken part, on some of a few functions."""
    monkeypatch.setattr(relaxation, name, broken)
    relaxation._stretches.cache_clear()
    try:
        for f in FEW:
            low, high = intervals(f, torch.float64)
            assert_between(f, low, high, default_lines(f, low, high))
    except AssertionError:
        return True
    finally:
        monkeypatch.undo()
        relaxation._stretches.cache_clear()
    return False


def test_a_wrong_curvature_is_caught(monkeypatch):
    right = relaxation._bend
    assert _caught(monkeypatch, "_bend", lambda *args: abs(right(*args)))
    assert _caught(monkeypatch, "_bend", lambda *args: -right(*args))


def test_ends_without_tangents_are_caught(monkeypatch):
    """A function called straight everywhere is judged by its ends."""
    assert _caught(monkeypatch, "_bend", lambda *args: 0)


def test_the_values_at_breaks_and_ends_are_needed(monkeypatch):
    right = relaxation._extremes

    def one_end(f, part, a, b, bend, k):
        return right(f, part, a, a, bend, k)

    assert _caught(monkeypatch, "_extremes", one_end)


def test_lines_that_are_swapped_or_lack_their_offset_are_caught():
    low, high = intervals(ew.GELU, torch.float64)
    lines = default_lines(ew.GELU, low, high)
    assert_between(ew.GELU, low, high, lines)
    swapped = Lines(lines.slope_high, lines.offset_high, lines.slope_low, lines.offset_low)
    for broken in (swapped, lines._replace(offset_low=0 * low), lines._replace(offset_high=0 * low)):
        with pytest.raises(AssertionError, match="outside"):
            assert_between(ew.GELU, low, high, broken)


def test_the_checks_notice_an_offset_that_is_off_by_a_millionth():
    low, high = intervals(ew.TANH, torch.float64)
    lines = default_lines(ew.TANH, low, high)
    with pytest.raises(AssertionError, match="outside"):
        assert_between(ew.TANH, low, high, lines._replace(offset_low=lines.offset_low + 1e-6))


@pytest.mark.parametrize("touch", [0.0, 0.3, 1.0])
def test_tangents_are_sound_wherever_they_touch(monkeypatch, touch):
    """Without any search for f' = k the lines are looser but hold."""
    monkeypatch.setattr(relaxation, "_HALVINGS", round(3 * touch))
    for f in FEW:
        low, high = intervals(f, torch.float64, n=8)
        assert_between(f, low, high, default_lines(f, low, high))

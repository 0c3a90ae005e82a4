"""CMA-ES over thresholds, on a measure whose minimum is known."""

import math

import pytest

from central.thresholds.search import search
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds


def distance_to(target: tuple[int, ...]):
    def measure(thresholds: Thresholds) -> float:
        return sum(math.log(t / g) ** 2 for t, g in zip(thresholds.bytes, target, strict=True))

    return measure


@pytest.mark.parametrize("target", [(70_000,), (20_000, 900_000, 6_000_000)])
def test_finds_a_known_minimum(target: tuple[int, ...]) -> None:
    start = Thresholds.of(round(t * 2.5) for t in target)
    found = search(distance_to(target), start, 3e7, evaluations=400, seed=3)
    assert found.thresholds.bytes == pytest.approx(target, rel=0.02)
    assert found.evaluations <= 400
    assert found.value < found.start_value


def test_is_never_worse_than_the_start_and_repeatable() -> None:
    best = Thresholds((1000, 50_000))
    first = search(distance_to(best.bytes), best, 1e6, evaluations=40, seed=1)
    assert first.thresholds == best
    away = Thresholds((3000, 20_000))
    runs = {search(distance_to(best.bytes), away, 1e6, evaluations=60, seed=5).thresholds for _ in range(2)}
    assert len(runs) == 1


def test_candidates_stay_within_bounds() -> None:
    seen: list[Thresholds] = []

    def measure(thresholds: Thresholds) -> float:
        seen.append(thresholds)
        return float(sum(thresholds.bytes))

    search(measure, Thresholds((5, 10, 20)), 1000, evaluations=80)
    assert max(t.bytes[-1] for t in seen) <= 1003
    assert min(t.bytes[0] for t in seen) >= 1


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        search(lambda _: 0.0, Thresholds((5,)), 1000, evaluations=1)
    with pytest.raises(UsageError, match="not a finite number"):
        search(lambda _: float("nan"), Thresholds((5,)), 1000)

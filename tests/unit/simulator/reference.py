"""Slow, plain models that the compiled kernels are held against: no incremental step, everything found anew."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

LevelOf = Callable[[float, float], int]  # attained, remaining -> level


def max_min(paths: list[list[int]], levels: list[int], capacity: npt.NDArray[np.float64]) -> list[float]:
    """Rates by progressive filling, level after level (Bertsekas and Gallager, Data Networks, 6.5.2)."""
    left = capacity.astype(float).copy()
    rates = [0.0] * len(paths)
    for level in sorted(set(levels)):
        open_flows = {i for i, k in enumerate(levels) if k == level}
        while open_flows:
            users: dict[int, list[int]] = {}
            for i in open_flows:
                for link in paths[i]:
                    users.setdefault(link, []).append(i)
            tightest = min(users, key=lambda link: left[link] / len(users[link]))
            share = max(left[tightest], 0.0) / len(users[tightest])
            for i in users[tightest]:
                rates[i] = share
                open_flows.discard(i)
                for link in paths[i]:
                    left[link] -= share
            left[tightest] = 0.0
    return rates


def replay(
    start_s: npt.NDArray[np.float64],
    size_bytes: npt.NDArray[np.int64],
    paths: list[list[int]],
    capacity: npt.NDArray[np.float64],
    level_of: LevelOf,
    boundaries: tuple[float, ...] = (),
    buffer_bytes: float = math.inf,
    shortest: bool = False,
) -> npt.NDArray[np.float64]:
    """Completion times of a fluid replay; all rates are found anew at every event."""
    n = len(start_s)
    fct = np.zeros(n)
    sent: dict[int, float] = {}
    now, coming = 0.0, 0
    while coming < n or sent:
        flows = list(sent)
        if shortest and flows:
            first = min(flows, key=lambda i: size_bytes[i] - sent[i])
            rates = [capacity[0] if i == first else 0.0 for i in flows]
        else:
            levels = [level_of(sent[i], size_bytes[i] - sent[i]) for i in flows]
            rates = max_min([paths[i] for i in flows], levels, capacity)
        step = start_s[coming] - now if coming < n else math.inf
        for i, rate in zip(flows, rates, strict=True):
            if rate <= 0:
                continue
            left = size_bytes[i] - sent[i]
            stops = [left]
            stops += [b - sent[i] for b in boundaries] + [left - b for b in boundaries] + [left - buffer_bytes]
            stops += [b - buffer_bytes - sent[i] for b in boundaries]
            step = min(step, min(s for s in stops if s > 1e-6) / rate if left > 1e-6 else 0.0)
        for i, rate in zip(flows, rates, strict=True):
            sent[i] += rate * step
            for b in boundaries:  # stand exactly on what was reached
                if abs(sent[i] - b) < 1e-5:
                    sent[i] = b
                if abs(sent[i] + buffer_bytes - b) < 1e-5:
                    sent[i] = b - buffer_bytes
                if abs(size_bytes[i] - sent[i] - b) < 1e-5:
                    sent[i] = size_bytes[i] - b
            if abs(size_bytes[i] - sent[i] - buffer_bytes) < 1e-5:
                sent[i] = size_bytes[i] - buffer_bytes
        now += step
        for i in [i for i in sent if size_bytes[i] - sent[i] <= 1e-5]:
            fct[i] = now - start_s[i]
            del sent[i]
        while coming < n and start_s[coming] <= now:
            sent[coming] = 0.0
            coming += 1
    return fct


def least_attained_first(
    start_s: npt.NDArray[np.float64], size_bytes: npt.NDArray[np.int64], rate: float
) -> npt.NDArray[np.float64]:
    """Completion times of least attained service first on one link, exactly: no levels, no steps.

    Flows with equal attained service stand together. The group with the least is served, all of it at the same rate,
    until somebody in it ends, it has caught up with the next group, or a flow arrives.
    """
    fct = np.zeros(len(start_s))
    groups: list[tuple[float, list[int]]] = []  # (attained, flows by falling size), the least attained last
    now, coming = 0.0, 0
    while coming < len(start_s) or groups:
        next_arrival = start_s[coming] if coming < len(start_s) else math.inf
        if not groups:
            now = next_arrival
        else:
            attained, flows = groups.pop()
            until = float(size_bytes[flows[-1]])
            if groups:
                until = min(until, groups[-1][0])
            ready_s = now + (until - attained) * len(flows) / rate
            if ready_s > next_arrival:
                groups.append((attained + (next_arrival - now) * rate / len(flows), flows))
                now = next_arrival
            else:
                now = ready_s
                if groups and groups[-1][0] == until:
                    flows = sorted(flows + groups.pop()[1], key=lambda i: -int(size_bytes[i]))
                while flows and size_bytes[flows[-1]] == until:
                    ended = flows.pop()
                    fct[ended] = now - start_s[ended]
                if flows:
                    groups.append((until, flows))
                continue
        groups.append((0.0, [coming]))
        coming += 1
    return fct

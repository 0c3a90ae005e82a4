"""How much slower flows of some hosts are than those of others, size by size.

Log-slowdowns are compared within a size bucket, so that another mix of sizes is no difference; a bucket counts as much
as it moves the objective. Each host has one voice (`central/outcomes.py`), so that a few that lie decide nothing.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from central.outcomes import Experienced, even_weights, middle_mean
from central.policy.base import Outcome
from simulator.statistics import BUCKETS

Floats = npt.NDArray[np.float64]


def cell(flows: Experienced) -> Floats:
    """Flows, and sum of their log-slowdowns, per bucket: shape (2, buckets). Cells of one host add up."""
    return np.array(
        [
            np.bincount(flows.bucket, minlength=len(BUCKETS)),
            np.bincount(flows.bucket, np.log(flows.slowdown), len(BUCKETS)),
        ]
    )


def bucket_weights(outcome: Outcome, objective: str) -> Floats:
    """What a relative change in a bucket's slowdown is worth, shape (buckets,), summing to 1.

    The objective's own derivative: d log(sum_b share_b y_b) = sum_b (share_b y_b / sum) d log y_b. For `slowdown` y_b
    is the mean slowdown, for `tail` its square; for `fct` it is the bucket's completion time, slowdown times size.
    """
    shares, slowdown = np.array(outcome.shares), np.array(outcome.slowdown)
    worth = {"slowdown": slowdown, "tail": slowdown**2, "fct": slowdown * _TYPICAL_BYTES}[objective]
    weights: Floats = shares * worth / (shares @ worth)
    return weights


def contrast(these: Iterable[Floats], others: Iterable[Floats], weights: Floats) -> float | None:
    """Mean log-slowdown of `these` hosts' flows less that of the `others`, over the buckets that both have.

    0.05 means 5 % slower. None if there is no such bucket.

    Args:
        these: a cell per host.
        others: likewise.
        weights: of the buckets.
    """
    means, known = zip(*(_means(list(cells)) for cells in (these, others)), strict=True)
    both = known[0] & known[1]
    worth = float(weights[both].sum())
    return float(weights[both] @ (means[0] - means[1])[both] / worth) if worth > 0 else None


def _means(cells: list[Floats]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Per bucket the mean over hosts, and where there is one."""
    table = np.array(cells).reshape(-1, 2, len(BUCKETS))
    flows, sums = table[:, 0], table[:, 1]
    per_host = sums / np.maximum(flows, 1.0)
    means = [middle_mean(per_host[:, b], even_weights(flows[:, b])) for b in range(len(BUCKETS))]
    return np.array(means), flows.sum(axis=0) > 0


# Geometric middle of each bucket; the first and last are open, and as wide as the others.
_TYPICAL_BYTES = np.array([10 ** (3.5 + index) for index in range(len(BUCKETS))])

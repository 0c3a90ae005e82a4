"""Dynamic programming over a grid of sizes, for criteria that are a sum over the levels."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def best_path(first: Floats, between: Floats, levels: int) -> npt.NDArray[np.intp]:
    """Grid indices of the thresholds of at most `levels` levels with the smallest total.

    Args:
        first: cost of a first level that ends at each grid size, shape (n,).
        between: cost of a later level from one grid size (row) to another (column), shape (n, n); infinite where that
            is not allowed.
        levels: K.

    Returns:
        Ascending, shape (up to K-1,): fewer where a further level gains nothing. The last level ends at n - 1.
    """
    totals, came_from = [first], []
    for _ in range(levels - 1):
        through = totals[-1][:, None] + between
        came_from.append(through.argmin(axis=0))
        totals.append(through.min(axis=0))
    used = int(np.argmin([total[-1] for total in totals]))
    chosen, at = [], len(first) - 1
    for step in reversed(came_from[:used]):
        at = int(step[at])
        chosen.append(at)
    return np.array(chosen[::-1], np.intp)

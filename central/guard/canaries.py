"""Which hosts try a challenger first."""

import hashlib
import math
from collections.abc import Iterable


def canaries(hosts: Iterable[str], share: float, trial: int) -> frozenset[str]:
    """About `share` of the hosts: at least one and never all of them; none of a single host.

    The same hosts for the same `trial`, others for the next one, so that no host (which may be odd, or lie) has a say
    in all trials. A host that joins or leaves changes at most who else is drawn, not the order.
    """
    ordered = sorted(set(hosts), key=lambda host: hashlib.sha256(f"{trial}:{host}".encode()).digest())
    if len(ordered) < 2:
        return frozenset()
    return frozenset(ordered[: min(max(1, math.floor(share * len(ordered))), len(ordered) - 1)])

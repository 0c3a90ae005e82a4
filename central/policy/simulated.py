"""What a policy would choose if all were known at once: for the simulator, and for a testbed run that begins with it.

`fabricpilot simulate` finds the schemes it does not have itself here (entry point `fabricpilot.schemes`), since the
simulator imports nothing of central.
"""

import math
from collections.abc import Mapping

import numpy as np

from central.policy.base import GroupSummary
from central.policy.schemes import SCHEMES, Rank, find, policy_of
from fabricpilot.config import DatapathSection, PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from fabricpilot.published import workload_of
from simulator import schemes as simulator
from simulator.workloads.distribution import SizeDistribution

_SIZES = 20_000  # quantiles that stand for a distribution


def names() -> Mapping[str, str]:
    """The schemes that the simulator does not have itself, each with a line about it."""
    return {name: scheme.text for name, scheme in SCHEMES.items() if name not in simulator.NAMES}


def scheme(
    name: str, sizes: SizeDistribution, load: float, levels: int, send_buffer_bytes: float, workload: str
) -> simulator.Scheme:
    """One of them, with the thresholds its policy chooses for these sizes at this load; arguments as `thresholds_for`.

    Raises:
        UsageError: its policy has no thresholds for these.
    """
    basis = {"sent": simulator.ATTAINED, "written": simulator.WRITTEN, "hinted": simulator.SIZE}[_rank(find(name).rank)]
    chosen = thresholds_for(name, sizes, load, levels, workload)
    return simulator.Scheme(
        name,
        basis=basis,
        thresholds=tuple(map(float, chosen.bytes)),
        send_buffer_bytes=float(round(send_buffer_bytes)),
    )


def thresholds_for(name: str, sizes: SizeDistribution, load: float, levels: int, workload: str) -> Thresholds:
    """What the policy of a scheme chooses once these sizes and this load are known.

    Args:
        name: of a scheme that has thresholds.
        sizes: of the flows.
        load: payload over link rate.
        levels: K.
        workload: name of the distribution, for thresholds published for a workload.

    Raises:
        UsageError: the scheme has no thresholds, or none for K or these sizes.
    """
    policy = policy_of(PolicySection(scheme=name, workload=workload_of(workload)))
    reported = LogHistogram.of(sizes.quantile((np.arange(_SIZES) + 0.5) / _SIZES))
    decision = policy.decide(GroupSummary("simulated", levels, 1, math.inf, load, reported, None))
    if decision.thresholds is None:
        raise UsageError(f"scheme '{name}' has no thresholds for K = {levels} here: {decision.reason}")
    return decision.thresholds


def _rank(rank: Rank | None) -> str:
    if rank == "default":
        return "sent" if DatapathSection().mode == "attained" else "written"
    assert rank is not None, "a scheme without ranks is the simulator's own"
    return rank

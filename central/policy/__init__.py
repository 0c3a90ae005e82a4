"""Schemes that choose thresholds, behind one interface (`base.ThresholdPolicy`)."""

from central.policy.base import ThresholdPolicy
from central.policy.fixed import FixedPolicy
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds


def policy_of(section: PolicySection) -> ThresholdPolicy:
    """The scheme that `[policy]` names.

    Raises:
        UsageError: `fixed` without valid thresholds.
    """
    if section.scheme == "fixed":
        if not section.thresholds:
            raise UsageError("policy.scheme = 'fixed' needs policy.thresholds, for example [20480, 1048576, 8388608]")
        return FixedPolicy(Thresholds.of(section.thresholds))
    from central.policy.optimiser import OptimiserPolicy

    return OptimiserPolicy(section.objective, section.min_flows, section.min_gain)

"""Schemes that choose thresholds, behind one interface (`base.ThresholdPolicy`); `schemes` has all of them by name."""

from central.policy.base import ThresholdPolicy
from central.policy.schemes import policy_of

__all__ = ["ThresholdPolicy", "policy_of"]

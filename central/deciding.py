"""The policy scheme as a worker's service: summaries in, one decision each out."""

import logging
from collections.abc import Sequence

from central.policy import policy_of
from central.policy.base import Decision, GroupSummary
from central.turns import Turns
from fabricpilot.config import PolicySection
from fabricpilot.errors import FabricpilotError

log = logging.getLogger(__name__)


class Deciding:
    """The scheme that `[policy]` names.

    Raises:
        UsageError: as `policy_of`.
    """

    def __init__(self, section: PolicySection) -> None:
        self._policy = policy_of(section)
        self._turns = Turns(self._decide, lambda _: Decision(None, "waits for its turn: there are many groups"))
        self._failing: set[str] = set()  # groups whose last decision failed: told once

    def answer(self, asked: Sequence[GroupSummary]) -> list[Decision]:
        """One decision per summary, in order; none for some of very many."""
        return self._turns.answer(asked)

    def close(self) -> None:
        """Schemes keep nothing."""

    def _decide(self, summary: GroupSummary) -> Decision:
        """A scheme that fails leaves the thresholds as they are."""
        try:
            decision = self._policy.decide(summary)
            self._failing.discard(summary.group)
            return decision
        except FabricpilotError as error:
            return Decision(None, f"{self._policy.name}: {error}")
        except Exception as error:
            # One group's odd report must not take the decisions of all others with it.
            if summary.group not in self._failing:
                log.exception("policy %s failed for group %s", self._policy.name, summary.group)
                self._failing.add(summary.group)
            return Decision(None, f"{self._policy.name} failed: {type(error).__name__}")

"""Learners for tests: one that does its duty, and every kind that does not. Named in `policy.learner`."""

import json
import math
import os
import time
from types import SimpleNamespace

from central.policy.base import Decision, LearnStats
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds


class Dutiful:
    """Proposes twice the thresholds in force, and counts what it learned from."""

    name = "dutiful"

    def __init__(self, section):
        self.transitions = 0
        self.objective = section.objective

    def propose(self, summary):
        return Decision(Thresholds.of(2 * value for value in summary.thresholds.bytes), "doubled")

    def learn(self, summary):
        assert summary.outcome is not None
        self.transitions += 1
        return LearnStats(self.transitions, 0, -summary.outcome.mean_slowdown, 0.1)

    def save(self, path):
        path.write_text(json.dumps({"transitions": self.transitions}))

    def load(self, path):
        try:
            self.transitions = int(json.loads(path.read_text())["transitions"])
        except (ValueError, KeyError) as error:
            raise UsageError(f"{path} is no checkpoint") from error


class Dawdling(Dutiful):
    """Writes its second checkpoint half, and then does not go on."""

    saved = False

    def save(self, path):
        if self.saved:
            path.write_text('{"transi')
            time.sleep(3600)
        self.saved = True
        super().save(path)


class BadActor(Dutiful):
    """Valid thresholds, and about the worst there are for a mix of sizes."""

    def propose(self, summary):
        return Decision(Thresholds((1000, 2000, 3000)), "trust me")


class Reversed(Dutiful):
    def propose(self, summary):
        return SimpleNamespace(thresholds=(9_000_000, 50_000, 1_000), reason="upside down")


class NaNWeights(Dutiful):
    def propose(self, summary):
        return SimpleNamespace(thresholds=(math.nan,) * (summary.levels - 1), reason="nan")


class Nonsense(Dutiful):
    def propose(self, summary):
        return "thresholds"


class Raising(Dutiful):
    def propose(self, summary):
        raise ZeroDivisionError("propose")

    def learn(self, summary):
        raise ZeroDivisionError("learn")


class Dying(Dutiful):
    def propose(self, summary):
        os._exit(1)


class Sleeping(Dutiful):
    def propose(self, summary):
        time.sleep(5)
        return super().propose(summary)


class Hanging(Dutiful):
    def propose(self, summary):
        time.sleep(3600)

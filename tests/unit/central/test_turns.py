"""Taking turns: who is not served for want of time is first the next time, and one always is."""

from dataclasses import replace

import pytest

from central import turns
from central.deciding import Deciding
from central.learning import Learning, Lesson
from central.policy.base import Decision, GroupSummary
from central.turns import Turns
from fabricpilot.config import PolicySection
from fabricpilot.histogram import LogHistogram

NOBODY = GroupSummary("", 4, 1, 0.0, 0.5, LogHistogram(), None)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when somebody is served."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    return now


def taking(clock, seconds, budget_s=10.0):
    def serve(one):
        clock[0] += seconds
        return one

    return Turns(serve, lambda one: None, budget_s)


def test_all_are_served_if_there_is_time(clock):
    few = taking(clock, 0.5)
    for _ in range(3):
        assert few.answer("abcd") == list("abcd")
    assert few.answer("") == []


def test_those_left_out_are_first_the_next_time(clock):
    many = taking(clock, 4.0)
    assert many.answer("abcde") == ["a", "b", "c", None, None]
    assert many.answer("abcde") == ["a", None, None, "d", "e"]
    assert many.answer("abcde") == [None, "b", "c", "d", None]


def test_one_is_served_however_long_it_takes_and_none_is_passed_over(clock):
    slow = taking(clock, 60.0)
    served = [answer for _ in range(3) for answer in slow.answer("abc") if answer]
    assert served == ["a", "b", "c"]


def test_members_may_come_and_go(clock):
    many = taking(clock, 4.0)
    many.answer("abcde")
    assert many.answer("ab") == ["a", "b"]
    assert len([one for one in many.answer("abcdefgh") if one]) == 3


def test_scheme_and_learner_take_turns_with_groups(clock, monkeypatch):
    deciding = Deciding(PolicySection())

    groups = [replace(NOBODY, group=name) for name in "abcd"]

    def slowly(summary):
        clock[0] += 10.0
        return Decision(None, "served")

    monkeypatch.setattr(type(deciding._policy), "decide", lambda self, summary: slowly(summary))
    told = [decision.reason for decision in deciding.answer(groups)]
    assert told[:2] == ["served"] * 2
    assert all("waits for its turn" in reason for reason in told[2:])
    learning = Learning(PolicySection(learn="on", learner="learner_doubles:Dutiful"), None)
    monkeypatch.setattr(learning._learner, "propose", slowly)
    said = [proposal.reason for proposal in learning.answer(Lesson((), tuple(groups))).proposals]
    assert said[:2] == ["served"] * 2
    assert all("waits for its turn" in reason for reason in said[2:])

"""Between link and scheduler: what is heard waits while a round is under way, and what comes back is sent."""

from types import SimpleNamespace

import pytest

from central import long_flows
from central.long_flows import LongFlowDesk, start_scheduler
from central.lrla.process import Answer
from central.planner.announced import Announced
from central.worker import Answered
from fabricpilot.config import LongFlowsSection
from fabricpilot.errors import UsageError
from fabricpilot.wire import FlowSummary, LongFlows, MigrationFlow, Migrations

SECTION = LongFlowsSection(scheme="least-loaded")
FLOW = FlowSummary("10.0.1.1", "10.0.2.1", 40_000, 49_152, 6, 10**7, 1000, 3)
HOST = SimpleNamespace(name="a", hello=SimpleNamespace(levels=4, link_rate_bps=10**9), usable_routes=[1, 2])


class Rounds:
    """A worker that answers when it is told to."""

    restarts = 0

    def __init__(self):
        self.asked = []
        self.busy = False
        self.ready = None

    def submit(self, asked):
        assert not self.busy
        self.asked.append(asked)
        self.busy = True

    def collect(self):
        answered, self.ready = self.ready, None
        self.busy = self.busy and answered is None
        return answered

    def answer(self, *frames, more=False):
        self.ready = Answered(self.asked[-1], Answer(list(frames), 1, 1, more, 0.1, 0.2), 0.2)


@pytest.fixture
def rounds():
    return Rounds()


def desk_of(rounds, announced=None):
    return LongFlowDesk(SECTION, rounds, announced or Announced())


def heard(desk, now_s=0.0):
    desk.hear(HOST, LongFlows(host="a", flows=[FLOW]), now_s)


def test_one_round_at_a_time_and_the_next_has_all_that_waited(rounds):
    desk, sent = desk_of(rounds), []
    desk.step(0.0, lambda *what: sent.append(what))
    assert rounds.asked == []
    heard(desk)
    desk.step(0.0, lambda *what: sent.append(what))
    heard(desk)
    heard(desk)
    desk.step(0.1, lambda *what: sent.append(what))
    assert [len(asked.told) for asked in rounds.asked] == [1]
    rounds.answer(("a", b"verdicts"))
    desk.step(0.2, lambda *what: sent.append(what))
    assert sent == [("a", b"verdicts")]
    assert [len(asked.told) for asked in rounds.asked] == [1, 2]
    assert desk.status()["decided"] == 1


def test_verdicts_that_wait_to_be_renewed_make_a_round_of_their_own(rounds):
    desk = desk_of(rounds)
    heard(desk)
    desk.step(0.0, print)
    rounds.answer(more=True)
    desk.step(0.1, print)
    assert [len(asked.told) for asked in rounds.asked] == [1, 0]


def test_what_finds_no_room_is_counted(rounds, monkeypatch):
    monkeypatch.setattr(long_flows, "_MAX_WAITING", 2)
    desk = desk_of(rounds)
    rounds.busy = True
    for _ in range(5):
        heard(desk)
    assert desk.status()["dropped"] == 3


def test_announced_migrations_are_told_apart(rounds):
    announced = Announced()
    move = MigrationFlow(vm="v", source_host="a", target_host="b", size_bytes=1, batch=0)
    announced.tell(Migrations(host="client", plan="p", flows=[move], ttl_s=60.0), 0.0)
    desk = desk_of(rounds, announced)
    heard(desk, 1.0)
    desk.step(1.0, print)
    assert rounds.asked[0].told[0].moving == [0]


def test_nothing_runs_for_a_scheme_that_is_off_and_wrong_weights_are_told_at_start(tmp_path):
    assert start_scheduler(LongFlowsSection()) is None
    with pytest.raises(UsageError):
        start_scheduler(LongFlowsSection(scheme="learned", weights=str(tmp_path / "none.npz")))

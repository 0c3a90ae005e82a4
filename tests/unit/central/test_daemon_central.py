"""Central's logic over real sockets and a real worker process, turned by hand."""

import json
import os
import signal
import time
from contextlib import ExitStack, closing
from functools import partial

import pytest

from central.daemon import Central, Workers
from central.deciding import Deciding
from central.enforcement import next_epoch
from central.link import CentralLink
from central.policy.base import Decision
from central.threshold_log import ThresholdLog
from central.worker import Answered, Worker
from fabricpilot.config import CentralConfig, CentralSection, LinkSection, PolicySection
from fabricpilot.control import ControlServer
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from fabricpilot.wire import Policy, Refused
from hostagent.link import HostLink


class NoWorker:
    """Decisions are made by the test."""

    restarts = 0


def deciding(**policy):
    return Worker("policy", partial(Deciding, PolicySection(**policy)))


class Rig:
    """A central without its loop: the test turns it."""

    def __init__(self, stack, tmp_path, **policy):
        self.log = tmp_path / "thresholds.jsonl"
        config = CentralConfig(
            link=LinkSection(listen="tcp://127.0.0.1:*", insecure=True),
            policy=PolicySection(**policy),
            central=CentralSection(run_dir=str(tmp_path), threshold_log=str(self.log)),
        )
        self.link = stack.enter_context(closing(CentralLink(config.link)))
        control = stack.enter_context(ControlServer(tmp_path / "central.sock"))
        self.central = Central(config, self.link, control, Workers(NoWorker(), None))
        self.stack = stack
        self.hosts = {}
        self.heard = {}

    def connect(self, hello):
        section = LinkSection(endpoint=self.link.endpoint, insecure=True)
        self.hosts[hello.host] = self.stack.enter_context(closing(HostLink(section, hello.host, lambda: hello)))
        self.heard[hello.host] = []
        self.until(lambda: hello.host in self.central.registry.hosts)

    def turn(self):
        now = time.monotonic()
        for arrival in self.link.receive():
            self.central.handle(arrival, now)
        for name, host in self.hosts.items():
            self.heard[name] += host.receive()
        time.sleep(0.002)

    def until(self, condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "it never happened"
            self.turn()

    def decide(self, *values, group="web"):
        now = time.monotonic()
        summaries = [s for s in self.central.registry.summaries(now) if s.group == group]
        decision = Decision(Thresholds(values) if values else None, "for a test")
        self.central.apply(Answered(summaries, [decision] * len(summaries), 0.001), now)


@pytest.fixture
def rig(tmp_path):
    with ExitStack() as stack:
        yield Rig(stack, tmp_path)


def test_a_decision_reaches_its_group_only(rig, hello):
    rig.connect(hello("a"))
    rig.connect(hello("b"))
    rig.connect(hello("c", group="cache"))
    rig.decide(1, 2, 3)
    rig.until(lambda: rig.heard["a"] and rig.heard["b"])
    policy = rig.heard["a"][0]
    assert (policy.thresholds, policy.reason) == ([1, 2, 3], "for a test")
    assert policy == rig.heard["b"][0]
    assert abs(policy.epoch - time.time() * 1000) < 60_000
    assert rig.heard["c"] == []


def test_a_late_joiner_gets_the_policy_at_once(rig, hello):
    rig.connect(hello("a"))
    rig.decide(1, 2, 3)
    rig.connect(hello("late"))
    rig.until(lambda: rig.heard["late"])
    assert rig.heard["late"][0].thresholds == [1, 2, 3]


def test_epochs_rise_even_above_what_hosts_report(rig, hello):
    ahead = int(time.time() * 1000) + 3_600_000  # the clock of the central before was an hour ahead
    rig.connect(hello("a", epoch=ahead))
    rig.connect(hello("liar", epoch=2**63 - 1))
    rig.decide(1, 2, 3)
    rig.decide(2, 3, 4)
    rig.until(lambda: len(rig.heard["a"]) == 2)
    assert [policy.epoch for policy in rig.heard["a"]] == [ahead + 1, ahead + 2]


def test_next_epoch():
    assert next_epoch(0, [], 1000) == 1000
    assert next_epoch(1000, [], 1000) == 1001
    assert next_epoch(5, [1500, 7], 1000) == 1501
    assert next_epoch(5, [2**63 - 1], 1000) == 1000


def test_the_policy_is_repeated_now_and_then(tmp_path, hello, report):
    with ExitStack() as stack:
        rig = Rig(stack, tmp_path, expiry_s=1.0)  # so it is repeated three times a second
        rig.connect(hello("a"))
        rig.decide(1, 2, 3)
        begin = time.monotonic()

        def two_repeats():
            rig.hosts["a"].send(report("a", sequence=1))
            return len(rig.heard["a"]) == 3

        rig.until(two_repeats)
        assert time.monotonic() - begin > 0.5
        assert len({policy.epoch for policy in rig.heard["a"]}) == 1


def test_a_central_without_a_decision_shows_that_it_lives(rig, hello, report):
    rig.connect(hello("a"))
    rig.until(lambda: rig.hosts["a"].silent_s is not None)
    assert rig.heard["a"] == []


def test_reports_from_a_stranger_are_answered_by_a_question(rig, hello, report):
    rig.connect(hello("a"))
    del rig.central.registry.hosts["a"]
    rig.hosts["a"].send(report("a"))
    rig.until(lambda: "a" in rig.central.registry.hosts)
    assert rig.central.status()["link"]["unidentified"] == 1


def test_an_impossible_k_is_refused(rig, hello):
    section = LinkSection(endpoint=rig.link.endpoint, insecure=True)
    with closing(HostLink(section, "odd", lambda: hello("odd", levels=77))) as odd:
        rig.hosts["odd"], rig.heard["odd"] = odd, []
        rig.until(lambda: rig.heard["odd"])
        assert isinstance(rig.heard["odd"][0], Refused)


def test_groups_with_two_k_get_one_policy_each(rig, hello):
    rig.connect(hello("a", levels=4))
    rig.connect(hello("b", levels=2))
    now = time.monotonic()
    summaries = sorted(rig.central.registry.summaries(now), key=lambda s: s.levels)
    decisions = [Decision(Thresholds((9,)), "K = 2"), Decision(Thresholds((1, 2, 3)), "K = 4")]
    rig.central.apply(Answered(summaries, decisions, 0.0), now)
    rig.until(lambda: rig.heard["a"] and rig.heard["b"])
    assert (rig.heard["a"][0].thresholds, rig.heard["b"][0].thresholds) == ([1, 2, 3], [9])


def test_a_decision_for_a_group_that_has_gone(rig, hello):
    rig.connect(hello("a"))
    now = time.monotonic()
    summaries = list(rig.central.registry.summaries(now))
    rig.central.registry.groups.clear()
    rig.central.apply(Answered(summaries, [Decision(Thresholds((1, 2, 3)), "")], 0.0), now)


def test_status_and_log_tell_of_the_change(rig, hello, report):
    rig.connect(hello("a"))
    rig.hosts["a"].send(report("a", sizes=[1000] * 50, durations=[500] * 50, long_sizes=[10**9]))
    rig.until(lambda: rig.central.registry.hosts["a"].reports)
    rig.decide(1, 2, 3)
    rig.decide()
    rig.until(lambda: rig.heard["a"])
    rig.hosts["a"].send(report("a", sequence=2, epoch=rig.heard["a"][0].epoch, long_sizes=[10**9]))
    rig.until(lambda: rig.central.registry.hosts["a"].reports == 2)
    told = json.loads(json.dumps(rig.central.status()))
    (group,) = told["groups"]
    assert (group["thresholds"], group["hosts"], group["applied"]) == ([1, 2, 3], 1, 1)
    assert group["last_decision"] == "for a test"
    (host,) = told["hosts"]
    assert (host["name"], host["state"], host["long"]) == ("a", "up", 1)
    assert told["decision_s"]["last"] == 0.001
    (line,) = [json.loads(line) for line in rig.log.read_text().splitlines()]
    assert (line["group"], line["thresholds"], line["epoch"]) == ("web", [1, 2, 3], group["epoch"])


def test_the_tables_show_it_all(rig, hello, report):
    import io

    from rich.console import Console

    from central.status import show

    rig.connect(hello("host-a"))
    rig.decide(20480, 1000000, 8388608)
    out = io.StringIO()
    show(rig.central.status(), Console(file=out, width=100))
    for word in ("host-a", "web", "20.48k", "1M", "8.389M", "malformed 0"):
        assert word in out.getvalue()


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match=r"central\.threshold_log"):
        ThresholdLog(str(tmp_path / "no" / "such.jsonl"))


def test_the_worker_decides_in_another_process(rig, hello, report):
    rig.connect(hello("a"))
    rig.hosts["a"].send(report("a", sizes=[1000] * 300 + [10**6] * 30))
    rig.until(lambda: rig.central.registry.hosts["a"].reports)
    with closing(deciding()) as worker:
        summaries = list(rig.central.registry.summaries(time.monotonic()))
        worker.submit(summaries)
        assert worker.busy
        decided = collect(worker)
        assert decided.answer[0].thresholds.levels == 4
        assert not worker.busy
        assert worker.pid != os.getpid()


def test_a_worker_that_dies_is_replaced_in_the_next_round():
    with closing(deciding()) as worker:
        worker.submit([])
        assert collect(worker).answer == []
        os.kill(worker.pid, signal.SIGKILL)
        wait(lambda: worker.collect() is None and worker.fileno() == -1)
        assert not worker.busy
        worker.submit([])
        assert collect(worker).answer == []
        assert worker.restarts == 1


def test_a_worker_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr("central.worker.MAX_SECONDS", 0.05)
    with closing(deciding()) as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        worker.submit([])
        wait(lambda: worker.collect() is None and not worker.busy)
        assert worker.fileno() == -1


def test_a_policy_that_fails_leaves_things_as_they_are(rig, hello):
    rig.connect(hello("a"))
    summaries = list(rig.central.registry.summaries(time.monotonic()))  # no flows, and min_flows = 0 asks for them
    with closing(deciding(min_flows=0)) as worker:
        worker.submit(summaries)
        (decision,) = collect(worker).answer
    assert decision.thresholds is None
    assert "empty" in decision.reason


def test_no_policy_but_valid_ones_leaves_central(rig, hello):
    """What goes out was a `Thresholds` before, so it ascends."""
    rig.connect(hello("a"))
    with pytest.raises(UsageError):
        rig.decide(3, 2, 1)
    with pytest.raises(ValueError, match="ascend"):
        Policy(epoch=1, thresholds=[3, 2, 1], expiry_s=1.0)


def collect(worker):
    found = []
    wait(lambda: found.append(worker.collect()) or found[-1] is not None)
    return found[-1]


def wait(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)

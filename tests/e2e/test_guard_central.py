"""`fabricpilot central run --learn on` with learners that do wrong, and hosts on the real link that feel it."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from fabricpilot.config import LinkSection
from fabricpilot.control import ask
from fabricpilot.histogram import LogHistogram
from fabricpilot.wire import FlowSummary, Hello, Policy, Report
from hostagent.link import HostLink

FABRICPILOT = Path(sys.executable).with_name("fabricpilot")
GOOD, BAD = [100_000, 1_000_000, 10_000_000], [1000, 2000, 3000]
SIZES = (5_000, 50_000, 500_000)
QUICK = {"canary_rounds": 3, "slice_rounds": 2, "max_pairs": 6, "rest_s": 0.5, "max_step": 1e6}


class Host:
    """Flows take three times as long under the bad thresholds; reports say so."""

    def __init__(self, name, link_section):
        self.name, self.sequence, self.epoch = name, 0, 0
        self.thresholds, self.received = [1, 2, 3], []
        self.rng = np.random.default_rng(len(name))
        self.link = HostLink(link_section, name, self.hello)

    def hello(self):
        return Hello(
            host=self.name, group="web", levels=4, backend="fake", queues="none", link_rate_bps=10**9,
            epoch=self.epoch, thresholds=self.thresholds, version="0",
        )  # fmt: skip

    def turn(self):
        for message in self.link.receive():
            if isinstance(message, Policy):
                self.received.append(message.thresholds)
                if message.epoch > self.epoch:
                    self.epoch, self.thresholds = message.epoch, message.thresholds
        self.sequence += 1
        factor = 3.0 if self.thresholds == BAD else 1.0
        flows = [
            FlowSummary("10.0.0.1", "10.0.0.2", 1, 2, 6, size, int(factor * self.rng.uniform(1, 1.1) * size / 50), 0)
            for size in SIZES * 10
        ]
        sizes = LogHistogram.of([flow.size_bytes for flow in flows]).sparse()
        self.link.send(
            Report(
                host=self.name, sequence=self.sequence, interval_ns=10**8, epoch=self.epoch, sent_bytes=10**6,
                sizes=sizes, durations=sizes, finished=len(flows), finished_sample=flows, long=0, long_flows=[],
                active=3, counters={},
            )
        )  # fmt: skip


class Site:
    def __init__(self, stack, folder, learner, *arguments):
        self.folder = folder
        self.command = [
            *(FABRICPILOT, "central", "run", "--insecure", "--listen", "tcp://127.0.0.1:*"),
            *("--run-dir", folder / "run", "--state-dir", folder / "state", "--interval", "0.3"),
            *("--scheme", "mlfq", "--set", f"policy.thresholds={','.join(map(str, GOOD))}"),
            *("--learn", "on", "--set", f"policy.learner=learner_doubles:{learner}"),
            *(word for key, value in QUICK.items() for word in ("--set", f"guard.{key}={value}")),
            *arguments,
        ]
        self.stack = stack
        self.start()
        section = LinkSection(endpoint=self.status()["endpoint"], insecure=True)
        self.hosts = [Host(f"h{n}", section) for n in range(4)]
        for host in self.hosts:
            stack.enter_context(closing(host.link))

    def start(self):
        environ = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
        log = self.stack.enter_context((self.folder / "log").open("a"))
        self.process = subprocess.Popen(self.command, stderr=log, env=environ)
        self.stack.callback(self.process.wait)
        self.stack.callback(self.process.kill)
        self.until(lambda: (self.folder / "run" / "central.sock").exists(), turn=False)

    def status(self):
        return ask(self.folder / "run" / "central.sock", "status", timeout_s=20.0)

    def guard(self):
        (group,) = self.status()["groups"]
        return group["guard"]

    def until(self, condition, limit_s=90.0, turn=True):
        end = time.monotonic() + limit_s
        while not condition():
            given_up = time.monotonic() > end or self.process.poll() is not None
            assert not given_up, (self.folder / "log").read_text()[-3000:]
            for host in self.hosts if turn else ():
                host.turn()
            time.sleep(0.05)

    def settled(self):
        return all(host.thresholds == GOOD for host in self.hosts)

    def vectors(self):
        return {tuple(vector) for host in self.hosts for vector in host.received}

    def run(self, *words):
        words = [FABRICPILOT, "central", *words, "--run-dir", self.folder / "run"]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def site(tmp_path):
    with ExitStack() as stack:
        yield lambda learner, *arguments: Site(stack, tmp_path, learner, *arguments)


def test_a_bad_actor_over_the_real_link(site):
    here = site("BadActor")
    here.until(lambda: here.settled() and here.guard()["rollbacks"] >= 2)
    here.until(here.settled)
    assert here.vectors() == {tuple(GOOD), tuple(BAD)}
    tried = [host for host in here.hosts if BAD in host.received]
    assert 1 <= len(tried) <= 2  # one canary host per trial
    assert here.guard()["promotions"] == 0
    shown = here.run("status")
    assert "rolled back" in shown
    assert "guard mode learning" in shown

    told = json.loads(here.run("guard", "--freeze", "--json"))
    assert told["mode"] == "frozen"
    here.until(here.settled)
    trials = here.guard()["trials"]
    sequence = here.hosts[0].sequence
    here.until(lambda: here.hosts[0].sequence > sequence + 40)
    assert here.guard()["trials"] == trials
    assert "guard mode learning" in here.run("guard", "--resume")


@pytest.mark.parametrize(
    "learner",
    ["NaNWeights", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Dying", "Reversed", "Raising"))],
)
def test_learners_out_of_order_reach_nobody(site, learner):
    here = site(learner)

    def tried_thrice():
        told = here.status()
        failed = told["learner"]["failures"] + told["learner"]["restarts"]
        return here.settled() and (failed >= 3 or told["groups"][0]["guard"]["refused"] >= 3)

    here.until(tried_thrice)
    assert here.vectors() == {tuple(GOOD)}


def test_what_was_learned_survives_a_restart(site):
    here = site("Dutiful")
    here.until(lambda: here.settled() and here.status()["learner"]["transitions"] >= 3)
    here.process.terminate()
    here.process.wait()
    before = json.loads((here.folder / "state" / "learner.checkpoint").read_text())["transitions"]
    assert before >= 3
    assert json.loads((here.folder / "state" / "guard.json").read_text())["groups"][0]["baseline"] == GOOD
    here.start()
    here.until(lambda: "goes on from" in (here.folder / "log").read_text(), turn=False)


class Liar(Host):
    """Whatever a message may hold, in any order and number; now and then it is another host of another group."""

    def any_count(self):
        return int(self.rng.choice([0, 1, 7, 2**62, 2**63 - 1]))

    def hello(self):
        return Hello(
            host=self.name, group=str(self.rng.choice(["web", f"x{self.rng.integers(50)}"])),
            levels=int(self.rng.choice([2, 4, 8])), backend="", queues="", link_rate_bps=self.any_count(),
            epoch=self.any_count(), thresholds=[], version="", visible_bytes=self.any_count(),
        )  # fmt: skip

    def turn(self):
        self.link.receive()
        numbers = [self.any_count() for _ in range(6)]
        flows = [FlowSummary(address, "", *numbers) for address in ("10.0.0.1", "no address", "") * 30]
        sizes = {int(size): self.any_count() for size in self.rng.integers(0, 384, 30)}
        for _ in range(5):
            sequence, interval_ns, epoch, sent_bytes, long, active = (self.any_count() for _ in range(6))
            self.link.send(
                Report(
                    host=self.name, sequence=sequence, interval_ns=interval_ns, epoch=epoch, sent_bytes=sent_bytes,
                    sizes=sizes, durations=sizes, finished=self.any_count(), finished_sample=flows, long=long,
                    long_flows=flows, active=active, counters={},
                )
            )  # fmt: skip
        if self.rng.random() < 0.3:
            self.link.send(self.hello())


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["configured", "clustered"])
def test_hosts_that_lie_in_every_number_stop_nothing(site, groups):
    more = {"scheme": "optimiser", "thresholds": "", "groups": groups, "window_s": 5, "min_flows": 50}
    here = site(
        "Dutiful",
        *("--set", "policy.learner=central.srla.online:OnlineSrla"),
        *(word for key, value in more.items() for word in ("--set", f"policy.{key}={value}")),
    )
    honest, section = list(here.hosts), LinkSection(endpoint=here.status()["endpoint"], insecure=True)
    for n in range(2):
        here.hosts.append(Liar(f"liar{n}", section))
        here.stack.enter_context(closing(here.hosts[-1].link))
    here.until(lambda: here.status()["learner"].get("transitions", 0) >= 20 and honest[0].sequence > 200)
    told = here.status()
    assert (told["worker_restarts"], told["learner"]["restarts"], told["learner"]["failures"]) == (0, 0, 0)
    for host in honest:
        assert host.received
        assert all(vector == sorted(set(vector)) and vector[0] > 0 for vector in host.received)


@pytest.mark.slow
def test_the_shipped_learner_learns_from_hosts(site):
    """OnlineSrla in its process: it learns, it proposes, and nothing breaks; hosts feel no difference in this world."""
    here = site("Dutiful", "--set", "policy.learner=central.srla.online:OnlineSrla", "--set", "policy.min_flows=50")
    here.until(lambda: here.status()["learner"].get("transitions", 0) >= 5 and here.settled(), limit_s=300)
    told = here.status()
    assert (told["learner"]["failures"], told["learner"]["restarts"]) == (0, 0)
    assert told["groups"][0]["guard"]["trials"] + told["groups"][0]["guard"]["refused"] >= 1

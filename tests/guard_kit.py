"""Hosts in the simulator under a real guard: reports go in, policies come out, second by second, without a network.

Each host has a link of its own, simulated under the thresholds that it was sent last; `lie` may change its reports.
"""

import numpy as np

from central.enforcement import Enforcement
from central.guard.memory import GuardMemory
from central.learning import Proposal
from central.registry import Registry
from central.steering import Steering
from central.threshold_log import ThresholdLog
from fabricpilot.config import CentralConfig, GuardSection, PolicySection
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds, default_thresholds
from fabricpilot.wire import FlowSummary, Hello, Policy, Report
from simulator.engine import Simulation
from simulator.schemes import scheme
from simulator.topology import star
from simulator.workloads.arrivals import poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import to_one

RATE_BPS = 10**9
SHARES_NOTHING = star(2, RATE_BPS)


class SimulatedHost:
    """One sender with a link of its own, and what it reports of its flows."""

    def __init__(self, name, seed, workload, load, seconds, lie=None, group="web"):
        self.name, self.group, self.lie = name, group, lie
        self.thresholds = default_thresholds(4)
        self.epoch = self.sequence = 0
        self.received = []
        self.rng = np.random.default_rng(seed)
        self.simulation = Simulation(scheme("mlfq", thresholds=self.thresholds), SHARES_NOTHING, receiver=0)
        sizes = SizeDistribution.load(workload)
        trace = poisson(sizes, load, RATE_BPS, self.rng, duration_s=float(seconds))
        self.simulation.add(to_one(trace, 2, self.rng))

    def hello(self):
        return Hello(
            host=self.name,
            group=self.group,
            levels=4,
            backend="fake",
            queues="none",
            link_rate_bps=RATE_BPS,
            epoch=self.epoch,
            thresholds=list(self.thresholds.bytes),
            version="0",
        )

    def take(self, policy):
        """As an agent does: only a higher epoch counts."""
        self.received.append(policy)
        if policy.epoch > self.epoch:
            self.epoch, self.thresholds = policy.epoch, Thresholds.of(policy.thresholds)
            self.simulation.set_thresholds(self.thresholds)

    def report(self, until_s):
        epoch = self.epoch
        done = self.simulation.run_until(until_s)
        self.sequence += 1
        seen_us = np.maximum((done.fct_s - self.simulation.physics.base_latency_s) * 1e6, 0).astype(int)
        sample = self.rng.permutation(len(done))[:100]
        flows = [
            FlowSummary("10.0.0.1", "10.0.0.2", 1, 2, 6, int(done.size_bytes[i]), int(seen_us[i]), 0) for i in sample
        ]
        report = Report(
            host=self.name,
            sequence=self.sequence,
            interval_ns=10**9,
            epoch=epoch,
            sent_bytes=int(done.size_bytes.sum()),
            sizes=LogHistogram.of(done.size_bytes).sparse(),
            durations=LogHistogram.of(seen_us).sparse(),
            finished=len(done),
            finished_sample=flows,
            long=0,
            long_flows=[],
            active=0,
            counters={},
        )
        return self.lie(self, report) if self.lie else report


class Loop:
    """The hosts, and central's logic with a scheme and a learner given as plain functions.

    Args:
        hosts: simulated ones.
        baseline: thresholds that the scheme decides at once.
        propose: summary -> thresholds or None; whatever it returns goes to the guard.
    """

    def __init__(self, hosts, baseline, propose, folder=None, learn="on", **guard):
        self.hosts = {host.name: host for host in hosts}
        section = PolicySection(learn=learn, objective="slowdown")
        config = CentralConfig(policy=section, guard=GuardSection(**guard))
        self.registry = Registry(60.0, 5.0)
        self.enforcement = Enforcement(self.registry, self, ThresholdLog(""), 3600.0)
        self.steering = Steering(config, self.registry, self.enforcement, GuardMemory(folder))
        self.baseline, self.propose, self.now_s = baseline, propose, 0
        self.exposed = []  # per second: how many hosts had the challenger
        for host in hosts:
            joined = self.registry.hello(host.name, host.name.encode(), host.hello(), 0.0)
            self.steering.joined(joined, 0.0)

    @property
    def guard(self):
        return self.steering.guards["web", 4]

    def send(self, peers, message):
        """The link."""
        for peer in peers:
            if isinstance(message, Policy):
                self.hosts[peer.decode()].take(message)

    def second(self):
        """All hosts report, the guards advance, and every five seconds scheme and learner have their say."""
        from central.policy.fixed import FixedPolicy

        self.now_s += 1
        for name, host in self.hosts.items():
            report = host.report(float(self.now_s))
            known = self.registry.report(name, name.encode(), report, float(self.now_s))
            self.steering.reported(known, report, float(self.now_s))
        self.steering.advance(float(self.now_s))
        if self.now_s % 5 == 0:
            summaries = list(self.registry.summaries(float(self.now_s)))
            for summary in self.steering.questions(summaries):
                self.steering.decide(summary, FixedPolicy(self.baseline).decide(summary), float(self.now_s))
            self.steering.recheck(summaries, float(self.now_s))
            for summary in self.steering.lesson(summaries, float(self.now_s)).asked:
                self.steering.propose(summary, Proposal(self.propose(summary), "for a test"), float(self.now_s))
        usual = self.registry.groups["web"].in_force.get(4)
        self.exposed.append(sum(usual is not None and h.thresholds != usual.thresholds for h in self.hosts.values()))

    def until(self, condition, seconds):
        for _ in range(seconds):
            if condition():
                return True
            self.second()
        return condition()

"""Runs one trace under one or more schemes in one star, and hands back everything that was measured.

    star -> shape the port -> calibrate on the idle path -> the same trace under every scheme -> check the capture

The star goes away whatever happens, Ctrl-C and SIGTERM included.
"""

import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from testbed.capture.oracle import InForce, Verdict, check
from testbed.capture.packets import read_packets
from testbed.capture.ring import RingCapture
from testbed.daemons import Daemons, Usage
from testbed.flows.calibration import REPEATS, SIZES, Calibration, calibrate
from testbed.flows.recorded import RecordedTrace, make_trace
from testbed.flows.replay import replay
from testbed.flows.results import Results
from testbed.netns.enter import call_in
from testbed.netns.programs import Programs
from testbed.netns.registry import RUNTIME_DIR, Run
from testbed.netns.star import BOTTLENECK_PORT, MTU_BYTES, RTO_MIN_MS, StarPlan
from testbed.netns.switch_port import PortCounters, port_counters, shape
from testbed.netns.tcp import TcpCounters, base_rtt_us, tcp_counters
from testbed.plan import RunPlan
from testbed.schemes import (
    check_kernel,
    check_names,
    dscp_of,
    has_agents,
    in_force,
    ranks_by_more_than_sent,
    thresholds_of,
    transport_of,
)


class Steps(Protocol):
    """Who is told how far things are."""

    def begin(self, step: str, total: float) -> None:
        """A step begins; it is done at `total`."""

    def advance(self, done: float, note: str = "") -> None:
        """The step is this far."""


@dataclass(frozen=True)
class Capture:
    """What the capture saw, and what the check makes of it."""

    pcap: Path
    packets: int
    missed: int
    window_s: float
    verdict: Verdict


@dataclass
class SchemeOutcome:
    """One trace under one scheme."""

    results: Results
    port: PortCounters
    tcp: TcpCounters
    elapsed_s: float
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    capture: Capture | None = None


@dataclass
class Outcome:
    """All of an experiment."""

    plan: RunPlan
    trace: RecordedTrace
    calibration: Calibration
    environment: dict[str, Any]
    schemes: dict[str, SchemeOutcome]


def run_experiment(
    plan: RunPlan, schemes: Sequence[str], out_dir: Path, steps: Steps, runtime_dir: Path = RUNTIME_DIR
) -> Outcome:
    """Run the plan's trace under every scheme; traces, flows and logs go to `out_dir`.

    Raises:
        FabricpilotError: with one line that says what failed; nothing of the star is left.
    """
    check_names(schemes)
    trace = make_trace(plan.recipe)
    with star_in_place(plan.senders, steps, runtime_dir, plan.send_buffer_bytes) as star:
        check_kernel(schemes, star, programs_of(star, out_dir), plan.rate_bps, plan.buffer_bytes)
        calibration = calibrated(star, trace, plan.rate_bps, plan.buffer_bytes, out_dir / "calibration", steps)
        environment = _environment(plan, schemes, star)
        outcomes = {}
        for scheme in schemes:
            outcomes[scheme] = _run_scheme(plan, scheme, star, trace, out_dir / scheme, steps)
    return Outcome(plan, trace, calibration, environment, outcomes)


@contextmanager
def star_in_place(
    senders: int, steps: Steps, runtime_dir: Path = RUNTIME_DIR, send_buffer_bytes: int = 0, receivers: int = 1
) -> Iterator[StarPlan]:
    """A star while the context lasts. SIGTERM and SIGHUP end it like Ctrl-C does."""
    run = Run.create(runtime_dir)
    with _signals(_leave, signal.SIGTERM, signal.SIGHUP):
        try:
            steps.begin(f"build the star: {senders} senders, {receivers} receiver{'s' * (receivers > 1)}", 1)
            star = StarPlan(run, senders, send_buffer_bytes, receivers)
            star.build()
            steps.advance(1)
            yield star
        finally:
            with _signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                run.remove()


def calibrated(
    star: StarPlan, trace: RecordedTrace, rate_bps: int, buffer_bytes: int, out_dir: Path, steps: Steps
) -> Calibration:
    """Ideal completion times up to the trace's largest flow, on idle ports without bands; all ports are alike."""
    programs = programs_of(star, out_dir)
    shape(programs, star, rate_bps, buffer_bytes, None)
    steps.begin("calibrate: flows alone on the idle path", SIZES * REPEATS)
    return calibrate(
        star,
        programs,
        int(trace.size_bytes.max()),
        rate_bps,
        out_dir,
        lambda flows, _: steps.advance(flows, f"{flows} flows"),
    )


def _run_scheme(
    plan: RunPlan, scheme: str, star: StarPlan, trace: RecordedTrace, out_dir: Path, steps: Steps
) -> SchemeOutcome:
    programs = programs_of(star, out_dir)
    window = _CaptureWindow(plan, star) if has_agents(scheme) else None
    thresholds = thresholds_of(scheme, plan.recipe)
    steps.begin(f"{scheme}: get ready", 1)
    with in_force(scheme, star, programs, plan.rate_bps, plan.buffer_bytes, plan.decision_s, thresholds) as daemons:
        steps.begin(f"{scheme}: {len(trace):,} flows", len(trace))
        began_ns = time.time_ns()
        tcp_before = tcp_counters(star)

        def progress(flows: int, elapsed_s: float) -> None:
            steps.advance(flows, f"{max(0.0, elapsed_s):.0f} of {plan.duration_s:.0f} s")
            if window is not None:
                window.at(elapsed_s)

        try:
            drain_s = plan.drain_s(int(trace.size_bytes.max()))
            transport = transport_of(scheme)
            results = replay(star, programs, trace, out_dir, drain_s=drain_s, progress=progress, transport=transport)
        finally:
            if window is not None:
                window.stop()
        outcome = SchemeOutcome(
            results=results,
            port=port_counters(programs, star),
            tcp=tcp_counters(star).since(tcp_before),
            elapsed_s=(time.time_ns() - began_ns) / 1e9,
        )
        if daemons is not None:
            outcome.usage = daemons.usage()
            outcome.thresholds = _timeline(daemons, star, began_ns)
    results.save(out_dir / "flows.csv")
    if window is not None and daemons is not None:
        steps.begin("check the DSCP of captured packets", 1)
        outcome.capture = window.verdict(daemons, out_dir / "capture.pcap", scheme)
        steps.advance(1)
    return outcome


class _CaptureWindow:
    """Opens and closes the capture while the traffic runs, and has it checked afterwards."""

    def __init__(self, plan: RunPlan, star: StarPlan) -> None:
        self.plan = plan
        self.star = star
        self.ring: RingCapture | None = None
        self._stopped = False

    def at(self, elapsed_s: float) -> None:
        """Called every so often with the time since the traffic began."""
        since_s = elapsed_s - self.plan.capture_begins_s
        if self.ring is None and since_s >= 0:
            self.ring = RingCapture(self.star.switch, (BOTTLENECK_PORT, "br0"), self.plan.capture_packets)
        elif since_s >= self.plan.capture_s:
            self.stop()

    def stop(self) -> None:
        """Capture no more. Idempotent."""
        if self.ring is not None and not self._stopped:
            self._stopped = True
            self.ring.stop()

    def verdict(self, daemons: Daemons, pcap: Path, scheme: str) -> Capture:
        """Check what was captured under a scheme."""
        assert self.ring is not None, "the traffic ended before the capture began"
        history: dict[str, Sequence[InForce]] = {}
        for host in self.star.sender_hosts:
            history[host.address] = history[host.address6] = daemons.history(host)
        packets = self.ring.save(pcap)
        window_s = (self.ring.ended_ns - self.ring.began_ns) / 1e9
        missed = self.ring.missed
        self.ring.close()
        written = ranks_by_more_than_sent(scheme)
        dscp = dscp_of(scheme)
        assert dscp is not None
        return Capture(pcap, packets, missed, window_s, check(read_packets(pcap), history, dscp, written=written))


def programs_of(star: StarPlan, out_dir: Path) -> Programs:
    """What starts programs in the star, with logs below `out_dir`, which is made."""
    out_dir.mkdir(parents=True, exist_ok=True)
    return Programs(star.run, out_dir / "logs")


def _timeline(daemons: Daemons, star: StarPlan, began_ns: int) -> list[dict[str, Any]]:
    """Thresholds over time: what the agents began with, then central's changes."""
    first = daemons.history(star.sender_hosts[0])[0]
    reason = "default" if daemons.thresholds is None else "of the scheme"
    line: list[dict[str, Any]] = [{"time_s": 0.0, "thresholds": list(first.thresholds.bytes), "reason": reason}]
    if daemons.threshold_log.exists():
        for text in daemons.threshold_log.read_text().splitlines():
            entry = json.loads(text)
            time_s = round(entry["time"] - began_ns / 1e9, 3)
            line.append({"time_s": time_s, "thresholds": entry["thresholds"], "reason": entry["reason"]})
    return line


def _environment(plan: RunPlan, schemes: Sequence[str], star: StarPlan) -> dict[str, Any]:
    """What the numbers depend on, stated."""
    memory = call_in(
        star.receiver.namespace,
        lambda: {n: Path(f"/proc/sys/net/ipv4/{n}").read_text().split() for n in ("tcp_wmem", "tcp_rmem")},
    )
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "topology": f"star of network namespaces: {plan.senders} senders, 1 receiver, 1 switch",
        "bottleneck_bps": plan.rate_bps,
        "sender_links": "veth, not shaped",
        "buffer_bytes": plan.buffer_bytes,
        "base_rtt_us": round(base_rtt_us(star), 1),
        "mtu_bytes": MTU_BYTES,
        "segmentation_offload": "off in effect (gso_max_segs 1): one packet is one wire packet",
        "tcp_congestion_control": ", ".join({transport_of(name).congestion_control: 0 for name in schemes}),
        "tcp_rto_min_ms": RTO_MIN_MS,
        "tcp_initial_rto_ms": 1000,
        **memory,
    }


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Handle these signals so while the context lasts."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

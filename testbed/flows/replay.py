"""Plays a trace through a star: a process per sending and receiving host, and the results of every flow.

The processes report flow by flow on their standard output; this end only reads, so progress and results come for free.
"""

import selectors
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fabricpilot.errors import FabricpilotError
from testbed.flows.protocol import ORDINARY, Transport
from testbed.flows.recorded import RecordedTrace
from testbed.flows.results import LOST, Results
from testbed.netns.programs import Program, Programs
from testbed.netns.star import StarPlan

_READY_S = 20.0
_LEAD_S = 0.3  # between telling the senders when to begin and that moment

Progress = Callable[[int, float], None]  # flows ended so far, seconds since the beginning


def replay(
    star: StarPlan,
    programs: Programs,
    trace: RecordedTrace,
    out_dir: Path,
    *,
    drain_s: float,
    progress: Progress | None = None,
    transport: Transport = ORDINARY,
) -> Results:
    """Send every flow of `trace`; those not completed `drain_s` after the last start are lost.

    Writes `trace.csv` and the processes' logs in `out_dir`. Senders that hint run in the cgroups of their hosts, which
    the agents have made theirs.

    Raises:
        FabricpilotError: a process did not start.
    """
    path = out_dir / "trace.csv"
    trace.save(path)
    module = [*programs.python, "-m"]
    receivers = [
        programs.start(
            f"receiver-{host.name}",
            host.namespace,
            [*module, "testbed.flows.receiver", host.address, *transport.arguments],
            talk=True,
        )
        for host in star.receiver_hosts
    ]
    _await_ready(receivers)
    numbers = [n for n in range(star.senders) if (trace.sender == n).any()]
    senders = [
        programs.start(
            f"sender-s{n}",
            star.sender_hosts[n].namespace,
            [*module, "testbed.flows.sender", str(path), str(n), star.receiver_of(n).address, *transport.arguments],
            talk=True,
            cgroup=star.run.cgroup(star.sender_hosts[n].name) if transport.hints else None,
        )
        for n in numbers
    ]
    _await_ready(senders)
    begin_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
    for sender in senders:
        sender.tell(str(begin_ns))
    deadline_s = _LEAD_S + float(trace.start_ns[-1]) / 1e9 + drain_s
    results = _collect(senders, trace, deadline_s, progress)
    for program in (*senders, *receivers):
        program.stop()
    return results


def _await_ready(programs: list[Program]) -> None:
    for program in programs:
        line = program.hear(_READY_S)
        if line != "ready":
            raise FabricpilotError(f"{program.name} did not start; see {program.log}")


def _collect(senders: list[Program], trace: RecordedTrace, timeout_s: float, progress: Progress | None) -> Results:
    fct_ns = np.full(len(trace), LOST, np.int64)
    late_ns = np.full(len(trace), LOST, np.int64)
    losses: dict[int, str] = {}
    ended = 0
    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for sender in senders:
            selector.register(sender.output, selectors.EVENT_READ, sender)
        while selector.get_map() and (left_s := began + timeout_s - time.monotonic()) > 0:
            for key, _ in selector.select(min(left_s, 0.2)):
                lines, open_still = key.data.lines()
                for line in lines:
                    if line == "end":
                        open_still = False
                        continue
                    number, late, *rest = line.split(" ", 3)
                    flow = int(number)
                    late_ns[flow] = int(late)
                    ended += 1
                    if rest[0] == "lost":
                        losses[flow] = rest[1]
                    else:
                        fct_ns[flow] = int(rest[0])
                if not open_still:
                    selector.unregister(key.fileobj)
            if progress is not None:
                progress(ended, time.monotonic() - began - _LEAD_S)
    return Results(trace, fct_ns, late_ns, losses)

"""The process that decides: it runs the policy beside the daemon, so that the link never waits for an optimiser.

The daemon `submit`s the summaries of all groups, goes on serving its sockets, and takes the decisions when `fileno`
becomes readable. A worker that dies or takes too long is replaced in the next round; thresholds stay meanwhile.
When the daemon ends, however it ends, its end of the pipe closes and the worker leaves.
"""

import logging
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from central.policy import policy_of
from central.policy.base import Decision, GroupSummary, ThresholdPolicy
from fabricpilot.config import PolicySection
from fabricpilot.errors import FabricpilotError

log = logging.getLogger(__name__)

MAX_SECONDS = 60.0  # for one round of decisions; the first one also loads the libraries


@dataclass(frozen=True)
class Decided:
    """One round of decisions, in the order of the summaries."""

    summaries: list[GroupSummary]
    decisions: list[Decision]
    seconds: float  # the policy's own time


class Worker:
    """A policy in a process of its own.

    Args:
        section: which policy; checked here, so that a wrong one is told at start.

    Raises:
        UsageError: as `policy_of`.
    """

    def __init__(self, section: PolicySection) -> None:
        policy_of(section)
        self.restarts = 0
        self._section = section
        self._asked: list[GroupSummary] | None = None
        self._asked_at = 0.0
        self._running: tuple[BaseProcess, Connection] | None = None
        self._start()

    @property
    def busy(self) -> bool:
        """Whether a round is under way."""
        return self._asked is not None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._running[0].pid if self._running else None

    def fileno(self) -> int:
        """Readable when decisions are there or the worker has died; -1 while there is no worker."""
        return self._running[1].fileno() if self._running else -1

    def submit(self, summaries: list[GroupSummary]) -> None:
        """Begin a round; none must be under way. Starts a worker if the one before has died."""
        if self._running is None:
            self.restarts += 1
            self._start()
        assert self._running is not None
        self._asked, self._asked_at = summaries, time.monotonic()
        try:
            self._running[1].send(summaries)
        except OSError:
            self._drop("it died")

    def collect(self) -> Decided | None:
        """The round's decisions if they are there. Gives a worker up that died or takes too long."""
        if self._running is None:
            return None
        pipe = self._running[1]
        try:
            if not pipe.poll():
                if self._asked is not None and time.monotonic() - self._asked_at > MAX_SECONDS:
                    self._drop(f"no decision within {MAX_SECONDS:g} s")
                return None
            decisions, seconds = pipe.recv()
        except (EOFError, OSError):
            self._drop("it died")
            return None
        asked, self._asked = self._asked, None
        return Decided(asked or [], decisions, seconds)

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._running is not None:
            process, pipe = self._running
            self._running = self._asked = None
            pipe.close()
            process.kill()  # it holds nothing that a gentler end would save
            process.join()
            process.close()

    def _start(self) -> None:
        # spawn: a fork would share ZeroMQ's threads and sockets.
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        process = context.Process(
            target=_decide_until_closed, args=(far, self._section), name="fabricpilot-policy", daemon=True
        )
        process.start()
        far.close()
        self._running = (process, near)

    def _drop(self, why: str) -> None:
        """Without a worker until the next round, so that one that cannot start is tried once per round."""
        log.error("policy worker dropped: %s; thresholds stay as they are, the next round starts another", why)
        self.close()


def _decide_until_closed(pipe: Connection, section: PolicySection) -> None:
    """The worker process: decide whatever comes through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon ends us
    policy = policy_of(section)
    while True:
        try:
            summaries = pipe.recv()
            begin = time.perf_counter()
            decisions = [_decide(policy, summary) for summary in summaries]
            pipe.send((decisions, time.perf_counter() - begin))
        except (EOFError, OSError):
            return


def _decide(policy: ThresholdPolicy, summary: GroupSummary) -> Decision:
    """One decision; a policy that fails leaves the thresholds as they are."""
    try:
        return policy.decide(summary)
    except FabricpilotError as error:
        return Decision(None, f"{policy.name}: {error}")
    except Exception as error:
        # One group's odd report must not take the decisions of all others with it.
        log.exception("policy %s failed for group %s", policy.name, summary.group)
        return Decision(None, f"{policy.name} failed: {type(error).__name__}")

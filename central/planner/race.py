"""Solvers side by side, each in a process of its own that can be abandoned: this is what makes a deadline hold.

A solver looks at the clock, but what it calls may not: HiGHS cannot be stopped in its presolve, and on a busy machine
any piece of work takes longer than it did. So a solver runs in a forked child (libraries, kernels and the mapping are
there already), which sends what it has found, checked (`judge`), over a pipe: sketches while a heuristic walks, plans,
at last its solution. The parent does nothing but listen: it keeps the best, tells the other lanes of it, and hands it
out when the time is over. As it sleeps otherwise, it is on time on a busy machine too. Children that are late are
killed.
"""

import ctypes
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from central.planner.judge import Checked, Judge, check
from central.planner.model.problem import Board, Deadline, Problem, Solution, Step
from fabricpilot.errors import FabricpilotError

Run = Callable[[Problem, Deadline, int], Solution]

SKETCH_S = 0.1  # at least between two sketches; and
SKETCH_CHECKS = 8  # times what a check takes, but no more
SKETCH_SHARE = 0.4  # of the deadline than this: something should be there in any case
LAST_CHECKS = 2.5  # times what a check takes is kept for checking and sending the last plan,
MOST_LAST_SHARE = 0.4  # but no more of the deadline than this
MOST_TOLD_BYTES = 64 * 1024  # of a plan that lanes tell each other: it must fit the pipe of one who does not listen
_NICE = 19
_ended: list[int] = []  # processes that were not waited for yet
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Said:
    """What a child says: a plan, its last word (`final`), or why it failed; `heard`: how often it has listened."""

    plan: Checked | None
    heard: int
    final: bool = False
    proven: bool = False
    impossible: bool = False
    error: Exception | None = None


class _Wire(Board):
    """The board as a child sees it: a pipe."""

    def __init__(self, problem: Problem, solver: str, pipe: Connection, check_s: float, seconds: float) -> None:
        self._problem, self._solver, self._pipe = problem, solver, pipe
        self._sketch_s = max(SKETCH_S, min(SKETCH_CHECKS * check_s, SKETCH_SHARE * seconds))
        self._posted_s = time.monotonic()
        self._heard = 0

    def post(self, solution: Solution) -> None:
        self._pipe.send(_Said(check(self._problem, solution, self._solver), self._heard))
        self._posted_s = time.monotonic()

    def sketch(self, steps: Sequence[Step]) -> None:
        if time.monotonic() - self._posted_s >= self._sketch_s:
            self.post(Solution(tuple(steps)))

    def close(self, solution: Solution) -> None:
        """The last word."""
        plan = None if solution.impossible else check(self._problem, solution, self._solver)
        self._pipe.send(_Said(plan, self._heard, True, solution.proven, solution.impossible))

    def fail(self, error: Exception) -> None:
        """No plan, but an error."""
        self._pipe.send(_Said(None, self._heard, final=True, error=error))

    def latest(self) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = ()
        while self._pipe.poll():
            steps = self._pipe.recv()
            self._heard += 1
        return steps


@dataclass
class _Lane:
    name: str
    process: int
    pipe: Connection
    known: tuple[Step, ...] = ()  # the best plan as far as it has been told, or has it itself
    told: int = 0
    heard: int = 0


def race(
    problem: Problem, lanes: Sequence[tuple[str, Run]], seconds: float, seed: int, judge: Judge, check_s: float
) -> None:
    """Run all lanes until one has proven its plan, all have ended, or `seconds` are over; `judge` hears of every plan.

    With one lane its solution stands, whatever it posted before. Lanes after the first use the processor that the first
    and everybody else leave. `check_s` is what a check takes about.

    Raises:
        FabricpilotError: what a lane raised, or that a process died and no plan is there.
    """
    until = time.monotonic() + seconds
    end = Deadline(seconds - min(LAST_CHECKS * check_s, MOST_LAST_SHARE * seconds))
    running: list[_Lane] = []
    died = ""
    try:
        for number, (name, run) in enumerate(lanes):
            running.append(_start(name, run, problem, end, seed, check_s, first=not number))
        while running and (left := until - time.monotonic()) > 0.0:
            ready = wait([lane.pipe for lane in running], left)
            for lane in [lane for lane in running if lane.pipe in ready]:
                said = _listen(lane)
                if said is None or said.final:
                    running.remove(lane)
                    _end(lane)
                if said is None:
                    died = lane.name
                    continue
                if said.error is not None:
                    raise said.error
                if said.plan is not None:
                    judge.hear(said.plan, final=said.final and len(lanes) == 1)
                    if judge.best is said.plan:
                        lane.known = said.plan.steps
                judge.impossible |= said.impossible
                if judge.impossible or said.proven or judge.met():
                    return
            for lane in running:
                _tell(lane, judge.best.steps)
    finally:
        for lane in running:
            _end(lane)
    if died and not judge.heard:
        raise FabricpilotError(f"solver {died} ended without a plan: its process died")


def settle(options: int = 0) -> None:
    """Wait for the children that were ended, so that their CPU time is known; with WNOHANG for those that are gone."""
    for process in list(_ended):
        if os.waitpid(process, options)[0]:
            _ended.remove(process)


def _start(name: str, run: Run, problem: Problem, deadline: Deadline, seed: int, check_s: float, first: bool) -> _Lane:
    settle(os.WNOHANG)
    mine, theirs = Pipe()
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            wire = _Wire(problem, name, theirs, check_s, deadline.seconds)
            _child(run, problem, deadline, seed, wire, parent, 0 if first else _NICE)
        finally:
            os._exit(0)  # nothing of the parent's is flushed or closed here
    theirs.close()
    return _Lane(name, process, mine)


def _child(run: Run, problem: Problem, deadline: Deadline, seed: int, wire: _Wire, parent: int, nice: int) -> None:
    """What a lane's process does."""
    os.nice(nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return
    try:
        wire.close(run(problem, replace(deadline, board=wire), seed))
    except Exception as error:  # the parent raises it
        wire.fail(error)


def _listen(lane: _Lane) -> _Said | None:
    """What it says; None if it died."""
    try:
        said: _Said = lane.pipe.recv()
    except (EOFError, OSError):
        return None
    lane.heard = said.heard
    return said


def _tell(lane: _Lane, steps: tuple[Step, ...]) -> None:
    """Tell it of the best plan, unless it knows it, or has not yet heard the one before."""
    if steps == lane.known or lane.told > lane.heard:
        return
    raw = pickle.dumps(steps)
    if len(raw) > MOST_TOLD_BYTES:
        return
    with suppress(OSError):  # it is about to end; its own word comes next
        lane.pipe.send_bytes(raw)
        lane.known, lane.told = steps, lane.told + 1


def _end(lane: _Lane) -> None:
    """End it without waiting: taking down a large process of low priority takes a while."""
    with suppress(ProcessLookupError):
        os.kill(lane.process, signal.SIGKILL)
    lane.pipe.close()
    _ended.append(lane.process)

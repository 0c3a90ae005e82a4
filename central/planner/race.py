"""Solvers side by side, each in a process of its own that can be abandoned: this is what makes a deadline hold.

A solver looks at the clock, but what it calls may not: HiGHS cannot be stopped in its presolve, and on a busy machine
any piece of work takes longer than it did. So a solver runs in a forked child (libraries, kernels and the mapping are
there already) and sends what it has found over a pipe: sketches while a heuristic walks, plans, at last its solution.
The parent has nothing to do but to listen: it checks each plan at once, keeps the best (`judge`), tells the other
lanes of it, and hands it out when the time is over. Children that are late are killed.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from central.planner.judge import Judge
from central.planner.model.problem import Board, Deadline, Problem, Solution, Step
from fabricpilot.errors import FabricpilotError

Run = Callable[[Problem, Deadline, int], Solution]

SKETCH_S = 0.2  # between two sketches
CHECK_S, CHECK_S_PER_VM = 0.005, 8e-6  # what is kept for sending and checking the last plan
MOST_CHECK_SHARE = 0.3  # of the deadline, at most
GRACE_S = 0.1  # a last plan is still checked if that ends no later than this after the deadline
MOST_TOLD_BYTES = 64 * 1024  # of a plan that lanes tell each other: it must fit the pipe of one who does not listen
_NICE = 19
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Said:
    """What a child says: a plan, its last word (`final`), or why it failed; `heard`: how often it has listened."""

    solution: Solution
    heard: int
    final: bool = False
    error: Exception | None = None


class _Wire(Board):
    """The board as a child sees it: a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._posted_s = time.monotonic()
        self.heard = 0

    def post(self, solution: Solution) -> None:
        self._posted_s = time.monotonic()
        self._pipe.send(_Said(solution, self.heard))

    def sketch(self, steps: Sequence[Step]) -> None:
        if time.monotonic() - self._posted_s >= SKETCH_S:
            self.post(Solution(tuple(steps)))

    def latest(self) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = ()
        while self._pipe.poll():
            steps = self._pipe.recv()
            self.heard += 1
        return steps


@dataclass
class _Lane:
    name: str
    process: BaseProcess
    pipe: Connection
    known: tuple[Step, ...] = ()  # the best plan as far as it has been told, or has it itself
    told: int = 0
    heard: int = 0


def race(
    problem: Problem, lanes: Sequence[tuple[str, Run]], seconds: float, seed: int
) -> tuple[tuple[Solution, ...], Judge]:
    """Run all lanes until one has proven its plan, all have ended, or `seconds` are over; the solutions that came.

    The plans are the judge's to tell. With one lane its solution stands, whatever it posted before. Lanes after the
    first use the processor that the first and everybody else leave.

    Raises:
        FabricpilotError: what a lane raised, or that a process died and no plan is there.
    """
    until = time.monotonic() + seconds
    kept = min(CHECK_S + CHECK_S_PER_VM * len(problem.mapping.vms), MOST_CHECK_SHARE * seconds)
    end = Deadline(seconds - kept)
    running = [_start(name, run, problem, end, seed, first=not number) for number, (name, run) in enumerate(lanes)]
    judge = Judge(problem)  # while they run
    solutions: list[Solution] = []
    died = ""
    try:
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
                if said.final:
                    solutions.append(said.solution)
                    if said.solution.impossible:
                        return tuple(solutions), judge
                if time.monotonic() + 1.5 * judge.cost_s > until + GRACE_S:
                    continue  # too late to check it
                kept_it = judge.hear(said.solution, lane.name, final=said.final and len(lanes) == 1)
                if said.final and (said.solution.proven or judge.met()):
                    return tuple(solutions), judge
                if kept_it:
                    lane.known = said.solution.steps
            for lane in running:
                _tell(lane, judge.best.steps)
    finally:
        for lane in running:
            _end(lane)
    if died and not judge.heard:
        raise FabricpilotError(f"solver {died} ended without a plan: its process died")
    return tuple(solutions), judge


def settle() -> None:
    """Wait for the children that were ended, so that their CPU time is known."""
    for process in multiprocessing.active_children():
        process.join()


def _start(name: str, run: Run, problem: Problem, deadline: Deadline, seed: int, first: bool) -> _Lane:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    nice = 0 if first else _NICE
    process = context.Process(target=_child, args=(run, problem, deadline, seed, theirs, os.getpid(), nice))
    process.start()
    theirs.close()
    return _Lane(name, process, mine)


def _child(run: Run, problem: Problem, deadline: Deadline, seed: int, pipe: Connection, parent: int, nice: int) -> None:
    """What a lane's process does."""
    os.nice(nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return
    wire = _Wire(pipe)
    timed = Deadline(deadline.seconds, deadline.clock, deadline.started, wire)
    try:
        said = _Said(run(problem, timed, seed), wire.heard, final=True)
    except Exception as error:  # the parent raises it
        said = _Said(Solution(), wire.heard, final=True, error=error)
    pipe.send(said)


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
    """End it without waiting: taking down a large process takes a while."""
    lane.process.kill()
    lane.pipe.close()

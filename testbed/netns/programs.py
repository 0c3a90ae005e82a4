"""Processes of a run: started in a namespace, written down in the register, logged, and always ended.

Each leads its own session: Ctrl-C reaches only us, and we end them in order.
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fabricpilot.errors import FabricpilotError
from testbed.netns.enter import argv_in
from testbed.netns.registry import Run, in_cgroup

_STOP_S = 5.0


@dataclass(eq=False)
class Program:
    """A running process of ours."""

    name: str
    log: Path
    popen: "subprocess.Popen[bytes]"
    _pending: bytes = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    @property
    def output(self) -> IO[bytes]:
        """Its standard output, for a selector; only of a program started with `talk`."""
        assert self.popen.stdout is not None
        return self.popen.stdout

    def tell(self, line: str) -> None:
        """Write one line to its standard input."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(line.encode() + b"\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            raise FabricpilotError(f"{self.name} has ended unexpectedly; see {self.log}") from None

    def lines(self) -> tuple[list[str], bool]:
        """Whole lines that are there now, and whether more may come; call when `output` is readable."""
        data = os.read(self.output.fileno(), 1 << 16)
        *whole, self._pending = (self._pending + data).split(b"\n")
        return [line.decode() for line in whole], bool(data)

    def hear(self, timeout_s: float) -> str:
        """The next line it says; empty if it ends or stays silent. For programs that say one line at a time."""
        until = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while selector.select(max(0.0, until - time.monotonic())):
                lines, more = self.lines()
                if lines or not more:
                    return lines[0] if lines else ""
        return ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it (and its children) and return its exit status. Idempotent."""
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.close()
        for step in (number, signal.SIGKILL):
            if self.popen.poll() is not None:
                break
            with suppress(ProcessLookupError):
                os.killpg(self.pid, step)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(_STOP_S)
        status = self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        return status


@dataclass
class Programs:
    """Starts programs of one run and ends what is left of them.

    Attributes:
        run: the register they are written down in.
        log_dir: where `<name>.log` of each goes.
    """

    run: Run
    log_dir: Path
    started: list[Program] = field(default_factory=list)
    python: tuple[str, ...] = (sys.executable,)

    def start(
        self,
        name: str,
        namespace: str,
        argv: Sequence[str],
        *,
        talk: bool = False,
        cgroup: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Program:
        """Start `argv` in the namespace.

        Args:
            name: names it in messages, and its log.
            namespace: network namespace.
            argv: command line.
            talk: connect its standard input and output with us; otherwise its output goes to the log as its errors do.
            cgroup: that it is to be in from its beginning, as `Run.make_cgroup` named it.
            environ: added to our environment.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        log = self.log_dir / f"{name}.log"
        if all(program.name != name for program in self.started):
            log.unlink(missing_ok=True)  # of an earlier run in the same directory; a restart in this one adds to it
        with log.open("ab") as errors:
            popen = subprocess.Popen(
                argv_in(namespace, in_cgroup(cgroup, argv) if cgroup else argv),
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else errors,
                stderr=errors,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )
        self.run.record_process(popen.pid)
        program = Program(name, log, popen)
        self.started.append(program)
        return program

    def run_in(self, namespace: str, argv: Sequence[str], timeout_s: float = 30.0) -> str:
        """Run `argv` in the namespace to its end; returns its standard output.

        Raises:
            FabricpilotError: it failed; the message has what it said.
        """
        try:
            done = subprocess.run(
                argv_in(namespace, argv), capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise FabricpilotError(f"'{' '.join(argv)}' did not end within {timeout_s:g} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise FabricpilotError(
                f"'{' '.join(argv)}' failed ({done.returncode}): {said[-1] if said else 'no output'}"
            )
        return done.stdout

    def stop_all(self) -> None:
        """End everything started, last first."""
        for program in reversed(self.started):
            program.stop()
        self.started.clear()

"""`fabricpilot agent` run as an operator does: commands in a host's namespace, an agent started, waited for and ended.

For tests that start the real process; what they have in common with others is in datapath_kit.py.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

FABRICPILOT = str(Path(sys.executable).with_name("fabricpilot"))


def wait_for(
    condition: Callable[[], object], process: "subprocess.Popen[bytes] | None" = None, seconds: float = 60.0
) -> None:
    """Wait until `condition()` is true, at most `seconds`; fails at once if `process` has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)
    pytest.fail("waited in vain")


def end(process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM) -> int:
    """Send a signal and wait for the end; returns the exit status."""
    process.send_signal(how)
    return process.wait(timeout=10)


class AgentHost:
    """The commands of one host: a network namespace, and options that all of its commands get.

    Args:
        netns: its name.
        directory: for the agent's log, and its run_dir.
        options: further ones, also of `detach`.
    """

    def __init__(self, netns: str, directory: Path, *options: str):
        self.name = netns
        self.options = ("--set", f"host.run_dir={directory}", *options)
        self.log_path = directory / "agent.log"
        self.log = self.log_path.open("w")
        self.started: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str, program: tuple[str, ...] = (FABRICPILOT,)) -> list[str]:
        """`fabricpilot ...` as it is run on this host."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *program, *arguments]

    def agent(
        self, what: str, *arguments: str, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `agent <what>` to its end."""
        command = self.command("agent", what, *self.options, *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)

    def start(self, *arguments: str, program: tuple[str, ...] = (FABRICPILOT,)) -> "subprocess.Popen[bytes]":
        """Start `agent run` and wait until it answers."""
        command = self.command("agent", "run", *self.options, "--link-rate", "1Gbit", *arguments, program=program)
        process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.started.append(process)
        wait_for(lambda: self.status()["agent"] == "running", process)
        return process

    def status(self) -> dict:
        """What `agent status` says."""
        return json.loads(self.agent("status", "--json").stdout)

    def close(self) -> None:
        """End what a failed test has left behind, and detach."""
        for process in self.started:
            if process.poll() is None:
                end(process, signal.SIGKILL)
        self.agent("detach")
        self.log.close()

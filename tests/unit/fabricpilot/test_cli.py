"""The way into the one command: what ends it, be it Ctrl-C, a full disk or SIGTERM, leaves no traceback behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

MAIN = "from fabricpilot.cli import main; main()"
BENCHMARK = """
import os, signal
from fabricpilot import commands
@commands.bench.command()
def waiting():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        print("tidied up")
commands.run()
"""
# A process started in the background may have been told to ignore Ctrl-C, and so would those it starts.
INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
"""


def run(
    code: str, *arguments: str, first: Path | None = None, stdout: IO[str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """A Python process that runs `code` with those arguments; modules in the folder `first` come before all others."""
    path = [*([str(first)] if first else []), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("imported", "arguments"),
    [
        ("click", ["--version"]),  # before there is a command
        ("msgspec", ["agent", "check", "--backend", "fake"]),  # while the room that has it is imported
        ("zmq", ["agent", "status", "--backend", "fake"]),  # by the command itself
    ],
)
def test_interrupted_while_modules_are_imported(tmp_path: Path, imported: str, arguments: list[str]) -> None:
    (tmp_path / f"{imported}.py").write_text(INTERRUPTED)
    done = run(MAIN, *arguments, first=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(MAIN, "agent", "check", "--backend", "fake", stdout=full)
    said = "fabricpilot: No space left on device; make room there, or write somewhere else\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_benchmark_that_is_ended_tidies_up() -> None:
    done = run(BENCHMARK, "bench", "waiting")
    assert (done.returncode, done.stdout, done.stderr) == (143, "tidied up\n", "")

"""The way into the one command: Ctrl-C at any moment of its start ends it without a word, a full disk with one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "from fabricpilot.cli import main; main()"
INTERRUPTED = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"


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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-P", "-c", MAIN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-c", MAIN, "agent", "check", "--backend", "fake"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    said = "fabricpilot: No space left on device; make room there, or write somewhere else\n"
    assert (done.returncode, done.stderr) == (1, said)

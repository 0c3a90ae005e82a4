"""The register: what is written down goes, what is not stays; a pid that was given to somebody else is not ours."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.netns import registry
from testbed.netns.registry import Process, Run, clean


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def disown(run: Run) -> None:
    """As if the process that made this run had died."""
    (run.dir / "owner").write_text("[1, 1]")


@pytest.mark.usefixtures("as_root")
def test_clean_ends_the_processes_it_knows_and_no_other(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    disown(run)
    ours, other = sleeper(), sleeper()
    try:
        run.record_process(ours.pid)
        assert [r.processes for r in clean(dry_run=True, base_dir=tmp_path)] == [[ours.pid]]
        assert ours.poll() is None
        assert [r.processes for r in clean(base_dir=tmp_path)] == [[ours.pid]]
        assert ours.wait(5) == -signal.SIGTERM
        assert other.poll() is None
        assert not run.dir.exists()
        assert clean(base_dir=tmp_path) == []
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


@pytest.mark.usefixtures("as_root")
def test_a_pid_with_another_start_time_is_not_ours(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    disown(run)
    other = sleeper()
    try:
        started = Process.of(other.pid)
        assert started is not None
        (run.dir / "processes").write_text(f"[{other.pid}, {started.started_ticks - 1}]\n")
        assert clean(base_dir=tmp_path)[0].processes == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("as_root")
def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    assert clean(base_dir=tmp_path)[0].in_use_by == os.getpid()
    assert run.dir.exists()


@pytest.mark.usefixtures("as_root")
def test_a_namespace_not_of_this_run_is_left_alone_even_if_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "NETNS_DIR", tmp_path / "netns")
    (tmp_path / "netns").mkdir()
    (tmp_path / "netns" / "production").touch()
    run = Run.create(tmp_path / "runs")
    run.record_namespace("production")
    assert run.contents().namespaces == []

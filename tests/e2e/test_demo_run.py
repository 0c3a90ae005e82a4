"""`fabricpilot testbed demo` from the command line: it does what it says, and leaves nothing, whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyroute2 import netns

from testbed.netns.registry import RUNTIME_DIR

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_BPF, CAP_NET_ADMIN)"),
]

COMMAND = [sys.executable, "-c", "from fabricpilot.cli import main; main()", "testbed"]
SMALL = ["--duration", "10", "--senders", "2", "--rate", "100Mbit", "--scale", "0.05", "--decision-interval", "2"]
KEYS = {"mean_us", "p50_us", "p99_us", "mean_slowdown", "count"}


def run_name(pid: int) -> str | None:
    """The run that a process owns, if it has one yet."""
    for owner in RUNTIME_DIR.glob("*/owner"):
        try:
            if json.loads(owner.read_text())[0] == pid:
                return owner.parent.name
        except (OSError, ValueError):
            continue  # it is being written, or has just gone
    return None


def leftovers(run: str) -> list[str]:
    """Everything on this machine that carries the name of the run."""
    processes = [p.name for p in Path("/proc").glob("[0-9]*") if mentions(p, run)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if run in line]
    namespaces = [name for name in netns.listnetns() if run in name]
    return [*processes, *mounts, *namespaces, *map(str, RUNTIME_DIR.glob(run))]


def mentions(process: Path, run: str) -> bool:
    try:
        return run in (process / "cmdline").read_text()
    except OSError:
        return False


@contextmanager
def demo_in_progress(out: Path, phase: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A demo whose traffic has begun: (process, run)."""
    process = subprocess.Popen(
        [*COMMAND, "run", phase, *SMALL, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 40
        while not (run_name(process.pid) and (out / phase / "trace.csv").exists()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until, "the traffic did not begin"
            time.sleep(0.1)
        time.sleep(1)
        name = run_name(process.pid)
        assert name is not None
        yield process, name
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        subprocess.run([*COMMAND, "clean"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*COMMAND, "demo", "--json", *SMALL, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.timeout(120)
def test_report_tells_what_was_promised(demo: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    out, done = demo
    report = json.loads((out / "report.json").read_text())
    assert json.loads(done.stdout) == report
    assert set(report["schemes"]) == {"fifo", "fabricpilot"}
    for scheme in report["schemes"].values():
        assert set(scheme) == {"all", "small", "medium", "large"}
        assert all(set(numbers) >= KEYS for numbers in scheme.values())
    assert report["lost_flows"] == 0
    counts = [scheme["all"]["count"] for scheme in report["schemes"].values()]
    assert counts == [report["flows"]] * 2
    assert (report["workload"], report["load"], report["seed"]) == ("websearch_dctcp_bytes_trafficgenerator", 0.8, 1)
    assert (out / "fct.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (out / "index.html").read_text()


def test_every_captured_packet_had_the_right_dscp(demo: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    dscp = json.loads((demo[0] / "report.json").read_text())["dscp"]
    assert dscp["checked"] > 5_000
    assert dscp["correct"] == dscp["checked"], dscp["wrong"]
    assert set(dscp["by_dscp"]) >= {"32", "24"}
    assert dscp["missed_by_capture"] == 0
    assert dscp["flows_with_a_gap"] == 0


def test_both_schemes_saw_the_same_arrivals(demo: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    fifo, ours = ((demo[0] / scheme / "trace.csv").read_text() for scheme in ("fifo", "fabricpilot"))
    assert fifo == ours


def test_small_flows_are_faster_under_priorities(demo: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    """Not how much faster: that is the demo's to show. But an order of service that does not work is not faster."""
    schemes = json.loads((demo[0] / "report.json").read_text())["schemes"]
    assert schemes["fabricpilot"]["small"]["p50_us"] < schemes["fifo"]["small"]["p50_us"]


def test_central_changed_the_thresholds(demo: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    thresholds = json.loads((demo[0] / "report.json").read_text())["thresholds"]
    assert len(thresholds) >= 2
    assert thresholds[1]["time_s"] > 0


@pytest.mark.parametrize(
    ("scheme", "number", "status"), [("fabricpilot", signal.SIGINT, 130), ("fifo", signal.SIGTERM, 143)]
)
def test_being_stopped_leaves_nothing(tmp_path: Path, scheme: str, number: int, status: int) -> None:
    with demo_in_progress(tmp_path, scheme) as (process, run):
        assert leftovers(run)
        process.send_signal(number)
        assert process.wait(30) == status
        assert leftovers(run) == []


def test_clean_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    with demo_in_progress(tmp_path, "fabricpilot") as (process, run):
        subprocess.run([*COMMAND, "clean"], check=True, capture_output=True)
        assert process.poll() is None  # a run in progress is left alone
        process.kill()
        process.wait(10)
        assert leftovers(run)
        told = subprocess.run([*COMMAND, "clean", "--json"], check=True, capture_output=True, text=True)
        removal = next(r for r in json.loads(told.stdout)["runs"] if r["run"] == run)
        assert len(removal["namespaces"]) == 6
        assert len(removal["mounts"]) == 1
        assert leftovers(run) == []

"""`fabricpilot central run` as a process, with hosts on a real CURVE link: restarts, signals, and bad input."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from fabricpilot.config import LinkSection
from fabricpilot.control import ask
from fabricpilot.histogram import LogHistogram
from fabricpilot.keys import plan_pairs, write_pair
from fabricpilot.wire import Hello, Policy, Report
from hostagent.link import HostLink

FABRICPILOT = Path(sys.executable).with_name("fabricpilot")
HOSTS = ("h1", "h2", "h3")


@pytest.fixture
def site(tmp_path):
    for planned in plan_pairs(tmp_path, HOSTS):
        write_pair(planned)
    return tmp_path


@pytest.fixture
def start(site):
    """Start central on a port that stays the same; every one is killed when the test ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = []

    def run(*arguments, wait=True):
        process = subprocess.Popen(
            [
                *(FABRICPILOT, "central", "run", "--run-dir", site / "run", "--listen", f"tcp://127.0.0.1:{port}"),
                *("--key", site / "central.key_secret", "--authorized-keys", site / "hosts"),
                *("--interval", "0.3", "--set", "policy.min_flows=50", "--log-thresholds", site / "log.jsonl"),
                *arguments,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        if wait:
            assert "room for" in process.stderr.readline() + process.stderr.readline()
            assert "listens on" in process.stderr.readline()
        return process

    run.endpoint = f"tcp://127.0.0.1:{port}"
    yield run
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


class Fleet:
    """Hosts that report the same sizes again and again."""

    def __init__(self, stack, site, endpoint):
        self.sequence = 0
        self.policies = {name: [] for name in HOSTS}
        self.links = {
            name: stack.enter_context(
                closing(
                    HostLink(
                        LinkSection(
                            endpoint=endpoint,
                            key=str(site / "hosts" / f"{name}.key_secret"),
                            central_key=str(site / "central.key"),
                        ),
                        name,
                        lambda name=name: self.hello(name),
                    )
                )
            )
            for name in HOSTS
        }
        self.sizes = LogHistogram.of(np.random.default_rng(1).lognormal(10, 2, 200)).sparse()

    def hello(self, name):
        epoch = self.policies[name][-1].epoch if self.policies[name] else 0
        return Hello(
            host=name,
            group="default",
            levels=4,
            backend="fake",
            queues="none",
            link_rate_bps=10**9,
            epoch=epoch,
            thresholds=[1, 2, 3],
            version="0",
        )

    def until(self, condition, limit_s=40.0):
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, {name: link.trouble for name, link in self.links.items()}
            self.sequence += 1
            for name, link in self.links.items():
                link.send(
                    Report(
                        host=name,
                        sequence=self.sequence,
                        interval_ns=10**8,
                        epoch=self.policies[name][-1].epoch if self.policies[name] else 0,
                        sent_bytes=5 * 10**6,
                        sizes=self.sizes,
                        durations=self.sizes,
                        finished=200,
                        finished_sample=[],
                        long=0,
                        long_flows=[],
                        active=3,
                        counters={},
                    )
                )
                self.policies[name] += [m for m in link.receive() if isinstance(m, Policy)]
            time.sleep(0.02)


def test_hosts_get_thresholds_and_rejoin_a_central_that_was_killed(site, start):
    with ExitStack() as stack:
        first = start()
        fleet = Fleet(stack, site, start.endpoint)
        fleet.until(lambda: all(fleet.policies.values()))
        (epoch,) = {policies[0].epoch for policies in fleet.policies.values()}
        told = ask(site / "run" / "central.sock", "status")
        assert sorted(host["name"] for host in told["hosts"]) == list(HOSTS)
        worker = children(first.pid)
        assert worker
        first.kill()
        first.wait()
        wait(lambda: not any(alive(pid) for pid in worker))
        fleet.until(lambda: not any(link.connected for link in fleet.links.values()))
        assert not fleet.links["h1"].send(fleet.hello("h1"))
        start()
        fleet.until(lambda: all(policies[-1].epoch > epoch for policies in fleet.policies.values()))
        assert all(link.counters["connects"] == 2 for link in fleet.links.values())
        log = [json.loads(line) for line in (site / "log.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in log] == sorted({line["epoch"] for line in log})
        assert log[0]["epoch"] == epoch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(site, start, number):
    with ExitStack() as stack:
        central = start()
        fleet = Fleet(stack, site, start.endpoint)
        fleet.until(lambda: all(link.connected for link in fleet.links.values()))
        worker = children(central.pid)
        central.send_signal(number)
        assert central.wait(timeout=10) == 0
        assert "Traceback" not in central.stderr.read()
        wait(lambda: not any(alive(pid) for pid in worker))
        assert not (site / "run" / "central.sock").exists()


def test_it_tells_the_service_manager(site, start, monkeypatch):
    address = str(site / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        central = start()
        assert manager.recv(4096).startswith(b"READY=1")
        assert manager.recv(4096).startswith(b"WATCHDOG=1")
        central.terminate()
        central.wait(timeout=10)
        manager.setblocking(False)
        rest = []
        while True:
            try:
                rest.append(manager.recv(4096))
            except BlockingIOError:
                break
        assert rest[-1].startswith(b"STOPPING=1")


def test_two_centrals_on_one_run_dir(site, start):
    start()
    second = start(wait=False)
    assert second.wait(timeout=20) == 2
    assert "a daemon runs already" in second.stderr.read()


def test_status_as_table_and_json(site, start):
    start()
    shown = command("central", "status", "--run-dir", site / "run")
    assert shown.returncode == 0
    assert "policy optimiser" in shown.stdout
    told = json.loads(command("central", "status", "--run-dir", site / "run", "--json").stdout)
    assert told["groups"] == []
    assert told["scheme"] == "optimiser"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["status", "--run-dir", "{site}/nobody"], 1, "no daemon answers"),
        (["run", "--run-dir", "{site}/r", "--key", "{site}/nokey"], 2, "does not exist"),
        (
            ["run", "--run-dir", "{site}/r", "--key", "{site}/central.key_secret", "--authorized-keys", "{site}/no"],
            2,
            "authorized_keys",
        ),
        (["run", "--run-dir", "{site}/r", "--insecure"], 2, "loopback only"),
        (["run", "--run-dir", "{site}/r", "--listen", "127.0.0.1:5555"], 2, "link.listen"),
        (["run", "--config", "{site}/none.toml"], 2, "cannot read configuration"),
        (["run", "--config", "{site}/bad.toml"], 2, "not valid TOML"),
        (["run", "--set", "policy.intervall_s=3"], 2, "did you mean 'interval_s'"),
        (["run", "--set", "nonsense"], 2, "SECTION.KEY=VALUE"),
        (["run", "--interval", "never"], 2, "policy.interval_s"),
        (["run", "--scheme", "fifo", "--insecure", "--listen", "tcp://127.0.0.1:*", "--run-dir", "{site}/r"], 2,
         "no thresholds for central to choose"),
        (["run", "--scheme", "magic", "--insecure", "--listen", "tcp://127.0.0.1:*", "--run-dir", "{site}/r"], 2,
         "scheme 'magic' is unknown; choose from: fair"),
        (["run", "--set", "policy.thresholds=3,2,1"], 2, "ascend"),
        (["run", "--run-dir", "/proc/none"], 1, "cannot make control socket"),
        (["keys", "--out", "{site}", "--host", "../x"], 2, "host name"),
        (["keys", "--out", "{site}", "--host", "h1"], 2, "exist"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(site, arguments, code, says):
    (site / "bad.toml").write_text("[policy\n")
    done = command("central", *(argument.format(site=site) for argument in arguments))
    assert done.returncode == code
    errors = [line for line in done.stderr.splitlines() if line.startswith("fabricpilot:")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.stderr


def command(*arguments):
    return subprocess.run([FABRICPILOT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_benchmark_counts_what_arrives(tmp_path):
    code = "from central.bench import link; link()"
    arguments = ["--hosts", "3", "--seconds", "2", "--shape", "light", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    told = json.loads(done.stdout)
    assert told["reports"] >= 3
    assert told["missed"] == 0
    assert told["report_bytes"]["idle"] < told["report_bytes"]["light"] < told["report_bytes"]["largest"] < 65536

"""`fabricpilot agent` as an operator meets it: under traffic, killed, restarted, and given nonsense."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from agent_kit import FABRICPILOT, AgentHost, end, wait_for
from datapath_kit import bpf_file_system, in_netns, our_programs, run
from datapath_wire import Capture, captured, dscp_at, first_time
from pyroute2 import IPRoute, netns

from fabricpilot.levels import Thresholds, default_dscp

THRESHOLDS = Thresholds((10_000, 100_000, 1_000_000))
DSCP = default_dscp(4)
PORT = 5201
STEP_BYTES = 1000  # below a segment, so that every write is one packet


class Host(AgentHost):
    """A namespace with a NIC to schedule, another that receives, and the commands run in the first."""

    def __init__(self, name, peer, directory, pins):
        # What these tests send is one message by bytes sent, whatever pauses a busy machine makes in it.
        message = "mode=attained", "message_gap_us=60000000", "blind_message_gap_ms=600000", "starved_ms=0"
        options = [option for setting in message for option in ("--set", f"datapath.{setting}")]
        super().__init__(name, directory, "--pin-dir", str(pins / "fabricpilot"), "-i", "nic", *options)
        self.peer = peer
        with IPRoute(netns=name) as ipr:
            ipr.link("add", ifname="nic", kind="veth", peer={"ifname": "nic", "net_ns_fd": peer})
        for namespace, address in ((name, "10.9.1.1"), (peer, "10.9.1.2")):
            with IPRoute(netns=namespace) as ipr:
                index = ipr.link_lookup(ifname="nic")[0]
                ipr.addr("add", index=index, address=address, prefixlen=24)
                ipr.link("set", index=index, state="up")
                ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")

    def state(self):
        """What is on the NIC, without counters."""
        with in_netns(self.name):
            programs = str(our_programs("nic"))
        return [programs, *(run("tc", kind, "show", "dev", "nic", netns=self.name) for kind in ("qdisc", "class"))]

    def socket(self, namespace, *kind):
        netns.pushns(namespace)
        try:
            return socket.socket(*kind)
        finally:
            netns.popns()


@pytest.fixture
def host(make_netns, tmp_path):
    with bpf_file_system(tmp_path / "bpf") as pins:
        made = Host(make_netns("host"), make_netns("peer"), tmp_path, pins)
        yield made
        made.close()


class Flow(threading.Thread):
    """A TCP flow that writes small pieces until stopped."""

    def __init__(self, host):
        super().__init__(daemon=True)
        listener = host.socket(host.peer, socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("10.9.1.2", PORT))
        listener.listen(1)
        self.sender = host.socket(host.name, socket.AF_INET, socket.SOCK_STREAM)
        self.sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sender.connect(("10.9.1.2", PORT))
        self.receiver, _ = listener.accept()
        listener.close()
        self.sent = 0
        self.stopped = threading.Event()
        threading.Thread(target=self.drain, daemon=True).start()
        self.start()

    def drain(self):
        while self.receiver.recv(65536):
            pass

    def run(self):
        while not self.stopped.is_set():
            self.sender.sendall(bytes(STEP_BYTES))
            self.sent += STEP_BYTES
            time.sleep(0.0005)

    def until(self, sent_bytes):
        wait_for(lambda: self.sent >= sent_bytes)

    def close(self):
        self.stopped.set()
        self.join()
        self.sender.close()
        self.receiver.close()


@contextlib.contextmanager
def flow_on_the_wire(host: Host) -> Iterator[tuple[Flow, Capture]]:
    """A flow, ended with the block, and all its packets as they arrive."""
    with captured(host.peer, "nic") as capture:
        flow = Flow(host)
        try:
            yield flow, capture
        finally:
            flow.close()


def assert_every_packet_right(capture: Capture, sent_bytes: int) -> None:
    """All that was sent arrived, each packet on the level of the bytes before it; those without payload at the top."""
    placed = first_time(capture.packets)
    assert placed[-1][0] + placed[-1][1].payload_bytes == sent_bytes
    wrong = [(place, seen) for place, seen in placed if seen.dscp != dscp_at(place, THRESHOLDS)]
    assert not wrong, wrong[:5]
    assert {seen.dscp for seen in capture.packets if not seen.payload_bytes} == {DSCP[0]}
    assert {seen.dscp for _, seen in placed} == set(DSCP)


def test_a_killed_agent_leaves_tagging_going_and_the_next_one_adopts(host):
    first = host.start("--thresholds", ",".join(map(str, THRESHOLDS.bytes)))
    with flow_on_the_wire(host) as (flow, capture):
        flow.until(50_000)
        end(first, signal.SIGKILL)
        flow.until(flow.sent + 100_000)  # passes the second threshold with no agent there
        assert host.status()["agent"] == "not running"
        second = host.start()
        adopted = host.status()["datapath"]
        assert adopted["adopted"]
        assert [*adopted["attached_by"].values()] == [["nic"]]
        assert adopted["thresholds"] == list(THRESHOLDS.bytes)
        flow.until(1_100_000)
        [listed] = json.loads(host.agent("dump", "--json").stdout)["flows"]
    assert listed["size_bytes"] >= 1_100_000 - STEP_BYTES  # nothing was forgotten on the way
    assert_every_packet_right(capture, flow.sent)
    assert end(second, signal.SIGTERM) == 0
    assert host.status()["datapath"]["interfaces"] == ["nic"]


@pytest.mark.parametrize("outage_s", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_central_killed_changes_nothing_for_traffic_and_the_agent_rejoins(host, tmp_path, outage_s):
    keys = tmp_path / "keys"
    subprocess.run([FABRICPILOT, "central", "keys", "--out", str(keys), "--host", "h1"], check=True)
    settings = [f"--set=central.run_dir={tmp_path}/c", "--listen=tcp://127.0.0.1:5556"]
    settings += [f"--key={keys}/central.key_secret", f"--authorized-keys={keys}/hosts"]
    fixed = "--set=policy.scheme=mlfq", f"--set=policy.thresholds={','.join(map(str, THRESHOLDS.bytes))}"

    def start_central():
        return subprocess.Popen(
            host.command("central", "run", *settings, *fixed, "--interval=0.5"), stdout=host.log, stderr=host.log
        )

    central = start_central()
    try:
        link = [f"link.key={keys}/hosts/h1.key_secret", f"link.central_key={keys}/central.key", "host.name=h1"]
        agent = host.start("--central=tcp://127.0.0.1:5556", *(f"--set={item}" for item in link))
        wait_for(lambda: host.status()["policy"]["epoch"] > 0, agent)
        with flow_on_the_wire(host) as (flow, capture):
            flow.until(20_000)
            end(central, signal.SIGKILL)
            begin = time.monotonic()
            wait_for(lambda: not host.status()["link"]["connected"], agent)
            time.sleep(max(0.0, begin + outage_s - time.monotonic()))
            epoch = host.status()["policy"]["epoch"]
            central = start_central()
            wait_for(lambda: host.status()["policy"]["epoch"] > epoch, agent)
            flow.until(1_100_000)
        assert_every_packet_right(capture, flow.sent)
        assert end(agent, signal.SIGINT) == 0
    finally:
        end(central, signal.SIGKILL)


def test_detach_puts_everything_back(host):
    before = host.state()
    agent = host.start()
    assert host.state() != before
    refused = host.agent("detach")
    assert refused.returncode == 1
    assert f"pid {host.status()['pid']}" in refused.stderr
    assert end(agent, signal.SIGTERM) == 0
    told = host.agent("detach", "--dry-run").stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in told[:1]] == ["would remove the ebpf data path from"]
    assert told[1] == "nic: would restore the queues: tc qdisc del dev nic root"
    assert host.state() != before
    assert host.agent("detach").returncode == 0
    assert host.state() == before
    assert "nothing" in host.agent("detach").stdout
    assert "nothing" in host.agent("detach", "--dry-run").stdout


def test_detach_on_exit(host):
    before = host.state()
    agent = host.start("--detach-on-exit")
    assert end(agent, signal.SIGINT) == 0
    assert host.state() == before


def test_dry_run_changes_nothing_and_prints_tc_commands(host):
    before = host.state()
    done = host.agent("run", "--link-rate", "1Gbit", "--dry-run")
    assert done.returncode == 0
    assert "tc qdisc" in done.stdout
    assert re.search(r"^# nic: data path ebpf by (tcx|clsact), pinned in ", done.stdout, re.M)
    assert host.state() == before


def test_check_passes_here_and_says_what_is_absent(host):
    told = json.loads(host.agent("check", "--json").stdout)
    assert told["can_run"]
    assert any(finding["ok"] for finding in told["findings"])
    assert all(finding["ok"] or finding["why"] for finding in told["findings"])


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("-i", "nosuch"), 2, "nosuch"),
        (("--thresholds", "300,20,10"), 2, "ascend"),
        (("--thresholds", "300"), 2, "levels"),
        (("--levels", "9"), 2, "2 to 8"),
        (("--levels", "1"), 2, "2 to 8"),
        (("--set", "datapath.level=4"), 2, "did you mean 'levels'"),
        (("--set", "datapath"), 2, "SECTION.KEY=VALUE"),
        (("--config", "/does/not/exist.toml"), 2, "cannot read"),
        (("--central", "tcp://10.9.1.2:5555", "--set", "link.key=/does/not/exist"), 2, "/does/not/exist"),
        (("--central", "tcp://10.9.1.2:5555", "--insecure"), 2, "loopback"),
        (("--link-rate", "fast"), 2, "rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing_attached(host, arguments, status, says):
    before = host.state()
    rate = () if "--link-rate" in arguments else ("--link-rate", "1Gbit")
    done = host.agent("run", *rate, *arguments)
    assert done.returncode == status
    assert says in done.stderr
    errors = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1, done.stderr
    assert host.state() == before


def test_malformed_toml(host, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[datapath\n")
    done = host.agent("run", "--config", str(path))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "not valid TOML" in done.stderr


def test_no_root(host):
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    done = subprocess.run(
        [*nobody, FABRICPILOT, "agent", "run", "-i", "lo"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "root" in done.stderr


def test_no_bcc(host, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "bcc.py").write_text("raise ImportError('hidden by the test')")
    before = host.state()
    done = host.agent("run", "--link-rate", "1Gbit", env={"PYTHONPATH": str(hidden), "PATH": "/usr/sbin:/usr/bin:/bin"})
    assert done.returncode == 3
    assert "python3-bpfcc" in done.stderr
    assert host.state() == before

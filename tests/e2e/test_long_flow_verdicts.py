"""A real agent and a real central in namespaces: a flow that becomes long gets its level and its route at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest
from datapath_kit import bpf_file_system, in_netns, run

from fabricpilot.control import ask
from fabricpilot.keys import plan_pairs, write_pair

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_BPF, CAP_NET_ADMIN)"),
]
FABRICPILOT = str(Path(sys.executable).with_name("fabricpilot"))
AGENT = """
[host]
interfaces = ["nic0"]
name = "h1"
run_dir = "{directory}/agent"
report_interval_s = 0.2
[datapath]
pin_dir = "{pins}/fabricpilot"
thresholds = [1000, 2000, 3000]
blind_message_gap_ms = 60000
[queues]
kind = "none"
[link]
endpoint = "tcp://127.0.0.1:5558"
key = "{directory}/hosts/h1.key_secret"
central_key = "{directory}/central.key"
[[routes.paths]]
number = 1
interface = "nic0"
next_hop = "10.81.0.2"
[[routes.paths]]
number = 2
interface = "nic1"
next_hop = "10.82.0.2"
[routes]
gap_ms = 0
"""
CENTRAL = """
[central]
run_dir = "{directory}/central"
[link]
listen = "tcp://127.0.0.1:5558"
key = "{directory}/central.key_secret"
authorized_keys = "{directory}/hosts"
[policy]
scheme = "mlfq"
thresholds = [1000, 2000, 3000]
[long_flows]
scheme = "least-loaded"
"""


@pytest.fixture
def site(tmp_path):
    """A host with two ways to a far network behind its peer, with agent and central; all of it goes away."""
    names = [f"fptest-{role}-{uuid.uuid4().hex[:8]}" for role in ("host", "peer")]
    with ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True, timeout=30)
        host, peer = names
        run("ip", "link", "set", "lo", "up", netns=host)
        for way in range(2):
            nic, network = f"nic{way}", f"10.8{way + 1}.0"
            run("ip", "link", "add", nic, "type", "veth", "peer", "name", nic, "netns", peer, netns=host)
            for side, name in enumerate(names):
                run("ip", "address", "add", f"{network}.{side + 1}/24", "dev", nic, netns=name)
                run("ip", "link", "set", nic, "up", netns=name)
        run("ip", "route", "add", "10.99.0.0/24", "via", "10.81.0.2", netns=host)
        run("ip", "address", "add", "10.99.0.1/24", "dev", "lo", netns=peer)
        for planned in plan_pairs(tmp_path, ("h1",)):
            write_pair(planned)
        pins = stack.enter_context(bpf_file_system(tmp_path / "bpf"))
        for name, text in (("agent", AGENT), ("central", CENTRAL)):
            (tmp_path / f"{name}.toml").write_text(text.format(directory=tmp_path, pins=pins))
        stack.enter_context(in_netns(host))
        stack.callback(
            subprocess.run, [FABRICPILOT, "agent", "detach", "--config", str(tmp_path / "agent.toml")], timeout=30
        )
        for name in ("central", "agent"):
            process = subprocess.Popen([FABRICPILOT, name, "run", "--config", str(tmp_path / f"{name}.toml")])
            stack.callback(_stop, process)
        yield Site(tmp_path, peer)


def _stop(process):
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


class Site:
    def __init__(self, directory, peer):
        self.directory, self.peer = directory, peer

    def status(self, daemon):
        return ask(self.directory / daemon / f"{daemon}.sock", "status")

    def until(self, condition, limit_s=40.0):
        deadline = time.monotonic() + limit_s
        while True:
            try:
                if condition():
                    return
            except Exception as error:
                last = error
            else:
                last = None
            assert time.monotonic() < deadline, f"waited in vain ({last})"
            time.sleep(0.05)

    def flow(self, port):
        done = subprocess.run(
            [FABRICPILOT, "agent", "dump", "--config", str(self.directory / "agent.toml"), "--json"],
            capture_output=True,
            check=True,
        )
        return next(flow for flow in json.loads(done.stdout)["flows"] if flow["destination_port"] == port)


def tos_of_arrivals(namespace, nic, port):
    """A tap on the far end of one way; call what it returns for the DSCP of the packets to `port` that came so."""
    with in_netns(namespace):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        tap.bind((nic, 0x0800))
    tap.settimeout(0.2)

    def seen():
        found = []
        try:
            while True:
                frame = tap.recv(2048)
                if frame[23] == 17 and int.from_bytes(frame[36:38]) == port:
                    found.append(frame[15] >> 2)
        except TimeoutError:
            return found

    return seen


def test_a_long_flow_gets_a_verdict_and_its_packets_follow_it(site):
    site.until(lambda: site.status("agent")["link"]["connected"])
    site.until(lambda: site.status("agent")["flow_control"]["routes"] == {"1": "usable", "2": "usable"})
    [host] = site.status("central")["hosts"]
    site.until(lambda: site.status("central")["hosts"][0]["reports"] > host["reports"] + 1)  # with these routes
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taps = {nic: tos_of_arrivals(site.peer, nic, 9001) for nic in ("nic0", "nic1")}
    for _ in range(5):
        udp.sendto(bytes(1000), ("10.99.0.1", 9000))  # takes route 1
    site.until(lambda: site.status("agent")["long_flows"]["verdicts"] >= 1)
    for _ in range(5):
        udp.sendto(bytes(1000), ("10.99.0.1", 9001))  # so this one takes route 2
    site.until(lambda: site.status("agent")["long_flows"]["verdicts"] >= 2)
    before = {nic: tap() for nic, tap in taps.items()}
    assert len(before["nic0"]) == 5
    for _ in range(3):
        udp.sendto(bytes(1000), ("10.99.0.1", 9001))
    assert (taps["nic0"](), len(taps["nic1"]())) == ([], 3)
    assert (site.flow(9000)["route"], site.flow(9001)["route"]) != (0, 0)
    assert site.flow(9001)["route"] == 2
    status = site.status("central")["long_flows"]
    assert status["flows"] == 2
    assert status["decided"] >= 2
    assert site.status("agent")["long_flows"]["verdict_latency_ms"]["p50"] > 0

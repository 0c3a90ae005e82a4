"""`agent run` with rules and routes in its configuration, and verdicts from a central that speaks the wire protocol."""

import json
import socket
import time
from pathlib import Path

import pytest
import zmq
from agent_kit import AgentHost, wait_for
from datapath_kit import bpf_file_system, in_netns, run

from fabricpilot.wire import FlowVerdict, Hello, Report, Verdicts, decode_from_host, encode

CONFIG = """
[host]
interfaces = ["nic0"]
report_interval_s = 0.2
[datapath]
pin_dir = "{pins}/fabricpilot"
[queues]
kind = "none"
[link]
endpoint = "tcp://127.0.0.1:5557"
insecure = true
[[routes.paths]]
number = 2
interface = "nic1"
next_hop = "10.71.1.2"
[[rules]]
name = "bulk"
destination_port = [9]
action = "pin"
level = 3
"""


class Site(AgentHost):
    """A host with two ways to its peer, its agent running; and a central that is this test."""

    def __init__(self, name: str, directory: Path, config: Path):
        super().__init__(name, directory, "--config", str(config))
        self.central = zmq.Context().socket(zmq.ROUTER)
        self.central.bind("tcp://127.0.0.1:5557")
        self.start()

    def close(self) -> None:
        super().close()
        self.central.close(linger=0)

    def told(self, what: str) -> dict:
        return json.loads(self.agent(what, "--json").stdout)

    def levels(self) -> dict[int, int]:
        """Level by destination port."""
        return {flow["destination_port"]: flow["level"] for flow in self.told("dump")["flows"]}


@pytest.fixture
def site(make_netns, tmp_path):
    name, peer = make_netns("host"), make_netns("peer")
    for path in range(2):
        nic = f"nic{path}"
        run("ip", "link", "add", nic, "type", "veth", "peer", "name", nic, "netns", peer, netns=name)
        for side, namespace in enumerate((name, peer)):
            run("ip", "address", "add", f"10.7{path}.1.{side + 1}/24", "dev", nic, netns=namespace)
            run("ip", "link", "set", nic, "up", netns=namespace)
    run("ip", "link", "set", "lo", "up", netns=name)
    config = tmp_path / "agent.toml"
    with bpf_file_system(tmp_path / "bpf") as pins, in_netns(name):
        config.write_text(CONFIG.format(pins=pins))
        made = Site(name, tmp_path, config)
        yield made
        made.close()


def next_message(central, kind, condition=lambda message: True):
    """The next message of that kind that satisfies the condition, with who sent it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if central.poll(200):
            who, frame = central.recv_multipart()
            message = decode_from_host(frame)
            if isinstance(message, kind) and condition(message):
                return who, message
    pytest.fail("waited in vain")


def test_rules_routes_and_verdicts_of_a_running_agent(site):
    who, hello = next_message(site.central, Hello)
    assert hello.routes == [2]
    next_message(site.central, Report, lambda report: report.usable_routes == [2])
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("10.70.1.1", 4000))
    for port in (9, 10, 11):
        udp.sendto(b"x" * 100, ("10.70.1.2", port))
    assert site.levels() == {9: 3, 10: 0, 11: 0}
    flow = ("10.70.1.1", "10.70.1.2", 4000, 10, 17)
    site.central.send_multipart([who, encode(Verdicts(verdicts=[FlowVerdict(*flow, 2, 2, 60.0)]))])
    wait_for(lambda: site.status()["flow_control"]["verdicts"] == 1)
    for _ in range(3):
        udp.sendto(b"x" * 100, ("10.70.1.2", 10))
        time.sleep(0.1)
    assert site.levels() == {9: 3, 10: 2, 11: 0}
    told = site.status()
    assert told["flow_control"]["routes"] == {"2": "usable"}
    assert told["datapath"]["counters"]["routed"] >= 1
    [rule] = site.told("rules")["rules"]
    assert (rule["name"], rule["flows"]) == ("bulk", 1)
    run("ip", "link", "set", "nic1", "down", netns=site.name)
    next_message(site.central, Report, lambda report: report.usable_routes == [])
    udp.close()

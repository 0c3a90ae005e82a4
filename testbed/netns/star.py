"""The star: sender namespaces and a receiver around a switch namespace, and a management network beside it.

    s0 eth0 --- s0 |                                    ctl mgmt0 --- ctl |
    s1 eth0 --- s1 |- br0 (switch) rx === eth0 rx       s0  mgmt0 --- s0  |- br0 (mgmt)
    ...            |            the bottleneck          rx  mgmt0 --- rx  |

Data crosses the switch, and the slow port is the switch's towards the receiver (`switch_port` shapes it). There may be
several receivers, each behind a slow port of its own; a sender then sends to one of them only (`receiver_of`). What
agents and central say to each other crosses the management network, as in AuTO's testbed with its separate
control-plane switch. Every link lives wholly inside our namespaces: nothing shows up on the machine itself.

What the network is made to be, and why:
- one packet is one wire packet: `gso_max_segs 1` on the hosts' ports. A veth passes TCP's 64 KB super-packets on whole;
  at 200 Mbit/s one of them holds the link for 2.6 ms, as long as 43 packets, and no strict priority can interrupt it.
- neighbours are permanent: no ARP query waits in the bottleneck's queue, or is dropped there.
- TCP is the same for every scheme: minimum RTO 10 ms (as the DCTCP and PIAS testbeds; the default of 200 ms would let
  a few losses decide every mean), no metrics remembered from one flow to the next. The congestion control is set per
  socket (`flows.protocol`): a namespace may not choose one that the machine restricts.
"""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fabricpilot.errors import KernelError, UsageError
from testbed.netns.enter import set_sysctls
from testbed.netns.registry import Run

MAX_SENDERS = 64
MAX_RECEIVERS = 8
DATA_PORT = "eth0"  # of every host, towards the switch
BOTTLENECK_PORT = "rx"  # of the switch, towards the (first) receiver
MTU_BYTES = 1500
RTO_MIN_MS = 10
MIN_SEND_BUFFER_BYTES = 4096  # what the kernel lets every connection have

SYSCTLS = {
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
}


@dataclass(frozen=True)
class Host:
    """One end of the star: its namespace and its addresses in the data and the management network."""

    name: str  # s0, s1 ..., rx, rx1 ...
    namespace: str
    address: str
    address6: str
    mac: str
    management_address: str


@dataclass(frozen=True)
class StarPlan:
    """The star as it will be; `build` makes it so.

    Attributes:
        run: the register it is written down in.
        senders: number of sending hosts.
        send_buffer_bytes: of their connections from the beginning; 0: as Linux has it.
        receivers: number of receiving hosts, each the end of every so many-th sender's flows.

    Raises:
        UsageError: number of senders or receivers out of bounds.
    """

    run: Run
    senders: int
    send_buffer_bytes: int = 0
    receivers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.senders <= MAX_SENDERS:
            raise UsageError(f"{self.senders} senders; the star has 1 to {MAX_SENDERS}")
        if not 1 <= self.receivers <= min(MAX_RECEIVERS, self.senders):
            raise UsageError(
                f"{self.receivers} receivers; the star has 1 to {MAX_RECEIVERS}, and as many senders at least"
            )

    @property
    def switch(self) -> str:
        """Namespace of the data switch."""
        return self.run.namespace("sw")

    @property
    def management(self) -> str:
        """Namespace of the management switch."""
        return self.run.namespace("mgmt")

    @property
    def controller(self) -> str:
        """Namespace in which central runs."""
        return self.run.namespace("ctl")

    controller_address = "10.20.0.1"

    @property
    def receiver(self) -> Host:
        """The host behind the bottleneck; the first of several."""
        return self.receiver_hosts[0]

    @property
    def receiver_hosts(self) -> list[Host]:
        """The hosts behind bottlenecks; the switch's ports towards them have their names."""
        return [self._host(f"{BOTTLENECK_PORT}{i or ''}", 1 + i) for i in range(self.receivers)]

    def receiver_of(self, sender: int) -> Host:
        """Where flows of the sender with this number go."""
        return self.receiver_hosts[sender % self.receivers]

    @property
    def sender_hosts(self) -> list[Host]:
        """The sending hosts, in the order of their numbers."""
        return [self._host(f"s{i}", 10 + i) for i in range(self.senders)]

    @property
    def hosts(self) -> list[Host]:
        """Receivers and senders."""
        return [*self.receiver_hosts, *self.sender_hosts]

    @property
    def namespaces(self) -> list[str]:
        """All namespaces of the star."""
        return [self.switch, self.management, self.controller, *(h.namespace for h in self.hosts)]

    def _host(self, name: str, number: int) -> Host:
        return Host(
            name=name,
            namespace=self.run.namespace(name),
            address=f"10.10.0.{number}",
            address6=f"fd10::{number:x}",
            mac=f"02:fb:00:00:00:{number:02x}",
            management_address=f"10.20.0.{number + 1}",
        )

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """What `build` does: (namespace, its `ip` commands), in order."""
        for switch, ports in ((self.switch, self._data_ports()), (self.management, self._management_ports())):
            lines = ["link add br0 type bridge mcast_snooping 0", "link set br0 up"]
            for name, namespace, port in ports:
                lines.append(f"link add {name} type veth peer name {port} netns {namespace}")
                lines.append(f"link set {name} master br0 up")
            yield switch, lines
        for host in self.hosts:
            yield host.namespace, ["link set lo up", *_management_end(host.management_address), *self._data_end(host)]
        yield self.controller, ["link set lo up", *_management_end(self.controller_address)]

    def build(self) -> None:
        """Make namespaces, links and addresses. What fails half-way is removed with the run.

        Raises:
            KernelError: the kernel refused; names what.
        """
        for namespace in self.namespaces:
            self.run.record_namespace(namespace)
            _run_ip(["netns", "add", namespace])
            set_sysctls(namespace, {**SYSCTLS, **self._send_buffer()})
        for namespace, lines in self.commands():
            _run_ip(["-netns", namespace, "-batch", "-"], "".join(f"{line}\n" for line in lines))

    def _send_buffer(self) -> dict[str, str]:
        size = self.send_buffer_bytes
        return {"net.ipv4.tcp_wmem": f"{MIN_SEND_BUFFER_BYTES} {size} {size}"} if size else {}

    def _data_ports(self) -> list[tuple[str, str, str]]:
        return [(host.name, host.namespace, DATA_PORT) for host in self.hosts]

    def _management_ports(self) -> list[tuple[str, str, str]]:
        hosts = [(host.name, host.namespace, "mgmt0") for host in self.hosts]
        return [*hosts, ("ctl", self.controller, "mgmt0")]

    def _data_end(self, host: Host) -> Iterator[str]:
        yield f"link set {DATA_PORT} address {host.mac} mtu {MTU_BYTES} gso_max_segs 1 up"
        yield f"address add {host.address}/24 dev {DATA_PORT}"
        yield f"address add {host.address6}/64 dev {DATA_PORT}"
        for other in self.hosts:
            if other != host:
                for address in (other.address, other.address6):
                    yield f"neighbour add {address} lladdr {other.mac} dev {DATA_PORT} nud permanent"
        yield f"route change 10.10.0.0/24 dev {DATA_PORT} src {host.address} scope link rto_min {RTO_MIN_MS}ms"
        yield f"route add fd10::/64 dev {DATA_PORT} metric 1 rto_min {RTO_MIN_MS}ms"


def _management_end(address: str) -> list[str]:
    return [f"link set mgmt0 mtu {MTU_BYTES} up", f"address add {address}/24 dev mgmt0"]


def _run_ip(arguments: Sequence[str], batch: str = "") -> None:
    try:
        done = subprocess.run(["ip", *arguments], input=batch, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        raise KernelError("there is no 'ip' command here; install the package iproute2") from None
    if done.returncode:
        said = done.stderr.strip().replace("\n", " ")
        raise KernelError(f"cannot build the star ('ip {' '.join(arguments)}'): {said}")

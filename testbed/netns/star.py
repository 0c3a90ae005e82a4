"""The star: N sender namespaces and a receiver around a switch namespace, and a management network beside it.

    s0 eth0 --- s0 |                                    ctl mgmt0 --- ctl |
    s1 eth0 --- s1 |- br0 (switch) rx === eth0 rx       s0  mgmt0 --- s0  |- br0 (mgmt)
    ...            |            the bottleneck          rx  mgmt0 --- rx  |

Data crosses the switch, and the one slow port is the switch's towards the receiver (`switch_port` shapes it). What
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

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fabricpilot.errors import FabricpilotError, KernelError, UsageError
from testbed.netns.enter import set_sysctls
from testbed.netns.registry import Run

MAX_SENDERS = 64
DATA_PORT = "eth0"  # of every host, towards the switch
BOTTLENECK_PORT = "rx"  # of the switch, towards the receiver
MTU_BYTES = 1500
RTO_MIN_MS = 10

SYSCTLS = {
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
}


@dataclass(frozen=True)
class Host:
    """One end of the star: its namespace and its addresses in the data and the management network."""

    name: str  # s0, s1 ..., rx
    namespace: str
    address: str
    address6: str
    mac: str
    management_address: str


@dataclass(frozen=True)
class StarPlan:
    """The star as it will be; `build` makes it so.

    Raises:
        UsageError: number of senders out of bounds.
    """

    run: Run
    senders: int

    def __post_init__(self) -> None:
        if not 1 <= self.senders <= MAX_SENDERS:
            raise UsageError(f"{self.senders} senders; the star has 1 to {MAX_SENDERS}")

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
        """The host behind the bottleneck."""
        return self._host("rx", 1)

    @property
    def sender_hosts(self) -> list[Host]:
        """The sending hosts, in the order of their numbers."""
        return [self._host(f"s{i}", 10 + i) for i in range(self.senders)]

    @property
    def hosts(self) -> list[Host]:
        """Receiver and senders."""
        return [self.receiver, *self.sender_hosts]

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

    def describe(self) -> Iterator[str]:
        """One line per thing that `build` makes."""
        for namespace in self.namespaces:
            yield f"namespace {namespace}"
        for host in self.hosts:
            yield f"link {host.namespace}/{DATA_PORT} {host.address} -- {self.switch}/{host.name}"
            yield f"link {host.namespace}/mgmt0 {host.management_address} -- {self.management}/{host.name}"
        yield f"link {self.controller}/mgmt0 {self.controller_address} -- {self.management}/ctl"

    def build(self) -> None:
        """Make namespaces, links and addresses. What fails half-way is removed with the run.

        Raises:
            KernelError: the kernel refused; names what.
        """
        from pyroute2 import IPRoute, netns
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            for namespace in self.namespaces:
                self.run.record_namespace(namespace)
                netns.create(namespace)
            for namespace in self.namespaces:
                set_sysctls(namespace, SYSCTLS)
            with ExitStack() as opened:
                inside = {n: opened.enter_context(IPRoute(netns=n)) for n in self.namespaces}
                self._switches(inside)
                for host in self.hosts:
                    self._connect(inside, host)
                self._port(inside, self.controller, "mgmt0", self.management, "ctl", self.controller_address)
        except (OSError, NetlinkError) as error:
            raise KernelError(f"cannot build the star of {self.senders} senders: {error}") from error

    def _switches(self, inside: dict[str, Any]) -> None:
        for namespace in (self.switch, self.management):
            link = inside[namespace]
            link.link("add", ifname="br0", kind="bridge", br_mcast_snooping=0)
            link.link("set", index=_index(link, "br0"), state="up")
        for namespace in self.namespaces:
            inside[namespace].link("set", index=_index(inside[namespace], "lo"), state="up")

    def _connect(self, inside: dict[str, Any], host: Host) -> None:
        self._port(inside, host.namespace, "mgmt0", self.management, host.name, host.management_address)
        self._port(inside, host.namespace, DATA_PORT, self.switch, host.name, None)
        link = inside[host.namespace]
        index = _index(link, DATA_PORT)
        link.link("set", index=index, address=host.mac, gso_max_segs=1)
        link.addr("add", index=index, address=host.address, prefixlen=24)
        link.addr("add", index=index, address=host.address6, prefixlen=64)
        for other in self.hosts:
            if other != host:
                for address in (other.address, other.address6):
                    link.neigh("add", dst=address, lladdr=other.mac, ifindex=index, state="permanent")
        metrics = {"rto_min": RTO_MIN_MS}
        link.route("replace", dst="10.10.0.0/24", oif=index, prefsrc=host.address, scope="link", metrics=metrics)
        link.route("replace", dst="fd10::/64", oif=index, metrics=metrics, priority=1)

    def _port(
        self, inside: dict[str, Any], namespace: str, port: str, switch: str, switch_port: str, address: str | None
    ) -> None:
        """A veth pair between `port` in `namespace` and `switch_port` on the bridge in `switch`."""
        link = inside[switch]
        link.link("add", ifname=switch_port, kind="veth", peer={"ifname": port, "net_ns_fd": namespace})
        link.link("set", index=_index(link, switch_port), master=_index(link, "br0"), state="up")
        end = inside[namespace]
        index = _index(end, port)
        end.link("set", index=index, mtu=MTU_BYTES, state="up")
        if address is not None:
            end.addr("add", index=index, address=address, prefixlen=24)


def _index(link: Any, name: str) -> int:
    found = link.link_lookup(ifname=name)
    if not found:
        raise FabricpilotError(f"the link {name} has disappeared from the testbed")
    return int(found[0])

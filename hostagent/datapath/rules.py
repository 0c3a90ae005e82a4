"""Operator rules: from `[[rules]]` to the tables that the kernel looks a flow up in, and the same decision in Python.

Pure: what the tables hold, not how they get into the kernel (steering.py). A rule admits a flow when each thing it says
something about admits it; the first rule in the list that admits a flow decides. ebpf/rules.h explains the lookup: for
every dimension a table from value to a set of rules, one bit per rule.
"""

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from fabricpilot.config import Rule
from fabricpilot.errors import UsageError
from fabricpilot.levels import MAX_DSCP

MAX_RULES: Final = 64
MAX_PREFIXES: Final = 8192  # per slot; the kernel's table holds two slots
MAX_CGROUP_DEPTH: Final = 8

# Layouts of the structs in ebpf/rules.h.
PREFIX_KEY_DTYPE: Final = np.dtype(
    [("bits", "<u4"), ("slot", "u1"), ("dimension", "u1"), ("pad", "u1", 2), ("value", "u1", 16)]
)
RULE_OUTCOME_DTYPE: Final = np.dtype([("treatment", "u1"), ("level", "u1"), ("route", "u1"), ("pad", "u1")])
RULE_SET_DTYPE: Final = np.dtype(
    [
        ("by_dscp", "<u8", 64),
        ("by_protocol", "<u8", 2),
        ("without_cgroup", "<u8"),
        ("dimensions", "<u4"),
        ("cgroup_depths", "<u4"),
        ("outcome", RULE_OUTCOME_DTYPE, MAX_RULES),
    ]
)
# `rules` of a flow's state: `union kept_outcome`.
KEPT_OUTCOME_DTYPE: Final = np.dtype(
    [("generation", "<u4"), ("treatment", "u1"), ("level", "u1"), ("route", "u1"), ("rule", "u1")]
)

TREATMENTS: Final = {"schedule": 0, "pin": 0, "observe": 1, "exclude": 2}
DIMENSIONS: Final = ("source", "destination", "source_port", "destination_port", "cgroup")
_SLOT_AND_DIMENSION_BITS: Final = 32
_TCP: Final = 6
_UDP: Final = 17

Prefix = tuple[bytes, int]  # value in network order, how many of its leading bits count


@dataclass(frozen=True)
class Flow:
    """What rules look at. `cgroups` are the ids of the socket's cgroup and of all above it; none if it is not local."""

    source: str
    destination: str
    source_port: int
    destination_port: int
    protocol: int
    dscp: int = 0
    cgroups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Cgroup:
    """A cgroup that exists: the id that sockets carry and how deep it lies below the root."""

    id: int
    depth: int


@dataclass(frozen=True)
class CompiledRules:
    """What goes into the kernel.

    Attributes:
        prefixes: PREFIX_KEY_DTYPE, shape (n,), slot 0.
        admits: u64, shape (n,); the rules that admit values below that prefix.
        rule_set: one RULE_SET_DTYPE record, shape ().
    """

    prefixes: npt.NDArray[np.void]
    admits: npt.NDArray[np.uint64]
    rule_set: npt.NDArray[np.void]


@dataclass(frozen=True)
class ParsedRule:
    """A rule of the configuration, understood. An empty tuple says nothing about that dimension."""

    name: str
    action: Literal["schedule", "pin", "observe", "exclude"]
    level: int | None
    route: int
    prefixes: dict[str, tuple[Prefix, ...]]  # by dimension
    protocols: tuple[int, ...]
    dscp: tuple[int, ...]
    cgroup: str

    def admits(self, flow: Flow, cgroup: Cgroup | None) -> bool:
        """Whether the rule matches; `cgroup` is the rule's own, None if there is no such cgroup."""
        values = {
            "source": _address_bytes(flow.source),
            "destination": _address_bytes(flow.destination),
            "source_port": flow.source_port.to_bytes(2, "big"),
            "destination_port": flow.destination_port.to_bytes(2, "big"),
        }
        return (
            flow.protocol in self.protocols
            and (not self.dscp or flow.dscp in self.dscp)
            and (not self.cgroup or (cgroup is not None and cgroup.id in flow.cgroups))
            and all(
                any(_truncated(values[dimension], bits) == value for value, bits in prefixes)
                for dimension, prefixes in self.prefixes.items()
                if prefixes
            )
        )


def parse_rules(rules: Sequence[Rule], levels: int, routes: Iterable[int] = ()) -> tuple[ParsedRule, ...]:
    """The rules of a configuration, checked.

    Args:
        rules: as configured, the first one that matches decides.
        levels: K, which levels there are to pin to.
        routes: the numbers of the routes there are.

    Raises:
        UsageError: names the rule and what is wrong with it.
    """
    if len(rules) > MAX_RULES:
        raise UsageError(f"{len(rules)} rules; there can be {MAX_RULES} (a rule may list many networks and ports)")
    known = frozenset(routes)
    return tuple(_parse_rule(rule, number, levels, known) for number, rule in enumerate(rules, 1))


def first_match(rules: Sequence[ParsedRule], cgroups: Sequence[Cgroup | None], flow: Flow) -> int | None:
    """Index of the rule that decides about `flow`; None if no rule admits it."""
    return next(
        (i for i, (rule, cgroup) in enumerate(zip(rules, cgroups, strict=True)) if rule.admits(flow, cgroup)), None
    )


def compile_rules(rules: Sequence[ParsedRule], cgroups: Sequence[Cgroup | None]) -> CompiledRules:
    """The kernel's tables.

    Args:
        rules: what `parse_rules` returned.
        cgroups: each rule's cgroup; None if it names none or there is none of that name now, so it admits nothing.

    Raises:
        UsageError: more prefixes than the kernel's table has room for, or a cgroup too deep.
    """
    rule_set = np.zeros((), RULE_SET_DTYPE)
    keys: list[tuple[int, Prefix, int]] = []  # dimension, prefix, rules
    for dimension, name in enumerate(DIMENSIONS[:4]):
        table = _table_of([rule.prefixes[name] for rule in rules])
        if len(table) > 1:
            rule_set["dimensions"] |= 1 << dimension
            keys += [(dimension, prefix, admitted) for prefix, admitted in table.items()]
    by_cgroup: dict[int, int] = defaultdict(int)
    for number, (rule, cgroup) in enumerate(zip(rules, cgroups, strict=True)):
        bit = 1 << number
        for dscp in rule.dscp or range(MAX_DSCP + 1):
            rule_set["by_dscp"][dscp] |= np.uint64(bit)
        for index, protocol in enumerate((_TCP, _UDP)):
            if protocol in rule.protocols:
                rule_set["by_protocol"][index] |= np.uint64(bit)
        if not rule.cgroup:
            rule_set["without_cgroup"] |= np.uint64(bit)
        else:
            rule_set["dimensions"] |= 1 << DIMENSIONS.index("cgroup")
            if cgroup is not None:
                if not 1 <= cgroup.depth <= MAX_CGROUP_DEPTH:
                    raise UsageError(
                        f"rule '{rule.name}': cgroup {rule.cgroup} lies {cgroup.depth} below the root; "
                        f"it must be 1 to {MAX_CGROUP_DEPTH}"
                    )
                rule_set["cgroup_depths"] |= 1 << cgroup.depth
                by_cgroup[cgroup.id] |= bit
        outcome = rule_set["outcome"][number]
        outcome["treatment"] = TREATMENTS[rule.action]
        outcome["level"] = 0 if rule.level is None else rule.level + 1
        outcome["route"] = rule.route
    keys += [(4, (identity.to_bytes(8, "little"), 64), bits) for identity, bits in by_cgroup.items()]
    if len(keys) > MAX_PREFIXES:
        raise UsageError(f"the rules need {len(keys)} prefixes of networks and ports; there is room for {MAX_PREFIXES}")
    prefixes = np.zeros(len(keys), PREFIX_KEY_DTYPE)
    for row, (dimension, (value, bits), _) in enumerate(keys):
        prefixes[row]["bits"] = _SLOT_AND_DIMENSION_BITS + bits
        prefixes[row]["dimension"] = dimension
        prefixes[row]["value"][: len(value)] = np.frombuffer(value, np.uint8)
    return CompiledRules(prefixes, np.array([admitted for *_, admitted in keys], np.uint64), rule_set)


def excluded(states: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which flows (FLOW_STATE_DTYPE, shape (n,)) a rule says to leave alone and not to report."""
    return np.asarray(states["rules"].view(KEPT_OUTCOME_DTYPE)["treatment"] == TREATMENTS["exclude"])


def flows_by_rule(states: npt.NDArray[np.void], count: int) -> list[int]:
    """How many flows (FLOW_STATE_DTYPE, shape (n,)) each of `count` rules decides about."""
    decided = states["rules"].view(KEPT_OUTCOME_DTYPE)["rule"]
    return [int(n) for n in np.bincount(decided, minlength=count + 1)[1 : count + 1]]


def _table_of(per_rule: Sequence[tuple[Prefix, ...]]) -> dict[Prefix, int]:
    """For each prefix, and for everything else (no bits), the rules that admit what lies below it."""
    own: dict[Prefix, int] = defaultdict(int)
    anywhere = 0
    for number, prefixes in enumerate(per_rule):
        if not prefixes:
            anywhere |= 1 << number
        for prefix in prefixes:
            own[prefix] |= 1 << number
    lengths = sorted({bits for _, bits in own})
    table: dict[Prefix, int] = {(b"", 0): anywhere}
    for value, bits in own:
        admitted = anywhere
        for shorter in lengths[: lengths.index(bits) + 1]:
            admitted |= own.get((_truncated(value, shorter), shorter), 0)
        table[(value, bits) if bits else (b"", 0)] = admitted
    return table


def _parse_rule(rule: Rule, number: int, levels: int, routes: frozenset[int]) -> ParsedRule:
    name = rule.name or f"#{number}"

    def wrong(what: str) -> UsageError:
        return UsageError(f"rule '{name}': {what}")

    if rule.action == "pin" and rule.level is None:
        raise wrong(f"action = 'pin' needs level = 0 to {levels - 1}")
    if rule.action != "pin" and rule.level is not None:
        raise wrong(f"level = {rule.level} needs action = 'pin'")
    if rule.level is not None and not 0 <= rule.level < levels:
        raise wrong(f"level = {rule.level}; there are levels 0 to {levels - 1}")
    if rule.route and rule.route not in routes:
        raise wrong(f"there is no route {rule.route} in [routes]")
    if rule.route and rule.action in ("observe", "exclude"):
        raise wrong(f"a flow with action = '{rule.action}' is left where it is; take route away")
    if any(not 0 <= dscp <= MAX_DSCP for dscp in rule.dscp):
        raise wrong(f"dscp = {rule.dscp}; code points are 0 to {MAX_DSCP}")
    if rule.cgroup and not rule.cgroup.startswith("/"):
        raise wrong(f"cgroup = '{rule.cgroup}'; write it like /system.slice/backup.service")
    if rule.cgroup.rstrip("/") == "" and rule.cgroup:
        raise wrong("cgroup = '/' is every socket of this host; take it away")
    try:
        prefixes = {
            "source": tuple(dict.fromkeys(_network(text) for text in rule.source)),
            "destination": tuple(dict.fromkeys(_network(text) for text in rule.destination)),
            "source_port": _port_prefixes(rule.source_port),
            "destination_port": _port_prefixes(rule.destination_port),
        }
    except ValueError as error:
        raise wrong(str(error)) from error
    return ParsedRule(
        name=name,
        action=rule.action,
        level=rule.level,
        route=rule.route,
        prefixes=prefixes,
        protocols={"any": (_TCP, _UDP), "tcp": (_TCP,), "udp": (_UDP,)}[rule.protocol],
        dscp=tuple(rule.dscp),
        cgroup=rule.cgroup.rstrip("/"),
    )


def _network(text: str) -> Prefix:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is no network; write it like 10.0.0.0/8 or 2001:db8::/32") from error
    if network.version == 4:
        return bytes(10) + b"\xff\xff" + network.network_address.packed, 96 + network.prefixlen
    return network.network_address.packed, network.prefixlen


def _address_bytes(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _truncated(value: bytes, bits: int) -> bytes:
    """`value` with all but its leading `bits` bits at 0."""
    beyond = len(value) * 8 - bits
    return ((int.from_bytes(value, "big") >> beyond) << beyond).to_bytes(len(value), "big")


def _port_prefixes(texts: Iterable[int | str]) -> tuple[Prefix, ...]:
    """Ports and ranges as prefixes of 16 bits; a range of any size needs at most 30."""
    found: dict[Prefix, None] = {}
    for text in texts:
        low, high = _port_range(str(text))
        while low <= high:
            size = low & -low or 1 << 16
            while size > high - low + 1:
                size >>= 1
            found[low.to_bytes(2, "big"), 17 - size.bit_length()] = None
            low += size
    return tuple(found)


def _port_range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if first.strip().isdecimal() and (not dash or last.strip().isdecimal()):
        low = int(first)
        high = int(last) if dash else low
        if low <= high <= 65535:
            return low, high
    raise ValueError(f"port '{text}' is not understood; write 80 or 5000-5999, up to 65535")

"""Configuration: a TOML file, then the environment, then flags; a key nobody knows is an error.

`load` turns those three into one frozen struct. The structs are the only place that says which keys exist, what
they mean and what they are by default. Environment variables are `FABRICPILOT_<SECTION>_<KEY>`, for example
`FABRICPILOT_DATAPATH_LEVELS=4`; flags arrive as a dictionary of overrides with the keys `"section.key"`.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from fabricpilot.errors import UsageError
from fabricpilot.levels import (
    DEFAULT_LEVELS,
    DscpPreset,
    Thresholds,
    check_dscp,
    check_levels,
    default_thresholds,
    preset_dscp,
)

ENV_PREFIX = "FABRICPILOT_"
HOST_RUN_DIR = "/run/fabricpilot"
CENTRAL_RUN_DIR = "/run/fabricpilot-central"  # of its own, as central does not run as root


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the configuration file."""


class HostSection(Section, frozen=True, kw_only=True):
    """`[host]`: which server this is and which of its NICs are scheduled."""

    interfaces: list[str] = []  # to schedule: names and shell patterns, ["eth0", "veth*"]; at least one is needed
    wait_for_interfaces: bool = False  # false: one that is named and missing at start is an error; true: wait for it
    name: str = ""  # name towards central; empty: the machine's host name
    group: str = "default"  # hosts of one group get the same thresholds
    report_interval_s: float = 1.0  # seconds between reports to central, 0.1 to 60
    detach_on_exit: bool = False  # true: Ctrl-C and SIGTERM also remove the data path
    run_dir: str = HOST_RUN_DIR  # control socket for `agent status`, and what `detach` needs to restore qdiscs


class DatapathSection(Section, frozen=True, kw_only=True):
    """`[datapath]`: how packets are counted and tagged."""

    backend: Literal["auto", "ebpf", "nftables", "fake"] = "auto"  # auto: ebpf, or nftables; fake: no kernel at all
    # where eBPF meets packets, on NICs that it is not on yet: tcx (Linux 6.6) runs before clsact and costs less;
    # auto: tcx where the kernel has it
    hook: Literal["auto", "tcx", "clsact"] = "auto"
    levels: int = DEFAULT_LEVELS  # K, 2 to 8
    thresholds: list[int] = []  # K-1 ascending bytes; empty: the default for K, until central sends better
    dscp: list[int] = []  # one code point per level; empty: what dscp_preset says
    dscp_preset: DscpPreset = "class-selectors"  # CS<K> downwards; "802.1p": as switches map PCP to K queues
    observe: bool = False  # true: compute and report everything, change no packet and no queue
    # attained: level by bytes sent; backlog: by bytes written to a local TCP socket; auto: backlog where it can be had
    mode: Literal["auto", "backlog", "attained"] = "auto"
    respect_dscp: bool = True  # a packet that already carries a foreign DSCP keeps it (it is counted)
    flow_entries: int = 131_072  # places in the flow table; a full one makes room for new flows
    idle_timeout_s: float = 30.0  # a flow silent for so long has ended, and leaves the table
    message_gap_us: int = 500  # least silence between two messages of a local TCP socket; twice its RTT if longer
    blind_message_gap_ms: int = 200  # the same for flows without a local TCP socket: forwarded ones, UDP
    starved_ms: int = 500  # silence with data waiting after which a flow gets a turn at the top; 0: never
    turn_bytes: int = 65_536  # payload that such a turn is for
    # flows that one source (cgroup, forwarding interface, forwarded address) may begin at the top per second; what is
    # beyond starts on the last level and gets no place in the flow table. 0: as many as it likes
    new_flows_per_s: int = 20_000
    hint_cgroups: list[str] = []  # cgroups (paths below cgroup v2, "/" for all) whose applications' size hints count
    send_buffer_bytes: int = 0  # send buffer of new TCP connections, at most net.core.wmem_max; 0: the kernel's own
    send_buffer_ports: list[int] = []  # only of connections with one of these ports, at most 32; empty: of all
    send_buffer_cgroups: list[str] = []  # only of applications in these cgroups; empty: of all
    pin_dir: str = "/sys/fs/bpf/fabricpilot"  # in a bpffs; programs and maps outlive the agent here


class Rule(Section, frozen=True, kw_only=True):
    """One `[[rules]]`: what it says nothing about, it admits. The first rule that admits a flow decides about it."""

    name: str = ""  # for people
    action: Literal["schedule", "pin", "observe", "exclude"] = "schedule"  # schedule: as if no rule had matched
    level: int | None = None  # with action = "pin": the level of all the flow's packets
    route: int = 0  # number of a route in [routes]; 0: not said
    source: list[str] = []  # networks, IPv4 or IPv6
    destination: list[str] = []
    source_port: list[int | str] = []  # ports, or ranges "5000-5999"
    destination_port: list[int | str] = []
    protocol: Literal["any", "tcp", "udp"] = "any"
    dscp: list[int] = []  # what the flow's first packet carries
    cgroup: str = ""  # of the local socket, or above it: "/system.slice/backup.service"


class Route(Section, frozen=True, kw_only=True):
    """One `[[routes.paths]]`: a way into the fabric, by next hop, by policy routing or by flow label."""

    number: int  # 1 to 31; 0 is the kernel's own choice
    interface: str = ""  # where it leaves
    next_hop: str = ""  # IPv4 router behind that interface; empty: destinations are neighbours there
    next_hop6: str = ""  # the same for IPv6
    mark: int = 0  # instead: wherever policy routing (`ip rule fwmark`) sends packets with this mark
    flow_label: int = 0  # instead: IPv6 flow label (and the hash of tunnelled packets) for fabrics that spread by it


class RoutesSection(Section, frozen=True, kw_only=True):
    """`[routes]`: the host's ways into the fabric, for rules and for central to choose from."""

    paths: list[Route] = []  # [[routes.paths]]
    gap_ms: int = 20  # a flow changes its route after a silence this long, so that packets stay in order; 0: at once


class QueuesSection(Section, frozen=True, kw_only=True):
    """`[queues]`: the K strict bands on each NIC."""

    kind: Literal["auto", "prio", "htb", "pfifo_fast", "none"] = "auto"  # none: tag only, leave qdiscs alone
    link_rate: str = ""  # for htb, for example "10Gbit"; empty: what the NIC says
    tag_only: list[str] = msgspec.field(  # interfaces that are tagged and keep their queues, unless named in full
        default_factory=lambda: ["veth*", "cali*", "lxc*", "tap*", "vnet*"]
    )
    replace_foreign: bool = False  # true: also replace a qdisc that somebody configured (it is restored on detach)


class LinkSection(Section, frozen=True, kw_only=True):
    """`[link]`: the connection of host and central."""

    endpoint: str = ""  # host: where central listens, "tcp://10.0.0.1:5555"; empty: run alone
    listen: str = "tcp://0.0.0.0:5555"  # central: where it listens
    key: str = "/etc/fabricpilot/host.key_secret"  # own secret key file (`fabricpilot central keys` makes it)
    central_key: str = "/etc/fabricpilot/central.key"  # host: central's public key file
    authorized_keys: str = "/etc/fabricpilot/hosts"  # central: folder of the public key files of its hosts
    insecure: bool = False  # no encryption and no authentication; accepted on loopback only


class PolicySection(Section, frozen=True, kw_only=True):
    """`[policy]`: what central decides, and how often."""

    scheme: str = "optimiser"  # how thresholds are chosen, by name; docs/schemes.md has all
    thresholds: list[int] = []  # K-1 ascending bytes, for schemes that do not adapt; empty: what the scheme has for K
    workload: Literal["websearch", "datamining"] = "websearch"  # pias-published, pias-mismatched: what traffic this is
    objective: Literal["fct", "slowdown", "tail"] = "fct"  # what the optimiser minimises
    min_gain: float = 0.01  # predicted improvement (a share) below which thresholds stay as they are
    shared_rate: str = ""  # bottleneck that a group's hosts share, "10Gbit"; empty: each host's own NIC is it
    interval_s: float = 5.0  # seconds between decisions
    window_s: float = 60.0  # how much of the past a decision looks at (exponential forgetting)
    min_flows: int = 200  # finished flows in the window below which the thresholds stay as they are
    expiry_s: float = 3600.0  # a host that hears nothing for so long marks its policy as stale (it keeps it)
    groups: Literal["configured", "clustered"] = "configured"  # clustered: split further by what hosts' sizes look like
    learn: Literal["off", "shadow", "on"] = "off"  # shadow: learn and tell what it would do; on: try it, see [guard]
    learner: str = "central.srla.online:OnlineSrla"  # module:class of the learner


class GuardSection(Section, frozen=True, kw_only=True):
    """`[guard]`: how what a learner proposes is tried before it counts."""

    canary_share: float = 0.1  # of a group's hosts try a challenger first; at least one host, never all
    canary_rounds: int = 12  # length of the canary phase, and of watching before it; a round: every host reports once
    slice_rounds: int = 5  # then all hosts have it and do not have it by turns of so many rounds
    max_pairs: int = 20  # of such turns, after which a challenger that is not clearly better goes
    alpha: float = 0.05  # probability with which a challenger that is no better is promoted
    max_harm: float = 1.5  # a challenger under which flows take so many times as long goes at once
    rest_s: float = 30.0  # no new trial so long after one that failed; doubles with each failure, up to an hour
    recheck_s: float = 1800.0  # what was promoted is tried against the scheme's own thresholds again after so long
    lowest_bytes: int = 1_000  # no threshold below
    highest_bytes: int = 1_000_000_000  # nor above
    max_step: float = 16.0  # factor by which one proposal may move a threshold


class LongFlowsSection(Section, frozen=True, kw_only=True):
    """`[long_flows]`: whether central chooses level and route of single long flows, and how."""

    # least-loaded: the route with the fewest long flows; young-first: that, and flows that have sent less than 10 MB go
    # before the others; shortest-first: that, and priority by what is seen to remain; learned: what the network of
    # `fabricpilot train lrla` makes of young-first; in-turn: least-loaded, and of a receiver's long flows one at a time
    # a level above the last (the optimiser's thresholds go with it)
    scheme: Literal["off", "least-loaded", "young-first", "shortest-first", "learned", "in-turn"] = "off"
    turn_bytes: float = 1e9  # in-turn: what a flow may send before others have their turn
    ttl_s: float = 10.0  # how long a verdict holds by itself; it is renewed while the flow goes on
    rack_prefix: int = 24  # hosts whose IPv4 addresses agree in so many bits share a leaf; 32: each has its own
    rack_prefix6: int = 64  # the same for IPv6
    weights: str = ""  # of the learned scheme, a file of `fabricpilot train lrla`; empty: those that are shipped


class CentralSection(Section, frozen=True, kw_only=True):
    """`[central]`: the daemon on the controller."""

    run_dir: str = CENTRAL_RUN_DIR  # control socket for `central status`
    host_timeout_s: float = 5.0  # a host silent for so long is shown as lost
    threshold_log: str = ""  # file that gets one JSON line per change of thresholds; empty: none
    planners: list[str] = []  # names of keys that may ask for migration plans and announce migrations; empty: none
    state_dir: str = ""  # folder that keeps what was learned and promoted over restarts; empty: nothing is kept


class AgentConfig(Section, frozen=True, kw_only=True):
    """Everything `fabricpilot agent` reads."""

    host: HostSection = HostSection()
    datapath: DatapathSection = DatapathSection()
    queues: QueuesSection = QueuesSection()
    link: LinkSection = LinkSection()
    routes: RoutesSection = RoutesSection()
    rules: list[Rule] = []

    def __post_init__(self) -> None:
        check_levels(self.datapath.levels)
        if self.thresholds.levels != self.datapath.levels:
            raise UsageError(
                f"datapath.thresholds has {len(self.datapath.thresholds)} values; "
                f"datapath.levels = {self.datapath.levels} needs {self.datapath.levels - 1}"
            )
        check_dscp(self.dscp, self.datapath.levels)
        _check_range("host.report_interval_s", self.host.report_interval_s, 0.1, 60)
        _check_range("datapath.flow_entries", self.datapath.flow_entries, 1024, 16_777_216)
        _check_range("routes.gap_ms", self.routes.gap_ms, 0, 60_000)
        _check_range("datapath.idle_timeout_s", self.datapath.idle_timeout_s, 1, 86_400)
        _check_range("datapath.message_gap_us", self.datapath.message_gap_us, 1, 60_000_000)
        _check_range("datapath.blind_message_gap_ms", self.datapath.blind_message_gap_ms, 10, 600_000)
        _check_range("datapath.starved_ms", self.datapath.starved_ms, 0, 600_000)
        _check_range("datapath.turn_bytes", self.datapath.turn_bytes, 1500, 1 << 30)
        _check_range("datapath.new_flows_per_s", self.datapath.new_flows_per_s, 0, 1_000_000)
        _check_range("datapath.send_buffer_bytes", self.datapath.send_buffer_bytes, 0, 1 << 30)
        for port in self.datapath.send_buffer_ports:
            _check_range("datapath.send_buffer_ports", port, 1, 65_535)

    @property
    def thresholds(self) -> Thresholds:
        """The configured thresholds, or the default ones for K."""
        given = self.datapath.thresholds
        return Thresholds.of(given) if given else default_thresholds(self.datapath.levels)

    @property
    def dscp(self) -> tuple[int, ...]:
        """The DSCP code point of each level."""
        return tuple(self.datapath.dscp) or preset_dscp(self.datapath.dscp_preset, self.datapath.levels)


class CentralConfig(Section, frozen=True, kw_only=True):
    """Everything `fabricpilot central` reads."""

    central: CentralSection = CentralSection()
    link: LinkSection = LinkSection(key="/etc/fabricpilot/central.key_secret")
    policy: PolicySection = PolicySection()
    guard: GuardSection = GuardSection()
    long_flows: LongFlowsSection = LongFlowsSection()

    def __post_init__(self) -> None:
        _check_range("policy.interval_s", self.policy.interval_s, 0.1, 86_400)
        _check_range("policy.window_s", self.policy.window_s, self.policy.interval_s, 86_400)
        _check_range("policy.min_flows", self.policy.min_flows, 1, 1e9)
        _check_range("policy.expiry_s", self.policy.expiry_s, 1, 1e9)
        _check_range("policy.min_gain", self.policy.min_gain, 0, 1)
        if self.policy.thresholds:
            Thresholds.of(self.policy.thresholds)
        if self.policy.shared_rate:
            parse_rate(self.policy.shared_rate)
        _check_range("long_flows.ttl_s", self.long_flows.ttl_s, 1, 3600)
        _check_range("long_flows.turn_bytes", self.long_flows.turn_bytes, 1e6, 1e15)
        _check_range("long_flows.rack_prefix", self.long_flows.rack_prefix, 0, 32)
        _check_range("long_flows.rack_prefix6", self.long_flows.rack_prefix6, 0, 128)
        _check_range("central.host_timeout_s", self.central.host_timeout_s, 0.5, 86_400)
        _check_range("guard.canary_share", self.guard.canary_share, 0, 0.5)
        _check_range("guard.canary_rounds", self.guard.canary_rounds, 2, 10_000)
        _check_range("guard.slice_rounds", self.guard.slice_rounds, 1, 10_000)
        _check_range("guard.max_pairs", self.guard.max_pairs, 5, 10_000)
        _check_range("guard.alpha", self.guard.alpha, 1e-6, 0.5)
        _check_range("guard.max_harm", self.guard.max_harm, 1.01, 1000)
        _check_range("guard.rest_s", self.guard.rest_s, 0, 86_400)
        _check_range("guard.recheck_s", self.guard.recheck_s, 1, 1e9)
        _check_range("guard.lowest_bytes", self.guard.lowest_bytes, 1, self.guard.highest_bytes)
        _check_range("guard.highest_bytes", self.guard.highest_bytes, self.guard.lowest_bytes, 2**60)
        _check_range("guard.max_step", self.guard.max_step, 1.1, 1e12)


ConfigT = TypeVar("ConfigT", AgentConfig, CentralConfig)


def load(
    kind: type[ConfigT],
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ConfigT:
    """The configuration from file, environment and flags, later ones winning.

    Args:
        kind: `AgentConfig` or `CentralConfig`.
        path: TOML file; None reads no file.
        overrides: `{"section.key": value}` from flags; None values are passed over, strings are converted.
        environ: the environment; `os.environ` by default.

    Raises:
        UsageError: unreadable or malformed file, unknown key, wrong type or value; names the place.
    """
    tables: dict[str, dict[str, Any]] = {}
    if path is not None:
        tables = _read_toml(path)
    environ = os.environ if environ is None else environ
    for name, struct in _sections(kind).items():
        for field in struct.__struct_fields__:
            variable = f"{ENV_PREFIX}{name}_{field}".upper()
            if variable in environ:
                tables.setdefault(name, {})[field] = _from_text(struct, field, environ[variable], variable)
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(kind, tables, key, value)
    where = str(path) if path else "configuration"
    _refuse_unknown(kind, tables, where)
    defaults = kind()
    merged = {
        name: {**msgspec.to_builtins(getattr(defaults, name)), **tables.get(name, {})} for name in _sections(kind)
    }
    merged.update({name: tables[name] for name in _lists(kind) if name in tables})
    try:
        return msgspec.convert(merged, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {_readable(str(error))}{_choices(_type_at(kind, str(error)))}") from error


def _type_at(kind: type[Any], message: str) -> Any:
    """The type of the field that a complaint is about, `... - at `$.section.key``; None if of no section."""
    section, _, field = message.rpartition("$.")[2].rstrip("`").partition(".")
    struct = _sections(kind).get(section)
    return next((f.type for f in msgspec.structs.fields(struct) if f.name == field), None) if struct else None


def parse_rate(text: str) -> int:
    """A link rate such as `200Mbit`, `10Gbit` or `1000000` (bit/s), in bit/s.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:bit|bps)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"rate '{text}' is not understood; write it like 200Mbit or 10Gbit")
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}[match[2].lower()])


def _sections(kind: type[Any]) -> dict[str, type[Section]]:
    return {field.name: field.type for field in msgspec.structs.fields(kind) if field.name not in _lists(kind)}


def _lists(kind: type[Any]) -> list[str]:
    """Names of what is written as [[name]]: a list of tables, in the file only."""
    return [field.name for field in msgspec.structs.fields(kind) if get_origin(field.type) is list]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def _refuse_unknown(kind: type[Any], tables: Mapping[str, Any], where: str) -> None:
    sections = _sections(kind)
    for name, table in tables.items():
        if name in _lists(kind):
            if not isinstance(table, list):
                raise UsageError(f"{where}: '{name}' must be a list of tables, each written [[{name}]]")
            continue
        if name not in sections:
            raise UsageError(f"{where}: unknown section [{name}]{_did_you_mean(name, sections)}")
        if not isinstance(table, dict):
            raise UsageError(f"{where}: '{name}' must be a table, written [{name}]")
        for key in table:
            fields = sections[name].__struct_fields__
            if key not in fields:
                raise UsageError(f"{where}: unknown key '{key}' in [{name}]{_did_you_mean(key, fields)}")


def _put(kind: type[Any], tables: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    section, _, field = key.partition(".")
    struct = _sections(kind).get(section)
    if isinstance(value, str) and struct is not None and field in struct.__struct_fields__:
        value = _from_text(struct, field, value, key)
    tables.setdefault(section, {})[field] = value


def _from_text(struct: type[Section], field: str, text: str, where: str) -> Any:
    """A string from the environment or a flag, in the type its field has; lists are comma-separated, or as in TOML."""
    wanted = next(f.type for f in msgspec.structs.fields(struct) if f.name == field)
    given: Any = text
    if msgspec.inspect.type_info(wanted).__class__ is msgspec.inspect.ListType:
        given = [part.strip() for part in text.split(",") if part.strip()]
        if text.lstrip().startswith("["):
            try:
                given = tomllib.loads(f"list = {text}")["list"]
            except tomllib.TOMLDecodeError as error:
                raise UsageError(f'{where} = \'{text}\' is no list; write a,b or ["a", "b"]') from error
    try:
        return msgspec.convert(given, wanted, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where} = '{text}': {_readable(str(error))}{_choices(wanted)}") from error


def _choices(wanted: Any) -> str:
    """What a field takes that has a fixed set of words."""
    return f"; it must be one of {', '.join(map(str, get_args(wanted)))}" if get_origin(wanted) is Literal else ""


def _readable(message: str) -> str:
    message = message.replace("`", "'").replace("'$.", "'").replace(" - at ", " at ")
    return re.sub(r"at '\$\[(\d+)\]'", lambda place: f"in place {int(place[1]) + 1}", message)


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are: {', '.join(known)}"


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        given, least, most = (f"{x:.0f}" if x == int(x) else f"{x:g}" for x in (value, low, high))
        raise UsageError(f"{name} = {given}; it must be {least} to {most}")

"""The nftables rules of one data path, as libnftables JSON. Pure: what to install, not how.

    egress (postrouting)  -- is it ours to schedule? TCP or UDP, on a scheduled interface
      small               -- TCP packets of the length of their headers: no payload, to the top
      original, reply     -- note the flow in `sent_original` / `sent_reply` (its time of sending), by direction
        *_levels          -- conntrack's byte count against the thresholds, the last one first
        *_young           -- the first packets: what started in mid-life goes to the bottom, what did not to the top
          level_N, top    -- respect a foreign DSCP, else count, DSCP, skb->priority

One transaction replaces all rules; sets and counters stay. nftables picks the generation of rules once per packet and
hook, so a packet sees the whole of one vector. Postrouting sees local and forwarded packets alike, GSO packets whole,
and after it nothing is routed anew. What the next agent must know stands in chain `state`, as comments of rules that
no packet reaches, in the same transaction.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from fabricpilot.levels import MAX_LEVELS, Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.payload_estimate import conntrack_thresholds

FAMILY: Final = "inet"
TABLE: Final = "fabricpilot"
DIRECTIONS: Final = ("original", "reply")
_SETS: Final = (*(f"sent_{direction}" for direction in DIRECTIONS), "midlife")

# Behind the rules people write at `mangle` (-150), whose DSCP is to be respected; before source NAT (100).
_HOOK_PRIORITY: Final = -140
VERSION: Final = 1  # of chains, sets and state; another one is replaced as a whole

# Beside the counters that all data paths share: why a packet was left alone, and packets without an entry.
OWN_COUNTERS: Final = ("untracked_notrack", "untracked_invalid", "insert_failed")
COUNTERS: Final = (
    *(f"level_{level}" for level in range(MAX_LEVELS)),
    "top",
    "foreign_dscp",
    "observed",
    "untagged",
    "untracked_other_protocol",
    *OWN_COUNTERS,
)

# Handshake, and the first packet with payload: SYN, its acknowledgement, data.
YOUNG_PACKETS: Final = 3
_MIDLIFE_TIMEOUT_S: Final = 3600  # a flow seen in mid-life and silent for so long may start on top
_IP_HEADER_BYTES: Final = {"ipv4": 20, "ipv6": 40}
# Header lengths of TCP in words, the frequent ones first: with timestamps, without, with 1 to 3 SACKs.
_TCP_HEADER_WORDS: Final = (8, 5, 11, 13, 15, 10, 6, 7, 9, 12, 14)

_FIN, _SYN, _RST = 1, 2, 4

# The numbers and switches of `Settings` beside its vectors.
_OTHER_SETTINGS: Final = tuple(
    given.name for given in fields(Settings) if isinstance(given.default, bool | int | float)
)

Json = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What is, or shall be, installed.

    Attributes:
        interfaces: names of the interfaces scheduled, sorted.
        settings: None leaves packets untouched and only notes flows.
        sysctls: values before this data path changed them, by name.
        since_ns: CLOCK_MONOTONIC when it was first installed.
        flow_entries: flows that each of the two sets of flows can hold.
        flow_timeout_s: how long a flow is kept there without a packet.
    """

    interfaces: tuple[str, ...] = ()
    settings: Settings | None = None
    sysctls: Mapping[str, int] = field(default_factory=dict)
    since_ns: int = 0
    flow_entries: int = 131_072
    flow_timeout_s: int = 150


def prepare(state: State, *, afresh: bool = False) -> str:
    """The nft commands, one transaction, that make table and sets where they are not there.

    Text, because JSON has no name for the type of `ct id`, the key of all three sets.

    Args:
        state: sizes of the sets.
        afresh: first drop the table that is there (another version's), with all flows and counters.
    """
    table = f"add table {FAMILY} {TABLE}\n"
    if afresh:
        table += f"delete table {FAMILY} {TABLE}\n" + table
    flow_set = f"{{ typeof ct id; size {state.flow_entries}; flags dynamic,timeout; }}"
    return table + "".join(f"add set {FAMILY} {TABLE} {name} {flow_set}\n" for name in _SETS)


def install(state: State) -> list[Json]:
    """The transaction that brings `state` into the prepared table, whatever rules were there."""
    table = {"family": FAMILY, "name": TABLE}
    commands: list[Json] = [{"add": {"counter": {"family": FAMILY, "table": TABLE, "name": name}}} for name in COUNTERS]
    rules = {**_packet_rules(state), "state": [_note(text) for text in _notes(state)]}
    # Rules are flushed before chains go; `add` makes `delete` work whether the chain is there or not.
    known = {"state", "egress", *_packet_rules(State(("any",), _every_level()))}
    commands += [_chain(name) for name in sorted(known)]
    commands.append({"flush": {"table": table}})
    commands += [{"delete": {"chain": {"family": FAMILY, "table": TABLE, "name": n}}} for n in sorted(known - {*rules})]
    for chain, expressions in rules.items():
        for expression in expressions:
            comment = {"comment": expression.pop()["comment"]} if "comment" in expression[-1] else {}
            commands.append({"add": {"rule": {**_in(chain), "expr": expression, **comment}}})
    return commands


def remove() -> list[Json]:
    """The transaction that takes the table away."""
    table = {"family": FAMILY, "name": TABLE}
    return [{"add": {"table": table}}, {"delete": {"table": table}}]


def forget(direction: str, flow_ids: Iterable[int]) -> list[Json]:
    """The transaction that drops flows from a set, whether they are still in it or not."""
    elements = {"family": FAMILY, "table": TABLE, "name": f"sent_{direction}", "elem": list(flow_ids)}
    return [{"add": {"element": elements}}, {"delete": {"element": elements}}]


def parse_state(comments: Iterable[str]) -> State | None:
    """Inverse of what `install` writes into chain `state`; None if it is of another version or not whole."""
    interfaces, sysctls, levels, numbers = [], {}, {}, {}
    others: dict[str, Any] = {}
    for text in comments:
        if match := re.fullmatch(r"interface (\S+)", text):
            interfaces.append(match[1])
        elif match := re.fullmatch(r"sysctl (\S+) was (\d+)", text):
            sysctls[match[1]] = int(match[2])
        elif match := re.fullmatch(r"level (\d+): from (\d+) bytes, dscp (\d+), priority (\d+)", text):
            levels[int(match[1])] = tuple(int(match[group]) for group in (2, 3, 4))
        elif match := re.fullmatch(r"(version|since_ns|flow_entries|flow_timeout_s) (\d+)", text):
            numbers[match[1]] = int(match[2])
        elif (match := re.fullmatch(r"setting (\w+) (.+)", text)) and match[1] in _OTHER_SETTINGS:
            others[match[1]] = json.loads(match[2])
    if numbers.pop("version", None) != VERSION or numbers.keys() != {"since_ns", "flow_entries", "flow_timeout_s"}:
        return None
    settings = None
    if levels:
        rows = [levels[level] for level in sorted(levels)]
        settings = Settings(
            thresholds=Thresholds.of(first for first, _, _ in rows[1:]),
            dscp=tuple(dscp for _, dscp, _ in rows),
            priority=tuple(priority for _, _, priority in rows),
            **others,
        )
    return State(tuple(sorted(interfaces)), settings, sysctls, **numbers)


def parse_sysctls(comments: Iterable[str]) -> dict[str, int]:
    """The remembered sysctls alone, which all versions write alike."""
    found = (re.fullmatch(r"sysctl (\S+) was (\d+)", text) for text in comments)
    return {match[1]: int(match[2]) for match in found if match}


def _notes(state: State) -> list[str]:
    notes = [f"version {VERSION}", f"since_ns {state.since_ns}", f"flow_entries {state.flow_entries}"]
    notes.append(f"flow_timeout_s {state.flow_timeout_s}")
    notes += [f"interface {name}" for name in state.interfaces]
    notes += [f"sysctl {name} was {value}" for name, value in state.sysctls.items()]
    if state.settings is not None:
        starts = (0, *state.settings.thresholds.bytes)
        columns = zip(starts, state.settings.dscp, state.settings.priority, strict=True)
        notes += [
            f"level {level}: from {start} bytes, dscp {dscp}, priority {priority}"
            for level, (start, dscp, priority) in enumerate(columns)
        ]
        notes += [f"setting {name} {json.dumps(getattr(state.settings, name))}" for name in _OTHER_SETTINGS]
    return notes


def _packet_rules(state: State) -> dict[str, list[list[Json]]]:
    """Every chain that packets pass, by name: its rules, each a list of expressions."""
    if not state.interfaces:
        return {}
    out = _match(_meta("oifname"), _one_or_set(state.interfaces), "!=")
    rules: dict[str, list[list[Json]]] = {
        "egress": [
            [out, _ACCEPT],
            [_match(_meta("length"), 100, "<="), {"jump": {"target": "small"}}],
            # Plain comparisons: each costs a third of a lookup in a set.
            *(
                [_match(_meta("l4proto"), protocol), _direction(direction), _goto(direction)]
                for protocol in ("tcp", "udp")
                for direction in DIRECTIONS
            ),
            [_match(_meta("l4proto"), {"set": ["tcp", "udp"]}, "!="), _count("untracked_other_protocol"), _ACCEPT],
            [_match(_ct("state"), "untracked", "in"), _count("untracked_notrack"), _ACCEPT],
            [_count("untracked_invalid")],
        ],
        "small": [
            [_match(_meta("l4proto"), "udp"), _match(_payload("udp", "length"), 8), _goto("top")],
            [_match(_meta("l4proto"), "tcp", "!="), {"return": None}],
            *(
                [
                    _match(_meta("nfproto"), family),
                    _match(_payload("tcp", "doff"), words),
                    _match(_meta("length"), _IP_HEADER_BYTES[family] + 4 * words),
                    _goto("bare"),
                ]
                for words in _TCP_HEADER_WORDS
                for family in _IP_HEADER_BYTES
            ),
        ],
        # Acknowledgements are neither the flow's sending nor its end, and do not make it one.
        "bare": [
            [_match(_tcp_flags(_FIN | _SYN | _RST), 0), _goto("top")],
            *(
                [_match(_tcp_flags(_SYN | _RST), _SYN), _direction(direction), _update(f"sent_{direction}", state)]
                for direction in DIRECTIONS
            ),
            *(
                [_direction(direction), _match(_ct("id"), f"@sent_{direction}"), _update(f"sent_{direction}", state)]
                for direction in DIRECTIONS
            ),
            [_goto("top")],
        ],
    }
    for direction in DIRECTIONS:
        onwards = _goto(f"{direction}_levels")
        rules[direction] = [[_update(f"sent_{direction}", state), onwards], [_count("insert_failed"), onwards]]
        rules |= _level_rules(direction, state.settings)
    marks = _mark_rules(state.settings)
    return rules | marks


def _level_rules(direction: str, settings: Settings | None) -> dict[str, list[list[Json]]]:
    if settings is None:
        return {f"{direction}_levels": [[_goto("top")]]}
    thresholds = conntrack_thresholds(settings)
    packets, sent = _ct("packets", direction), _ct("bytes", direction)
    bottom = _goto(f"level_{len(thresholds)}")
    levels = [[_match(sent, thresholds[-1], ">="), bottom]]
    levels.append([_match(packets, YOUNG_PACKETS, "<="), {"jump": {"target": f"{direction}_young"}}])
    levels.append([_match(_ct("id"), "@midlife"), bottom])
    levels += [
        [_match(sent, threshold, ">="), _goto(f"level_{level}")]
        for level, threshold in reversed(list(enumerate(thresholds[:-1], 1)))
    ]
    levels.append([_goto("level_0")])
    midlife = {"set": {"op": "update", "elem": _element(_MIDLIFE_TIMEOUT_S), "set": "@midlife"}}
    young = [
        # Known before accounting was on: conntrack counts nothing for it, ever.
        [_match(packets, 0), bottom],
        [_match(packets, 1), _match(_meta("l4proto"), "udp"), _goto("level_0")],
        [_match(_meta("l4proto"), "udp"), {"return": None}],
        [_match(packets, 1), _match(_tcp_flags(_SYN), 0), midlife, bottom],
        [_match(_ct("id"), "@midlife"), bottom],
        [_goto("level_0")],
    ]
    return {f"{direction}_levels": levels, f"{direction}_young": young}


def _mark_rules(settings: Settings | None) -> dict[str, list[list[Json]]]:
    if settings is None:
        return {"top": [[_count("untagged")]]}
    foreign = []
    if settings.respect_dscp:
        ours = {"set": sorted({0, *settings.dscp})}
        foreign = [
            [_match(dscp, 0, "!="), _match(dscp, ours, "!="), _count("foreign_dscp"), _ACCEPT]
            for dscp in (_payload("ip", "dscp"), _payload("ip6", "dscp"))
        ]

    def mark(counter: str, level: int) -> list[list[Json]]:
        if settings.observe:
            return [*([*rule] for rule in foreign), [_count(counter)], [_count("observed")]]
        return [
            *([*rule] for rule in foreign),
            [_count(counter), _set_value(_meta("priority"), tc_handle(settings.priority[level]))],
            [_set_value(_payload("ip", "dscp"), settings.dscp[level]), _ACCEPT],
            [_set_value(_payload("ip6", "dscp"), settings.dscp[level])],
        ]

    marks = {f"level_{level}": mark(f"level_{level}", level) for level in range(settings.thresholds.levels)}
    return {**marks, "top": mark("top", 0)}


def tc_handle(priority: int) -> str:
    """`skb->priority` in the only form nftables takes it: major:minor, hexadecimal."""
    return f"{priority >> 16:x}:{priority & 0xFFFF:x}"


def _every_level() -> Settings:
    return Settings(Thresholds.of(range(1, MAX_LEVELS)), tuple(range(MAX_LEVELS)), (0,) * MAX_LEVELS)


# --- the words of libnftables' JSON schema, see libnftables-json(5) ---------------------------------------------------

_ACCEPT: Final = {"accept": None}


def _in(chain: str) -> Json:
    return {"family": FAMILY, "table": TABLE, "chain": chain}


def _chain(name: str) -> Json:
    chain: Json = {"family": FAMILY, "table": TABLE, "name": name}
    if name == "egress":
        chain |= {"type": "filter", "hook": "postrouting", "prio": _HOOK_PRIORITY, "policy": "accept"}
    return {"add": {"chain": chain}}


def _note(text: str) -> list[Json]:
    return [{"return": None}, {"comment": text}]


def _match(left: Json, right: Any, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str) -> Json:
    return {"meta": {"key": key}}


def _ct(key: str, direction: str = "") -> Json:
    return {"ct": {"key": key, "dir": direction} if direction else {"key": key}}


def _payload(protocol: str, name: str) -> Json:
    return {"payload": {"protocol": protocol, "field": name}}


def _tcp_flags(mask: int) -> Json:
    return {"&": [_payload("tcp", "flags"), mask]}


def _direction(direction: str) -> Json:
    return _match(_ct("direction"), direction)


def _one_or_set(values: tuple[str, ...]) -> Any:
    return values[0] if len(values) == 1 else {"set": list(values)}


def _goto(target: str) -> Json:
    return {"goto": {"target": target}}


def _count(name: str) -> Json:
    return {"counter": name}


def _set_value(key: Json, value: Any) -> Json:
    return {"mangle": {"key": key, "value": value}}


def _element(timeout_s: int) -> Json:
    return {"elem": {"val": _ct("id"), "timeout": timeout_s}}


def _update(name: str, state: State) -> Json:
    return {"set": {"op": "update", "elem": _element(state.flow_timeout_s), "set": f"@{name}"}}

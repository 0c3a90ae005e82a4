"""`fabricpilot agent rules`: the configured rules in words, and which of them decides about a given flow.

Reads the configuration and asks the rules as the kernel does (datapath/rules.py). How many flows each rule decides
about now is read from the data path where there is one and it may be opened.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabricpilot.config import AgentConfig, Rule
from fabricpilot.errors import FabricpilotError, UsageError
from hostagent.datapath.cgroups import find_cgroup
from hostagent.datapath.rules import Flow, first_match, flows_by_rule
from hostagent.flow_control import check

_FLOW = re.compile(r"\s*(tcp|udp)\s+(\S+):(\d+)\s+(\S+):(\d+)\s*", re.IGNORECASE)
_BY_DEFAULT = "by thresholds and central's verdicts"


def listing(config: AgentConfig) -> list[dict[str, Any]]:
    """One dictionary per rule: number, name, matches, says, flows (None: no data path to ask).

    Raises:
        UsageError: a rule is wrong.
    """
    parsed = check(config)
    flows = _flows_now(config, len(parsed))
    return [
        {
            "number": number,
            "name": rule.name,
            "matches": _matches(given),
            "says": _says(given),
            "flows": flows[number - 1] if flows else None,
        }
        for number, (rule, given) in enumerate(zip(parsed, config.rules, strict=True), 1)
    ]


def decide(config: AgentConfig, flow: str, dscp: int, cgroup: str) -> dict[str, Any]:
    """Which rule decides about `flow`, a text such as "tcp 10.0.0.1:40000 10.0.0.2:80".

    Raises:
        UsageError: a rule is wrong, or `flow` is not understood.
    """
    parsed = check(config)
    asked = _parse_flow(flow, dscp, cgroup)
    cgroups = [find_cgroup(rule.cgroup) if rule.cgroup else None for rule in parsed]
    number = first_match(parsed, cgroups, asked)
    if number is None:
        return {"rule": 0, "name": "", "says": f"no rule: {_BY_DEFAULT}"}
    says = f"rule {number + 1} '{parsed[number].name}': {_says(config.rules[number])}"
    return {"rule": number + 1, "name": parsed[number].name, "says": says}


def _parse_flow(text: str, dscp: int, cgroup: str) -> Flow:
    match = _FLOW.fullmatch(text)
    wrong = UsageError(
        f"--flow '{text}': write it like 'tcp 10.0.0.1:40000 10.0.0.2:80' or 'udp [fd00::1]:53 [fd00::2]:9'"
    )
    if match is None:
        raise wrong
    try:
        source, destination = (ipaddress.ip_address(match[group].strip("[]")) for group in (2, 4))
    except ValueError as error:
        raise wrong from error
    ports = int(match[3]), int(match[5])
    if max(ports) > 65535 or source.version != destination.version:
        raise wrong
    protocol = 6 if match[1].lower() == "tcp" else 17
    return Flow(str(source), str(destination), *ports, protocol, dscp, _with_ancestors(cgroup))


def _with_ancestors(cgroup: str) -> frozenset[int]:
    parts = [part for part in cgroup.split("/") if part]
    found = [find_cgroup("/" + "/".join(parts[: depth + 1])) for depth in range(len(parts))]
    if parts and found[-1] is None:
        raise UsageError(f"--cgroup {cgroup}: there is no such cgroup (v2)")
    return frozenset(one.id for one in found if one is not None)


def _matches(rule: Rule) -> str:
    said = [
        *([rule.protocol] if rule.protocol != "any" else []),
        *_one_of("from", rule.source),
        *_one_of("from port", rule.source_port),
        *_one_of("to", rule.destination),
        *_one_of("to port", rule.destination_port),
        *_one_of("with DSCP", rule.dscp),
        *([f"of cgroup {rule.cgroup}"] if rule.cgroup else []),
    ]
    return " ".join(said) or "every flow"


def _one_of(what: str, values: Sequence[object]) -> list[str]:
    return [f"{what} {', '.join(map(str, values))}"] if values else []


def _says(rule: Rule) -> str:
    said = {
        "schedule": _BY_DEFAULT,
        "pin": f"always on level {rule.level}",
        "observe": "only observed",
        "exclude": "left alone",
    }[rule.action]
    return f"{said}, by route {rule.route}" if rule.route else said


def _flows_now(config: AgentConfig, rules: int) -> list[int] | None:
    from hostagent.datapath.bpffs import holds
    from hostagent.datapath.ebpf import EbpfDatapath

    pin_dir = Path(config.datapath.pin_dir)
    if os.geteuid() != 0 or not holds(pin_dir):
        return None
    with contextlib.suppress(FabricpilotError):
        datapath = EbpfDatapath(pin_dir, config.datapath.flow_entries)
        try:
            return flows_by_rule(datapath.flows().states, rules) if datapath.adopted else None
        finally:
            datapath.close()
    return None

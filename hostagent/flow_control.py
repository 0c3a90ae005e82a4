"""Rules, verdicts and routes of a running agent: what the operator and central want of single flows.

    configuration --rules--> kernel     evaluated again when a cgroup that a rule names comes or goes
    central --verdicts--> kernel        by the number of one of this host's routes; the kernel ends them
    netlink --links, neighbours--> usable routes

The agent's loop calls `on_event` when `socket` is readable and `tick` at every report. Only an eBPF data path has maps
for this; `require` says so before anything is attached.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig
from fabricpilot.errors import UsageError
from fabricpilot.wire import FlowVerdict
from hostagent.datapath.base import Datapath
from hostagent.datapath.cgroups import find_cgroup
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.rules import Cgroup, ParsedRule, compile_rules, parse_rules
from hostagent.datapath.steering import Steering
from hostagent.routes import RouteWatch, parse_paths

log = logging.getLogger(__name__)

_LEAST_LEASE_S: Final = 10.0  # how long routes hold on when the agent says nothing ...
_LEASE_TICKS: Final = 3  # ... or as many reports, if that is longer


def check(config: AgentConfig) -> tuple[ParsedRule, ...]:
    """The rules of `config`, checked together with its routes.

    Raises:
        UsageError: names the rule or route and what is wrong with it.
    """
    paths = parse_paths(config.routes.paths)
    rules = parse_rules(config.rules, config.datapath.levels, paths)
    for rule in rules:
        if rule.route and paths[rule.route].mark:
            raise UsageError(
                f"rule '{rule.name}': route {rule.route} goes by mark, which central asks for flow by flow; a rule "
                "needs a route with interface or flow_label"
            )
    compile_rules(rules, [None] * len(rules))
    return rules


def require(config: AgentConfig, datapath: Datapath) -> None:
    """Refuse what `datapath` cannot do: unlike a level, it would show as packets changed that were to be left alone.

    Raises:
        UsageError: names the key and the data path.
    """
    if isinstance(datapath, EbpfDatapath):
        return
    wanted = {
        "[[rules]]": bool(config.rules),
        "[[routes.paths]]": bool(config.routes.paths),
        "datapath.observe": config.datapath.observe and datapath.name != "fake",
    }
    lacking = [key for key, used in wanted.items() if used]
    if lacking:
        raise UsageError(
            f"{', '.join(lacking)}: the {datapath.name} data path cannot do that; set datapath.backend = ebpf"
        )


class FlowControl:
    """What is wanted of single flows on one host.

    Args:
        config: of this host; its rules replace those an agent before this one has left.
        datapath: loaded.
        ipr: one long-lived rtnetlink socket.
        scheduled: names of the interfaces that carry the data path's program; None asks the data path.

    Raises:
        UsageError: a rule or route is wrong.
    """

    def __init__(
        self,
        config: AgentConfig,
        datapath: EbpfDatapath,
        ipr: IPRoute,
        scheduled: Callable[[], list[str]] | None = None,
    ) -> None:
        self._rules = check(config)
        self._steering = Steering(datapath)
        self._cgroups: list[Cgroup | None] | None = None
        self._verdicts = 0
        self._no_room = 0
        self._watch: RouteWatch | None = None
        self._steering.use_routes([], 0)
        if paths := parse_paths(config.routes.paths):
            lease_s = max(_LEAST_LEASE_S, _LEASE_TICKS * config.host.report_interval_s)
            scheduled = scheduled or datapath.attached
            self._watch = RouteWatch(ipr, self._steering, paths, scheduled, config.routes.gap_ms, lease_s)
        try:
            self._apply_rules()
            self._forget_foreign_hops()
        except BaseException:
            self.close()
            raise

    @property
    def socket(self) -> socket.socket | None:
        """For a poller; None if there is nothing to watch."""
        return self._watch.socket if self._watch else None

    @property
    def routes(self) -> tuple[int, ...]:
        """Numbers of the configured routes."""
        return self._watch.numbers if self._watch else ()

    @property
    def usable_routes(self) -> tuple[int, ...]:
        """Those of them that lead somewhere now."""
        return (
            tuple(number for number in self._steering.usable_routes() if number in self.routes) if self._watch else ()
        )

    def on_event(self) -> None:
        """Something happened to links, neighbours or routing tables."""
        if self._watch and self._watch.on_event():
            self._add(self._watch.marks.again())

    def take(self, verdicts: Sequence[FlowVerdict]) -> None:
        """Act on what central wants of single flows."""
        self._add(self._watch.marks.translate(verdicts) if self._watch else verdicts)

    def tick(self) -> None:
        """Once per report: what ends by time, and what changes without an event."""
        self._apply_rules()
        self._verdicts = self._steering.drop_expired()
        if self._watch:
            self._watch.tick()

    def status(self) -> dict[str, Any]:
        """What `fabricpilot agent status` shows."""
        return {
            "rules": len(self._rules),
            "verdicts": self._verdicts,
            "verdicts_without_room": self._no_room,
            "routes": {
                str(number): (self._watch.why_not.get(number, "usable") if self._watch else "")
                for number in self.routes
            },
        }

    def close(self) -> None:
        """Stop watching links; rules and verdicts go on."""
        if self._watch:
            self._watch.close()

    def _add(self, verdicts: Sequence[FlowVerdict]) -> None:
        if self._watch and self._watch.marks.hops():
            self._watch.refresh()  # next hops that a flow is to take must be usable first
        refused = self._steering.add_verdicts(verdicts)
        if refused and not self._no_room:
            log.warning("there is no room for more verdicts; flows without one go by the thresholds")
        self._no_room += refused

    def _apply_rules(self) -> None:
        cgroups = [find_cgroup(rule.cgroup) if rule.cgroup else None for rule in self._rules]
        if cgroups == self._cgroups:
            return
        self._steering.set_rules(compile_rules(self._rules, cgroups), len(self._rules))
        self._cgroups = cgroups

    def _forget_foreign_hops(self) -> None:
        """Verdicts for next hops that only the agent before this one knew; their numbers may mean others now."""
        self._steering.end_verdicts_beyond(max(self.routes, default=0))


def open_flow_control(
    config: AgentConfig, datapath: Datapath, ipr: IPRoute, scheduled: Callable[[], list[str]]
) -> FlowControl | None:
    """The flow control of a data path that has one."""
    return FlowControl(config, datapath, ipr, scheduled) if isinstance(datapath, EbpfDatapath) else None

"""The netfilter data path: for kernels that have nftables and conntrack but refuse BPF.

Conntrack counts every connection; the rules of table `inet fabricpilot` (nft_rules.py) compare its counts with the
thresholds and write DSCP and skb->priority. All state is in the kernel: rules, settings and the sysctls' former values
in the table, flows in conntrack and in two sets of the table. The table outlives the agent; the next one adopts it.

    attach: remember sysctls in the table -> switch conntrack's counting on -> rules for the interface
    apply:  all rules anew in one transaction
    flows:  dump sets and conntrack, join them, estimate payload
    detach: sysctls as they were -> the table goes

Conntrack's entries belong to the host and are never deleted. To forget a flow takes it out of our set; if it goes on
afterwards it appears as a new flow, from zero, as it does in the other data paths.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import MAX_LEVELS
from hostagent.datapath import nft_rules, nft_table
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START, FinishedMessages, FlowTable, Settings, SocketRule
from hostagent.datapath.conntrack_flows import (
    NO_FLOWS,
    Flows,
    connections,
    contained,
    flow_table,
    load_conntrack,
    realtime_offset_ns,
    senders,
)
from hostagent.datapath.layout import counter_names
from hostagent.datapath.netlink_dump import NetfilterDump
from hostagent.datapath.nft_library import Nft
from hostagent.datapath.nft_rules import DIRECTIONS, YOUNG_PACKETS, State
from hostagent.datapath.payload_estimate import MEAN_HEADERS_BYTES, UDP, conntrack_thresholds

log = logging.getLogger(__name__)

SYSCTLS: Final = ("net.netfilter.nf_conntrack_acct", "net.netfilter.nf_conntrack_timestamp")
_TABLE: Final = f"{nft_rules.FAMILY} {nft_rules.TABLE}"
_MAX_CLOCK_STEP_NS: Final = 50_000_000
_FLOW_GRACE_S: Final = 120  # two of the longest report intervals, in which an idle flow is seen as finished
_FORGOTTEN_DTYPE: Final = np.dtype([("code", "<u8"), ("payload", "<u8"), ("packets", "<u8"), ("since_ns", "<u8")])


class NftablesDatapath:
    """The `Datapath` on nftables and conntrack; see base.py for the contract.

    Args:
        flow_entries: flows that can be told apart, per direction; further ones are scheduled but not reported.
        idle_timeout_s: silence after which the agent sees a flow as finished.

    Raises:
        KernelError: python3-nftables is missing, or netfilter may not be used.
    """

    name = "nftables"
    capabilities = frozenset({"adopt"})

    def __init__(self, flow_entries: int, idle_timeout_s: float) -> None:
        self._flow_entries = flow_entries
        self._flow_timeout_s = round(idle_timeout_s) + _FLOW_GRACE_S
        self._nft = Nft()
        self._dump = NetfilterDump()
        self._state = self._installed()
        self._kept: State | None = None  # what this process has applied, and keeps installed
        self._last = NO_FLOWS
        self._forgotten = np.zeros(0, _FORGOTTEN_DTYPE)
        self._offset_ns = realtime_offset_ns()
        self._counted = dict.fromkeys(
            ("flows_inserted", "flows_midlife", "flows_forgotten", "flows_evicted", "fresh_starts"), 0
        )
        self._sent_bytes = [0] * MAX_LEVELS

    def attach(self, interface: str) -> bool:
        """See `Datapath.attach`."""
        names = [name for _, name in socket.if_nameindex()]
        if interface not in names:
            raise UsageError(f"interface '{interface}' does not exist; there are: {', '.join(sorted(names))}")
        with contextlib.ExitStack() as undo:
            if (state := self._reload()) is None:
                undo.callback(self.detach)
                state = self._prepare()
            for name in SYSCTLS:
                _write_sysctl(name, 1)
            known = interface in state.interfaces
            if not known:
                self._install(replace(state, interfaces=tuple(sorted((*state.interfaces, interface)))))
            undo.pop_all()
        return not known

    def attached(self) -> list[str]:
        """See `Datapath.attached`."""
        state = self._reload()
        present = {name for _, name in socket.if_nameindex()}
        return sorted(present.intersection(state.interfaces)) if state else []

    def attached_by(self, interfaces: Collection[str]) -> dict[str, list[str]]:
        """See `Datapath.attached_by`."""
        return {"netfilter": list(interfaces)}

    def release(self, interfaces: Collection[str]) -> None:
        """See `Datapath.release`."""
        if (state := self._reload()) is None:
            return
        present = {name for _, name in socket.if_nameindex()}
        kept = tuple(name for name in state.interfaces if name in present and name not in interfaces)
        if kept != state.interfaces:
            self._install(replace(state, interfaces=kept))

    def claim(self) -> None:
        """See `Datapath.claim`: there is one table per network namespace, and nothing to lock in it."""

    def detach(self) -> None:
        """See `Datapath.detach`."""
        if (comments := self._comments()) is None:
            return
        # The table goes last: it is what remembers the sysctls, should this be interrupted.
        for name, value in nft_rules.parse_sysctls(comments).items():
            if name in SYSCTLS:
                _write_sysctl(name, value)
        self._nft.run(nft_rules.remove(), "removing the data path")
        self._state, self._kept = None, None
        self._last = NO_FLOWS

    def apply(self, settings: Settings) -> None:
        """See `Datapath.apply`."""
        state = self._reload() or self._prepare()
        wanted = replace(state, settings=settings, flow_timeout_s=self._flow_timeout_s)
        if wanted != state:
            self._install(wanted)
        self._kept = self._state

    def settings(self) -> Settings | None:
        """See `Datapath.settings`."""
        state = self._reload()
        return state.settings if state else None

    def flows(self) -> FlowTable:
        """See `Datapath.flows`.

        A flow whose conntrack entry has gone is shown as ended until it is forgotten.
        """
        read_at_ns = time.monotonic_ns()
        try:
            current = self._read() if self._state is not None else None
        except FileNotFoundError:
            current = None
        except OSError as error:
            raise KernelError(f"cannot read the flow table: {error.strerror}") from error
        if current is None:
            self._bring_back()
            return FlowTable.empty(read_at_ns)
        self._count_new(current)
        self._settle_times(current)
        departed = self._last.take(~contained(self._last.codes, current.codes))
        departed.states["flags"] |= FLAG_ENDED
        if (surplus := len(departed) - self._flow_entries) > 0:
            self._counted["flows_evicted"] += surplus
            departed = departed.take(slice(surplus, None))
        self._last = current.and_also(departed)
        return FlowTable(self._last.keys.copy(), self._last.states.copy(), read_at_ns)

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """See `Datapath.forget`."""
        if self._state is None or len(keys) == 0:
            return 0
        wanted = _as_bytes(keys)
        rows = contained(_as_bytes(self._last.keys), wanted)
        if rows.sum() < len(keys):
            self.flows()
            rows = contained(_as_bytes(self._last.keys), wanted)
        # Ports used again: the ended flow of that key is meant, not the one that goes on.
        ended = rows & (self._last.states["flags"] & FLAG_ENDED != 0)
        goes_on = rows & ~ended
        rows = ended | (goes_on & ~contained(_as_bytes(self._last.keys), _as_bytes(self._last.keys[ended])))
        self._remember_forgotten(self._last.take(rows))
        for side, direction in enumerate(DIRECTIONS):
            codes = self._last.codes[rows]
            if len(ids := codes[codes & np.uint64(1) == side] >> np.uint64(1)):
                self._nft.run(nft_rules.forget(direction, ids.tolist()), "forgetting flows")
        self._last = self._last.take(~rows)
        self._counted["flows_forgotten"] += int(rows.sum())
        return int(rows.sum())

    def counters(self) -> dict[str, int]:
        """See `Datapath.counters`; packets of GSO count once, payload is estimated, flows since this agent began."""
        if self._state is None or not (kernel := nft_table.counters(self._dump)):
            return {}
        settings = self._state.settings
        levels = settings.thresholds.levels if settings else MAX_LEVELS
        named = dict.fromkeys((*counter_names(levels), *nft_rules.OWN_COUNTERS), 0)
        for level in range(levels):
            counted = kernel[f"level_{level}"]
            estimate = counted.ip_bytes - MEAN_HEADERS_BYTES * counted.packets
            self._sent_bytes[level] = max(self._sent_bytes[level], estimate)  # tiny datagrams make it fall
            named[f"packets_level_{level}"] = counted.packets
            named[f"bytes_level_{level}"] = self._sent_bytes[level]
        named["packets_level_0"] += kernel["top"].packets
        named |= {name: kernel[name].packets for name in nft_rules.COUNTERS if name in named}
        return named | self._counted

    def finished_messages(self) -> FinishedMessages:
        """See `Datapath.finished_messages`: conntrack counts connections, so messages are not told apart."""
        return FinishedMessages.none()

    def serve_sockets(self, rule: SocketRule) -> None:
        """See `Datapath.serve_sockets`: there is nothing it could do."""

    def sees_backlog(self) -> bool:
        """See `Datapath.sees_backlog`."""
        return False

    def close(self) -> None:
        """See `Datapath.close`."""
        self._dump.close()

    # --- the table ----------------------------------------------------------------------------------------------------

    def _comments(self) -> list[str] | None:
        """The notes in the table; None if there is no table."""
        if not nft_table.exists(self._dump):
            return None
        try:
            return nft_table.comments(self._dump, "state")
        except OSError as error:
            raise KernelError(f"table {_TABLE} cannot be read: {error.strerror}") from error

    def _installed(self) -> State | None:
        comments = self._comments()
        return None if comments is None else nft_rules.parse_state(comments)

    def _reload(self) -> State | None:
        """What is installed now: another process, or a person, may have changed it since."""
        self._state = self._installed()
        return self._state

    def _prepare(self) -> State:
        """Table and sets, and in them what the sysctls were, before anything else changes."""
        try:
            load_conntrack(self._dump)
        except OSError as error:
            raise KernelError(
                f"conntrack cannot be used: {error.strerror}; it needs CONFIG_NF_CONNTRACK and CONFIG_NF_CT_NETLINK"
            ) from error
        before = self._comments()
        remembered = nft_rules.parse_sysctls(before or ())
        sysctls = {name: remembered.get(name, _read_sysctl(name)) for name in SYSCTLS}
        state = State((), None, sysctls, time.monotonic_ns(), self._flow_entries, self._flow_timeout_s)
        self._nft.run(nft_rules.prepare(state, afresh=before is not None), "making the table")
        self._install(state)
        if before is not None:
            log.warning("the table of another version was replaced: the flow table starts afresh")
            self._counted["fresh_starts"] += 1
        return state

    def _install(self, state: State) -> None:
        self._nft.run(nft_rules.install(state), "installing the rules")
        self._state = state
        if self._kept is not None:
            self._kept = state

    def _bring_back(self) -> None:
        """After somebody removed the table under us (`nft flush ruleset` does), where this process had applied it."""
        self._state, self._last = None, NO_FLOWS
        if self._kept is None:
            return
        log.warning("table %s was removed by somebody else; bringing it back, its flow table starts afresh", _TABLE)
        self._nft.run(nft_rules.prepare(self._kept), "making the table")
        self._install(self._kept)
        self._counted["fresh_starts"] += 1

    # --- flows --------------------------------------------------------------------------------------------------------

    def _read(self) -> Flows:
        """What the kernel has now, less what was forgotten."""
        assert self._state is not None
        # The sets first: a connection read later has sent at least as much.
        first, second = (senders(self._dump, nft_rules.TABLE, way, time.monotonic_ns()) for way in DIRECTIONS)
        known = connections(self._dump)
        offset_ns = realtime_offset_ns()
        if abs(offset_ns - self._offset_ns) > _MAX_CLOCK_STEP_NS:  # else first_seen_ns would never stay the same
            self._offset_ns = offset_ns
        flows = flow_table(known, (first, second), self._offset_ns, self._state.since_ns)
        if self._state.settings is not None:
            flows.states["level"] = _levels(flows, self._state.settings)
        self._forgotten = self._forgotten[contained(self._forgotten["code"] >> np.uint64(1), known["id"])]
        self._subtract_forgotten(flows)
        return flows

    def _subtract_forgotten(self, flows: Flows) -> None:
        """What was told once is not told again: a flow that goes on after it was forgotten begins anew."""
        _, rows, before = np.intersect1d(flows.codes, self._forgotten["code"], assume_unique=True, return_indices=True)
        told = self._forgotten[before]
        for name, column in (("attained_bytes", "payload"), ("packets", "packets")):
            flows.states[name][rows] -= np.minimum(flows.states[name][rows], told[column])
        flows.states["first_seen_ns"][rows] = told["since_ns"]
        flows.states["last_seen_ns"][rows] = np.maximum(flows.states["last_seen_ns"][rows], told["since_ns"])
        flows.states["flags"][rows] &= ~np.uint8(FLAG_SAW_START)

    def _remember_forgotten(self, flows: Flows) -> None:
        told = np.zeros(len(flows), _FORGOTTEN_DTYPE)
        _, rows, before = np.intersect1d(flows.codes, self._forgotten["code"], assume_unique=True, return_indices=True)
        told["code"], told["since_ns"] = flows.codes, time.monotonic_ns()
        for name, column in (("payload", "attained_bytes"), ("packets", "packets")):
            told[name] = flows.states[column]
            told[name][rows] += self._forgotten[name][before]
        kept = ~contained(self._forgotten["code"], flows.codes)
        self._forgotten = np.concatenate([self._forgotten[kept], told])

    def _settle_times(self, current: Flows) -> None:
        """Keep the time of sending where nothing was sent since: ages come in clock ticks, so it would waver."""
        _, now, before = np.intersect1d(current.codes, self._last.codes, assume_unique=True, return_indices=True)
        was = self._last.states[before]
        still = (current.states["packets"][now] == was["packets"]) | (was["flags"] & FLAG_ENDED != 0)
        current.states["last_seen_ns"][now[still]] = was["last_seen_ns"][still]

    def _count_new(self, current: Flows) -> None:
        new = ~contained(current.codes, self._last.codes)
        self._counted["flows_inserted"] += int(new.sum())
        midlife = new & (current.states["flags"] & FLAG_SAW_START == 0)
        self._counted["flows_midlife"] += int(midlife.sum())


def _levels(flows: Flows, settings: Settings) -> npt.NDArray[np.uint8]:
    """The level of each flow's latest packet with payload, by the comparisons the rules make."""
    thresholds = np.array(conntrack_thresholds(settings), np.uint64)
    level = np.searchsorted(thresholds, flows.ip_bytes, side="right")
    young = np.where(flows.keys["protocol"] == UDP, 1, YOUNG_PACKETS)
    level[(flows.states["packets"] <= young) & (level < len(thresholds))] = 0
    level[flows.states["flags"] & FLAG_SAW_START == 0] = len(thresholds)
    return level.astype(np.uint8)


def _as_bytes(keys: npt.NDArray[np.void]) -> npt.NDArray[np.bytes_]:
    """Keys in a form that sorts quickly; they all end in zeros (`pad`), so nothing is lost."""
    return np.ascontiguousarray(keys).view(f"S{keys.dtype.itemsize}")


def _sysctl_path(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _read_sysctl(name: str) -> int:
    try:
        return int(_sysctl_path(name).read_text(encoding="ascii"))
    except OSError as error:
        option = "CONFIG_NF_CONNTRACK_TIMESTAMP" if name.endswith("timestamp") else "CONFIG_NF_CONNTRACK"
        raise KernelError(f"sysctl {name} cannot be read: {error.strerror}; it needs {option}") from error


def _write_sysctl(name: str, value: int) -> None:
    """Set a sysctl, if it is not that already.

    Raises:
        KernelError: it may not be written.
    """
    if _read_sysctl(name) == value:
        return
    try:
        _sysctl_path(name).write_text(f"{value}\n", encoding="ascii")
    except OSError as error:
        raise KernelError(
            f"sysctl {name} = {value} refused: {os.strerror(error.errno or 0)}; "
            "where /proc/sys is read-only (a container, a sandboxed service), set it from outside"
        ) from error

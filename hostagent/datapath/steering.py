"""Rules, verdicts and routes in the kernel: the maps that ebpf/rules.h, verdict.h and route.h read.

What a packet must never see half of is written behind its back and switched on by one number, the generation: a flow
whose generation differs looks again. The maps are pinned like all others, so rules and verdicts hold on when the agent
is gone; routes do not, as somebody has to watch the links they lead over.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import KernelError
from fabricpilot.wire import FlowVerdict
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLOW_KEY_DTYPE
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.rules import PREFIX_KEY_DTYPE, CompiledRules
from hostagent.datapath.verdicts import VERDICT_DTYPE, expired, flow_keys, verdict_words

STEERING_DTYPE: Final = np.dtype(  # `struct steering`
    [
        ("usable_routes", "<u8"),
        ("routes_until_ns", "<u8"),
        ("rules_generation", "<u4"),
        ("verdict_generation", "<u4"),
        ("route_gap_ms", "<u4"),
        ("last_rules_generation", "<u4"),
        ("last_verdict_generation", "<u4"),
        ("pad", "<u4"),
    ]
)
ROUTE_DTYPE: Final = np.dtype(  # `struct route`
    [
        ("interface", "<u4"),
        ("flags", "<u4"),
        ("flow_label", "<u4"),
        ("on_link", "<u4"),  # all ones: the destination is the neighbour, and the next hops are 0
        ("next_hop_ipv4", "u1", 4),
        ("next_hop_ipv6", "u1", 16),
    ]
)
ROUTE_IPV4, ROUTE_IPV6, ROUTE_LABEL, ROUTE_MANAGED = 1, 2, 4, 8
MAX_ROUTES: Final = 64  # route 0 is the kernel's choice

_ZERO: Final = np.zeros(1, np.uint32)
_WORD: Final = np.dtype([("word", "<u8")])
_VERDICT_GENERATIONS: Final = 2**16
_RULES_GENERATIONS: Final = 2**32


class Steering:
    """What is wanted of flows beyond thresholds, on a data path that is loaded; there is one writer per data path."""

    def __init__(self, datapath: EbpfDatapath) -> None:
        self._datapath = datapath

    def set_rules(self, rules: CompiledRules, count: int) -> None:
        """Act on `rules` from each flow's next packet on; `count` 0 switches them off. Costs an RCU grace period."""
        record = self._read()
        if count == 0:
            record["rules_generation"] = 0
            self._write(record)
            return
        generation = (int(record["last_rules_generation"][0]) + 1) % _RULES_GENERATIONS or 2
        slot = generation & 1
        bpf.wait_for_running_programs()  # some may be looking into this slot
        self._clear_prefixes(slot)
        for row in range(len(rules.prefixes)):
            key = rules.prefixes[row : row + 1].copy()
            key["slot"] = slot
            bpf.update(self._map("prefixes"), key, rules.admits[row : row + 1])
        bpf.update(self._map("rule_sets"), np.array([slot], np.uint32), rules.rule_set.reshape(1))
        record["rules_generation"] = record["last_rules_generation"] = generation
        self._write(record)

    def add_verdicts(self, verdicts: Sequence[FlowVerdict]) -> int:
        """Act on `verdicts`, one with `ttl_s` 0 ends that flow's; returns how many found no room.

        Raises:
            KernelError: the kernel refused for another reason.
        """
        if not verdicts:
            return 0
        keys, words = flow_keys(verdicts), verdict_words(verdicts, time.monotonic_ns())
        last = np.array(sorted({key.tobytes(): row for row, key in enumerate(keys)}.values()))  # of each flow
        ends = np.array([verdicts[row].ttl_s == 0 for row in last])
        try:
            bpf.delete_all(self._map("verdicts"), keys[last[ends]])
            refused = bpf.update_all(self._map("verdicts"), keys[last[~ends]], words[last[~ends]])
        except OSError as error:
            raise KernelError(f"cannot write a verdict: {error.strerror}") from error
        self._turn_verdicts()
        return refused

    def verdicts(self) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """All verdicts in the kernel, expired ones included: FLOW_KEY_DTYPE and VERDICT_DTYPE, shape (n,)."""
        keys, words = bpf.lookup_all(self._map("verdicts"), FLOW_KEY_DTYPE, _WORD, 64)
        return keys, words.view(VERDICT_DTYPE)

    def drop_expired(self) -> int:
        """Remove verdicts that have ended (the kernel heeds them no more); returns how many go on."""
        record = self._read()
        if record["verdict_generation"][0] == 0:
            return 0
        keys, words = self.verdicts()
        over = expired(words, time.monotonic_ns())
        bpf.delete_all(self._map("verdicts"), keys[over])
        left = int(len(keys) - over.sum())
        if left == 0:
            record["verdict_generation"] = 0
            self._write(record)
        return left

    def end_verdicts_beyond(self, route: int) -> None:
        """Remove the verdicts for routes of a higher number."""
        keys, words = self.verdicts()
        bpf.delete_all(self._map("verdicts"), keys[words["route"] > route])
        if len(keys):
            self._turn_verdicts()

    def set_routes(self, routes: Mapping[int, npt.NDArray[np.void]], gap_ms: int) -> None:
        """Where routes lead, ROUTE_DTYPE each, shape (); a new one is not used before `use_routes` says so.

        One that leads elsewhere from now on is withdrawn meanwhile. One whose flags alone change is not: flows of the
        other IP version would leave it, and wait for a gap to come back.

        Args:
            routes: by number, 1 to 63.
            gap_ms: silence after which a flow may change its route; 0: at any packet.
        """
        record = self._read()
        for number, route in routes.items():
            index, held = np.array([number], np.uint32), np.zeros(1, ROUTE_DTYPE)
            bpf.lookup(self._map("routes"), index, held)
            held["flags"] = route["flags"]
            if held.tobytes() != route.tobytes():
                record["usable_routes"] &= ~np.uint64(1 << number)
                self._write(record)
            bpf.update(self._map("routes"), index, route.reshape(1))
        record["route_gap_ms"] = gap_ms
        self._write(record)

    def use_routes(self, numbers: Sequence[int], for_s: float) -> None:
        """From the next packet on, exactly these routes may be used, for that long unless this is called again."""
        record = self._read()
        record["usable_routes"] = sum(1 << number for number in set(numbers))
        record["routes_until_ns"] = time.monotonic_ns() + int(for_s * 1e9)
        self._write(record)

    def usable_routes(self) -> tuple[int, ...]:
        """The routes that may be used now."""
        record = self._read()
        if int(record["routes_until_ns"][0]) <= time.monotonic_ns():
            return ()
        return tuple(number for number in range(MAX_ROUTES) if int(record["usable_routes"][0]) >> number & 1)

    def clear(self) -> None:
        """No rules, no verdicts, no routes."""
        record = self._read()
        record["rules_generation"] = record["verdict_generation"] = 0
        record["usable_routes"] = record["routes_until_ns"] = 0
        self._write(record)
        bpf.delete_all(self._map("verdicts"), self.verdicts()[0])

    def _turn_verdicts(self) -> None:
        """Make every flow look again."""
        record = self._read()
        generation = (int(record["last_verdict_generation"][0]) + 1) % _VERDICT_GENERATIONS or 1
        record["verdict_generation"] = record["last_verdict_generation"] = generation
        self._write(record)

    def _clear_prefixes(self, slot: int) -> None:
        prefixes = self._map("prefixes")
        stale = [key for key in bpf.keys(prefixes, PREFIX_KEY_DTYPE) if key["slot"][0] == slot]
        for key in stale:
            bpf.delete(prefixes, key)

    def _read(self) -> npt.NDArray[np.void]:
        record = np.zeros(1, STEERING_DTYPE)
        bpf.lookup(self._map("steering"), _ZERO, record)
        return record

    def _write(self, record: npt.NDArray[np.void]) -> None:
        bpf.update(self._map("steering"), _ZERO, record)

    def _map(self, name: str) -> int:
        return self._datapath.map_fd(name)

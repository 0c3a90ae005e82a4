"""Schemes that other rooms bring, whose thresholds a policy chooses: found as entry points, so nothing is imported.

An entry point of the group `fabricpilot.schemes` is a module with the functions of `Source`.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Protocol

from simulator.schemes import NAMES, Scheme
from simulator.workloads.distribution import SizeDistribution

ENTRY_POINT_GROUP = "fabricpilot.schemes"


class Source(Protocol):
    """What brings schemes."""

    def names(self) -> Mapping[str, str]:
        """Its schemes, each with a line about it."""

    def scheme(
        self, name: str, sizes: SizeDistribution, load: float, levels: int, send_buffer_bytes: float, workload: str
    ) -> Scheme:
        """One of them, for these flow sizes at this load, with K levels."""


def sources() -> list[Source]:
    """All of them."""
    return [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]


def all_names() -> dict[str, str]:
    """Every scheme that `fabricpilot simulate` takes, with a line about it: the simulator's own first."""
    brought = {name: text for source in sources() for name, text in source.names().items()}
    return {**NAMES, **brought}


def source_of(name: str) -> Source | None:
    """Who brings a scheme; None: it is the simulator's own, or unknown."""
    return None if name in NAMES else next((source for source in sources() if name in source.names()), None)

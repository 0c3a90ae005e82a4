"""Migrations that run or will run, as their operators announced them: long flows that may wait for all others.

Where it sits: `desk.PlanDesk` fills it from the link; whoever decides about long flows asks `match` for each of them
and gives what it finds the lowest priority. A migration is known by the host that reports the flow, the ports that
migrations use and, if it was told, the address it goes to. Announcements end by themselves, so that a client that
vanished holds nobody back for ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fabricpilot.wire import FlowSummary, MigrationFlow, Migrations

MAX_PLANS = 16  # of one client
TCP = 6


@dataclass(frozen=True)
class _Running:
    flows: tuple[MigrationFlow, ...]
    until_s: float


class Announced:
    """What is announced now."""

    def __init__(self) -> None:
        self._plans: dict[tuple[str, str], _Running] = {}

    def tell(self, message: Migrations, now_s: float) -> bool:
        """Take an announcement; False if the client has too many running."""
        key = (message.host, message.plan)
        self.forget(now_s)
        if not message.flows:
            self._plans.pop(key, None)
            return True
        if key not in self._plans and sum(client == message.host for client, _ in self._plans) >= MAX_PLANS:
            return False
        self._plans[key] = _Running(tuple(message.flows), now_s + message.ttl_s)
        return True

    def match(self, host: str, flow: FlowSummary, now_s: float) -> MigrationFlow | None:
        """The announced migration that this long flow of `host` is; None if it is none."""
        if flow.protocol != TCP:
            return None
        for one in self.flows(now_s):
            if (
                one.source_host == host
                and one.first_port <= flow.destination_port <= one.last_port
                and one.destination in ("", flow.destination)
            ):
                return one
        return None

    def flows(self, now_s: float) -> Iterator[MigrationFlow]:
        """All that are announced now."""
        for running in self._plans.values():
            if now_s < running.until_s:
                yield from running.flows

    def plans(self, now_s: float) -> list[str]:
        """Names of the plans announced now."""
        return sorted({plan for (_, plan), running in self._plans.items() if now_s < running.until_s})

    def forget(self, now_s: float) -> None:
        """Drop what has ended."""
        self._plans = {key: running for key, running in self._plans.items() if now_s < running.until_s}

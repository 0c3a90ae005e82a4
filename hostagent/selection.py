"""Which interfaces are scheduled, and which of them get queues: the configuration's answer about any name. Pure.

`host.interfaces` holds names and shell patterns. A name is a NIC somebody counts on, a pattern takes what comes: NICs
of a kind, or the host's ends of containers and virtual machines. Those in `queues.tag_only` are tagged and keep what
queues they have, as a container's end has no link of its own to share out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fabricpilot.config import AgentConfig
from fabricpilot.errors import UsageError
from hostagent.nics import SCRATCH_PREFIX, Nic


@dataclass(frozen=True)
class Selection:
    """What the configuration says about interfaces."""

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    tag_only: tuple[str, ...]

    @classmethod
    def of(cls, config: AgentConfig) -> "Selection":
        """That of a host.

        Raises:
            UsageError: nothing is selected, or something twice.
        """
        interfaces = config.host.interfaces
        if not interfaces:
            raise UsageError("no interface to schedule; give --interface NAME or set interfaces in [host]")
        if len(set(interfaces)) != len(interfaces):
            raise UsageError(f"host.interfaces = {interfaces} names an interface twice")
        return cls(
            tuple(entry for entry in interfaces if not is_pattern(entry)),
            tuple(entry for entry in interfaces if is_pattern(entry)),
            tuple(config.queues.tag_only),
        )

    def wants(self, nic: Nic) -> bool:
        """Whether the interface is to be scheduled: a named one always, others if they can be and a pattern fits."""
        if nic.name in self.names:
            return True
        if not nic.ethernet or nic.name == "lo" or nic.name.startswith(SCRATCH_PREFIX):
            return False
        return _matches(nic.name, self.patterns)

    def is_tag_only(self, name: str) -> bool:
        """Whether the interface keeps the queues it has; naming it in host.interfaces outdoes a pattern."""
        if name in self.tag_only:
            return True
        return name not in self.names and _matches(name, self.tag_only)


def is_pattern(entry: str) -> bool:
    """Whether an entry of host.interfaces stands for any number of interfaces."""
    return any(letter in entry for letter in "*?[")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

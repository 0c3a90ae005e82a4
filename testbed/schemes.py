"""The schemes under comparison: what queues the packets at the bottleneck, and who tags them.

Both have the same rate and the same buffer at the switch's port; only the order of service differs.

- `fifo`: one queue, no agents. What a plain switch does.
- `fabricpilot`: strict priority by DSCP at the port, an agent on every sender, central deciding the thresholds; the
  level of a flow is that of the bytes sent so far, as in AuTO and PIAS.
- `fabricpilot-backlog`: the same, but the level is that of the bytes written to the flow's socket so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.levels import DEFAULT_LEVELS, default_dscp
from testbed.daemons import Daemons
from testbed.netns.programs import Programs
from testbed.netns.star import StarPlan
from testbed.netns.switch_port import shape

FIFO = "fifo"
FABRICPILOT = "fabricpilot"
BACKLOG = "fabricpilot-backlog"
SCHEMES = (FIFO, FABRICPILOT)  # of the demo
ALL_SCHEMES = (*SCHEMES, BACKLOG)

DSCP = default_dscp(DEFAULT_LEVELS)  # what agents mark by default, and so what the switch serves by


def dscp_of(scheme: str) -> tuple[int, ...] | None:
    """What the switch serves by, None for one queue."""
    return None if scheme == FIFO else DSCP


@contextmanager
def in_force(
    scheme: str, star: StarPlan, programs: Programs, rate_bps: int, buffer_bytes: int, decision_s: float
) -> Iterator[Daemons | None]:
    """The star under a scheme, while the context lasts; gives the daemons, None where there are none.

    Raises:
        UsageError: there is no such scheme.
        FabricpilotError: the port cannot be shaped or a daemon does not start.
    """
    if scheme not in ALL_SCHEMES:
        raise UsageError(f"scheme '{scheme}' is unknown; choose one of {', '.join(ALL_SCHEMES)}")
    shape(programs, star, rate_bps, buffer_bytes, dscp_of(scheme))
    if scheme == FIFO:
        yield None
        return
    daemons = Daemons(star, programs, rate_bps, decision_s, "backlog" if scheme == BACKLOG else "attained")
    try:
        daemons.start()
        yield daemons
    except BaseException:
        with suppress(FabricpilotError):  # the first failure is the one to tell
            daemons.stop()
        raise
    daemons.stop()

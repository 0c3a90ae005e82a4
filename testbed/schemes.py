"""The schemes on the star: what queues the packets at the bottleneck, who tags them, and how senders are set up.

What a name stands for is said in `central.policy.schemes`; here it is put into place. All have the same rate and the
same buffer at the switch's port; only the order of service differs.

    fifo          one queue, cubic                       marked       one ECN-marked queue, DCTCP at both ends
    fair-queues   a queue per flow (sch_fq, fq_codel)    bands        strict priority by DSCP, an agent on every sender,
                                                                      central choosing the thresholds

Thresholds that do not adapt are for flow sizes as published; a run scales sizes, and so these thresholds by as much.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from central.policy.schemes import SCHEMES, find
from fabricpilot.config import DatapathSection
from fabricpilot.errors import UsageError
from fabricpilot.levels import DEFAULT_LEVELS, Thresholds, default_dscp
from testbed.daemons import Daemons, running
from testbed.flows.protocol import Transport
from testbed.flows.recorded import Recipe
from testbed.netns.programs import Programs
from testbed.netns.star import StarPlan
from testbed.netns.switch_port import shape, shape_fair_queues
from testbed.transport.dctcp import DCTCP

FIFO = "fifo"
FABRICPILOT = "fabricpilot"
DEMO = (FIFO, FABRICPILOT)

DSCP = default_dscp(DEFAULT_LEVELS)  # what agents mark by default, and so what the switch serves by

_MARKING_S = 0.0024  # queue at which an ECN-marking port begins to mark, as time on the link; docs/transport.md


def check_names(names: Sequence[str]) -> None:
    """Raise `UsageError` unless every name is that of a scheme that a network can run."""
    for name in names:
        scheme = find(name)
        if scheme.refusal:
            raise UsageError(f"scheme '{name}' cannot run on a network: {scheme.refusal}")


def runnable() -> list[str]:
    """Names of all schemes that a network can run."""
    return [name for name, scheme in SCHEMES.items() if not scheme.refusal]


def has_agents(name: str) -> bool:
    """Whether agents rank flows under this scheme."""
    return find(name).rank is not None


def mode_of(name: str) -> str:
    """The agents' `datapath.mode` under this scheme."""
    return {"written": "backlog", "default": DatapathSection().mode}.get(str(find(name).rank), "attained")


def ranks_by_more_than_sent(name: str) -> bool:
    """Whether a flow may be on a lower level than its bytes sent say: by what was written or announced."""
    return find(name).rank == "hinted" or mode_of(name) != "attained"


def dscp_of(name: str, levels: int | None = None) -> tuple[int, ...] | None:
    """What the switch serves by, with the scheme's K or another; None for one queue."""
    return default_dscp(levels or find(name).levels) if has_agents(name) else None


def transport_of(name: str) -> Transport:
    """How the flows' ends are set up."""
    scheme = find(name)
    return Transport(DCTCP if scheme.port == "marked" else "cubic", hints=scheme.rank == "hinted")


def thresholds_of(name: str, recipe: Recipe) -> Thresholds | None:
    """The thresholds that a scheme keeps for the whole run, at the trace's scale; None: it has none, or they adapt.

    Raises:
        UsageError: none are published for this workload.
    """
    scheme = find(name)
    if scheme.policy is None or scheme.adapts:
        return None
    from central.policy.simulated import thresholds_for
    from simulator.workloads.distribution import SizeDistribution

    sizes = SizeDistribution.load(recipe.workload)
    published = thresholds_for(name, sizes, recipe.load, scheme.levels, recipe.workload)
    return scaled(published.bytes, recipe.scale)


def scaled(thresholds: Sequence[float], scale: float) -> Thresholds:
    """Thresholds for sizes as published, for the same sizes times `scale`."""
    return Thresholds.of(max(round(value * scale), 1 + level) for level, value in enumerate(thresholds))


def check_kernel(names: Sequence[str], star: StarPlan, programs: Programs, rate_bps: int, buffer_bytes: int) -> None:
    """Raise `KernelError` if the kernel lacks what one of them needs: now, not after minutes of others' traffic."""
    for name in names:
        if find(name).port in ("fair-queues", "marked"):
            with port_in_force(name, star, programs, rate_bps, buffer_bytes):
                pass


@contextmanager
def in_force(
    name: str,
    star: StarPlan,
    programs: Programs,
    rate_bps: int,
    buffer_bytes: int,
    decision_s: float,
    thresholds: Thresholds | None = None,
) -> Iterator[Daemons | None]:
    """The star under a scheme, while the context lasts; gives the daemons, None where there are none.

    Flows are then sent with `transport_of(name)`.

    Args:
        name: of the scheme.
        star: built.
        programs: starts what is needed.
        rate_bps: rate of the bottleneck.
        buffer_bytes: what it queues in all.
        decision_s: how often central decides.
        thresholds: those of a scheme that does not adapt (`thresholds_of`); None: what central has for it.

    Raises:
        UsageError: there is no such scheme, or no network can run it.
        KernelError: the kernel lacks what it needs.
        FabricpilotError: the port cannot be shaped or a daemon does not start.
    """
    check_names([name])
    with port_in_force(name, star, programs, rate_bps, buffer_bytes):
        if not has_agents(name):
            yield None
            return
        scheme = find(name)
        daemons = Daemons(
            star,
            programs,
            rate_bps,
            decision_s,
            mode=mode_of(name),
            scheme=name,
            levels=scheme.levels,
            thresholds=thresholds,
            hints=scheme.rank == "hinted",
        )
        with running(daemons):
            yield daemons


@contextmanager
def port_in_force(
    name: str, star: StarPlan, programs: Programs, rate_bps: int, buffer_bytes: int, levels: int | None = None
) -> Iterator[None]:
    """The bottleneck ports as the scheme wants them, and what the machine must have for that; K may be another."""
    port = find(name).port
    shape(programs, star, rate_bps, buffer_bytes, dscp_of(name, levels))
    with ExitStack() as stack:
        if port == "fair-queues":
            shape_fair_queues(programs, star, buffer_bytes)
        if port == "marked":
            from testbed.transport import attach_marker, dctcp_registered

            k_bytes = min(buffer_bytes // 2, round(rate_bps / 8 * _MARKING_S))
            stack.enter_context(dctcp_registered())
            for host in star.receiver_hosts:
                stack.enter_context(attach_marker(star.switch, host.name, k_bytes, rate_bps, "real"))
        yield

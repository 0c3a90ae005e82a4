"""`fabricpilot bench simulator`: how fast the kernels are, how that grows, and what memory they take.

Every figure is from one process on one core, after a run that compiles. An event is an arrival, a change of level or an
end. CPU time is measured, so that other work on the machine does not count.
"""

import json
import time
from typing import Any

import click


@click.command()
@click.option("--quick", is_flag=True, help="A tenth of the work, for a first look.")
@click.option("--ns3", "with_ns3", is_flag=True, help="Also run ns-3 on the same flows (optional wheel; a minute).")
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
def simulator(quick: bool, with_ns3: bool, as_json: bool) -> None:
    """Measure the simulator: events per second, growth, memory."""
    results = measure(0.1 if quick else 1.0)
    if with_ns3:
        results["ns3"] = against_ns3()
    if as_json:
        click.echo(json.dumps(results))
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("case", "events/s", "events", "active flows", "state (KB)", "8 h take (CPU min)")
    table = Table(*columns, title="simulator, one core")
    for case in results["cases"]:
        table.add_row(
            case["name"],
            f"{case['events_per_second']:,.0f}",
            f"{case['events']:,}",
            f"{case['mean_active']:.0f} (peak {case['peak_active']})",
            f"{case['state_bytes'] / 1e3:,.0f}",
            f"{case['cpu_s_for_8_hours'] / 60:,.0f}" if "cpu_s_for_8_hours" in case else "",
        )
    Console().print(table)
    if with_ns3:
        for name, found in results["ns3"].items():
            Console().print(
                f"ns-3, {name}, same {found['flows']} flows: {found['ratio']:.0f} times our CPU time; our mean FCT "
                f"{found['mean_error']:+.1%}, up to 100 KB {found['small_error']:+.1%}, single flows "
                f"{found['median_error']:.1%} (median)"
            )


def measure(scale: float = 1.0) -> dict[str, Any]:
    """All cases; `scale` multiplies the number of flows.

    `events_per_second` is the headline: the star with about 100 active flows, fair sharing (the most flows in service).
    """
    from simulator.schemes import scheme
    from simulator.topology import leaf_spine, star

    cases = []
    for name, active in (("star, 10 active", 10), ("star, 100 active", 100), ("star, 1000 active", 1000)):
        cases.append(_star_case(name, "fair", active, round(1_000_000 * scale)))
    for ranks in ("mlfq", "backlog", "srpt", "las"):
        cases.append(_star_case(f"star, 100 active, {ranks}", ranks, 100, round(300_000 * scale)))
    for hosts, ranks in ((32, "mlfq"), (32, "fair"), (32, "backlog"), (128, "mlfq"), (1000, "mlfq")):
        cases.append(_fabric_case(f"all to all, {hosts} hosts, {ranks}", star(hosts, 1e9), scheme(ranks), scale))
    for leaves in (4, 16):
        fabric = leaf_spine(leaves, 4, 8, 1e9, 2.0)
        name = f"leaf-spine, {fabric.hosts} hosts, {fabric.links} links, mlfq"
        cases.append(_fabric_case(name, fabric, scheme("mlfq"), scale))
    headline = next(case for case in cases if case["name"] == "star, 100 active")
    return {"events_per_second": headline["events_per_second"], "cases": cases}


def against_ns3(flows: int = 200) -> dict[str, Any]:
    """The same DCTCP flows in ns-3 and here, with one queue and with priority bands.

    Of each: CPU seconds of both, their ratio, and our errors of mean FCT, of the mean up to 100 KB, and of the single
    flow (median, absolute). Flows that ns-3 did not finish count nowhere.

    Raises:
        FabricpilotError: ns3 is not installed.
    """
    import numpy as np

    from fabricpilot.levels import default_thresholds
    from simulator.engine import simulate
    from simulator.packetlevel import run_dctcp, same_physics
    from simulator.topology import star
    from simulator.workloads.arrivals import poisson
    from simulator.workloads.distribution import SizeDistribution
    from simulator.workloads.placement import to_one

    rng = np.random.default_rng(1)
    web = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    trace = to_one(poisson(web, 0.6, 1e9, rng, count=flows), 8, rng)
    results = {}
    for name, thresholds in (("one queue", ()), ("4 priority bands", default_thresholds(4).bytes)):
        packets = run_dctcp(trace, 1e9, 20e-6, thresholds)
        physics, ranks = same_physics(1e9, 20e-6, thresholds)
        simulate(trace, ranks, star(8, 1e9), physics)  # compiles
        began_s = time.process_time()
        found = simulate(trace, ranks, star(8, 1e9), physics)
        cpu_s = time.process_time() - began_s
        ended, small = np.isfinite(packets.fct_s), trace.size_bytes <= 100_000
        ours_s, theirs_s = found.fct_s[ended], packets.fct_s[ended]
        results[name] = {
            "flows": flows,
            "ns3_cpu_s": packets.cpu_s,
            "cpu_s": cpu_s,
            "ratio": packets.cpu_s / cpu_s,
            "ns3_unfinished": int((~ended).sum()),
            "ns3_mean_s": float(theirs_s.mean()),
            "mean_error": float(ours_s.mean() / theirs_s.mean() - 1),
            "small_error": float(ours_s[small[ended]].mean() / theirs_s[small[ended]].mean() - 1),
            "median_error": float(np.median(np.abs(ours_s / theirs_s - 1))),
        }
    return results


def _star_case(name: str, ranks: str, active: int, flows: int) -> dict[str, Any]:
    """A link with half of `active` flows that never end, and as many others on average that come and go.

    With P flows that stay, processor sharing at load r holds r / (1 - r) (P + 1) others; r is one half.
    """
    import numpy as np

    from simulator.engine import Simulation
    from simulator.physics import Physics
    from simulator.schemes import scheme
    from simulator.topology import star
    from simulator.workloads.arrivals import poisson
    from simulator.workloads.distribution import SizeDistribution
    from simulator.workloads.trace import Trace

    web = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    rng = np.random.default_rng(1)
    stay = active // 2
    coming = poisson(web, 0.5, 1e9 * Physics().goodput(1.0) * 8, rng, count=flows)
    sizes = np.concatenate([np.full(stay, 10**14), coming.size_bytes])
    start_s = np.concatenate([np.zeros(stay), coming.start_s])
    trace = Trace.of(start_s, sizes, rng.integers(1, 16, len(sizes)), np.zeros(len(sizes)))
    for part in (slice(0, min(1000, len(sizes))), slice(0, None)):  # the first run compiles
        simulation = Simulation(scheme(ranks), star(16, 1e9), receiver=0)
        simulation.add(Trace(*(getattr(trace, f)[part] for f in ("start_s", "size_bytes", "source", "destination"))))
        began_s = time.process_time()
        results = simulation.run_until(float(trace.start_s[part][-1]))
        cpu_s = time.process_time() - began_s
    mean_active = stay + float(results.fct_s.sum()) / simulation.now_s  # Little's law
    return _case(name, simulation, cpu_s, mean_active)


def _fabric_case(name: str, topology: Any, ranks: Any, scale: float) -> dict[str, Any]:
    import numpy as np

    from simulator.engine import Simulation
    from simulator.workloads.arrivals import poisson
    from simulator.workloads.distribution import SizeDistribution
    from simulator.workloads.placement import all_to_all

    web = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    rng = np.random.default_rng(1)
    load = 0.4 if topology.spines else 0.8
    trace = poisson(web, load * topology.hosts, 1e9, rng, count=round(50_000 * scale), overload=True)
    simulation = Simulation(ranks, topology)
    simulation.add(all_to_all(trace, topology.hosts, rng))
    simulation.run_until(float(trace.start_s[len(trace) // 10]))  # compile, and fill the fabric
    before, from_s, began_s = simulation.events, simulation.now_s, time.process_time()
    results = simulation.run_until(float(trace.start_s[-1]))
    cpu_s, span_s = time.process_time() - began_s, simulation.now_s - from_s
    mean_active = float(results.fct_s.sum()) / span_s
    return _case(name, simulation, cpu_s, mean_active, before) | {"cpu_s_for_8_hours": cpu_s * 8 * 3600 / span_s}


def _case(name: str, simulation: Any, cpu_s: float, mean_active: float, before: int = 0) -> dict[str, Any]:
    events = simulation.events - before
    return {
        "name": name,
        "events_per_second": events / cpu_s,
        "events": events,
        "mean_active": mean_active,
        "peak_active": simulation.peak_flows,
        "hosts": simulation.topology.hosts,
        "links": simulation.topology.links,
        "state_bytes": simulation.state_bytes,
    }

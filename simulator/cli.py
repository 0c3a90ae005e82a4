"""`fabricpilot simulate`: one workload under one or several schemes, as a table, CSV, JSON or picture."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.config import parse_rate
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

if TYPE_CHECKING:
    from simulator.schemes import Scheme
    from simulator.statistics import FlowStatistics
    from simulator.topology import Topology
    from simulator.workloads.distribution import SizeDistribution
    from simulator.workloads.trace import Trace

_CHUNK_FLOWS = 200_000  # generated and simulated at once, so that memory does not grow with --flows


@click.command()
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Replay the flows of this file.")
@click.option(
    "--trace-format",
    default="csv",
    show_default=True,
    help="csv (start_s,size_bytes[,source,destination]), pias (gap_ms size_KiB sender), pcap, conntrack or netflow.",
)
@click.option("--cdf", help="Generate flows: name of a bundled flow-size distribution, or a CDF file.")
@click.option("--load", type=float, default=0.7, show_default=True, help="With --cdf: payload over link rate.")
@click.option("--flows", type=int, default=100_000, show_default=True, help="With --cdf: how many flows.")
@click.option("--seed", type=int, default=1, show_default=True, help="With --cdf: of all random draws.")
@click.option("--arrivals", type=click.Choice(["poisson", "bursty"]), default="poisson", show_default=True)
@click.option("--overload", is_flag=True, help="With --cdf: allow a load of 1 and more.")
@click.option(
    "--scheme", "names", multiple=True, help="Repeat or separate by commas. Default: fair. `help` lists them."
)
@click.option("--thresholds", help="Bytes, ascending, for mlfq, qlas, qsjf and backlog: 20480,1048576,...")
@click.option("--levels", type=int, help="K where no thresholds are given.  [default: 8]")
@click.option("--send-buffer", default="4MB", show_default=True, help="Visible backlog; several by commas: 4MB,2MB.")
@click.option("--link-rate", default="1Gbit", show_default=True, help="Of every host.")
@click.option("--hosts", type=int, default=16, show_default=True, help="Hosts of the star: senders and one receiver.")
@click.option("--all-to-all", is_flag=True, help="With --cdf: between all hosts, not all to host 0.")
@click.option("--leaves", type=int, default=1, show_default=True, help="Leaf switches; more than 1 need --spines.")
@click.option("--spines", type=int, default=0, show_default=True, help="Spine switches, each one a route.")
@click.option("--oversubscription", type=float, default=1.0, show_default=True, help="Of the leaves' uplinks.")
@click.option("--exact", is_flag=True, help="Keep every flow: exact percentiles; needed for --out.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of every flow: flow_id,size_bytes,start_us,fct_us.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw FCT and slowdown by size (.png, .svg)."
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
def simulate(
    trace_file: Path | None,
    trace_format: str,
    cdf: str | None,
    load: float,
    flows: int,
    seed: int,
    arrivals: str,
    overload: bool,
    names: tuple[str, ...],
    thresholds: str | None,
    levels: int | None,
    send_buffer: str,
    link_rate: str,
    hosts: int,
    all_to_all: bool,
    leaves: int,
    spines: int,
    oversubscription: float,
    exact: bool,
    out: Path | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    r"""Simulate flows under one or several schemes.

    \b
    fabricpilot simulate --cdf websearch_dctcp_bytes_trafficgenerator --load 0.8 --scheme fair,mlfq,backlog,srpt
    fabricpilot simulate --trace flows.csv --scheme mlfq --thresholds 20480,1048576 --out fct.csv
    """
    wanted = [name.strip() for given in names or ("fair",) for name in given.split(",") if name.strip()]
    if wanted == ["help"]:
        from simulator.brought import all_names

        known = all_names()
        width = max(map(len, known))
        click.echo("\n".join(f"{name:{width}}  {text}" for name, text in known.items()))
        return
    if (trace_file is None) == (cdf is None):
        raise UsageError("give either --trace FILE or --cdf NAME")

    rate_bps = parse_rate(link_rate)
    workload = _Workload(trace_file, trace_format, cdf, load, flows, seed, arrivals, overload, all_to_all)
    topology = _topology(hosts, leaves, spines, oversubscription, rate_bps)
    workload.prepare(rate_bps, topology.hosts)
    load_found = workload.load(rate_bps, topology.hosts)
    if trace_file is not None:
        topology = workload.fitting(topology, rate_bps, hosts, leaves)
    schemes = _schemes(wanted, thresholds, levels, send_buffer, workload, load_found)
    runs = {name: _run(scheme, topology, workload, exact or out is not None) for name, scheme in schemes.items()}
    if out is not None:
        for name, (statistics, _) in runs.items():
            _write_flows(statistics, out if len(runs) == 1 else out.with_name(f"{out.stem}.{name}{out.suffix}"))
    summaries = {name: statistics.summary() for name, (statistics, _) in runs.items()}
    title = f"{workload.name}, load {load_found:.3g}, {summaries[next(iter(runs))].overall.flows} flows, {link_rate}"
    if plot_file is not None:
        from simulator.report import plot

        plot(summaries, title, plot_file)
    if as_json:
        first = next(iter(summaries.values())).overall.mean_us
        found = {
            name: summary.as_dict()
            | {"mean_reduction": 1 - summary.overall.mean_us / first, "thresholds": list(schemes[name].thresholds)}
            | runs[name][1]
            for name, summary in summaries.items()
        }
        stated = load_found if math.isfinite(load_found) else None  # flows that all start at once have no load
        click.echo(json.dumps({"workload": workload.name, "load": stated, "rate_bps": rate_bps, "schemes": found}))
        return
    from rich.console import Console

    from simulator.report import table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a pipe has no width; do not cut numbers
    console.print(table(summaries, title))


class _Workload:
    """Where the flows come from: a file, or a generator that is started anew for every scheme."""

    def __init__(
        self,
        trace_file: Path | None,
        trace_format: str,
        cdf: str | None,
        load: float,
        flows: int,
        seed: int,
        arrivals: str,
        overload: bool,
        all_to_all: bool,
    ) -> None:
        from simulator.workloads.distribution import SizeDistribution

        self.name = trace_file.stem if trace_file is not None else str(cdf)
        self.trace: Trace | None = None
        self.distribution: SizeDistribution | None = None
        self._asked_load, self._flows, self._seed, self._arrivals = load, flows, seed, arrivals
        self._overload, self._all_to_all = overload, all_to_all
        self._rate_bps, self._hosts = 0.0, 0
        if trace_file is not None:
            self.trace = _read(trace_file, trace_format)
        elif cdf is not None:
            self.distribution = SizeDistribution.load(cdf)

    def prepare(self, rate_bps: float, hosts: int) -> None:
        """Say what the fabric is; refuses an impossible load."""
        from simulator.workloads.arrivals import mean_gap_s

        self._rate_bps, self._hosts = rate_bps, hosts
        if self.distribution is not None:
            mean_gap_s(self.distribution, self._asked_load, rate_bps, self._overload)
            if self._flows < 1:
                raise UsageError(f"--flows {self._flows}; at least 1 is needed")

    def load(self, rate_bps: float, hosts: int) -> float:
        """Of the receiving links: as asked for, or as the trace has it (the mean over its receivers)."""
        if self.trace is None:
            return self._asked_load
        receivers = len(set(self.trace.destination.tolist()))
        return self.trace.load(rate_bps * receivers)

    def fitting(self, topology: "Topology", rate_bps: float, hosts: int, leaves: int) -> "Topology":
        """The fabric with at least as many hosts as the trace has, where it is a star."""
        from simulator.topology import star

        assert self.trace is not None
        needed = max(int(self.trace.source.max()), int(self.trace.destination.max())) + 1
        return star(max(needed, hosts), rate_bps) if leaves == 1 and needed > topology.hosts else topology

    def sizes(self) -> "SizeDistribution":
        """Its flow sizes, for schemes that are set by them."""
        from fabricpilot.histogram import LogHistogram
        from simulator.workloads.distribution import SizeDistribution

        if self.distribution is not None:
            return self.distribution
        assert self.trace is not None
        return SizeDistribution.from_histogram(LogHistogram.of(self.trace.size_bytes), self.name)

    def receiver(self) -> int | None:
        """The one host all flows go to, or None."""
        if self.trace is None:
            return None if self._all_to_all else 0
        receivers = set(self.trace.destination.tolist())
        return receivers.pop() if len(receivers) == 1 else None

    def parts(self) -> "Iterator[Trace]":
        """The flows, in parts."""
        import numpy as np

        from simulator.workloads.arrivals import bursty, poisson
        from simulator.workloads.placement import all_to_all, to_one

        if self.trace is not None:
            yield self.trace
            return
        assert self.distribution is not None
        rng = np.random.default_rng(self._seed)
        generate = poisson if self._arrivals == "poisson" else bursty
        rate_bps = self._rate_bps * (self._hosts if self._all_to_all else 1)
        begin_s, left = 0.0, self._flows
        while left > 0:
            n = min(left, _CHUNK_FLOWS)
            part = generate(
                self.distribution, self._asked_load, rate_bps, rng, count=n, overload=self._overload
            ).shifted(begin_s)
            begin_s, left = float(part.start_s[-1]), left - n
            yield (all_to_all if self._all_to_all else to_one)(part, self._hosts, rng)


def _run(
    scheme: "Scheme", topology: "Topology", workload: _Workload, exact: bool
) -> "tuple[FlowStatistics, dict[str, Any]]":
    """Statistics of one scheme, and what the run took."""
    import time

    from simulator.engine import Simulation, is_only_bottleneck
    from simulator.statistics import FlowStatistics

    receiver = workload.receiver()
    if receiver is not None and not is_only_bottleneck(topology, receiver):
        receiver = None
    simulation, statistics = Simulation(scheme, topology, receiver=receiver), FlowStatistics(exact)
    began_s = time.perf_counter()
    for part in workload.parts():
        simulation.add(part)
        statistics.add(simulation.run_until(float(part.start_s[-1])))
    statistics.add(simulation.run())
    wall_s = time.perf_counter() - began_s
    return statistics, {"events": simulation.events, "wall_s": wall_s, "peak_flows": simulation.peak_flows}


def _read(path: Path, form: str) -> "Trace":
    if form == "pcap":
        from simulator.workloads.capture import read_pcap

        return read_pcap(path)
    if form in ("conntrack", "netflow"):
        from simulator.workloads.connections import read_connections

        return read_connections(path, form)
    from simulator.workloads.tracefile import read_trace

    return read_trace(path, form)


def _topology(hosts: int, leaves: int, spines: int, oversubscription: float, rate_bps: float) -> "Topology":
    from simulator.topology import leaf_spine, star

    if leaves <= 1:
        return star(hosts, rate_bps)
    if hosts % leaves:
        raise UsageError(f"{hosts} hosts cannot be shared by {leaves} leaves; make --hosts a multiple of --leaves")
    return leaf_spine(leaves, spines, hosts // leaves, rate_bps, oversubscription)


def _schemes(
    wanted: list[str],
    thresholds: str | None,
    levels: int | None,
    send_buffer: str,
    workload: _Workload,
    load: float,
) -> "dict[str, Scheme]":
    """Schemes by the name results call them."""
    from simulator.brought import all_names, source_of
    from simulator.schemes import DEFAULT_LEVELS, scheme

    known = all_names()
    given = None if thresholds is None else Thresholds.of(_whole_bytes(part) for part in thresholds.split(","))
    buffers = [part.strip() for part in send_buffer.split(",")]
    found = {}
    for name in wanted:
        if name not in known:
            raise UsageError(f"scheme '{name}' is unknown; choose from: {', '.join(known)}")
        source = source_of(name)
        seen = name in ("backlog", "written", "fabricpilot-backlog")
        for buffer in buffers if seen else buffers[:1]:
            key = f"{name} {buffer}" if seen and len(buffers) > 1 else name
            if source is not None:
                chosen = source.scheme(
                    name, workload.sizes(), load, levels or DEFAULT_LEVELS, parse_size(buffer), workload.name
                )
                found[key] = chosen if given is None else chosen.with_thresholds(given)
                continue
            found[key] = scheme(
                name,
                thresholds=given,
                levels=levels,
                send_buffer_bytes=parse_size(buffer),
                distribution=workload.sizes() if name == "equal-split" else None,
                workload=workload.name,
                load=load,
            )
    return found


def _whole_bytes(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"threshold '{text}' is not a whole number of bytes; write 20480,1048576") from error


def parse_size(text: str) -> int:
    """A size such as `4MB`, `512KiB` or `65536`, in bytes; KB is 1000 bytes, KiB 1024.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0 or (match[3] and not match[2]):
        raise UsageError(f"size '{text}' is not understood; write it like 4MB, 512KiB or 65536")
    base = 1024 if match[3] else 1000
    power = " kmg".index(match[2].lower() or " ")
    return math.ceil(float(match[1]) * float(base**power))


def _write_flows(statistics: "FlowStatistics", path: Path) -> None:
    results = statistics.results
    columns = (results.flow, results.size_bytes.astype("int64"), results.start_s * 1e6, results.fct_s * 1e6)
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write("flow_id,size_bytes,start_us,fct_us\n")
            file.writelines(
                f"{flow},{size},{start:.3f},{fct:.3f}\n"
                for flow, size, start, fct in zip(*(c.tolist() for c in columns), strict=True)
            )
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error

"""`transport`: the commands over this package, for the testbed and for `python -m testbed.transport`."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from fabricpilot.config import parse_rate
from fabricpilot.options import json_option, print_json


@click.group()
def transport() -> None:
    """DCTCP and ECN marking by BPF, for kernels that have neither."""


@transport.group()
def dctcp() -> None:
    """The congestion control `bpf_dctcp` (RFC 8257)."""


@dctcp.command()
def on() -> None:
    """Register bpf_dctcp until `off`; sockets choose it by TCP_CONGESTION, on both ends."""
    from testbed.transport.dctcp import DCTCP, keep

    keep()
    click.echo(f"{DCTCP} is registered")


@dctcp.command()
def off() -> None:
    """Unregister bpf_dctcp; open connections keep it until they close."""
    from testbed.transport.dctcp import DCTCP, forget

    click.echo(f"{DCTCP} is gone" if forget() else f"{DCTCP} is in use by a running testbed, which will remove it")


@dctcp.command()
@json_option
def status(as_json: bool) -> None:
    """Whether bpf_dctcp is registered."""
    from testbed.transport.dctcp import DCTCP, is_registered

    registered = is_registered()
    if as_json:
        print_json({"name": DCTCP, "registered": registered})
    else:
        click.echo(f"{DCTCP} is {'registered' if registered else 'not registered'}")


_netns_option = click.option("--netns", metavar="NAME", help="Network namespace of the port.  [default: this one]")


@transport.command()
@click.argument("interface")
@_netns_option
@click.option("--k", "k_bytes", type=int, required=True, metavar="BYTES", help="Mark what finds more than this queued.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "real", "virtual"]),
    default="auto",
    show_default=True,
    help="How the queue is known: the qdisc's backlog, or a leaky bucket.",
)
@click.option("--rate", metavar="RATE", help="Rate of the port, such as 200Mbit; a virtual queue needs it.")
@click.option("--gamma", default=0.95, show_default=True, help="Share of the rate at which a virtual queue drains.")
@json_option
def mark(
    interface: str, netns: str | None, k_bytes: int, mode: str, rate: str | None, gamma: float, as_json: bool
) -> None:
    """Mark CE on what leaves INTERFACE until interrupted; print what was seen once a second.

    With --json one document per line, for programs.
    """
    from typing import cast

    from testbed.transport.counters import MarkerStats
    from testbed.transport.marker import Mode, attach_marker

    rate_bps = parse_rate(rate) if rate else 0
    with (
        _until_stopped(),
        attach_marker(netns, interface, k_bytes, rate_bps, cast(Mode, mode), gamma=gamma) as marker,
    ):
        before: MarkerStats = marker.stats()
        while True:
            time.sleep(1.0)
            now = marker.stats()
            seen, before = now.since(before), now
            line = {
                "mode": marker.mode,
                "packets": seen.packets,
                "mbit_per_s": round(8 * seen.bytes / 1e6, 3),
                "marked": seen.marked,
                "not_capable": seen.not_capable,
                "queue_mean_bytes": round(seen.mean_queue_bytes),
                "queue_p99_bytes": seen.queue_quantile_bytes(0.99),
            }
            click.echo(json.dumps(line) if as_json else "  ".join(f"{name} {value}" for name, value in line.items()))


@transport.command()
@click.argument("interface")
@_netns_option
def unmark(interface: str, netns: str | None) -> None:
    """Remove a marker that a killed process left on INTERFACE."""
    from testbed.transport.marker import detach_marker

    click.echo("removed" if detach_marker(netns, interface) else "there was none")


@transport.command()
@click.option("--senders", default=2, show_default=True, help="One bulk flow each.")
@click.option("--rate", default="100Mbit", show_default=True, help="Rate of the bottleneck.")
@click.option("--buffer", "buffer_bytes", default=500_000, show_default=True, help="Bytes the bottleneck queues.")
@click.option("--k", "k_bytes", default=30_000, show_default=True, metavar="BYTES", help="Marking threshold.")
@click.option("--seconds", default=3.0, show_default=True, help="Measured per trial.")
@json_option
def compare(senders: int, rate: str, buffer_bytes: int, k_bytes: int, seconds: float, as_json: bool) -> None:
    """Measure DCTCP over a marking port beside cubic, in namespaces (root; three trials)."""
    from testbed.transport import compare as comparison

    setting = comparison.Setting(senders, parse_rate(rate), buffer_bytes, k_bytes, seconds)
    outcomes = comparison.compare(setting)
    if as_json:
        print_json({"setting": asdict(setting), "trials": [asdict(outcome) for outcome in outcomes]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("trial", "of the line", "queue mean", "queue p99", "marked", "dropped", "fairness")
    for o in outcomes:
        table.add_row(
            o.name,
            f"{o.throughput_ratio:.1%}",
            f"{o.queue_mean_bytes / 1e3:.1f} kB",
            f"{o.queue_p99_bytes / 1e3:.1f} kB",
            f"{o.marked_fraction:.1%}",
            str(o.dropped),
            f"{o.fairness:.3f}",
        )
    Console().print(table)


@contextmanager
def _until_stopped() -> Iterator[None]:
    """End the block quietly on Ctrl-C or SIGTERM, so that what it holds is detached."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)

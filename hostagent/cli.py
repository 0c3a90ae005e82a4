"""`fabricpilot agent ...`: the commands of the daemon on each server."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from fabricpilot.config import AgentConfig
from fabricpilot.errors import FabricpilotError, KernelError
from fabricpilot.options import config_options, json_option, load_config, print_json, start_logging

DEFAULT_CONFIG = "/etc/fabricpilot/agent.toml"

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

# Flags for the keys people set by hand, beside --set for all of them.
_FLAGS = {
    "interface": "host.interfaces",
    "levels": "datapath.levels",
    "thresholds": "datapath.thresholds",
    "backend": "datapath.backend",
    "pin_dir": "datapath.pin_dir",
    "queues": "queues.kind",
    "link_rate": "queues.link_rate",
    "central": "link.endpoint",
    "insecure": "link.insecure",
    "detach_on_exit": "host.detach_on_exit",
}


@click.group()
def agent() -> None:
    """Schedule this server's flows: count, tag and prioritise them in the kernel."""


def agent_options(command: CommandT) -> CommandT:
    """The options that say which NICs and which data path a command is about."""
    for option in (
        click.option("--pin-dir", metavar="DIR", help="Where programs and maps are pinned (in a bpffs)."),
        click.option("--backend", metavar="NAME", help="Data path: auto, ebpf, nftables or fake."),
        click.option(
            "-i", "--interface", multiple=True, metavar="NAME", help="NIC to schedule; may be given several times."
        ),
    ):
        command = option(command)
    return config_options(DEFAULT_CONFIG)(command)


@agent.command()
@agent_options
@click.option("--levels", type=int, help="Number of priority levels, 2 to 8.")
@click.option("--thresholds", metavar="BYTES,...", help="One ascending byte count fewer than levels.")
@click.option("--queues", metavar="KIND", help="Strict bands on the NIC: auto, prio, htb, pfifo_fast or none.")
@click.option("--link-rate", metavar="RATE", help="Rate of the NIC where htb needs it, for example 10Gbit.")
@click.option("--central", metavar="ENDPOINT", help="Where central listens, for example tcp://10.0.0.1:5555.")
@click.option("--insecure", is_flag=True, default=None, help="No encryption towards central; on loopback only.")
@click.option("--detach-on-exit", is_flag=True, default=None, help="Remove the data path when the agent stops.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
def run(config_path: Path | None, settings: tuple[str, ...], dry_run: bool, **flags: Any) -> None:
    """Attach (or adopt) the data path and report to central until stopped.

    Ctrl-C and SIGTERM leave the data path tagging, unless --detach-on-exit is given.
    """
    config = _config(config_path, settings, flags)
    start_logging()
    _need_root(config)
    from pyroute2 import IPRoute

    from fabricpilot.control import ControlServer
    from hostagent.agent import Agent, host_name
    from hostagent.lifecycle import bring_up, plan_all, take_down
    from hostagent.link import HostLink

    with IPRoute() as ipr:
        if dry_run:
            plans = plan_all(config, ipr)
            for line in _attaching(config, list(plans)):
                click.echo(f"# {line}")
            for name, plan in plans.items():
                click.echo(f"# {name}: queues {plan.kind}: {plan.why}")
                for line in plan.commands(name):
                    click.echo(line)
            click.echo(f"# thresholds {list(config.thresholds.bytes)}, dscp {list(config.dscp)}")
            return
        with contextlib.ExitStack() as stack:
            # Before anything changes in the kernel: the control socket, which keeps two agents from working on one
            # data path, and the link, which finds out whether keys and endpoint are right and says hello later.
            control = stack.enter_context(ControlServer(_control_socket(config)))
            link = HostLink(config.link, host_name(config), lambda: running.hello()) if config.link.endpoint else None
            if link is not None:
                stack.callback(link.close)
            scheduled = bring_up(config, ipr)
            stack.callback(scheduled.datapath.close)
            running = Agent(config, scheduled, control, link)
            control.answer = lambda _request: running.status()
            running.run()
            if config.host.detach_on_exit:
                scheduled.datapath.close()  # lets go of its claim
                for line in take_down(config, ipr):
                    logging.getLogger("hostagent").info("%s", line)


@agent.command()
@agent_options
@json_option
def check(config_path: Path | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Say what this kernel supports and what is missing; exit 3 if the agent cannot run here."""
    config = _config(config_path, settings, flags)
    from hostagent.support import probe

    findings = probe(config.datapath)
    missing = [finding for finding in findings if finding.required and not finding.ok]
    if as_json:
        print_json({"can_run": not missing, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = "ok     " if finding.ok else "MISSING" if finding.required else "absent "
            click.echo(f"{mark} {finding.what}" + (f": {finding.why}" if finding.why else ""))
    if missing:
        raise KernelError("the agent cannot run here: " + "; ".join(f"{f.what}: {f.why}" for f in missing))


@agent.command()
@agent_options
@json_option
def status(config_path: Path | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Show the running agent, or the data path that goes on without one."""
    config = _config(config_path, settings, flags)
    from fabricpilot.control import ask

    try:
        told = {"agent": "running", **ask(_control_socket(config), "status", timeout_s=2.0)}
    except FabricpilotError:
        told = {"agent": "not running", "datapath": _kernel_status(config)}
    if as_json:
        print_json(told)
    else:
        _show(told)


@agent.command()
@agent_options
@click.option("--top", default=20, show_default=True, type=click.IntRange(1), help="How many flows to show.")
@json_option
def dump(config_path: Path | None, settings: tuple[str, ...], top: int, as_json: bool, **flags: Any) -> None:
    """List the flows that have sent most, straight from the kernel's table."""
    config = _config(config_path, settings, flags)
    _need_root(config)
    import msgspec
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from hostagent.datapath import open_datapath
    from hostagent.observe import summary

    datapath = open_datapath(config.datapath)
    try:
        if not datapath.attached():
            raise FabricpilotError("no data path is attached here; start one with `fabricpilot agent run`")
        table = datapath.flows()
    finally:
        datapath.close()
    order = np.argsort(table.states["attained_bytes"], kind="stable")[::-1][:top]
    flows = [summary(table, row) for row in order]
    if as_json:
        print_json({"active": len(table), "flows": [msgspec.structs.asdict(flow) for flow in flows]})
        return
    shown = Table(
        "source", "destination", "protocol", "bytes", "ms", "level", title=f"{len(flows)} of {len(table)} flows"
    )
    for flow in flows:
        shown.add_row(
            f"{flow.source}:{flow.source_port}",
            f"{flow.destination}:{flow.destination_port}",
            {6: "tcp", 17: "udp"}.get(flow.protocol, str(flow.protocol)),
            f"{flow.size_bytes:,}",
            f"{flow.duration_us / 1000:,.1f}",
            str(flow.level),
        )
    Console().print(shown)


@agent.command()
@agent_options
@click.option(
    "--flow", metavar="FLOW", help='Which rule decides about it, for example "tcp 10.0.0.1:40000 10.0.0.2:80".'
)
@click.option("--dscp", default=0, type=click.IntRange(0, 63), help="With --flow: what its first packet carries.")
@click.option("--cgroup", default="", metavar="PATH", help="With --flow: of its socket.")
@json_option
def rules(
    config_path: Path | None,
    settings: tuple[str, ...],
    flow: str | None,
    dscp: int,
    cgroup: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """List the configured rules, checked, and what they decide; changes nothing and needs no root."""
    config = _config(config_path, settings, flags)
    from hostagent.rules_listing import decide, listing

    if flow is not None:
        told = decide(config, flow, dscp, cgroup)
        if as_json:
            print_json(told)
        else:
            click.echo(told["says"])
        return
    listed = listing(config)
    if as_json:
        print_json({"rules": listed})
        return
    for row in listed:
        deciding = "" if row["flows"] is None else f"  [{row['flows']} flows now]"
        click.echo(f"{row['number']:3d}  {row['name']}: {row['matches']} -> {row['says']}{deciding}")
    if not listed:
        click.echo("no rules are configured; every flow goes by thresholds and central's verdicts")


@agent.command()
@agent_options
@click.option("--dry-run", is_flag=True, help="Say what would be removed and change nothing.")
def detach(config_path: Path | None, settings: tuple[str, ...], dry_run: bool, **flags: Any) -> None:
    """Remove every trace of the data path and put the NICs' queues back as they were."""
    config = _config(config_path, settings, flags)
    _need_root(config)
    from pyroute2 import IPRoute

    from fabricpilot.control import ask
    from hostagent.lifecycle import take_down, take_down_preview

    try:
        pid = ask(_control_socket(config), "status", timeout_s=2.0).get("pid")
    except FabricpilotError:
        pid = None
    if pid is not None:
        raise FabricpilotError(f"an agent (pid {pid}) is running on this data path; stop it first")
    with IPRoute() as ipr:
        told = take_down_preview(config, ipr) if dry_run else take_down(config, ipr)
    for line in told or ["nothing is attached" if dry_run else "nothing was attached"]:
        click.echo(line)


def _config(config_path: Path | None, settings: tuple[str, ...], flags: dict[str, Any]) -> AgentConfig:
    overrides = {_FLAGS[name]: list(value) if name == "interface" else value for name, value in flags.items()}
    if not overrides.get("host.interfaces"):
        overrides.pop("host.interfaces", None)
    return load_config(AgentConfig, DEFAULT_CONFIG, config_path, settings, overrides)


def _control_socket(config: AgentConfig) -> Path:
    return Path(config.host.run_dir) / "agent.sock"


def _need_root(config: AgentConfig) -> None:
    if config.datapath.backend != "fake" and os.geteuid() != 0:
        raise KernelError(
            "this needs root (capabilities BPF, NET_ADMIN and PERFMON); run it with sudo or as the service"
        )


def _attaching(config: AgentConfig, interfaces: list[str]) -> list[str]:
    """The data path that `run` would attach to these, and how, one line for each way."""
    from hostagent.datapath import open_datapath

    datapath = open_datapath(config.datapath)
    try:
        ways = datapath.attached_by(interfaces)
        return [
            f"{', '.join(names)}: data path {datapath.name} by {way}, pinned in {config.datapath.pin_dir}"
            for way, names in ways.items()
        ]
    finally:
        datapath.close()


def _kernel_status(config: AgentConfig) -> dict[str, Any]:
    _need_root(config)
    from hostagent.datapath import open_datapath

    datapath = open_datapath(config.datapath)
    try:
        settings, interfaces = datapath.settings(), datapath.attached()
        return {
            "backend": datapath.name,
            "interfaces": interfaces,
            "attached_by": datapath.attached_by(interfaces),
            "thresholds": list(settings.thresholds.bytes) if settings else [],
            "dscp": list(settings.dscp) if settings else [],
            "counters": datapath.counters() if settings else {},
        }
    finally:
        datapath.close()


def _show(told: dict[str, Any], indent: str = "") -> None:
    """A nested dictionary as indented lines."""
    for key, value in told.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{key}:")
            _show(value, indent + "  ")
        else:
            shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
            click.echo(f"{indent}{key}: {shown}")

"""`fabricpilot central ...`: the commands of the daemon on the controller."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fabricpilot.config import CentralConfig
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.options import config_options, json_option, load_config, print_json, start_logging

DEFAULT_CONFIG = "/etc/fabricpilot/central.toml"

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

# Flags for the keys people set by hand, beside --set for all of them.
_FLAGS = {
    "listen": "link.listen",
    "key": "link.key",
    "authorized_keys": "link.authorized_keys",
    "insecure": "link.insecure",
    "scheme": "policy.scheme",
    "learn": "policy.learn",
    "interval": "policy.interval_s",
    "log_thresholds": "central.threshold_log",
    "state_dir": "central.state_dir",
    "run_dir": "central.run_dir",
}


@click.group()
def central() -> None:
    """Learn from what the hosts report, and send them the thresholds they act on."""


def central_options(command: CommandT) -> CommandT:
    """The options that say which central a command is about."""
    command = click.option("--run-dir", metavar="DIR", help="Where the control socket lies.")(command)
    return config_options(DEFAULT_CONFIG)(command)


@central.command()
@central_options
@click.option("--listen", metavar="ENDPOINT", help="Where to listen, for example tcp://0.0.0.0:5555.")
@click.option("--key", metavar="FILE", help="Own secret key file.")
@click.option("--authorized-keys", metavar="DIR", help="Folder of the hosts' public key files.")
@click.option("--insecure", is_flag=True, default=None, help="No keys at all; on loopback only.")
@click.option("--scheme", metavar="NAME", help="How thresholds are chosen, by name; a wrong one shows all.")
@click.option("--learn", metavar="MODE", help="on: try what the learner proposes; shadow: only tell it; off.")
@click.option("--interval", metavar="SECONDS", help="Time between decisions.")
@click.option("--log-thresholds", metavar="FILE", help="Add a JSON line to FILE for every change of thresholds.")
@click.option("--state-dir", metavar="DIR", help="Keep what was learned and promoted there over restarts.")
def run(config_path: Path | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Listen to the hosts and decide, until stopped.

    Hosts go on with their last policy while central is away, and rejoin by themselves.
    """
    config = _config(config_path, settings, flags)
    start_logging()
    from contextlib import closing

    from central.daemon import Central, Workers
    from central.link import CentralLink
    from fabricpilot.control import ControlServer

    with (
        ControlServer(_control_socket(config)) as control,
        closing(CentralLink(config.link)) as link,
        closing(Workers.start(config)) as workers,
    ):
        Central(config, link, control, workers).run()


@central.command()
@central_options
@json_option
def status(config_path: Path | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Show hosts, groups with their thresholds, and how the link is doing."""
    config = _config(config_path, settings, flags)
    from fabricpilot.control import ask

    told = ask(_control_socket(config), "status", timeout_s=5.0)
    if as_json:
        print_json(told)
        return
    from central.status import show

    show(told)


@central.command()
@central_options
@click.option("--resume", "mode", flag_value="learning", help="Try what the learner proposes (with policy.learn on).")
@click.option("--optimiser-only", "mode", flag_value="optimiser", help="Return to the scheme's own decisions at once.")
@click.option("--freeze", "mode", flag_value="frozen", help="The same, and let nothing change any more.")
@json_option
def guard(config_path: Path | None, settings: tuple[str, ...], mode: str | None, as_json: bool, **flags: Any) -> None:
    """Show what the guard is at, or stop learning from having any effect.

    A mode holds until the next one, over restarts too if central has a state folder.
    """
    config = _config(config_path, settings, flags)
    from fabricpilot.control import ask

    told = ask(_control_socket(config), f"guard {mode}" if mode else "guard", timeout_s=5.0)
    if as_json:
        print_json({"mode": told["guard_mode"], "groups": {_name(g): g["guard"] for g in told["groups"]}})
        return
    from central.status import show_guard

    show_guard(told)


@central.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to, for example keys.")
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Also a key pair for this host; several times.")
@click.option("--force", is_flag=True, help="Replace the named hosts' files if they exist; without --host, central's.")
@click.option("--dry-run", is_flag=True, help="Say what would be written and write nothing.")
@json_option
def keys(out: Path, hosts: tuple[str, ...], force: bool, dry_run: bool, as_json: bool) -> None:
    """Make key pairs: one for central, and one for each host.

    Central needs central.key_secret and the public files hosts/NAME.key; a host needs central.key and its own
    hosts/NAME.key_secret, as link.key. Run it again to add further hosts: central's key is kept.
    """
    from fabricpilot.keys import plan_pairs, write_pair

    planned = plan_pairs(out, hosts)
    clashes = [pair.name for pair in planned[1:] if pair.exists]
    if clashes and not force:
        raise UsageError(
            f"key files of {', '.join(clashes)} exist in {out}/hosts; leave them out, or replace by --force"
        )
    # --force with hosts is about these hosts: a new key for central would lock out every host there is.
    made = [pair for pair in planned if not pair.exists or (force and (pair is not planned[0] or not hosts))]
    if not dry_run:
        for pair in made:
            write_pair(pair)
    if as_json:
        files = [{"name": p.name, "public": str(p.public_file), "secret": str(p.secret_file)} for p in made]
        print_json({"written": not dry_run, "keys": files})
        return
    for pair in made:
        click.echo(f"{'would write' if dry_run else 'wrote'} {pair.public_file} and {pair.secret_file}")
    if not made:
        click.echo(f"nothing to do: central's key exists in {out}; name hosts with --host")


def _config(config_path: Path | None, settings: tuple[str, ...], flags: dict[str, Any]) -> CentralConfig:
    named = {_FLAGS[name]: value for name, value in flags.items()}
    config = load_config(CentralConfig, DEFAULT_CONFIG, config_path, settings, named)
    if not config.central.run_dir:
        raise FabricpilotError("central.run_dir is empty; give a folder, for example /run/fabricpilot-central")
    return config


def _name(group: dict[str, Any]) -> str:
    return f"{group['name']}, K = {group['levels']}"


def _control_socket(config: CentralConfig) -> Path:
    return Path(config.central.run_dir) / "central.sock"

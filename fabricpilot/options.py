"""Command-line options that both daemons and their companions share.

`--config FILE`, `--set section.key=value` for every key, and named flags for the common ones end up in one dictionary
of overrides for `fabricpilot.config.load`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fabricpilot.config import AgentConfig, CentralConfig, load
from fabricpilot.errors import UsageError

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
ConfigT = TypeVar("ConfigT", AgentConfig, CentralConfig)


def config_options(default_path: str) -> Callable[[CommandT], CommandT]:
    """Add `--config` and `--set`; the file at `default_path` is read when it exists and `--config` is not given."""

    def add(command: CommandT) -> CommandT:
        command = click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Set any configuration key; may be given several times. Wins over file and environment.",
        )(command)
        return click.option(
            "--config",
            "config_path",
            type=click.Path(path_type=Path),
            help=f"Configuration file.  [default: {default_path} if it exists]",
        )(command)

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def load_config(
    kind: type[ConfigT],
    default_path: str,
    config_path: Path | None,
    settings: tuple[str, ...],
    flags: dict[str, Any] | None = None,
) -> ConfigT:
    """The configuration from file, environment, `--set` and named flags.

    Raises:
        UsageError: as `fabricpilot.config.load`, or a `--set` that is not SECTION.KEY=VALUE.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key.count(".") != 1:
            raise UsageError(f"--set {setting}: write it as SECTION.KEY=VALUE, for example datapath.levels=4")
        overrides[key] = value
    overrides.update({key: value for key, value in (flags or {}).items() if value is not None})
    if config_path is None and Path(default_path).exists():
        config_path = Path(default_path)
    return load(kind, config_path, overrides)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))


def start_logging() -> None:
    """Log of a daemon to standard error, one line per change."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

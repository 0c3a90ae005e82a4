"""`fabricpilot train`: train an agent in the simulator, on one machine or on a Ray cluster, by the same command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])

_EXAMPLES = """\b
Examples:
  fabricpilot train srla --seed 1 --workers 2 --out runs/srla
  fabricpilot train srla --config scratch.toml --seed 1 --out runs/scratch
  fabricpilot train srla --resume --seed 1 --workers 2 --out runs/srla
"""


@click.group(epilog=_EXAMPLES)
def train() -> None:
    """Train sRLA or lRLA in the simulator. Same seed and configuration, same weights, whatever the workers."""


@dataclass(frozen=True)
class Start:
    """How a run was asked for."""

    config: Path | None
    seed: int
    workers: int
    ray: str | None
    resume: bool
    out: Path


def training_options(command: _CommandT) -> _CommandT:
    """The options that every `train` command has."""
    for option in (
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
        click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint."),
        click.option("--ray", metavar="ADDRESS", help="Work on this Ray cluster; `local` starts one (extra `scale`)."),
        click.option("--workers", default=1, show_default=True, help="Processes, or Ray actors, that simulate."),
        click.option("--seed", default=1, show_default=True, help="Same seed, same run."),
        click.option("--config", type=click.Path(path_type=Path), help="TOML file of hyper-parameters."),
    ):
        command = option(command)
    return command

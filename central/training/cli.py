"""`fabricpilot train`: train an agent in the simulator, on one machine or on a Ray cluster, by the same command."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from central.training import Trainer

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


def training_options(command: _CommandT) -> _CommandT:
    """The options that every `train` command has."""
    for option in (
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
        click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint."),
        click.option("--ray", metavar="ADDRESS", help="Work on this Ray cluster; `local` starts one (extra `scale`)."),
        click.option(
            "--workers",
            default=1,
            show_default=True,
            type=click.IntRange(min=1),
            help="Processes, or Ray actors, that simulate.",
        ),
        click.option("--seed", default=1, show_default=True, help="Same seed, same run."),
        click.option("--config", type=click.Path(path_type=Path), help="TOML file of hyper-parameters."),
    ):
        command = option(command)
    return command


@train.command()
@click.option(
    "--algorithm",
    type=click.Choice(["ddpg", "td3"]),
    default="ddpg",
    show_default=True,
    help="td3: stable-baselines3's, on the same environment, for comparison (extra `sb3`; one worker).",
)
@training_options
def srla(
    algorithm: str, config: Path | None, seed: int, workers: int, ray: str | None, resume: bool, out: Path
) -> None:
    """Thresholds: DDPG on what reports tell (docs/srla.md)."""
    from central.srla.training import Settings, SrlaTrainer
    from central.training.settings import read

    settings = read(Settings, config)

    def make() -> "Trainer":
        if algorithm == "ddpg":
            return SrlaTrainer(settings, seed, workers, ray)
        from central.srla.comparison import Td3Trainer

        return Td3Trainer(settings, seed)

    _run(make, f"srla-{algorithm}", settings, seed, resume, out)


@train.command()
@training_options
def lrla(config: Path | None, seed: int, workers: int, ray: str | None, resume: bool, out: Path) -> None:
    """Priority and route of long flows: REINFORCE in a simulated fabric (docs/lrla.md)."""
    from central.lrla.reinforce import Settings
    from central.lrla.training import LrlaTrainer
    from central.training.settings import read

    settings = read(Settings, config)
    _run(lambda: LrlaTrainer(settings, seed, workers, ray), "lrla", settings, seed, resume, out)


def _run(make: Callable[[], "Trainer"], agent: str, settings: object, seed: int, resume: bool, out: Path) -> None:
    """What every `train` command does once it has its settings; `make` starts the workers."""
    from central.training.loop import run
    from central.training.settings import as_record

    record = {"agent": agent, "seed": seed, "settings": as_record(settings)}
    if run(make(), out, record, resume=resume):
        click.echo(f"weights: {out / 'weights.npz'}")
    else:
        click.echo(f"stopped; go on with --resume --out {out}")

"""The one command. Rooms bring their subcommands as entry points (`fabricpilot.commands` in pyproject.toml).

`run` turns every known error into one line on standard error and the exit code of its class; what else goes wrong
is a bug and shows its traceback.
"""

import errno
import os
import signal
import sys
from importlib.metadata import EntryPoint, entry_points

import click

from fabricpilot import __version__
from fabricpilot.errors import FabricpilotError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # to write to: nothing that a traceback would explain


class Rooms(click.Group):
    """A group whose subcommands are entry points of the rooms, loaded only when they are named."""

    entry_point_group = "fabricpilot.commands"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands."""
        return sorted({*super().list_commands(ctx), *self._rooms()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name, or None."""
        found = self._rooms().get(cmd_name)
        return found.load() if found else super().get_command(ctx, cmd_name)

    def _rooms(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.entry_point_group)}


class Benchmarks(Rooms):
    """The benchmarks of all rooms."""

    entry_point_group = "fabricpilot.benchmarks"


@click.group(cls=Rooms, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fabricpilot")
def root() -> None:
    """Make a datacenter network tune itself.

    Exit codes: 0 good, 1 failed, 2 wrong usage or configuration, 3 the kernel lacks what is needed.
    """


@root.group(cls=Benchmarks)
def bench() -> None:
    """Measure, always as a ratio against a baseline in the same run."""
    # They tidy up when they are ended, as after Ctrl-C: maps of a million flows would stay pinned.
    signal.signal(signal.SIGTERM, _end)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def run() -> None:
    """Run the command that the program's arguments name, and exit with its status."""
    try:
        root.main(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except FabricpilotError as error:
        click.echo(f"fabricpilot: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; point stdout away so that exiting does not raise again.
        sys.stdout = None
        sys.exit(0)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        sys.stdout = None  # what did not find room there would be tried once more
        where = f" for {error.filename}" if error.filename else ""
        click.echo(f"fabricpilot: {error.strerror}{where}; make room there, or write somewhere else", err=True)
        sys.exit(1)

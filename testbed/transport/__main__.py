"""`python -m testbed.transport ...`: the transport commands without the rest of the testbed."""

import sys

import click

from fabricpilot.errors import FabricpilotError
from testbed.transport.cli import transport

try:
    transport(prog_name="python -m testbed.transport")
except FabricpilotError as error:
    click.echo(f"fabricpilot: {error}", err=True)
    sys.exit(error.exit_code)

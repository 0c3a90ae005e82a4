"""The way into the one command: what the console script calls.

Nothing is imported before Ctrl-C can be caught: the command (commands.py) and what it stands on take a while to import,
in which an impatient user would meet a traceback.
"""

import sys


def main() -> None:
    """Console entry point: exits with the command's status, or with 130 if it was interrupted."""
    try:
        from fabricpilot.commands import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)

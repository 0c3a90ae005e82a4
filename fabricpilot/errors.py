"""The errors a user can meet, each with its exit code.

An error names what was given, what was expected and what to do, in one line.
"""


class FabricpilotError(Exception):
    """Something failed; the message is one line for a person. Exit code 1."""

    exit_code = 1


class UsageError(FabricpilotError):
    """Wrong usage or configuration: the user can put it right. Exit code 2."""

    exit_code = 2


class KernelError(FabricpilotError):
    """The kernel, or the right to use it, lacks what is needed; the message names it. Exit code 3."""

    exit_code = 3

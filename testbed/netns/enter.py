"""Work inside a network namespace, leaving every other namespace (mounts above all) as it is.

`ip netns exec` also remounts /sys, which hides a bpffs; so processes are started through `nsenter --net`, and short
work in our own process is done in a thread that has moved into the namespace and ends there.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fabricpilot.errors import KernelError

NETNS_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def argv_in(namespace: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in the network namespace; the process id stays that of `argv`."""
    return ["nsenter", f"--net={NETNS_DIR / namespace}", "--", *argv]


def call_in(namespace: str, function: Callable[[], T]) -> T:
    """What `function` returns (or raises) when its calling thread is in the network namespace.

    Sockets opened inside stay in that namespace for their whole life.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            _move_this_thread(namespace)
            result.append(function())
        except BaseException as error:  # handed to the caller's thread, whatever it is
            failure.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def set_sysctls(namespace: str, values: Mapping[str, str]) -> None:
    """Set sysctls of a network namespace, for example `{"net.ipv4.tcp_congestion_control": "cubic"}`.

    Raises:
        KernelError: the kernel has no such sysctl or refuses the value.
    """

    def write() -> None:
        for name, value in values.items():
            path = Path("/proc/sys") / name.replace(".", "/")
            try:
                path.write_text(value)
            except OSError as error:
                raise KernelError(f"sysctl {name} = '{value}' is refused: {os.strerror(error.errno or 0)}") from error

    call_in(namespace, write)


def _move_this_thread(namespace: str) -> None:
    # Not by pyroute2, whose namespace functions fork: in a process with threads a fork can hang for ever.
    descriptor = os.open(NETNS_DIR / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), namespace)
    finally:
        os.close(descriptor)

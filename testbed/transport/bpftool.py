"""Load compiled objects with bpftool and hand out file descriptors; nothing stays pinned.

bpftool can only pin what it loads. So the loading happens in a thread with a mount namespace of its own, on a bpffs
that no other process sees: when the thread ends, or the process is killed, mount and pins are gone and only the
descriptors (and what they were attached to) keep the programs alive.
"""

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fabricpilot.errors import KernelError

_TIMEOUT_S = 60.0
_CLONE_NEWNS = 0x00020000
_MS_PRIVATE_EVERYWHERE = 0x44000  # MS_PRIVATE | MS_REC
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedProgram:
    """A program and its maps, as file descriptors (close-on-exec) that the owner closes."""

    program_fd: int
    map_fds: dict[str, int]

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (self.program_fd, *self.map_fds.values()):
            os.close(fd)


def bpftool(*arguments: str) -> Any:
    """Run bpftool; returns what it says as JSON (None if nothing).

    Raises:
        KernelError: bpftool is missing, or the kernel refused; the message has its reason.
    """
    if os.geteuid() != 0:
        raise KernelError("BPF programs are loaded as root (CAP_BPF, CAP_NET_ADMIN); run it with sudo")
    tool = shutil.which("bpftool", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        raise KernelError("bpftool is not installed; run `apt-get install bpftool`")
    done = subprocess.run([tool, "--json", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    answer = _last_json(done.stdout)
    if done.returncode or (isinstance(answer, dict) and "error" in answer):
        raise KernelError(f"bpftool {' '.join(arguments[:2])} failed: {_reason(done.stderr, answer)}")
    return answer


def _last_json(text: str) -> Any:
    lines = text.strip().splitlines()
    return json.loads(lines[-1]) if lines else None


def _reason(log: str, answer: Any) -> str:
    """The most telling line of a failure: libbpf's last complaint about the program, or bpftool's own word."""
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)"
    said = [line.strip() for line in log.splitlines()]
    for start in ("libbpf: extern", "libbpf: prog", "libbpf: map", "libbpf: struct_ops", "libbpf:", "Error:"):
        telling = [line for line in said if line.startswith(start) and "LOG" not in line]
        if telling:
            return telling[0]
    if isinstance(answer, dict) and "error" in answer:
        return str(answer["error"])
    return said[-1] if said else "no reason given"


def load_program(compiled: Path) -> LoadedProgram:
    """Load an object with one program.

    Raises:
        KernelError: the kernel refused it.
    """

    def load(bpffs: Path) -> LoadedProgram:
        bpftool("prog", "load", str(compiled), str(bpffs / "program"), "pinmaps", str(bpffs / "maps"))
        return LoadedProgram(
            _get(bpffs / "program"), {path.name: _get(path) for path in sorted((bpffs / "maps").iterdir())}
        )

    return _with_private_bpffs(load)


def open_map(map_id: int) -> int:
    """File descriptor of a map of the kernel, by its id."""

    def get(bpffs: Path) -> int:
        bpftool("map", "pin", "id", str(map_id), str(bpffs / "map"))
        return _get(bpffs / "map")

    return _with_private_bpffs(get)


def _get(path: Path) -> int:
    from hostagent.datapath.bpf_syscall import obj_get

    return obj_get(path)


def _with_private_bpffs(function: Callable[[Path], T]) -> T:
    """What `function(bpffs)` returns or raises, run where only it sees the bpffs."""
    result: list[T] = []
    failure: list[BaseException] = []

    def inside(directory: Path) -> None:
        try:
            _enter_private_mounts()
            _mount(b"bpf", directory, b"bpf", 0)
            result.append(function(directory))
        except BaseException as error:  # handed to the caller's thread, whatever it is
            failure.append(error)

    with tempfile.TemporaryDirectory(prefix="fabricpilot-") as name:
        thread = threading.Thread(target=inside, args=(Path(name),))
        thread.start()
        thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _enter_private_mounts() -> None:
    if _libc.unshare(_CLONE_NEWNS):
        raise KernelError(f"cannot make a mount namespace ({os.strerror(ctypes.get_errno())}); run it as root")
    _mount(b"none", Path("/"), None, _MS_PRIVATE_EVERYWHERE)


def _mount(what: bytes, where: Path, kind: bytes | None, flags: int) -> None:
    if _libc.mount(what, os.fsencode(where), kind, ctypes.c_ulong(flags), None):
        reason = os.strerror(ctypes.get_errno())
        raise KernelError(f"cannot mount {what.decode()} at {where} ({reason}); it needs root and CONFIG_BPF_SYSCALL")

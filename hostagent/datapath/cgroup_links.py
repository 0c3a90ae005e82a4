"""Programs on cgroups: attached by BPF links that are pinned, so they outlive the agent and go with their pin.

    PIN_DIR/<program>_<inode of the cgroup>     one link; unpinning it detaches the program

Only cgroup v2 takes programs. A cgroup is named by its path below where cgroup v2 is mounted, "/" for all processes.
"""

import errno
import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fabricpilot.errors import KernelError, UsageError
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.pinned_names import CGROUP_PROGRAMS

# enum bpf_attach_type
SETSOCKOPT: Final = 22
SOCK_OPS: Final = 3


def cgroup_mount() -> Path:
    """Where cgroup v2 is mounted.

    Raises:
        KernelError: nowhere.
    """
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise KernelError("cgroup v2 is not mounted; run `mount -t cgroup2 none /sys/fs/cgroup/unified`")


def cgroup_directory(name: str) -> Path:
    """Directory of a cgroup.

    Raises:
        UsageError: there is none of that name.
        KernelError: cgroup v2 is not mounted.
    """
    mount = cgroup_mount()
    directory = mount / name.strip("/")
    if ".." in directory.parts or not (directory / "cgroup.procs").exists():
        raise UsageError(f"cgroup '{name}' does not exist below {mount}; give a path as in /proc/PID/cgroup, or /")
    return directory


def attach_to_cgroups(pin_dir: Path, program: str, attach_type: int, names: Collection[str]) -> None:
    """Have the pinned program on exactly these cgroups. Idempotent.

    Raises:
        UsageError: a cgroup does not exist.
        KernelError: the kernel refused.
    """
    wanted = {}
    for name in names:
        directory = cgroup_directory(name)
        wanted[pin_dir / f"{program}_{directory.stat().st_ino}"] = directory
    for pin in pin_dir.glob(f"{program}_[0-9]*"):
        if pin not in wanted:
            pin.unlink()
    for pin, directory in wanted.items():
        if not pin.exists():
            _attach(pin_dir / program, pin, directory, attach_type)


def hand_over(old_dir: Path, new_dir: Path) -> None:
    """Put the programs pinned in `new_dir` in the place of those that links pinned in `old_dir` attach.

    Each in one step: no call of an application in between meets none or both. The links are pinned in both folders
    afterwards. A link whose program is not in `new_dir` is left behind.

    Raises:
        KernelError: the kernel refused.
    """
    for program in CGROUP_PROGRAMS:
        for pin in old_dir.glob(f"{program}_[0-9]*"):
            with ExitStack() as closing:
                try:
                    new = bpf.obj_get(new_dir / program)
                    closing.callback(os.close, new)
                    link = bpf.obj_get(pin)
                    closing.callback(os.close, link)
                    bpf.link_update(link, new)
                    bpf.obj_pin(link, new_dir / pin.name)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise KernelError(f"cannot replace the program behind {pin}: {error.strerror}") from error


def _attach(program: Path, pin: Path, directory: Path, attach_type: int) -> None:
    opened: list[int] = []
    try:
        opened.append(bpf.obj_get(program))
        opened.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        opened.append(bpf.link_create(opened[0], opened[1], attach_type))
        bpf.obj_pin(opened[2], pin)
    except OSError as error:
        why = {
            errno.ENOENT: "the kernel did not take the program when it was loaded: it needs CONFIG_CGROUP_BPF",
            errno.EPERM: "a program above it allows no others",
        }
        raise KernelError(
            f"cannot attach to cgroup {directory}: {why.get(error.errno or 0, error.strerror)}"
        ) from error
    finally:
        for fd in opened:
            os.close(fd)

"""The BPF file system: is a folder on one, and mount it where it belongs.

Pins live there and nowhere else. systemd mounts it at /sys/fs/bpf at boot; where nobody has, the agent does, under a
name of its own (the mount's source), so that `detach` knows it again and takes it away once nobody uses it.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fabricpilot.errors import KernelError, UsageError

log = logging.getLogger(__name__)

STANDARD_MOUNT = Path("/sys/fs/bpf")
_BPF_FS_MAGIC = 0xCAFE4A11
_SOURCE = "fabricpilot"  # of the mounts that the agent makes, as /proc/mounts shows it
_BY_THE_KERNEL = {"maps.debug", "progs.debug"}  # in every bpffs, where CONFIG_BPF_PRELOAD is on
_libc = ctypes.CDLL(None, use_errno=True)


def is_bpffs(path: Path) -> bool:
    """Whether the existing `path` is on a BPF file system."""
    words = (ctypes.c_long * 32)()  # struct statfs: f_type is its first long on every 64-bit architecture
    if _libc.statfs(os.fsencode(path), ctypes.byref(words)) != 0:
        return False
    return (words[0] & 0xFFFFFFFF) == _BPF_FS_MAGIC


def holds(pin_dir: Path) -> bool:
    """Whether the folder that `pin_dir` lies in is there and on a BPF file system."""
    return pin_dir.parent.is_dir() and is_bpffs(pin_dir.parent)


def check_path(pin_dir: Path) -> None:
    """Refuse what the kernel would: a BPF file system answers a name with a dot in it with EPERM, even to a look.

    Raises:
        UsageError: it is such a path, or not an absolute one.
    """
    if not pin_dir.is_absolute() or "." in pin_dir.name:
        raise UsageError(f"datapath.pin_dir = {pin_dir} must be an absolute path, its last part without dots")


def check_bpffs(pin_dir: Path) -> str:
    """Whether `ensure_bpffs` will do, without mounting; returns "" or that it has yet to be mounted.

    Raises:
        UsageError: `check_path`.
        KernelError: it will not, with what to do.
    """
    check_path(pin_dir)
    if STANDARD_MOUNT in pin_dir.parents and not is_bpffs(STANDARD_MOUNT):
        _check_mountable()
        return f"will be mounted at {STANDARD_MOUNT}"
    _check_parent(pin_dir)
    return ""


def ensure_bpffs(pin_dir: Path) -> None:
    """Make sure `pin_dir`'s parent exists on a BPF file system; mounts one at /sys/fs/bpf if `pin_dir` is below it.

    Raises:
        KernelError: it is not on one, with the command that changes that.
    """
    if STANDARD_MOUNT in pin_dir.parents and not is_bpffs(STANDARD_MOUNT):
        _check_mountable()
        _mount_standard()
    _check_parent(pin_dir)
    try:
        pin_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot make {pin_dir.parent} on the BPF file system: {error.strerror}") from error


def _check_parent(pin_dir: Path) -> None:
    parent = pin_dir.parent
    existing = next(path for path in [parent, *parent.parents] if path.exists())
    if not is_bpffs(existing):
        raise KernelError(
            f"datapath.pin_dir = {pin_dir} is not on a BPF file system; mount one with "
            f"`mkdir -p {parent} && mount -t bpf bpf {parent}`, or use a folder below {STANDARD_MOUNT}"
        )


def _check_mountable() -> None:
    if not STANDARD_MOUNT.exists():
        raise KernelError(
            f"{STANDARD_MOUNT} does not exist: the kernel lacks CONFIG_BPF_SYSCALL, or /sys is not mounted"
        )
    if private := _netns_exec_name():
        # `ip netns exec` gives its command a /sys of its own. Pins mounted there would vanish with the command.
        raise KernelError(
            f"/sys/fs/bpf is not visible under `ip netns exec {private}`; mount a BPF file system elsewhere "
            "(`mkdir -p /run/bpf && mount -t bpf bpf /run/bpf` outside) and set datapath.pin_dir below it"
        )


def _mount_standard() -> None:
    if _libc.mount(_SOURCE.encode(), os.fsencode(STANDARD_MOUNT), b"bpf", 0, None) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise KernelError(
            f"no BPF file system at {STANDARD_MOUNT} and mounting it failed ({reason}); "
            f"run `mount -t bpf bpf {STANDARD_MOUNT}` as root"
        )
    log.info("mounted a BPF file system at %s, as nobody had", STANDARD_MOUNT)


def unmount_if_unused(pin_dir: Path) -> bool:
    """Take away the file system that an agent mounted for `pin_dir`, unless somebody has pinned something there since.

    Returns whether it was taken away.
    """
    if STANDARD_MOUNT not in pin_dir.parents:
        return False
    mounted = next((mount for mount in _mounts() if mount[4] == str(STANDARD_MOUNT)), None)
    if mounted is None or mounted[mounted.index("-") + 1 :][:2] != ["bpf", _SOURCE]:
        return False
    for folder in pin_dir.parents:  # those that `ensure_bpffs` made
        if folder == STANDARD_MOUNT:
            break
        with contextlib.suppress(OSError):
            folder.rmdir()
    if {path.name for path in STANDARD_MOUNT.iterdir()} - _BY_THE_KERNEL:
        return False
    if _libc.umount2(os.fsencode(STANDARD_MOUNT), 0) != 0:
        return False  # busy: somebody stands in it
    log.info("unmounted the BPF file system at %s, which an agent had mounted", STANDARD_MOUNT)
    return True


def _netns_exec_name() -> str | None:
    """The namespace whose name `ip netns exec` gave as the source of the /sys it mounted, if it did."""
    with contextlib.suppress(OSError):
        for mount in _mounts():
            if mount[4] == "/sys":
                source = mount[mount.index("-") + 2]
                return source if (Path("/run/netns") / source).exists() else None
    return None


def _mounts() -> Iterator[list[str]]:
    """Fields of /proc/self/mountinfo, latest mount first (it hides earlier ones at the same place)."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return (line.split() for line in reversed(lines))

"""Names of control groups to the ids that the kernel knows their sockets by (cgroup v2 only)."""

from pathlib import Path

from hostagent.datapath.rules import Cgroup


def find_cgroup(path: str) -> Cgroup | None:
    """The cgroup named as in /proc/PID/cgroup, for example `/system.slice/backup.service`; None if there is none now.

    Its id is the inode of its folder (a 64-bit kernel's), which is what `bpf_skb_ancestor_cgroup_id` returns.
    """
    root = _mount_point()
    if root is None:
        return None
    parts = [part for part in path.split("/") if part]
    try:
        return Cgroup(root.joinpath(*parts).stat().st_ino, len(parts))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _mount_point() -> Path | None:
    """Where cgroup v2 is mounted, also beside v1 (hybrid)."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    return None

"""What the testbed has made on this machine, written down before it is made, so that all of it can be removed.

Every run has a directory `/run/fabricpilot-testbed/<run>` with append-only lists: `namespaces`, `cgroups` (names) and
`processes` (pid and start time: a pid alone may have been given to somebody else meanwhile). Whatever needs a bpffs
mounts it below the run's directory. `clean` works from these lists only; it touches nothing that is not in them.

Removal goes processes, mounts, namespaces, cgroups, directory, and each step passes over what is already gone. A run
whose owner is still alive is somebody's running demo: it is left alone unless forced.
"""

import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fabricpilot.errors import FabricpilotError, KernelError
from testbed.netns.enter import NETNS_DIR

RUNTIME_DIR = Path("/run/fabricpilot-testbed")
PREFIX = "fp-"  # of every namespace we make: fp-<run>-<role>

_TERM_GRACE_S = 3.0


@dataclass(frozen=True)
class Process:
    """A process of ours: its pid, and when it started (clock ticks since boot, from /proc), which makes it unique."""

    pid: int
    started_ticks: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process with this pid now, or None if there is none or it is a zombie."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()  # the name, in parentheses, may hold anything
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether exactly this process is still there."""
        return Process.of(self.pid) == self


@dataclass(frozen=True)
class Removal:
    """What was removed, or would be: for the person who asked."""

    run: str
    processes: list[int] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    in_use_by: int = 0  # pid of the live owner: nothing was removed


@dataclass(frozen=True)
class Run:
    """The register of one run."""

    name: str
    base_dir: Path = RUNTIME_DIR

    @classmethod
    def create(cls, base_dir: Path = RUNTIME_DIR) -> "Run":
        """A new run with a name nobody has.

        Raises:
            KernelError: not root.
        """
        need_root()
        while True:
            run = cls(secrets.token_hex(3), base_dir)
            with suppress(FileExistsError):
                run.dir.mkdir(parents=True, mode=0o700)
                break
        me = Process.of(os.getpid())
        assert me is not None
        (run.dir / "owner").write_text(json.dumps([me.pid, me.started_ticks]))
        return run

    @property
    def dir(self) -> Path:
        """Directory of this run: registers, configuration, control sockets, bpffs mounts."""
        return self.base_dir / self.name

    def namespace(self, role: str) -> str:
        """Name of the namespace with this role."""
        return f"{PREFIX}{self.name}-{role}"

    def cgroup(self, role: str) -> str:
        """Name of the cgroup with this role, as its path below where cgroup v2 is mounted."""
        return f"/{self.namespace(role)}"

    def make_cgroup(self, role: str) -> str:
        """Make the cgroup with this role, unless it is there; returns its name.

        Raises:
            KernelError: cgroup v2 is not mounted.
        """
        name = self.cgroup(role)
        if not _cgroup_directory(name).exists():
            self._append("cgroups", name)
            _cgroup_directory(name).mkdir()
        return name

    def record_namespace(self, name: str) -> None:
        """Write the name down; do so before making it."""
        self._append("namespaces", name)

    def record_process(self, pid: int) -> None:
        """Write a process down; it must lead its own session, so that its children can be ended with it."""
        process = Process.of(pid)
        if process is not None:
            self._append("processes", json.dumps([process.pid, process.started_ticks]))

    def owner(self) -> Process | None:
        """Who made this run, if that process is still alive."""
        owners = [Process(*entry) for entry in self._entries("owner")]
        return owners[0] if owners and owners[0].alive else None

    def contents(self) -> Removal:
        """What of this run is on the machine now."""
        processes = [Process(*entry) for entry in self._entries("processes")]
        names, cgroups = self._lines("namespaces"), self._lines("cgroups")
        return Removal(
            run=self.name,
            processes=[p.pid for p in processes if p.alive],
            mounts=_mounts_below(self.dir),
            namespaces=[n for n in names if n.startswith(self.namespace("")) and (NETNS_DIR / n).exists()],
            cgroups=[n for n in cgroups if n.startswith(self.cgroup("")) and _cgroup_directory(n).exists()],
        )

    def remove(self) -> Removal:
        """Remove all of this run. Idempotent.

        Raises:
            FabricpilotError: something could not be removed; the register is kept, so that it can be tried again.
        """
        found = self.contents()
        _end([Process(*entry) for entry in self._entries("processes")])
        failed: list[str] = []
        steps = [(mount, ["umount", mount]) for mount in found.mounts]
        steps += [(namespace, ["ip", "netns", "delete", namespace]) for namespace in found.namespaces]
        for what, command in steps:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed.append(f"{what} ({done.stderr.strip()})")
        for name in found.cgroups:
            try:
                _remove_cgroup(_cgroup_directory(name))
            except OSError as error:
                failed.append(f"{name} ({error.strerror})")
        if failed:
            raise FabricpilotError(f"run {self.name}: cannot remove {', '.join(failed)}; look at what holds them")
        shutil.rmtree(self.dir, ignore_errors=True)
        return found

    def _append(self, name: str, line: str) -> None:
        with (self.dir / name).open("a") as file:
            file.write(line + "\n")

    def _lines(self, name: str) -> list[str]:
        try:
            return (self.dir / name).read_text().split("\n")[:-1] if name != "owner" else []
        except FileNotFoundError:
            return []

    def _entries(self, name: str) -> list[tuple[int, int]]:
        try:
            lines = (self.dir / name).read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(int(pid), int(ticks)) for pid, ticks in (json.loads(line) for line in lines if line)]


def runs(base_dir: Path = RUNTIME_DIR) -> list[Run]:
    """All runs written down on this machine."""
    return [Run(path.name, base_dir) for path in sorted(base_dir.glob("*")) if path.is_dir()]


def clean(*, force: bool = False, dry_run: bool = False, base_dir: Path = RUNTIME_DIR) -> list[Removal]:
    """Remove what every run left behind, and nothing else; runs of a live owner only with `force`.

    Raises:
        KernelError: not root.
        FabricpilotError: something could not be removed.
    """
    need_root()
    done = []
    for run in runs(base_dir):
        owner = run.owner()
        if owner is not None and not force:
            done.append(Removal(run.name, in_use_by=owner.pid))
        elif dry_run:
            done.append(run.contents())
        else:
            if owner is not None:
                _end([owner])  # it removes its own run on SIGTERM; what it leaves is removed here
            done.append(run.remove())
    return done


def need_root() -> None:
    """Raise `KernelError` unless we may make network namespaces."""
    if os.geteuid() != 0:
        raise KernelError("the testbed makes network namespaces, which needs root; run it with sudo")


def in_cgroup(name: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in the cgroup; the process id stays that of `argv`."""
    enter = 'echo $$ >"$0" && exec "$@"'
    return ["sh", "-c", enter, str(_cgroup_directory(name) / "cgroup.procs"), *argv]


def _cgroup_directory(name: str) -> Path:
    from hostagent.datapath.cgroup_links import cgroup_mount

    return cgroup_mount() / name[1:]


def _remove_cgroup(directory: Path) -> None:
    """Remove it as soon as the kernel has let go of the processes that have just ended there."""
    until = time.monotonic() + _TERM_GRACE_S
    while directory.exists():
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _mounts_below(directory: Path) -> list[str]:
    """Mount points below `directory`, deepest first."""
    prefix = f"{directory}/"
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return sorted((p for p in points if p.startswith(prefix)), key=len, reverse=True)


def _end(processes: list[Process]) -> None:
    """SIGTERM to the process groups of these processes, SIGKILL to those still there after a grace period."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [p for p in processes if p.alive]
        for process in left:
            _signal(process, number)
        until = time.monotonic() + _TERM_GRACE_S
        while any(p.alive for p in left) and time.monotonic() < until:
            time.sleep(0.02)


def _signal(process: Process, number: int) -> None:
    with suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:  # it leads a group of its own: children included
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)

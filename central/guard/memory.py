"""What the guard knows after a restart: its mode, and each group's baseline and promoted thresholds; one JSON file."""

import logging
from pathlib import Path

import msgspec

from central.durable import replace_file
from central.guard.keeper import Mode
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

log = logging.getLogger(__name__)

FILE = "guard.json"
MAX_REMEMBERED = 4096  # groups, the latest ones: hosts choose their names


class Remembered(msgspec.Struct, frozen=True):
    """One group and K."""

    group: str
    levels: int
    baseline: list[int]
    promoted: list[int] | None = None

    def __post_init__(self) -> None:
        for values in (self.baseline, self.promoted):
            if values is not None and Thresholds.of(values).levels != self.levels:
                raise ValueError(f"{len(values)} thresholds are not for K = {self.levels}")


class Memory(msgspec.Struct, frozen=True):
    """The content of the file."""

    mode: Mode = "learning"
    groups: list[Remembered] = []

    def of(self, group: str, levels: int) -> Remembered | None:
        """What is remembered of a group and K."""
        return next((known for known in self.groups if (known.group, known.levels) == (group, levels)), None)


class GuardMemory:
    """The file in `folder`; without a folder nothing is remembered."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None
        self._failed = False

    def read(self) -> Memory:
        """What was written last; a file that says nothing valid is set aside and counts as none."""
        if self._path is None or not self._path.exists():
            return Memory()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Memory)
        except (OSError, msgspec.DecodeError, UsageError) as error:
            log.error("%s cannot be read (%s); the guard begins anew", self._path, error)
            self._path.replace(self._path.with_suffix(".unreadable"))
            return Memory()

    def write(self, memory: Memory) -> None:
        """Replace the file. A full disk is told once; it is no reason to stop."""
        if self._path is None:
            return
        content = msgspec.json.encode(memory)
        try:
            replace_file(self._path, lambda path: path.write_bytes(content), flush=False)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s: %s", self._path, error.strerror)
            self._failed = True

"""A file with one JSON line per change of thresholds, for plots and for the record."""

import json
import logging
import time
from pathlib import Path

from central.policy.base import GroupSummary
from central.registry import InForce
from fabricpilot.errors import UsageError

log = logging.getLogger(__name__)


class ThresholdLog:
    """Appends to `path`; an empty path makes a log that writes nothing.

    Each line: `time` (Unix seconds), `group`, `levels`, `epoch`, `thresholds` (bytes), `hosts` told, `reason`,
    `flows`, `load`.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._failed = False
        if self._path is not None:
            try:
                self._path.open("a").close()
            except OSError as error:
                raise UsageError(f"cannot write {path} (central.threshold_log): {error.strerror}") from error

    def write(self, summary: GroupSummary, in_force: InForce, hosts: int) -> None:
        """Add one change. A full disk is told once; it is no reason to stop."""
        if self._path is None:
            return
        line = json.dumps(
            {
                "time": round(time.time(), 3),
                "group": summary.group,
                "levels": summary.levels,
                "epoch": in_force.epoch,
                "thresholds": list(in_force.thresholds.bytes),
                "hosts": hosts,
                "reason": in_force.reason,
                "flows": round(summary.flows, 1),
                "load": round(summary.load, 4),
            }
        )
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s: %s", self._path, error.strerror)
            self._failed = True

"""What all learning agents share: the run (`loop`), its workers, its logs, and checkpoints that reload exactly.

`fabricpilot train NAME` builds a `Trainer` and hands it to `loop.run`, which shows progress, logs and saves.
"""

from pathlib import Path
from typing import Any, Protocol


class Trainer(Protocol):
    """One training run, advanced in steps of about a second. Deterministic by its seed on one thread."""

    @property
    def done(self) -> int:
        """Steps taken."""

    @property
    def total(self) -> int:
        """Steps there are to take."""

    def advance(self) -> dict[str, float]:
        """One step; what to log of it, by name."""

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on exactly: nested dicts and lists of arrays, tensors and plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""

    def export(self, path: Path, record: dict[str, Any]) -> None:
        """Write the trained weights, for use, with a record of how they were made."""

    def close(self) -> None:
        """End its workers."""

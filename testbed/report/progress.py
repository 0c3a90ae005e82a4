"""Progress bars on standard error, so that standard output stays for results."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressSteps:
    """One line per step; a finished step keeps its line."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]:<14}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,  # more would take CPU from the traffic that is measured
        )
        self._task: TaskID | None = None

    def begin(self, step: str, total: float) -> None:
        """A step begins; the one before is done."""
        self._finish()
        self._task = self._progress.add_task(step, total=total, note="")

    def advance(self, done: float, note: str = "") -> None:
        """The step is this far."""
        assert self._task is not None
        self._progress.update(self._task, completed=done, note=note)

    def __enter__(self) -> "ProgressSteps":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            self._progress.update(self._task, completed=task.total)
            self._task = None

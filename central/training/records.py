"""What a run writes down as it goes: TensorBoard where it is installed (extra `train`), else a CSV file."""

import csv
from pathlib import Path
from typing import Protocol


class Records(Protocol):
    """Takes named numbers of a step."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write them down."""

    def close(self) -> None:
        """Flush."""


def records_in(folder: Path) -> Records:
    """Records in `folder`; a resumed run goes on there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - only whether it is there
    except ImportError:
        return CsvRecords(folder / "metrics.csv")
    return TensorBoardRecords(folder)


class TensorBoardRecords:
    """Scalars for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class CsvRecords:
    """Lines `step,name,value`: names may come and go, and a resumed run appends."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        self._file = path.open("a", encoding="utf-8", newline="")
        self._lines = csv.writer(self._file)
        if new:
            self._lines.writerow(("step", "name", "value"))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One line per name."""
        self._lines.writerows((step, name, f"{value:.8g}") for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

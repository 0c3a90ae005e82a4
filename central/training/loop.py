"""A training run from start to end: progress, logs, checkpoints, and weights when it is done.

In the run's folder: `checkpoint.npz` (all that a resumed run needs), `logs/`, and `weights.npz` at the end. SIGINT and
SIGTERM end the run after its step, saved.
"""

import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from central.training import Trainer, checkpoint
from central.training.records import records_in
from fabricpilot.errors import UsageError
from fabricpilot.stopping import stop_signal

_SAVE_EVERY_S = 60.0


def run(trainer: Trainer, folder: Path, record: dict[str, Any], *, resume: bool = False) -> bool:
    """Train to the end, or until told to stop.

    Args:
        trainer: what to train.
        folder: of the run.
        record: how it was started, kept with the weights; a resumed run must have the same.
        resume: go on from the folder's checkpoint.

    Returns:
        Whether the end was reached.

    Raises:
        UsageError: nothing to resume, another run's folder, or a folder that has a run while not resuming.
    """
    kept = folder / "checkpoint.npz"
    before_s = 0.0
    if resume:
        saved = checkpoint.load(kept)
        if saved["record"] != record:
            raise UsageError(f"{kept} is of another run: {saved['record']}; give the same configuration and seed")
        trainer.restore(saved["trainer"])
        before_s = saved["seconds"]
    elif kept.exists():
        raise UsageError(f"{folder} has a run already; go on with --resume, or give another --out")
    started = saved_at = time.monotonic()
    records = records_in(folder / "logs")

    def seconds() -> float:
        return before_s + time.monotonic() - started

    def save() -> None:
        checkpoint.save(kept, {"record": record, "seconds": seconds(), "trainer": trainer.state()})

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with stop_signal() as stop, Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task("training", total=trainer.total, completed=trainer.done)
            while trainer.done < trainer.total and not stop.asked:
                values = trainer.advance()
                records.add(trainer.done, values)
                shown = " ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:4])
                progress.update(task, completed=trainer.done, description=shown or "training")
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    save()
                    saved_at = time.monotonic()
        save()
        if trainer.done < trainer.total:
            return False
        trainer.export(folder / "weights.npz", record | {"seconds": round(seconds())})
        return True
    finally:
        records.close()
        trainer.close()

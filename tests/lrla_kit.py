"""What the tests of both of lRLA's networks hold in the same way."""

from pathlib import Path

import torch

from central.lrla.reinforce import Settings
from central.lrla.training import LrlaTrainer
from central.training import checkpoint


def assert_goes_on_exactly(settings: Settings, tmp_path: Path) -> tuple[LrlaTrainer, LrlaTrainer]:
    """Two trainings of one seed are one, and a third goes on from a checkpoint of the first as the second does.

    Returns the second and the third.
    """
    one, other = LrlaTrainer(settings, 7), LrlaTrainer(settings, 7)
    assert one.advance() == other.advance()
    checkpoint.save(tmp_path / "checkpoint.npz", one.state())
    later = LrlaTrainer(settings, 1)
    later.restore(checkpoint.load(tmp_path / "checkpoint.npz"))
    assert later.done == 1
    assert later.advance() == other.advance()
    for mine, theirs in zip(later.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    return other, later

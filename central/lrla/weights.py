"""Weights of `fabricpilot train lrla` as they lie in a file: checked, as arrays, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from central.training import checkpoint
from fabricpilot.errors import UsageError

FEATURES, HIDDEN = 9, 32  # what the network of `network.py` sees of a flow, and makes of it

_FOLDER = Path(__file__).with_name("weights")
SHIPPED = _FOLDER / "lrla.npz"
PAPER = _FOLDER / "paper.npz"
RATED = {"learned": _FOLDER / "lrla-rates.npz", "auto": _FOLDER / "paper-rates.npz"}  # for the ablation alone


@dataclass(frozen=True, eq=False)
class Stored:
    """A network's parameters by name, and the settings that it was trained with."""

    values: dict[str, npt.NDArray[np.float32]]
    settings: dict[str, Any]

    @property
    def rates(self) -> tuple[float, ...]:
        """What it may hold flows to, as shares of a host's link; empty: it knows of no rates."""
        return tuple(self.settings.get("rates", ()))


def stored(path: Path, network: Literal["sets", "paper"]) -> Stored:
    """What the file holds.

    Raises:
        UsageError: no such file, weights of another network, or such as are not finite; names the file.
    """
    content = checkpoint.load(path, arrays=True)
    try:
        found = Stored(content["network"], content["record"]["settings"])
        fits = found.settings["network"] == network and (
            network == "paper" or found.values["flow.0.weight"].shape == (HIDDEN, FEATURES)
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of `fabricpilot train lrla`") from error
    if not fits:
        raise UsageError(f'{path} holds no weights of network = "{network}"; train them anew')
    if not all(bool(np.isfinite(value).all()) for value in found.values.values()):
        raise UsageError(f"{path} holds weights that are not finite")
    return found


def deployable(path: Path) -> Stored:
    """Weights for a running central.

    Raises:
        UsageError: as `stored`, or they choose rates.
    """
    found = stored(path, "sets")
    if found.rates:
        raise UsageError(f"{path} chooses rates of flows, which no data path holds them to; train with rates = []")
    return found

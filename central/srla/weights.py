"""Trained sRLA in a file: actor and critic as half precision, how they see and act, and how they were trained."""

from pathlib import Path
from typing import Any

import msgspec
import torch

from central.srla.ddpg import Ddpg, Settings
from central.srla.encoding import ACTIONS, Encoding
from central.training import checkpoint
from central.training.settings import as_record
from fabricpilot.errors import UsageError

FOLDER = Path(__file__).parent / "weights"
DEFAULT = FOLDER / "srla.npz"
AUTO = FOLDER / "auto.npz"  # AuTO as published: 700 features, absolute thresholds, the paper's ratio as reward


def save(path: Path, agent: Ddpg, encoding: Encoding, record: dict[str, Any]) -> None:
    """Write actor and critic of `agent`."""
    networks = {
        name: {key: value.half() if key.endswith(("weight", "bias")) else value for key, value in net.items()}
        for name, net in (("actor", agent.actor.state_dict()), ("critic", agent.critic.state_dict()))
    }
    told = {"agent": as_record(agent.settings), "encoding": as_record(encoding), "training": record}
    checkpoint.save(path, told | {"networks": networks})


def load(
    path: Path = DEFAULT, *, settings: Settings | None = None, seed: int = 0
) -> tuple[Ddpg, Encoding, dict[str, Any]]:
    """The agent, how it sees and acts, and its training's record. Targets are copies; optimisers and replay are new.

    Args:
        path: of the weights.
        settings: other hyper-parameters for further training; the layers must be those trained.
        seed: of the agent's randomness.

    Raises:
        UsageError: no such file, or not weights of sRLA.
    """
    try:
        stored = checkpoint.load(path)
        encoding = msgspec.convert(stored["encoding"], Encoding)
        agent = Ddpg(settings or msgspec.convert(stored["agent"], Settings), encoding.features, ACTIONS, seed)
        for name in ("actor", "critic"):
            network = {key: value.to(torch.float32) for key, value in stored["networks"][name].items()}
            for target in (name, f"{name}_target"):
                getattr(agent, target).load_state_dict(network)
    except (KeyError, TypeError, RuntimeError, msgspec.ValidationError) as error:
        raise UsageError(f"{path} holds no weights of sRLA: {error}; train with `fabricpilot train srla`") from None
    return agent, encoding, stored["training"]

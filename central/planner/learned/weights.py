"""Weights in files: plain arrays (.npz, no pickle), the network's sizes and how they were trained beside them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from central.planner.learned.network import Policy
from fabricpilot.errors import UsageError

DEFAULT = Path(__file__).parent.parent / "weights" / "policy.npz"


def save(policy: Policy, path: Path, training: dict[str, Any]) -> None:
    """Write weights as half precision (small enough for the repository), sizes and the training record."""
    arrays = {name: value.detach().numpy().astype(np.float16) for name, value in policy.state_dict().items()}
    about = json.dumps({"sizes": policy.sizes, "training": training})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new.npz")
    np.savez_compressed(temporary, about=np.array(about), **arrays)
    temporary.replace(path)


def load(path: Path = DEFAULT) -> tuple[Policy, dict[str, Any]]:
    """The policy and its training record.

    Raises:
        UsageError: no such file, or not weights of this network.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            policy = Policy(**about["sizes"])
            state = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in policy.state_dict()}
        policy.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UsageError(f"weights {path}: {error}; train some with `fabricpilot plan train`") from None
    policy.eval()
    return policy, dict(about["training"])


@cache
def warm_up() -> None:
    """Load the policy's libraries and take its first steps, which are slow, before anybody's clock starts."""
    from central.planner.generator import SHAPES, generate
    from central.planner.learned.solver import Options, sample
    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Deadline, Limits, Problem

    torch.set_num_threads(1)  # solvers run in forked children, which must not meet another's threads; few gain from two
    problem = Problem(generate(SHAPES["tiny"], 0), parse_objective("fr"), Limits(mnl=2))
    sample(problem, Deadline(60.0), 0, Options())

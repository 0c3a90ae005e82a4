"""Checkpoints: any nesting of dicts and lists with arrays, tensors and plain values, as one file, without pickle.

The arrays lie in an .npz; the nesting is JSON beside them. A file is written under another name and then moved, so that
whoever reads sees the old one or the new one, whole. What is read equals what was written, bit by bit.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fabricpilot.errors import UsageError


def save(path: Path, tree: Any) -> None:
    """Write `tree` to `path` atomically; folders are made.

    Raises:
        TypeError: something in it is neither array, tensor nor plain value.
    """
    arrays: list[npt.NDArray[Any]] = []
    text = json.dumps(_plain(tree, arrays))
    content = io.BytesIO()
    named: dict[str, Any] = {f"a{i}": array for i, array in enumerate(arrays)}
    np.savez(content, tree=np.array(text), **named)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> Any:
    """What `save` wrote.

    Raises:
        UsageError: no such file, or not a checkpoint.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[f"a{i}"] for i in range(len(stored.files) - 1)]
            return _rebuilt(json.loads(str(stored["tree"])), arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no checkpoint: {error}") from None


def _plain(node: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    """`node` as JSON, its arrays moved to `arrays`."""
    if isinstance(node, torch.Tensor):
        arrays.append(node.detach().cpu().numpy())
        return {"tensor": len(arrays) - 1}
    if isinstance(node, np.ndarray):
        arrays.append(node)
        return {"array": len(arrays) - 1}
    if isinstance(node, dict):  # as pairs: JSON knows no keys but strings
        return {"map": [[key, _plain(value, arrays)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_plain(value, arrays) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}")


def _rebuilt(node: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    if isinstance(node, list):
        return [_rebuilt(value, arrays) for value in node]
    if isinstance(node, dict):
        ((kind, value),) = node.items()
        if kind == "map":
            return {key: _rebuilt(inner, arrays) for key, inner in value}
        return torch.from_numpy(arrays[value].copy()) if kind == "tensor" else arrays[value]
    return node

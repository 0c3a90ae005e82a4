"""Checkpoints: any nesting of dicts and lists with arrays, tensors and plain values, as one file, without pickle.

The arrays lie in an .npz; the nesting is JSON beside them. A file is written under another name and then moved, so that
whoever reads sees the old one or the new one, whole. What is read equals what was written, bit by bit.
"""

import io
import json
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from central.durable import replace_file
from fabricpilot.errors import UsageError

# What numpy and zipfile raise for a file that is none, was cut short, or has bits that have flipped.
_BROKEN = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, MemoryError, zlib.error)


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
    replace_file(path, lambda beside: beside.write_bytes(content.getbuffer()))


def load(path: Path, *, arrays: bool = False) -> Any:
    """What `save` wrote.

    Args:
        path: of the file.
        arrays: tensors come as arrays; then torch is not needed.

    Raises:
        UsageError: no such file, or not a checkpoint.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            kept = [stored[f"a{i}"] for i in range(len(stored.files) - 1)]
            return _rebuilt(json.loads(str(stored["tree"])), kept, arrays)
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no checkpoint: {error}") from None


def _plain(node: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    """`node` as JSON, its arrays moved to `arrays`."""
    if (torch := sys.modules.get("torch")) and isinstance(node, torch.Tensor):  # who has one has imported it
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


def _rebuilt(node: Any, kept: list[npt.NDArray[Any]], arrays: bool) -> Any:
    if isinstance(node, list):
        return [_rebuilt(value, kept, arrays) for value in node]
    if isinstance(node, dict):
        ((kind, value),) = node.items()
        if kind == "map":
            return {key: _rebuilt(inner, kept, arrays) for key, inner in value}
        if kind == "array" or arrays:
            return kept[value]
        import torch

        return torch.from_numpy(kept[value].copy())
    return node

"""Hyper-parameters from a TOML file: flat keys, the fields of an agent's frozen dataclass, each documented there."""

import tomllib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fabricpilot.errors import UsageError

SettingsT = TypeVar("SettingsT")


def read(kind: type[SettingsT], path: Path | None, given: dict[str, Any] | None = None) -> SettingsT:
    """Settings of `kind` from the file and what was given besides, which wins.

    Raises:
        UsageError: no such file, not TOML, an unknown key, or a value of the wrong type; names it.
    """
    assert is_dataclass(kind)
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}") from None
    table |= {key: value for key, value in (given or {}).items() if value is not None}
    known = [field.name for field in fields(kind)]
    for key in table:
        if key not in known:
            raise UsageError(f"{path or 'settings'}: '{key}' is unknown; there are {', '.join(known)}")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path or 'settings'}: {error}") from None


def as_record(settings: Any) -> dict[str, Any]:
    """All values, as JSON keeps them."""
    record: dict[str, Any] = msgspec.to_builtins(asdict(settings))
    return record

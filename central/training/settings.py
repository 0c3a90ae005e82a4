"""Hyper-parameters from a TOML file: keys are the fields of a frozen dataclass, tables those inside it."""

import tomllib
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

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
    _check_keys(table, kind, str(path or "settings"))
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path or 'settings'}: {error}") from None


def _check_keys(table: dict[str, Any], kind: Any, where: str) -> None:
    types = get_type_hints(kind)
    for key, value in table.items():
        if key not in types:
            raise UsageError(f"{where}: '{key}' is unknown; there are {', '.join(types)}")
        if isinstance(value, dict) and is_dataclass(types[key]):
            _check_keys(value, types[key], f"{where}: {key}")


def as_record(settings: Any) -> dict[str, Any]:
    """All values, as JSON keeps them."""
    # `asdict` looks defaults up too; of settings that were read, msgspec itself writes only what the file gave.
    record: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(asdict(settings)))
    return record

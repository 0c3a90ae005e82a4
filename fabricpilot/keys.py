"""CURVE key files: making and reading them.

A key pair is two small text files (the ZPL form that ZeroMQ's own tools read): NAME.key with the public key, and
NAME.key_secret with both. Central knows its hosts by a folder of their public files; the name of such a file is the
name of the host, so the key is the identity. Secret files are 0600 from the moment they exist.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import zmq

from fabricpilot.errors import FabricpilotError, UsageError

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELD = re.compile(r'^\s*(public-key|secret-key)\s*=\s*"([^"\s]{40})"\s*$', re.MULTILINE)  # z85: 40 characters
_MAX_FILE_BYTES = 4096
_HOW = "make keys with `fabricpilot central keys`"


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in Z85 (RFC 32 of ZeroMQ), 40 characters each."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class PlannedKey:
    """One key pair that `write_pairs` would make: its name and its two files."""

    name: str
    public_file: Path
    secret_file: Path

    @property
    def exists(self) -> bool:
        """Whether one of the files is there already."""
        return self.public_file.exists() or self.secret_file.exists()


def check_host_name(name: str) -> None:
    """Refuse names that cannot be a file name and an identity.

    Raises:
        UsageError: anything but 1 to 128 letters, digits, dots, dashes and underscores.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"host name '{name}' is not usable; use 1 to 128 letters, digits, '.', '-' and '_', no '.' or '-' in front"
        )


def plan_pairs(out: Path, hosts: tuple[str, ...]) -> list[PlannedKey]:
    """The key pairs of a site: central's, and one in hosts/ per host.

    Raises:
        UsageError: a host name that is no file name, or given twice.
    """
    for name in hosts:
        check_host_name(name)
    twice = sorted({name for name in hosts if hosts.count(name) > 1})
    if twice:
        raise UsageError(f"--host {twice[0]} is given twice")
    return [_planned(out, "central"), *(_planned(out / "hosts", name) for name in hosts)]


def write_pair(planned: PlannedKey) -> None:
    """Make one key pair and write its files, whole or not at all; existing files are replaced.

    Raises:
        FabricpilotError: the folder cannot be made or written.
    """
    public, secret = zmq.curve_keypair()
    head = f"# CURVE key of fabricpilot '{planned.name}'"
    body = f'curve\n    public-key = "{public.decode()}"\n'
    try:
        planned.public_file.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        _write(
            planned.secret_file,
            0o600,
            f'{head}. Secret: only its owner may read it.\n{body}    secret-key = "{secret.decode()}"\n',
        )
        _write(planned.public_file, 0o644, f"{head}. Public.\n{body}")
    except OSError as error:
        raise FabricpilotError(f"cannot write key {error.filename or planned.public_file}: {error.strerror}") from error


def read_public(path: Path, key: str) -> bytes:
    """The public key (Z85) in a key file, public or secret.

    Args:
        path: the file.
        key: the configuration key that names it, for the message.

    Raises:
        UsageError: missing, unreadable or not a key file.
    """
    fields = _fields(path, key)
    if "public-key" not in fields:
        raise UsageError(f"{path} ({key}) holds no public key; {_HOW}")
    return fields["public-key"]


def read_pair(path: Path, key: str) -> KeyPair:
    """The key pair in a secret key file.

    Raises:
        UsageError: missing, unreadable, not a secret key file, readable by everybody, or its halves do not match.
    """
    fields = _fields(path, key)
    mode = path.stat().st_mode
    if mode & 0o007:
        raise UsageError(f"{path} ({key}) can be read by every user (mode {mode & 0o777:04o}); run: chmod 0600 {path}")
    if fields.keys() != {"public-key", "secret-key"}:
        raise UsageError(f"{path} ({key}) holds no secret key; give the {SECRET_SUFFIX} file, or {_HOW}")
    pair = KeyPair(fields["public-key"], fields["secret-key"])
    try:
        matches = zmq.curve_public(pair.secret) == pair.public
    except zmq.ZMQError:
        matches = False
    if not matches:
        raise UsageError(f"{path} ({key}): public and secret key do not belong together; {_HOW}")
    return pair


def _planned(folder: Path, name: str) -> PlannedKey:
    return PlannedKey(name, folder / (name + PUBLIC_SUFFIX), folder / (name + SECRET_SUFFIX))


def _fields(path: Path, key: str) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace")
    except FileNotFoundError as error:
        raise UsageError(f"key file {path} ({key}) does not exist; {_HOW}") from error
    except OSError as error:
        raise UsageError(f"cannot read key file {path} ({key}): {error.strerror}") from error
    fields = {name: value.encode() for name, value in _FIELD.findall(text)}
    if not fields:
        raise UsageError(f"{path} ({key}) is not a CURVE key file; {_HOW}")
    return fields


def _write(path: Path, mode: int, text: str) -> None:
    """Write a file that is never there in part, nor ever readable by more than `mode` says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

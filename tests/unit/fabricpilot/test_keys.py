"""Key files: private from the start, read with clear errors."""

import os
import stat

import pytest
import zmq
import zmq.auth

from fabricpilot.endpoints import is_loopback, split_endpoint
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.keys import check_host_name, plan_pairs, read_pair, read_public, write_pair


@pytest.fixture
def made(tmp_path):
    planned = plan_pairs(tmp_path / "keys", ("h1",))
    for pair in planned:
        write_pair(pair)
    return planned


def test_pairs_are_written_where_they_belong(made, tmp_path):
    central, host = made
    assert central.secret_file == tmp_path / "keys" / "central.key_secret"
    assert host.public_file == tmp_path / "keys" / "hosts" / "h1.key"
    for planned in made:
        pair = read_pair(planned.secret_file, "link.key")
        assert read_public(planned.public_file, "link.central_key") == pair.public
        assert zmq.curve_public(pair.secret) == pair.public
        assert stat.S_IMODE(planned.secret_file.stat().st_mode) == 0o600
        assert pair.secret not in planned.public_file.read_bytes()
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["central.key", "central.key_secret", "hosts"]


def test_zeromqs_own_reader_understands_them(made):
    pair = read_pair(made[0].secret_file, "link.key")
    assert zmq.auth.load_certificate(made[0].secret_file) == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(made[0].public_file) == (pair.public, None)


def test_a_lax_umask_does_not_matter(tmp_path):
    before = os.umask(0)
    try:
        (planned,) = plan_pairs(tmp_path, ())
        write_pair(planned)
    finally:
        os.umask(before)
    assert stat.S_IMODE(planned.secret_file.stat().st_mode) == 0o600


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UsageError, match=r"nothere \(link\.key\) does not exist.*fabricpilot central keys") as caught:
        read_pair(tmp_path / "nothere", "link.key")
    assert "\n" not in str(caught.value)


def test_a_secret_that_everybody_can_read_is_refused(made):
    made[0].secret_file.chmod(0o644)
    with pytest.raises(UsageError, match=r"every user \(mode 0644\); run: chmod 0600"):
        read_pair(made[0].secret_file, "link.key")
    made[0].secret_file.chmod(0o640)  # a service's group may read it
    read_pair(made[0].secret_file, "link.key")


def test_the_public_file_is_no_pair(made):
    made[0].public_file.chmod(0o600)
    with pytest.raises(UsageError, match="holds no secret key"):
        read_pair(made[0].public_file, "link.key")


def test_halves_that_do_not_match(made):
    mine, other = (read_pair(planned.secret_file, "link.key") for planned in made)
    text = made[0].secret_file.read_text().replace(mine.secret.decode(), other.secret.decode())
    made[0].secret_file.write_text(text)
    with pytest.raises(UsageError, match="do not belong together"):
        read_pair(made[0].secret_file, "link.key")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b'public-key = "short"', b"x" * 100_000])
def test_other_files_are_no_keys(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    path.chmod(0o600)
    for read in (read_pair, read_public):
        with pytest.raises(UsageError, match="not a CURVE key file"):
            read(path, "link.key")


def test_a_folder_is_no_key(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read key file .*directory"):
        read_public(tmp_path, "link.central_key")


@pytest.mark.parametrize("name", ["", "../h1", "a/b", ".hidden", "-x", "a b", "ä", "x" * 129, "a\n"])
def test_names_that_are_no_file_names(name, tmp_path):
    with pytest.raises(UsageError, match="host name"):
        check_host_name(name)
    with pytest.raises(UsageError, match="host name"):
        plan_pairs(tmp_path, (name,))


def test_a_host_named_twice(tmp_path):
    with pytest.raises(UsageError, match="h1 is given twice"):
        plan_pairs(tmp_path, ("h1", "h2", "h1"))


def test_nowhere_to_write():
    (planned,) = plan_pairs(__import__("pathlib").Path("/proc/nothing"), ())
    with pytest.raises(FabricpilotError, match="cannot write key"):
        write_pair(planned)


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.8.7:1", True),
        ("tcp://[::1]:5555", True),
        ("tcp://localhost:5555", True),
        ("ipc:///run/x", True),
        ("inproc://x", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://10.0.0.1:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://127.0.0.1.example.org:5555", False),
        ("tcp://localhost.example.org:5555", False),
    ],
)
def test_what_is_loopback(endpoint, local):
    assert is_loopback(endpoint) is local
    split_endpoint(endpoint, "link.endpoint")

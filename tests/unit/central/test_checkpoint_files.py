"""Checkpoint files under fire: flipped bits, lost ends, and a writer that is killed in the middle."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from central.training import checkpoint
from fabricpilot.errors import UsageError

TREE = {"a": np.arange(200.0), "t": torch.ones(10, 10), "l": [1, None, "x", {"k": 2.5}]}


def same(one):
    return (
        set(one) == set(TREE)
        and np.array_equal(one["a"], TREE["a"])
        and torch.equal(one["t"], TREE["t"])
        and one["l"] == TREE["l"]
    )


def test_a_flipped_bit_is_told_or_was_of_no_meaning(tmp_path):
    path = tmp_path / "c.npz"
    checkpoint.save(path, TREE)
    whole = path.read_bytes()
    random = np.random.default_rng(2)
    refused = 0
    for _ in range(1500):
        torn = bytearray(whole)
        bit = int(random.integers(len(whole) * 8))
        torn[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(torn)
        try:
            assert same(checkpoint.load(path))
        except UsageError:
            refused += 1
    assert refused > 1300


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "c.npz"
    checkpoint.save(path, TREE)
    whole = path.read_bytes()
    for end in np.random.default_rng(3).integers(0, len(whole), 100):
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError, match="no checkpoint"):
            checkpoint.load(path)


def test_a_killed_writer_leaves_a_whole_file_and_no_heap_of_others(tmp_path):
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"n": -1, "a": np.zeros(100_000)})
    random = np.random.default_rng(4)
    for _ in range(12):
        writer = os.fork()
        if writer == 0:
            for n in range(10**6):
                checkpoint.save(path, {"n": n, "a": np.full(100_000, float(n))})
            os._exit(0)
        time.sleep(float(random.uniform(0.01, 0.1)))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        found = checkpoint.load(path)
        assert (found["a"] == max(found["n"], 0)).all()
    assert len(list(tmp_path.iterdir())) <= 2

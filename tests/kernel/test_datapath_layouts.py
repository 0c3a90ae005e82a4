"""The structs in C and their numpy dtypes agree, told by the BTF that the kernel keeps with each pinned map."""

import json

import pytest
from datapath_kit import run

from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE
from hostagent.datapath.flow_table import BUCKET_DTYPE, COPIES_DTYPE, FLOW_DTYPE, HASH_DTYPE, TAGS_DTYPE
from hostagent.datapath.layout import (
    COUNTERS_DTYPE,
    FINISHED_DTYPE,
    SEND_BUFFER_DTYPE,
    SETTINGS_DTYPE,
    UNTRACKED_REASONS,
)
from hostagent.datapath.rules import PREFIX_KEY_DTYPE, RULE_SET_DTYPE
from hostagent.datapath.source import EBPF_DIR
from hostagent.datapath.steering import ROUTE_DTYPE, STEERING_DTYPE


def btf_layout(pin, struct: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Size of a struct in a pinned map's BTF, and (offset, size) of each member."""
    types = {
        t["id"]: t for t in json.loads(run("bpftool", "-j", "btf", "dump", "map", "pinned", str(pin), "all"))["types"]
    }

    def size(type_id: int) -> int:
        kind = types[type_id]
        if kind["kind"] == "ARRAY":
            return kind["nr_elems"] * size(kind["type_id"])
        return kind["size"] if "size" in kind else size(kind["type_id"])

    found = next(t for t in types.values() if t["kind"] == "STRUCT" and t["name"] == struct)
    return found["size"], {m["name"]: (m["bits_offset"] // 8, size(m["type_id"])) for m in found["members"]}


@pytest.mark.parametrize(
    ("map_name", "struct", "dtype"),
    [
        ("flows", "flow_key", FLOW_KEY_DTYPE),
        ("flows", "flow_state", FLOW_STATE_DTYPE),
        ("flows", "flow", FLOW_DTYPE),
        ("flows", "flow_bucket", BUCKET_DTYPE),
        ("flow_tags", "flow_tags", TAGS_DTYPE),
        ("flow_hash", "flow_hash", HASH_DTYPE),
        ("flow_copies", "flow_copies", COPIES_DTYPE),
        ("slots", "settings", SETTINGS_DTYPE),
        ("counters", "counters", COUNTERS_DTYPE),
        ("steering", "steering", STEERING_DTYPE),
        ("prefixes", "prefix_key", PREFIX_KEY_DTYPE),
        ("rule_sets", "rule_set", RULE_SET_DTYPE),
        ("routes", "route", ROUTE_DTYPE),
        ("finished", "finished_messages", FINISHED_DTYPE),
        ("send_buffers", "send_buffer", SEND_BUFFER_DTYPE),
    ],
)
def test_struct_and_dtype_agree(kernel_sender, map_name, struct, dtype):
    pin = kernel_sender.pin_dir / map_name
    size, members = btf_layout(pin, struct)
    assert size == dtype.itemsize
    assert members == {name: (offset, field.itemsize) for name, (field, offset, *_) in dtype.fields.items()}


def test_reasons_are_in_the_order_of_the_enum():
    lines = (
        (EBPF_DIR / "counters.h").read_text().partition("enum untracked_reason {")[2].partition("};")[0].splitlines()
    )
    names = [line.split(",")[0].strip().lower() for line in lines if line.strip()]
    assert names == ["parsed", *UNTRACKED_REASONS[1:], "untracked_reasons"]

"""What tells whether another version's maps may be kept: fingerprints of layouts, and which maps belong together."""

import shutil

import pytest

from hostagent.datapath.pinned_names import MAPS
from hostagent.datapath.pins import kept_maps
from hostagent.datapath.source import EBPF_DIR, map_layouts


def changed(tmp_path, name, before, after):
    directory = tmp_path / "ebpf"
    shutil.copytree(EBPF_DIR, directory)
    text = (directory / name).read_text()
    assert before in text
    (directory / name).write_text(text.replace(before, after, 1))
    now, then = map_layouts(directory), map_layouts()
    return {map_name for map_name in then if now.get(map_name) != then[map_name]}


def test_every_pinned_map_has_a_fingerprint_and_no_two_the_same():
    layouts = map_layouts()
    assert set(MAPS) <= set(layouts)
    assert len(set(layouts.values())) == len(layouts)
    assert all(len(held) == 32 for held in layouts.values())


@pytest.mark.parametrize(
    ("name", "before", "after", "differ"),
    [
        ("egress.c", "int reason;", "int reason = 0;", set()),
        ("flow.h", "pragma once", "pragma once\n/* a comment */", set()),
        ("flow.h", "struct flow_state {", "struct   flow_state\t{ // another comment", set()),
        ("flow.h", "__u64 attained_bytes;", "__u32 attained_bytes;", {"flows", "flow_copies", "at_work"}),
        ("flow.h", "__u64 attained_bytes;", "__u64 sent_bytes;", {"flows", "flow_copies", "at_work"}),
        ("counters.h", "struct counters {", "struct counters {\n\t__u64 another;", {"counters"}),
        ("level.h", "__u8 dscp[MAX_LEVELS];", "__u16 dscp[MAX_LEVELS];", {"slots"}),
        ("rules.h", "#define MAX_RULES 64 ", "#define MAX_RULES 32 ", {"rule_sets"}),
        ("rules.h", "struct rule_outcome {", "struct rule_outcome {\n\t__u32 another;", {"rule_sets"}),
    ],
)
def test_a_change_shows_in_the_maps_it_concerns_and_no_other(tmp_path, name, before, after, differ):
    assert changed(tmp_path, name, before, after) == differ


@pytest.mark.parametrize(
    ("agreeing", "kept"),
    [
        (set(MAPS), set(MAPS)),
        (set(MAPS) - {"counters"}, set(MAPS) - {"counters"}),
        (
            set(MAPS) - {"flows"},
            set(MAPS) - {"flows", "flow_tags", "flow_hash", "counters"},
        ),  # counted from one table, read against another
        (set(MAPS) - {"slots"}, set(MAPS) - {"slots", "active"}),
        (
            set(MAPS) - {"rule_sets"},  # a flow's outcome would be taken for that of new rules of the same generation
            set(MAPS)
            - {"rule_sets", "prefixes", "steering", "verdicts", "flows", "flow_tags", "flow_hash", "counters"},
        ),
        ({"routes"}, {"routes"}),
        (set(), set()),
    ],
    ids=["all", "counters", "flows", "slots", "rules", "only routes", "none"],
)
def test_maps_that_belong_together_are_kept_together(agreeing, kept):
    assert kept_maps(agreeing) == kept

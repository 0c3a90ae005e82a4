"""The plan is pure: what is chosen, why, which priority reaches which level; and words agree with bytes."""

import re
import struct

import pytest

from fabricpilot.errors import KernelError, UsageError
from hostagent.qdisc.objects import (
    HANDLE,
    ROOT,
    TcObject,
    attribute,
    attributes,
    burst_bytes,
    handle_text,
    replayable,
    same_tree,
    signature,
)
from hostagent.qdisc.plan import KERNEL_OPTION, choose_kind, fold, make_plan, rate_text
from hostagent.qdisc.snapshot import differences, parents_first

EVERYTHING = frozenset({"prio", "htb", "pfifo_fast", "fq_codel", "bfifo", "u32"})
REFERENCE = frozenset({"htb", "pfifo_fast", "bfifo", "u32"})  # a kernel without prio and fq_codel
BARE = frozenset({"pfifo_fast"})
RATE = 10**10


def test_auto_prefers_prio_then_htb_then_pfifo_fast():
    assert choose_kind("auto", EVERYTHING) == "prio"
    assert choose_kind("auto", REFERENCE) == "htb"
    assert choose_kind("auto", BARE) == "pfifo_fast"
    assert choose_kind("none", frozenset()) == "none"


@pytest.mark.parametrize("kind", ["prio", "htb"])
def test_a_missing_kind_names_the_kernel_option(kind):
    with pytest.raises(KernelError, match=KERNEL_OPTION[kind]):
        make_plan(kind, BARE, 4, rate_bps=RATE)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="auto, prio, htb, pfifo_fast or none"):
        make_plan("cake", EVERYTHING, 4)


@pytest.mark.parametrize("levels", range(2, 9))
@pytest.mark.parametrize("supported", [EVERYTHING, REFERENCE])
def test_each_level_has_a_class_a_queue_and_a_priority(supported, levels):
    plan = make_plan("auto", supported, levels, rate_bps=RATE)
    assert plan.priority == tuple(HANDLE | (level + 1) for level in range(levels))
    leaves = [o for o in plan.objects if o.noun == "qdisc" and o.parent != ROOT]
    assert [o.parent for o in leaves] == list(plan.priority)
    assert len({o.handle for o in plan.objects if o.noun != "filter"}) == len(
        [o for o in plan.objects if o.noun != "filter"]
    )
    if plan.kind == "htb":
        classes = [o for o in plan.objects if o.noun == "class"]
        assert [o.handle for o in classes[1:]] == list(plan.priority)
        assert [int(re.search(r"prio (\d)$", o.words)[1]) for o in classes[1:]] == list(range(levels))
        assert all(f"ceil {RATE}bit" in o.words for o in classes)


@pytest.mark.parametrize("levels", range(2, 9))
def test_pfifo_fast_folds_in_order(levels):
    plan = make_plan("auto", BARE, levels)
    priomap = (1, 2, 2, 2, 1, 2, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)  # net/sched/sch_generic.c, prio2band
    bands = tuple(priomap[priority] for priority in plan.priority)
    assert bands == fold(levels)
    assert list(bands) == sorted(bands)
    assert bands[0] == 0 < bands[1]
    assert "3 bands" in plan.why
    assert KERNEL_OPTION["prio"] in plan.why
    assert KERNEL_OPTION["htb"] in plan.why


def test_none_is_the_same_for_every_level():
    plan = make_plan("none", frozenset(), 5)
    assert (plan.priority, plan.objects) == ((0,) * 5, ())


def test_the_reason_is_one_line_and_says_what_is_missing():
    for supported in (EVERYTHING, REFERENCE, BARE):
        why = make_plan("auto", supported, 4, rate_bps=RATE, rate_source="what eth0 reports").why
        assert "\n" not in why
        assert ("what eth0 reports" in why) == (supported is REFERENCE)
        assert ("CONFIG_NET_SCH_FQ_CODEL" in why) == (supported is REFERENCE)


def test_htb_needs_a_usable_rate():
    with pytest.raises(UsageError, match=r'link_rate = "10Gbit"'):
        make_plan("htb", REFERENCE, 4)
    with pytest.raises(UsageError, match="at least 1Mbit"):
        make_plan("htb", REFERENCE, 4, rate_bps=1000)


def test_k_is_checked():
    with pytest.raises(UsageError, match="2 to 8"):
        make_plan("prio", EVERYTHING, 9)


def test_without_u32_unmarked_traffic_is_last_and_said_so():
    for kind in ("prio", "htb"):
        plan = make_plan(kind, EVERYTHING - {"u32"}, 4, rate_bps=RATE)
        assert not [o for o in plan.objects if o.noun == "filter"]
        assert KERNEL_OPTION["u32"] in plan.why
        root = plan.objects[0].words
        assert root == ("bands 4 priomap 3 3 3 3 3 3 3 0 3 3 3 3 3 3 3 3" if kind == "prio" else "default 4")


def test_commands_read_like_tc():
    commands = make_plan("auto", REFERENCE, 2, rate_bps=10**8).commands("eth0")
    assert commands[0] == "tc qdisc replace dev eth0 root handle fab: htb default 1"
    assert commands[3] == (
        "tc class add dev eth0 parent fab:10 classid fab:2 htb rate 8000bit ceil 100000000bit "
        "burst 1600 cburst 12500 quantum 60000 prio 1"
    )
    assert commands[5] == "tc qdisc add dev eth0 parent fab:2 handle fa2: bfifo limit 33554432"
    assert commands[7] == "tc filter add dev eth0 parent fab: protocol ip prio 1 u32 match u32 0 0 flowid fab:2"


def test_rates_beyond_32_bits_of_bytes():
    """Rates from 2**32 bytes/s on (34 Gbit/s) need the 64-bit attributes."""
    trunk = make_plan("htb", REFERENCE, 2, rate_bps=10**11).objects[1]
    fields = dict(attributes(trunk.options))
    assert struct.unpack("=Q", fields[6]) == struct.unpack("=Q", fields[7]) == (10**11 // 8,)
    assert struct.unpack_from("=I", fields[1], 8) == (2**32 - 1,)


def test_a_bucket_is_a_millisecond():
    assert burst_bytes(10**8) == 12_500
    assert rate_text(10**8) == "100 Mbit/s"
    assert rate_text(25 * 10**8) == "2.5 Gbit/s"


def test_attributes_round_trip():
    given = [(1, b""), (2, b"abc"), (8, b"12345678")]
    assert list(attributes(b"".join(attribute(n, v) for n, v in given))) == given
    assert list(attributes(b"\x03\x00\x01\x00")) == []  # a length shorter than its own header


def test_the_order_of_filters_matters():
    objects = make_plan("prio", EVERYTHING, 4).objects
    swapped = (*objects[:-2], objects[-1], objects[-2])
    assert same_tree(objects, objects)
    assert same_tree((objects[1], objects[0], *objects[2:]), objects)
    assert not same_tree(swapped, objects)
    assert not same_tree(objects[:-1], objects)


def test_a_different_rate_is_a_different_tree():
    trees = [make_plan("htb", REFERENCE, 4, rate_bps=rate).objects for rate in (10**8, 2 * 10**8)]
    assert not same_tree(*trees)
    assert signature(trees[0][0]) == signature(trees[1][0])


def test_parents_come_first():
    plan = make_plan("htb", EVERYTHING, 8, rate_bps=RATE)
    shuffled = tuple(reversed([o for o in plan.objects if o.noun != "filter"]))
    handles = [ROOT]
    for obj in parents_first(shuffled):
        assert obj.parent in handles
        handles.append(obj.handle)
    bands = make_plan("prio", EVERYTHING, 3).objects
    assert parents_first(tuple(reversed(bands)))[0].parent == ROOT


def test_counters_are_no_difference():
    pcnt, flags = (9, bytes(24)), (11, struct.pack("=I", 8))
    shown = TcObject("filter", "u32", 0x80000800, HANDLE, attribute(*pcnt) + attribute(*flags))
    later = TcObject("filter", "u32", 0x80000800, HANDLE, attribute(9, b"\1" * 24) + attribute(*flags))
    assert shown != later
    assert differences((shown,), (later,)) == []
    assert replayable(shown).options == attribute(11, bytes(4))
    other = TcObject("qdisc", "bfifo", 0x10000, ROOT, bytes(4))
    assert differences((shown, other), (later,)) == ["qdisc bfifo 1:"]


@pytest.mark.parametrize(("handle", "text"), [(HANDLE, "fab:"), (HANDLE | 1, "fab:1"), (0x10, "0:10")])
def test_handles_as_tc_writes_them(handle, text):
    assert handle_text(handle) == text

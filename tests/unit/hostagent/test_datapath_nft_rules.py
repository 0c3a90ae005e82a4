"""The netfilter rules as data, and the arithmetic of what conntrack counts; no kernel, no libnftables."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.config import DatapathSection
from fabricpilot.errors import UsageError
from fabricpilot.levels import MAX_THRESHOLD_BYTES, Thresholds
from hostagent import datapath as backends
from hostagent.datapath.base import CAPABILITIES, Settings
from hostagent.datapath.ebpf import kernel_capabilities
from hostagent.datapath.fake import FakeDatapath
from hostagent.datapath.nft_rules import (
    COUNTERS,
    VERSION,
    State,
    install,
    parse_state,
    parse_sysctls,
    prepare,
    tc_handle,
)
from hostagent.datapath.nftables import NftablesDatapath
from hostagent.datapath.payload_estimate import TCP, UDP, conntrack_thresholds, payload_bytes

SYSCTLS = {"net.netfilter.nf_conntrack_acct": 0, "net.netfilter.nf_conntrack_timestamp": 1}
COMMENT_BYTES = 128  # what nftables keeps of a comment


@st.composite
def any_settings(draw):
    thresholds = sorted(draw(st.sets(st.integers(1, MAX_THRESHOLD_BYTES), min_size=1, max_size=7)))
    levels = len(thresholds) + 1
    return Settings(
        thresholds=Thresholds.of(thresholds),
        dscp=tuple(draw(st.permutations(range(64)))[:levels]),
        priority=tuple(draw(st.lists(st.integers(0, 2**32 - 1), min_size=levels, max_size=levels))),
        respect_dscp=draw(st.booleans()),
        observe=draw(st.booleans()),
    )


@st.composite
def any_state(draw):
    return State(
        interfaces=tuple(
            sorted(draw(st.lists(st.from_regex(r"[a-z][a-z0-9.@-]{0,14}", fullmatch=True), max_size=4, unique=True)))
        ),
        settings=draw(st.none() | any_settings()),
        sysctls=draw(st.sampled_from([{}, SYSCTLS])),
        since_ns=draw(st.integers(0, 2**63)),
        flow_entries=draw(st.integers(1024, 16_777_216)),
        flow_timeout_s=draw(st.integers(121, 86_520)),
    )


def rules_of(state):
    """Rules by chain, in order."""
    rules = {}
    for command in install(state):
        if "rule" in command.get("add", {}):
            rule = command["add"]["rule"]
            rules.setdefault(rule["chain"], []).append(rule)
    return rules


def comments_of(state):
    return [rule["comment"] for rule in rules_of(state)["state"]]


@given(any_state())
def test_state_is_written_and_read_back(state):
    comments = comments_of(state)
    assert all(len(text) < COMMENT_BYTES for text in comments)
    assert parse_state(comments) == parse_state(comments[::-1]) == state
    assert parse_sysctls(comments) == state.sysctls


def test_another_versions_state_is_not_read_but_its_sysctls_are():
    comments = [text.replace(f"version {VERSION}", "version 99") for text in comments_of(State(sysctls=SYSCTLS))]
    assert parse_state(comments) is None
    assert parse_state([]) is None
    assert parse_sysctls(comments) == SYSCTLS


@given(any_state())
def test_every_rule_leads_somewhere_and_nothing_stands_unreached(state):
    rules = rules_of(state)
    targets = set()

    def visit(item):
        if isinstance(item, dict):
            for key, value in item.items():
                if key in ("goto", "jump"):
                    targets.add(value["target"])
                visit(value)
        elif isinstance(item, list):
            for part in item:
                visit(part)

    for chain_rules in rules.values():
        for rule in chain_rules:
            visit(rule["expr"])
    assert targets == rules.keys() - {"egress", "state"}
    kept = {c["add"]["chain"]["name"] for c in install(state) if "chain" in c.get("add", {})}
    removed = {c["delete"]["chain"]["name"] for c in install(state) if "delete" in c}
    assert kept - removed == set(rules)
    assert all(name in COUNTERS for name in named_counters(rules))


def named_counters(rules):
    for chain_rules in rules.values():
        for rule in chain_rules:
            yield from (part["counter"] for part in rule["expr"] if "counter" in part)


def test_the_flow_sets_have_the_configured_size_and_only_our_table_is_named():
    text = prepare(State(flow_entries=12_345), afresh=True)
    assert text.count("size 12345;") == 3
    assert all(" inet fabricpilot" in line for line in text.splitlines())
    assert '"table": "filter"' not in json.dumps(install(State(("a",), None)))


@pytest.mark.parametrize(
    ("priority", "handle"), [(0, "0:0"), (7, "0:7"), (0x0FAB0001, "fab:1"), (2**32 - 1, "ffff:ffff")]
)
def test_priorities_in_the_form_nftables_takes(priority, handle):
    assert tc_handle(priority) == handle


@given(any_settings())
def test_translated_thresholds_ascend_above_the_given_ones(settings):
    translated = conntrack_thresholds(settings)
    assert all(low < high for low, high in pairwise(translated))
    assert all(given < count < 2**63 for given, count in zip(settings.thresholds.bytes, translated, strict=True))


@given(st.integers(1, 10**9), st.sampled_from([1448, 700, 7240, 65160]))
def test_a_flow_sinks_within_a_packet_and_the_stated_share(threshold, payload):
    """Packet by packet: handshake, then data of one size; the packet that is compared first with a higher count."""
    settings = Settings(Thresholds((threshold,)), (1, 2), (0, 0))
    [translated] = conntrack_thresholds(settings)
    before = -(-(translated - 112) // (payload + 52)) - 1  # data packets before the first one that counts `translated`
    share = 52 / min(payload, 1448) - 52 / max(payload, 1448)
    assert abs(before * payload - threshold) <= payload + 1500 + share * threshold * 1.05 + 1


@given(st.integers(0, 10**12), st.integers(1, 10**6), st.sampled_from([TCP, UDP]), st.booleans())
def test_payload_is_exact_for_linux_headers(payload, packets, protocol, ipv6):
    headers = (40 if ipv6 else 20) + (32 if protocol == TCP else 8)
    ip_bytes = payload + packets * headers + (8 if protocol == TCP else 0)
    found = payload_bytes(
        np.array([ip_bytes], np.uint64),
        np.array([packets], np.uint64),
        np.array([protocol], np.uint8),
        np.array([ipv6]),
        np.array([True]),
    )
    assert found.tolist() == [payload]


def test_payload_is_never_negative():
    none = payload_bytes(
        np.array([40], np.uint64),
        np.array([1], np.uint64),
        np.array([TCP], np.uint8),
        np.array([False]),
        np.array([True]),
    )
    assert none.tolist() == [0]


@pytest.mark.parametrize("can", [FakeDatapath.capabilities, kernel_capabilities(), NftablesDatapath.capabilities])
def test_capabilities_are_of_the_vocabulary(can):
    assert can <= CAPABILITIES.keys()


def test_what_a_data_path_cannot_do_is_refused_with_its_name(monkeypatch):
    monkeypatch.setattr(backends, "_NEEDS", (("flow_entries", 4096, "adopt"),))
    section = DatapathSection(backend="fake", flow_entries=4096)
    with pytest.raises(UsageError, match=r"the fake data path cannot do .*flow_entries = 4096 needs adopt"):
        backends.open_datapath(section)
    backends.open_datapath(DatapathSection(backend="fake", flow_entries=4097)).close()


def test_a_share_of_new_flows_is_refused_only_if_it_was_asked_for():
    """It has a default, which data paths without shares pass over."""
    backends.open_datapath(DatapathSection(backend="fake")).close()
    with pytest.raises(UsageError, match=r"new_flows_per_s = 1000 needs share"):
        backends.open_datapath(DatapathSection(backend="fake", new_flows_per_s=1000))


def test_auto_goes_without_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_NEEDS", (("flow_entries", 4096, "adopt"),))
    monkeypatch.setattr(backends, "_choose", lambda section: "fake")
    backends.open_datapath(DatapathSection(flow_entries=4096)).close()
    assert "the fake data path goes without: datapath.flow_entries = 4096" in caplog.text

"""The oracle: right captures pass, every kind of wrong one is seen, and what cannot be known is not judged."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.levels import Thresholds
from testbed.capture.oracle import InForce, Verdict, check
from testbed.capture.packets import FlowKey, SeenPacket

DSCP = (32, 24, 16, 8)
THRESHOLDS = Thresholds((3_000, 10_000, 50_000))
FLOW = FlowKey("10.10.0.10", "10.10.0.1", 40_000, 5_001)
ALWAYS = {FLOW.source: [InForce(0, 0, THRESHOLDS)]}
MSS = 1448
_FIRST = 2**32 - 5_000  # sequence numbers wrap on the way


def sent(
    payloads: Sequence[int],
    thresholds: Thresholds = THRESHOLDS,
    *,
    first_id: int = 100,
    flow: FlowKey = FLOW,
    begin_ns: int = 1_000,
    step_ns: int = 10,
) -> list[SeenPacket]:
    """What a correct host sends: a SYN, then packets of these payloads, 10 ns apart."""
    packets = [SeenPacket(begin_ns, flow, first_id % 65536, 0, True, DSCP[0], sequence=_FIRST)]
    attained = 0
    for number, payload in enumerate(payloads, 1):
        level = thresholds.level_of(attained) if payload else 0
        ip_id = (first_id + number) % 65536
        at_ns, sequence = begin_ns + number * step_ns, (_FIRST + attained) % 2**32
        packets.append(SeenPacket(at_ns, flow, ip_id, payload, False, DSCP[level], sequence=sequence))
        attained += payload
    return packets


def remark(packet: SeenPacket, dscp: int) -> SeenPacket:
    return packet._replace(dscp=dscp)


def judged(packets: list[SeenPacket], history: dict[str, list[InForce]] = ALWAYS) -> Verdict:
    return check(packets, history, DSCP)


def test_a_correct_flow_passes_through_all_levels() -> None:
    verdict = judged(sent([MSS] * 60))
    assert (verdict.checked, verdict.correct, verdict.flows) == (61, 61, 1)
    assert verdict.by_dscp == {32: 1 + 3, 24: 4, 16: 28, 8: 25}  # SYN and 3 packets up to 3000 bytes, and so on
    assert verdict.wrong == []


def test_level_is_that_of_the_bytes_before_the_packet() -> None:
    packets = sent([3_000, 1])  # the first packet reaches the threshold but was sent below it
    assert [p.dscp for p in packets] == [32, 32, 24]
    assert judged(packets).correct == 3
    assert judged([packets[0], remark(packets[1], 24), packets[2]]).correct == 2


@pytest.mark.parametrize("wrong_dscp", [0, 24, 8, 63])
def test_one_wrong_packet_is_seen(wrong_dscp: int) -> None:
    packets = sent([MSS] * 60)
    packets[2] = remark(packets[2], wrong_dscp)
    verdict = judged(packets)
    assert (verdict.checked, verdict.correct) == (61, 60)
    assert verdict.wrong[0].packet == packets[2]
    assert (verdict.wrong[0].attained_bytes, verdict.wrong[0].expected) == (MSS, (32,))


def test_a_host_that_never_tags_is_wrong_throughout() -> None:
    verdict = judged([remark(p, 0) for p in sent([MSS] * 60)])
    assert (verdict.checked, verdict.correct) == (61, 0)
    assert len(verdict.wrong) == 10  # only the first few are kept


def test_packets_without_payload_travel_at_the_top_and_count_no_bytes() -> None:
    packets = sent([MSS] * 60 + [0])
    assert packets[-1].dscp == 32
    assert judged(packets).correct == 62
    assert judged([*packets[:-1], remark(packets[-1], 8)]).correct == 61


@pytest.mark.parametrize(("segments", "dscp"), [(2, 32), (3, 24), (9, 16)])
def test_what_is_sent_again_is_on_the_level_of_its_message_and_counts_no_more(segments: int, dscp: int) -> None:
    """2, 3 and 9 segments are 2,896, 4,344 and 13,032 bytes; three times all of it again, then a new one."""
    packets = sent([MSS] * (4 * segments + 1))
    sequences = [packet.sequence for packet in packets[1 : segments + 2]]
    again = [
        remark(packet, dscp)._replace(sequence=sequences[number % segments])
        for number, packet in enumerate(packets[segments + 1 : -1])
    ]
    new = remark(packets[-1], dscp)._replace(sequence=sequences[-1])
    verdict = judged([*packets[: segments + 1], *again, new])
    assert verdict.wrong == []
    assert verdict.correct == 4 * segments + 2
    assert judged([*packets[: segments + 1], *again[:-1], remark(again[-1], 63), new]).wrong != []


def test_packets_handed_over_by_two_cpus_are_put_in_order() -> None:
    packets = sent([MSS] * 60)
    packets[3], packets[4] = packets[4], packets[3]  # around the threshold of 3000 bytes
    verdict = judged(packets)
    assert (verdict.checked, verdict.correct, verdict.incomplete_flows) == (61, 61, 0)


def test_identification_wraps() -> None:
    verdict = judged(sent([MSS] * 60, first_id=65_530))
    assert (verdict.checked, verdict.correct, verdict.incomplete_flows) == (61, 61, 0)


def test_from_a_missing_packet_on_a_flow_is_left_out() -> None:
    packets = sent([MSS] * 60)
    verdict = judged(packets[:10] + packets[11:])
    assert (verdict.checked, verdict.correct) == (10, 10)
    assert verdict.incomplete_flows == 1


def test_an_answer_from_no_socket_stands_outside_the_count() -> None:
    packets = sent([MSS] * 10)
    reset = SeenPacket(5_000, FLOW, 0, 0, False, 32)
    verdict = judged([*packets[:5], reset, *packets[5:]])
    assert (verdict.checked, verdict.correct, verdict.incomplete_flows) == (12, 12, 0)


def test_flows_begun_before_the_capture_are_counted_and_not_judged() -> None:
    verdict = judged([remark(p, 0) for p in sent([MSS] * 60)[20:]])
    assert (verdict.checked, verdict.skipped_flows, verdict.skipped_packets) == (0, 1, 41)


def test_ports_used_again_are_another_flow() -> None:
    first = sent([MSS] * 60)
    second = sent([MSS] * 2, first_id=9_000, begin_ns=100_000)
    verdict = judged(first + second)
    assert (verdict.flows, verdict.checked, verdict.correct) == (2, 64, 64)


def test_a_syn_sent_again_is_the_same_flow() -> None:
    packets = sent([0, MSS, MSS])
    packets[1] = packets[1]._replace(syn=True)
    assert judged(packets).flows == 1
    assert judged(packets).correct == 4


def test_without_identification_the_order_of_capture_counts() -> None:
    flow = FlowKey("fd10::a", "fd10::1", 40_000, 5_001)
    packets = [p._replace(flow=flow, ip_id=None) for p in sent([MSS] * 60)]
    verdict = check(packets, {flow.source: [InForce(0, 0, THRESHOLDS)]}, DSCP)
    assert (verdict.checked, verdict.correct) == (61, 61)


class TestThresholdChange:
    """Thresholds go from 3,000 to 1,000 bytes somewhere between 500 and 600 ns."""

    OLD, NEW = THRESHOLDS, Thresholds((1_000, 10_000, 50_000))
    HISTORY = (InForce(0, 0, OLD), InForce(500, 600, NEW))

    def second_packet(self, at_ns: int, dscp: int) -> Verdict:
        """A packet sent after 1,448 bytes: level 0 by the old thresholds, level 1 by the new ones."""
        packets = sent([MSS, MSS], begin_ns=at_ns - 20)
        packets[2] = packets[2]._replace(time_ns=at_ns, dscp=dscp)
        return judged(packets, {FLOW.source: list(self.HISTORY)})

    @pytest.mark.parametrize(("at_ns", "right", "wrong"), [(499, 32, 24), (601, 24, 32)])
    def test_outside_the_interval_only_one_vector_is_right(self, at_ns: int, right: int, wrong: int) -> None:
        assert self.second_packet(at_ns, right).correct == 3
        assert self.second_packet(at_ns, right).at_change == 0
        assert self.second_packet(at_ns, wrong).correct == 2

    @pytest.mark.parametrize("dscp", [32, 24])
    def test_within_it_either_is_right_and_counted(self, dscp: int) -> None:
        verdict = self.second_packet(550, dscp)
        assert (verdict.correct, verdict.at_change) == (3, 1)

    def test_within_it_a_third_is_wrong(self) -> None:
        assert self.second_packet(550, 16).correct == 2

    def test_before_any_thresholds_are_known_nothing_is_judged(self) -> None:
        history = {FLOW.source: [InForce(5_000, 6_000, self.OLD)]}
        assert judged(sent([MSS]), history).checked == 1  # the SYN, which is at the top under any thresholds


@given(
    payloads=st.lists(st.integers(0, MSS), min_size=1, max_size=80),
    cuts=st.lists(st.integers(1, 60_000), min_size=3, max_size=3, unique=True),
    first_id=st.integers(0, 65_535),
)
def test_whatever_a_correct_host_sends_is_right(payloads: list[int], cuts: list[int], first_id: int) -> None:
    thresholds = Thresholds.of(sorted(cuts))
    packets = sent(payloads, thresholds, first_id=first_id)
    verdict = judged(packets, {FLOW.source: [InForce(0, 0, thresholds)]})
    assert verdict.checked == verdict.correct == len(packets)
    assert all(later.time_ns > earlier.time_ns for earlier, later in pairwise(packets))


def ending(packets: list[SeenPacket]) -> list[SeenPacket]:
    """The same, with the FIN on the last."""
    return [*packets[:-1], packets[-1]._replace(fin=True)]


def test_by_bytes_written_a_level_lies_between_what_was_sent_and_what_there_is() -> None:
    packets = ending(sent([MSS] * 10))  # 14,480 bytes: the third level when all is written
    for dscp in (32, 24, 16):
        verdict = check(
            [packets[0], *[remark(p, 16) for p in packets[1:3]], remark(packets[3], dscp), *packets[4:]],
            ALWAYS,
            DSCP,
            written=True,
        )
        assert verdict.wrong == []
    too_low = [packets[0], remark(packets[1], 8), *packets[2:]]
    assert len(check(too_low, ALWAYS, DSCP, written=True).wrong) == 1
    too_high = [*packets[:9], remark(packets[9], 32), *packets[10:]]
    assert len(check(too_high, ALWAYS, DSCP, written=True).wrong) == 1


def test_a_starved_flow_may_have_a_bounded_turn() -> None:
    packets = sent([MSS] * 120)
    late = [p._replace(time_ns=p.time_ns + 600_000_000) for p in packets[60:]]
    turn = [remark(p, 32) for p in late[:46]]  # 46 packets begin within 65,536 bytes
    assert judged([*packets[:60], *turn, *late[46:]]).wrong == []
    assert len(judged([*packets[:60], *turn, *[remark(p, 32) for p in late[46:50]], *late[50:]]).wrong) == 4
    assert judged([*packets[:60], *[remark(p, 32) for p in packets[60:]]]).wrong != []

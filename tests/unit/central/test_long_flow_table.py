"""Long flows as central keeps them: who needs a verdict, who is gone, and what hosts cannot do to each other."""

import numpy as np
import pytest

from central.lrla import table as tables
from central.lrla.flow_set import UNKNOWN_ROUTE, Choice
from central.lrla.process import Round, Scheduler
from central.lrla.table import FlowTable, HostFlows, rack_of
from fabricpilot.config import LongFlowsSection
from fabricpilot.wire import FlowSummary, Verdicts, decode_from_central

SECTION = LongFlowsSection(scheme="least-loaded", ttl_s=10.0)


def flow(port=1, source="10.0.1.1", destination="10.0.2.1", sent=10**7, backlog=0, to=80):
    return FlowSummary(source, destination, port, to, 6, sent, 1000, 3, 0, backlog)


def told(*flows, host="a", routes=(1, 2), whole=False, ended=(), moving=()):
    return HostFlows(host, 4, 10**9, list(routes), whole, list(flows), list(ended), list(moving))


@pytest.fixture
def table():
    return FlowTable(SECTION)


def decide(table, now_s, route=0, priority=0):
    due = table.due(now_s)
    return table.verdicts(due, Choice(np.full(len(due), priority), np.full(len(due), route)), now_s)


def test_a_flow_is_due_at_once_and_again_when_it_is_told_of(table):
    table.update(told(flow()), 0.0)
    assert len(table.due(0.0)) == 1
    (verdict,) = decide(table, 0.0, route=1, priority=1)["a"]
    assert (verdict.level, verdict.route, verdict.ttl_s) == (2, 2, 10.0)
    assert len(table.due(4.0)) == 0
    table.update(told(flow(sent=2 * 10**7)), 4.0)
    assert len(table.due(4.0)) == 1


def test_hosts_are_told_of_changes_and_before_a_verdict_ends(table):
    def told_at(now_s, **choice):
        table.update(told(flow()), now_s)
        return [(v.level, v.route) for v in decide(table, now_s, **choice).get("a", [])]

    assert told_at(0.0) == [(3, 1)]
    assert told_at(1.0) == []
    assert told_at(2.0, route=1) == [(3, 2)]
    assert told_at(3.0, route=1, priority=2) == [(1, 2)]
    assert told_at(7.9, route=1, priority=2) == []
    assert told_at(8.2, route=1, priority=2) == [(1, 2)]


def test_what_a_report_of_all_flows_lacks_is_gone(table):
    table.update(told(flow(1), flow(2)), 0.0)
    table.update(told(flow(2), whole=False), 1.0)
    assert len(table) == 2
    table.update(told(flow(2), whole=True), 2.0)
    assert len(table) == 1
    table.update(told(ended=[flow(2)]), 3.0)
    assert len(table) == 0


def test_a_silent_host_loses_its_flows_with_their_verdicts(table):
    table.update(told(flow()), 0.0)
    table.expire(9.0)
    assert len(table) == 1
    table.expire(11.0)
    assert len(table) == 0


def test_hosts_speak_of_their_own_flows_only(table):
    table.update(told(flow()), 0.0)
    table.update(told(flow(sent=5), host="b", ended=[flow()], whole=True), 1.0)
    assert table.flow_set()[0].attained_bytes.tolist() == [10**7]


@pytest.mark.parametrize(
    "bad", [flow(source="x"), flow(source="fe80::1%eth0/3"), flow(port=70_000), flow(destination=""), flow(to=2**62)]
)
def test_what_is_no_flow_is_left_out(table, bad):
    table.update(told(bad, flow(2)), 0.0)
    assert len(table) == 1


def test_one_host_cannot_fill_the_table(table, monkeypatch):
    monkeypatch.setattr(tables, "MAX_HOST_FLOWS", 3)
    table.update(told(*(flow(port) for port in range(10))), 0.0)
    table.update(told(flow(1, source="10.0.9.1"), host="b"), 0.0)
    assert len(table) == 4
    assert table.untold == 7


def test_it_grows(table):
    table.update(told(*(flow(port) for port in range(3000))), 0.0)
    flows, rows = table.flow_set()
    assert len(flows) == len(set(rows.tolist())) == 3000


def test_what_is_seen_to_remain_shrinks_as_it_is_sent_until_nothing_is_known(table):
    table.update(told(flow(sent=10**7, backlog=10**6)), 0.0)
    known = [table.flow_set()[0].known_bytes[0]]
    for sent in (10**7 + 4 * 10**5, 2 * 10**7):
        table.update(told(flow(sent=sent)), 1.0)
        known.append(table.flow_set()[0].known_bytes[0])
    assert known[:2] == [10**6, 6 * 10**5]
    assert np.isnan(known[2])


def test_racks_routes_and_migrations(table):
    table.update(told(flow(1), flow(2, destination="10.0.1.9"), flow(3), moving=[2]), 0.0)
    flows, _ = table.flow_set()
    assert flows.crosses.tolist() == [True, False, True]
    assert flows.usable.tolist() == [[True, True]] * 3
    assert (flows.route == UNKNOWN_ROUTE).all()
    assert flows.migration.tolist() == [False, False, True]
    assert rack_of("10.0.1.200", 24, 64) == "10.0.1.0/24"
    assert rack_of("fd00::1", 24, 64) == "fd00::/64"


def test_a_flow_that_turns_out_to_be_a_migration_is_decided_again_and_comes_last():
    scheduler = Scheduler(SECTION)
    scheduler.answer(Round(0.0, [told(flow(1, backlog=1000))]))
    answer = scheduler.answer(Round(0.1, [told(flow(1, backlog=1000), moving=[0])]))
    (verdict,) = decode_from_central(answer.frames[0][1]).verdicts
    assert verdict.level == 3


def test_a_route_that_leads_nowhere_is_chosen_again_at_once(table):
    table.update(told(flow()), 0.0)
    decide(table, 0.0, route=1)
    table.update(told(flow(), routes=(1,)), 0.5)
    assert len(table.due(0.5)) == 1
    assert table.flow_set()[0].route.tolist() == [UNKNOWN_ROUTE]


def test_renewals_come_in_parts_and_new_flows_before_them():
    scheduler = Scheduler(SECTION)
    many = told(*(flow(port) for port in range(200)))
    first = scheduler.answer(Round(0.0, [many]))
    assert (first.decided, first.more) == (200, False)
    later = scheduler.answer(Round(6.0, [many, told(flow(999))]))
    assert (later.decided, later.more) == (65, True)
    rest = [scheduler.answer(Round(6.0, [])).decided for _ in range(4)]
    assert rest == [64, 64, 8, 0]


def test_verdicts_spread_over_the_routes_and_keep_the_route_they_gave():
    scheduler = Scheduler(SECTION)
    answer = scheduler.answer(Round(0.0, [told(*(flow(port) for port in range(10)))]))
    ((host, frame),) = answer.frames
    message = decode_from_central(frame)
    assert host == "a"
    assert isinstance(message, Verdicts)
    assert sorted(v.route for v in message.verdicts) == [1] * 5 + [2] * 5
    again = scheduler.answer(Round(6.0, [told(*(flow(port) for port in range(10)))]))
    renewed = decode_from_central(again.frames[0][1])
    by_port = {v.source_port: v.route for v in message.verdicts}
    assert all(by_port[v.source_port] == v.route for v in renewed.verdicts)
    assert len(renewed.verdicts) == 10

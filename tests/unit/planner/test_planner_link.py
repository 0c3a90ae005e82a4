"""Planning over the link: who may ask, parts, the queue, the process; and announced migrations."""

import threading
import time
import zlib
from contextlib import closing

import msgspec
import pytest

from central.link import CentralLink
from central.planner import client, desk
from central.planner.announced import MAX_PLANS, Announced
from central.planner.desk import PlanDesk
from central.planner.formats import vmr2l
from central.planner.generator import SHAPES, generate
from central.planner.migrations import announcement
from central.planner.planning import make_plan
from central.planner.request import (
    MOST_UNPACKED_BYTES,
    PlanOutcome,
    PlanRequest,
    answer,
    pack,
    parts_of,
    plan_of,
    unpack_outcome,
    unpack_request,
)
from fabricpilot.config import LinkSection
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.keys import plan_pairs, write_pair
from fabricpilot.wire import (
    MAX_MESSAGE_BYTES,
    MAX_PLAN_PART_BYTES,
    FlowSummary,
    MigrationFlow,
    Migrations,
    PlanPart,
    Refused,
    decode_from_host,
    encode,
)


@pytest.fixture(scope="module")
def mapping():
    return generate(SHAPES["tiny"], 1)


def request_for(mapping, **fields):
    return PlanRequest(mapping=msgspec.json.encode(vmr2l.document(mapping)), mnl=2, solver="greedy", **fields)


def part(data, number=0, of=1, host="ops", ticket="t"):
    return PlanPart(host=host, ticket=ticket, part=number, parts=of, data=data)


class Desk(PlanDesk):
    """A desk whose answers are kept, and whose process is never started unless the test wants it."""

    def __init__(self, *clients, real=False):
        self.sent = []
        self.real = real
        self.started = []
        super().__init__(clients, lambda peers, message: self.sent.append((*peers, message)) or 1, Announced())

    def _start(self, request, now_s):
        self.started.append(request)
        if self.real:
            super()._start(request, now_s)

    def outcome(self):
        return unpack_outcome(b"".join(message.data for _, message in self.sent))


def test_only_named_keys_may_plan():
    at = Desk("ops")
    at.take(b"p", part(b"x", host="web-01"), 0.0)
    assert "central.planners" in at.outcome().error
    at.take(b"p", Migrations(host="web-01", plan="p", flows=[], ttl_s=1.0), 0.0)
    assert isinstance(at.sent[-1][1], Refused)
    assert not at.started


def test_parts_are_put_together_per_connection():
    at = Desk("ops")
    at.take(b"p", part(b"ab", 0, 2), 0.0)
    at.take(b"q", part(b"xy", 0, 2), 0.0)
    at.take(b"p", part(b"cd", 1, 2), 0.0)
    assert [one.data for one in at.started] == [b"abcd"]
    at.take(b"q", part(b"..", 1, 2), desk.PART_TIMEOUT_S + 1)
    assert len(at.started) == 2  # it is only given up when nobody has sent anything for so long and somebody looked
    at.take(b"r", part(b"x", 0, 2), 100.0)
    at.step(100.0 + desk.PART_TIMEOUT_S + 1)
    at.take(b"r", part(b"y", 1, 2), 200.0)
    assert len(at.started) == 2


def test_parts_out_of_turn_are_no_request():
    at = Desk("ops")
    at.take(b"p", part(b"b", 1, 2), 0.0)
    at.take(b"p", part(b"a", 0, 3), 0.0)
    at.take(b"p", part(b"c", 2, 3), 0.0)
    assert not at.started


def test_the_queue_is_short(monkeypatch):
    at = Desk("ops")
    monkeypatch.setattr(at, "step", lambda now_s: None)
    for number in range(desk.MAX_WAITING + 1):
        at.take(b"p%d" % number, part(b"x"), 0.0)
    assert "are waiting" in at.outcome().error
    for number in range(desk.MAX_COLLECTING):
        at.take(b"q%d" % number, part(b"x", 0, 2), 0.0)
    at.sent.clear()
    at.take(b"one more", part(b"x", 0, 2), 0.0)
    assert "coming in" in at.outcome().error


def test_a_process_plans_and_its_failure_is_told(mapping):
    at = Desk("ops", real=True)
    with closing(at):
        for data in (pack(request_for(mapping)), b"no request at all"):
            at.sent.clear()
            at.take(b"p", part(data), time.monotonic())
            while not at.sent:
                at.step(time.monotonic())
                time.sleep(0.02)
            if data.startswith(b"no"):
                assert at.outcome().exit_code == 2
            else:
                assert len(plan_of(mapping, request_for(mapping), at.outcome()).moves) == 2
        at.sent.clear()
        at.take(b"p", part(pack(request_for(mapping))), 0.0)
        assert at._running is not None
        pid = at._running.process.pid
        at.step(1e9)  # far beyond what it may take
        assert "took more than" in at.outcome().error
        assert at._running is None
        assert pid > 0
        assert at.counters["failed"] == 1


def test_requests_are_answered_and_never_raise(mapping):
    good = request_for(mapping)
    assert plan_of(mapping, good, answer(good)).solver == "greedy"
    bad = answer(msgspec.structs.replace(good, mapping=good.mapping[:100]))
    assert bad.exit_code == 2
    assert "truncated" in bad.error
    with pytest.raises(UsageError, match="truncated"):
        plan_of(mapping, good, bad)


def test_an_answer_is_checked_here(mapping):
    good = request_for(mapping)
    other = generate(SHAPES["tiny"], 2)
    with pytest.raises(FabricpilotError, match="does not hold"):
        plan_of(other, good, answer(good))


def test_what_is_unpacked_is_bounded():
    with pytest.raises(UsageError, match="unpacks to more"):
        unpack_request(zlib.compress(bytes(MOST_UNPACKED_BYTES + 1)))
    with pytest.raises(UsageError, match="not one of this version"):
        unpack_request(b"\0" * 40)
    with pytest.raises(UsageError, match="too many"):
        parts_of(bytes(200 * MAX_PLAN_PART_BYTES))


def test_a_part_fits_a_message():
    largest = encode(part(bytes(MAX_PLAN_PART_BYTES), host="h" * 128, ticket="t" * 128))
    assert len(largest) <= MAX_MESSAGE_BYTES
    assert decode_from_host(largest) is not None


def test_migrations_fit_a_message():
    names = "n" * 128
    flow = MigrationFlow(names, names, names, 2**62, 255, "f" * 45)
    largest = encode(Migrations(host=names, plan=names, flows=[flow] * 128, ttl_s=1.0))
    assert len(largest) <= MAX_MESSAGE_BYTES  # 256 of them with names of a usual length
    usual = "compute-node-0123456789"
    flow = MigrationFlow(usual, usual, usual, 2**40, 255, "2001:db8::1234")
    assert len(encode(Migrations(host=usual, plan="p", flows=[flow] * 256, ttl_s=1.0))) <= MAX_MESSAGE_BYTES


def flow_to(address, port, protocol=6):
    return FlowSummary("10.0.0.1", address, 40000, port, protocol, 10**9, 10**6, 3)


def test_announced_migrations_are_found_again(mapping):
    plan = make_plan(desk_problem(mapping), "greedy", 5.0)
    across = [move for move in plan.moves if move.source.pm != move.target.pm]
    flows = announcement(mapping, plan.moves)
    assert [flow.size_bytes for flow in flows] == [mapping.vms[move.vm].mem_mb * 2**20 for move in across]
    told = Announced()
    assert told.tell(Migrations(host="ops", plan="p", flows=flows, ttl_s=10.0), 0.0)
    source = flows[0].source_host
    found = told.match(source, flow_to("10.0.0.9", 49_160), 5.0)
    assert found is not None
    assert found.source_host == source
    assert told.match(source, flow_to("10.0.0.9", 443), 5.0) is None
    assert told.match(source, flow_to("10.0.0.9", 49_160, protocol=17), 5.0) is None
    assert told.match("another", flow_to("10.0.0.9", 49_160), 5.0) is None
    assert told.match(source, flow_to("10.0.0.9", 49_160), 11.0) is None  # forgotten


def desk_problem(mapping):
    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Limits, Problem

    return Problem(mapping, parse_objective("fr"), Limits(5))


def test_announcements_name_addresses_end_and_are_few():
    told = Announced()
    one = MigrationFlow("vm", "a", "b", 1, 0, "10.0.0.9", 16_514, 16_514)
    told.tell(Migrations(host="ops", plan="p", flows=[one], ttl_s=10.0), 0.0)
    assert told.match("a", flow_to("10.0.0.9", 16_514), 1.0) == one
    assert told.match("a", flow_to("10.0.0.8", 16_514), 1.0) is None
    told.tell(Migrations(host="ops", plan="p", flows=[], ttl_s=10.0), 1.0)
    assert told.match("a", flow_to("10.0.0.9", 16_514), 1.0) is None
    taken = [
        told.tell(Migrations(host="ops", plan=f"p{n}", flows=[one], ttl_s=10.0), 1.0) for n in range(MAX_PLANS + 1)
    ]
    assert taken == [True] * MAX_PLANS + [False]
    assert told.tell(Migrations(host="ops", plan="p0", flows=[one], ttl_s=10.0), 12.0)  # the others have ended


def test_asked_over_an_authenticated_link(tmp_path, mapping):
    for planned in plan_pairs(tmp_path, ("ops", "web-01")):
        write_pair(planned)
    for planned in plan_pairs(tmp_path / "foreign", ("ops",)):
        write_pair(planned)
    section = LinkSection(
        listen="tcp://127.0.0.1:*",
        key=str(tmp_path / "central.key_secret"),
        authorized_keys=str(tmp_path / "hosts"),
    )
    stop = threading.Event()
    with closing(CentralLink(section)) as link, closing(PlanDesk(["ops"], link.send, Announced())) as at:

        def serve():
            while not stop.is_set():
                for arrival in link.receive():
                    at.take(arrival.peer, arrival.message, time.monotonic())
                at.step(time.monotonic())
                time.sleep(0.005)

        thread = threading.Thread(target=serve)
        thread.start()
        try:

            def reach(folder, name):
                key = tmp_path / folder / "hosts" / f"{name}.key_secret"
                central_key = tmp_path / "central.key"
                return LinkSection(endpoint=link.endpoint, key=str(key), central_key=str(central_key)), name

            asked = request_for(mapping)
            assert len(plan_of(mapping, asked, client.ask(*reach("", "ops"), asked)).moves) == 2
            assert "may not plan" in client.ask(*reach("", "web-01"), asked).error
            with pytest.raises(FabricpilotError, match="does not know this key"):
                client.ask(*reach("foreign", "ops"), asked)
            with pytest.raises(FabricpilotError, match="may not plan"):
                client.announce(reach("", "web-01")[0], Migrations(host="web-01", plan="p", flows=[], ttl_s=1.0))
            client.announce(reach("", "ops")[0], Migrations(host="ops", plan="p", flows=[], ttl_s=1.0))
        finally:
            stop.set()
            thread.join()


def test_errors_travel(mapping):
    assert unpack_outcome(pack(PlanOutcome(error="no", exit_code=2))).error == "no"
    assert answer(request_for(mapping, objective="nonsense")).exit_code == 2

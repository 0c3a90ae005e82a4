"""The learner's process: what it survives, its checkpoints, and that nobody waits for it."""

import os
import signal
import time
from contextlib import ExitStack, closing
from functools import partial
from types import SimpleNamespace

import pytest

from central.daemon import Central, Workers, state_folder
from central.durable import replace_file
from central.learning import CHECKPOINT, Learning, Lesson, find_learner
from central.link import CentralLink
from central.policy.base import GroupSummary, Outcome
from central.worker import Worker
from fabricpilot.config import CentralConfig, CentralSection, LinkSection, PolicySection
from fabricpilot.control import ControlServer
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from hostagent.link import HostLink

SUMMARY = GroupSummary(
    group="web",
    levels=4,
    hosts=3,
    flows=1e3,
    load=0.7,
    sizes=LogHistogram.of([1000.0]),
    thresholds=Thresholds((10, 20, 30)),
    outcome=Outcome(100.0, (1.0, 0, 0, 0, 0), (2.0, 0, 0, 0, 0), 1e-3, 2.0, 5.0),
)
LESSON = Lesson((SUMMARY,), (SUMMARY,))


def section(name):
    return PolicySection(learn="on", learner=f"learner_doubles:{name}")


def learning(name, folder=None):
    return Learning(section(name), folder)


def worker(name, folder=None):
    return Worker("learner", partial(Learning, section(name), folder))


def collect(one):
    end = time.monotonic() + 60
    while (answered := one.collect()) is None and one.pid is not None:
        assert time.monotonic() < end
        time.sleep(0.005)
    return answered


def test_lessons_and_proposals():
    learned = learning("Dutiful").answer(LESSON)
    assert learned.proposals[0].thresholds == (20.0, 40.0, 60.0)
    assert learned.stats.transitions == 1
    assert (learned.failures, learned.checkpoint_age_s) == (0, None)


@pytest.mark.parametrize(
    ("name", "says"), [("Raising", "ZeroDivisionError"), ("Nonsense", "AttributeError")], ids=["raises", "nonsense"]
)
def test_a_learner_that_fails_proposes_nothing(name, says):
    service = learning(name)
    learned = service.answer(LESSON)
    assert learned.proposals[0].thresholds is None
    assert says in learned.proposals[0].reason
    assert service.answer(LESSON).failures == 2 * learned.failures > 0


def test_numbers_leave_the_process_as_plain_ones():
    class Tensor:
        def __float__(self):
            return 5.5

    service = learning("Dutiful")
    service._learner.propose = lambda _summary: SimpleNamespace(thresholds=[Tensor()] * 3, reason=Tensor)
    (proposal,) = service.answer(LESSON).proposals
    assert [type(value) for value in proposal.thresholds] == [float] * 3
    assert type(proposal.reason) is str


def test_it_goes_on_exactly_where_it_was(tmp_path):
    first = learning("Dutiful", tmp_path)
    for _ in range(3):
        first.answer(LESSON)
    first.close()
    again = learning("Dutiful", tmp_path)
    assert again.answer(LESSON).stats.transitions == 4


def test_a_learner_that_learned_nothing_leaves_the_checkpoint_alone(tmp_path):
    learning("Dutiful", tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_written_now_and_then(tmp_path, monkeypatch):
    service = learning("Dutiful", tmp_path)
    assert service.answer(LESSON).checkpoint_age_s < 60
    written = (tmp_path / CHECKPOINT).read_text()
    service.answer(LESSON)
    assert (tmp_path / CHECKPOINT).read_text() == written
    monkeypatch.setattr("central.learning.CHECKPOINT_S", 0.0)
    service.answer(LESSON)
    assert (tmp_path / CHECKPOINT).read_text() != written


def test_a_checkpoint_that_cannot_be_read_is_set_aside(tmp_path):
    (tmp_path / CHECKPOINT).write_text("torn")
    assert learning("Dutiful", tmp_path).answer(LESSON).stats.transitions == 1
    assert (tmp_path / "learner.unreadable").read_text() == "torn"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda beside: beside.write_text("old"))

    def fail(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("reference", ["nonsense", "no.such.module:Class", "json:", ":x", "learner_doubles"])
def test_a_learner_that_does_not_exist_is_told_at_start(reference):
    with pytest.raises(UsageError, match=r"policy\.learner"):
        find_learner(reference)
    with pytest.raises(UsageError, match=r"policy\.learner"):
        Workers.start(CentralConfig(policy=PolicySection(learn="shadow", learner=reference)))


def test_a_state_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    config = CentralConfig(central=CentralSection(state_dir=str(tmp_path / "file" / "below")))
    with pytest.raises(UsageError, match=r"central\.state_dir"):
        state_folder(config)


def test_a_learner_killed_while_it_writes_goes_on_from_the_checkpoint_before(tmp_path):
    process = worker("Dawdling", tmp_path)
    process.submit(LESSON)
    assert collect(process).answer.stats.transitions == 1
    process.submit(LESSON)
    assert collect(process).answer.stats.transitions == 2
    process.close(grace_s=1.0)  # asks it for the last checkpoint, waits, and kills it
    again = worker("Dutiful", tmp_path)
    again.submit(LESSON)
    assert collect(again).answer.stats.transitions == 2  # the one of the checkpoint, and one more
    again.close(grace_s=60.0)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_the_last_checkpoint_is_written_when_central_ends(tmp_path):
    process = worker("Dutiful", tmp_path)
    process.submit(LESSON)
    assert collect(process).answer.stats.transitions == 1
    (tmp_path / CHECKPOINT).unlink()
    process.close(grace_s=30.0)
    assert (tmp_path / CHECKPOINT).exists()


def test_a_learner_that_ends_its_process_is_started_again():
    with closing(worker("Dying")) as process:
        for attempt in range(2):
            process.submit(LESSON)
            assert collect(process) is None
            assert process.restarts == attempt
            assert process.busy == (attempt > 0)  # one that dies again and again rests before it is started again


def test_a_learner_that_hangs_is_given_up(monkeypatch):
    with closing(worker("Hanging")) as process:
        process.submit(LESSON)
        monkeypatch.setattr("central.worker.MAX_SECONDS", 0.0)
        assert collect(process) is None
        assert process.pid is None


def test_asking_does_not_wait_for_a_worker_that_does_not_read():
    """More than a pipe holds, to a process that still loads its libraries."""
    many = Lesson((), (SUMMARY,) * 2_000)
    with closing(worker("Dutiful")) as process:
        process.submit(many)
        assert process.collect() is None
        assert len(collect(process).answer.proposals) == 2_000


def test_the_link_answers_while_the_learner_sleeps(tmp_path, hello, report):
    config = CentralConfig(link=LinkSection(listen="tcp://127.0.0.1:*", insecure=True), policy=section("Sleeping"))
    with ExitStack() as stack:
        link = stack.enter_context(closing(CentralLink(config.link)))
        control = stack.enter_context(ControlServer(tmp_path / "central.sock"))
        workers = stack.enter_context(closing(Workers.start(config)))
        central = Central(config, link, control, workers)
        asking = LinkSection(endpoint=link.endpoint, insecure=True)
        host = stack.enter_context(closing(HostLink(asking, "a", lambda: hello("a"))))
        now = time.monotonic()
        workers.learner.submit(Lesson((), (SUMMARY,)))
        answered = 0
        while answered < 20:  # reports to a central that forgets the host: each is answered by a question
            central.registry.hosts.pop("a", None)
            host.send(report("a"))
            for arrival in link.receive():
                central.handle(arrival, now)
                answered += 1
            host.receive()
            assert workers.learner.collect() is None, "the learner was done first"
            time.sleep(0.001)
        assert workers.learner.busy
        os.kill(workers.learner.pid, signal.SIGKILL)  # not to wait for it

"""What is logged about interfaces: a line for each, or one for many; and never more than a few per second."""

import logging

from hostagent.roster import Changes, shortened


def test_few_changes_are_a_line_each(caplog):
    changes = Changes()
    changes.note("attached, tag only", "veth1")
    changes.note("is gone", "veth2", logging.WARNING)
    with caplog.at_level(logging.INFO):
        changes.tell(10.0)
    assert caplog.messages == ["veth1 attached, tag only", "veth2 is gone"]
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]


def test_many_changes_are_a_line_per_kind(caplog):
    changes = Changes()
    for number in range(300):
        changes.note("attached, tag only", f"veth{number}")
        changes.note(f"cannot be scheduled: reason {number}", f"nic{number}", logging.WARNING)
    with caplog.at_level(logging.INFO):
        changes.tell(10.0)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("300 interfaces attached, tag only: veth0, veth1, ")
    assert caplog.messages[0].endswith(" and 292 more")


def test_at_most_once_a_second_and_nothing_is_lost(caplog):
    changes = Changes()
    with caplog.at_level(logging.INFO):
        for tick in range(100):
            changes.note("is gone", f"veth{tick}")
            changes.tell(tick * 0.05)  # five seconds in all
        changes.tell(float("inf"))
    assert len(caplog.messages) <= 7
    told = sum(int(m.split()[0]) if m.split()[1] == "interfaces" else 1 for m in caplog.messages)
    assert told == 100


def test_shortened():
    assert shortened(["a", "b"]) == "a, b"
    assert shortened([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"

"""Numbers, report.json and the page, from results made by hand."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from testbed.capture.oracle import Verdict
from testbed.daemons import Usage
from testbed.experiment import Capture, Outcome, SchemeOutcome
from testbed.flows.calibration import Calibration
from testbed.flows.recorded import RecordedTrace
from testbed.flows.results import LOST, Results
from testbed.netns.switch_port import PortCounters
from testbed.netns.tcp import TcpCounters
from testbed.plan import RunPlan
from testbed.report.document import document
from testbed.report.fct import in_class, summarise
from testbed.report.figures import draw
from testbed.report.page import write_page
from testbed.report.sentences import sentences
from testbed.report.table import fct_table

KEYS = {"mean_us", "p50_us", "p99_us", "mean_slowdown", "count"}
IDEAL = Calibration((100, 1_000_000), (1_000_000, 41_000_000))  # 1 ms, and 40 ns per byte beyond


def results(sizes: list[int], fct_ns: list[int], recipe: Any = None) -> Results:
    n = len(sizes)
    trace = RecordedTrace(np.arange(n) * 1_000_000, np.array(sizes, np.int64), np.zeros(n, np.int64), recipe)
    return Results(trace, np.array(fct_ns, np.int64), np.full(n, 50_000), {})


def outcome(fct_factor: int = 1) -> Outcome:
    plan = RunPlan(scale=0.1)
    sizes = [1_000] * 50 + [100_000] * 30 + [2_000_000] * 20
    fifo = results(sizes, [8_000_000 + size * 100 for size in sizes], plan.recipe)
    ours = results(sizes, [2_000_000 + size * 90 for size in sizes], plan.recipe)
    verdict = Verdict(checked=10, correct=10, flows=2, by_dscp={32: 10})
    port, tcp = PortCounters(1000, 1_000_000, 10), TcpCounters(10, 2, 1)
    return Outcome(
        plan=plan,
        trace=fifo.trace,
        calibration=IDEAL,
        environment={"kernel": "6.18", "tcp_wmem": ["4096", "16384", "4194304"]},
        schemes={
            "fifo": SchemeOutcome(fifo, port, tcp, 75.0),
            "fabricpilot": SchemeOutcome(
                ours,
                port,
                tcp,
                75.0,
                thresholds=[
                    {"time_s": 0.0, "thresholds": [20_480, 414_486, 8_388_608], "reason": "default"},
                    {"time_s": 5.2, "thresholds": [13_893, 191_654, 1_045_216], "reason": "first"},
                ],
                usage=[Usage("central", 1.5, 46_000_000)],
                capture=Capture(Path("capture.pcap"), 10, 0, 5.0, verdict),
            ),
        },
    )


def test_summary_has_the_right_numbers() -> None:
    measured = results([100, 100, 100, 1_000_000], [1_000_000, 2_000_000, 3_000_000, 82_000_000])
    summary = summarise(measured, IDEAL, scale=0.1)
    small = summary["small"]
    assert (small.count, small.mean_us, small.p50_us) == (3, 2000, 2000)
    assert small.p99_us == pytest.approx(2980)  # 2 % of the way down from the third to the second
    assert small.mean_slowdown == pytest.approx(2)
    assert summary["all"].mean_slowdown == pytest.approx((1 + 2 + 3 + 2) / 4)
    assert summary["large"].count == 0
    assert summary["large"].p99_us is None


def test_classes_are_of_unscaled_sizes_and_closed_above() -> None:
    measured = results([10_000, 10_001, 1_000_000, 1_000_001], [1, 1, 1, 1])
    counts = {name: in_class(measured, 0.1, name).tolist() for name in ("all", "small", "medium", "large")}
    assert counts == {
        "all": [True] * 4,
        "small": [True, False, False, False],
        "medium": [False, True, True, False],
        "large": [False, False, False, True],
    }


def test_lost_flows_are_counted_and_not_averaged() -> None:
    measured = results([100, 100], [1_000_000, LOST])
    assert measured.lost == 1
    assert summarise(measured, IDEAL, 0.1)["all"].mean_us == 1000


def test_report_has_the_keys_readers_rely_on() -> None:
    report = json.loads(json.dumps(document(outcome())))
    assert set(report["schemes"]) == {"fifo", "fabricpilot"}
    for scheme in report["schemes"].values():
        assert set(scheme) == {"all", "small", "medium", "large"}
        assert all(set(numbers) >= KEYS for numbers in scheme.values())
        assert scheme["all"]["count"] == 100
    assert (report["dscp"]["checked"], report["dscp"]["correct"]) == (10, 10)
    assert report["lost_flows"] == 0
    assert report["workload"] == "websearch_dctcp_bytes_trafficgenerator"
    assert (report["load"], report["seed"]) == (0.8, 1)
    assert report["improvement"]["small"]["p99_us"] == pytest.approx(2_090_000 / 8_100_000 - 1, abs=1e-4)


def test_one_scheme_alone_makes_a_report_too() -> None:
    alone = outcome()
    del alone.schemes["fabricpilot"]
    report = document(alone)
    assert report["improvement"] is None
    assert report["dscp"] == {"checked": 0, "correct": 0}
    assert sentences(report)[0] == "Flows completed of 100: fifo 100; lost: 0."


def test_any_number_of_schemes_of_any_k_is_drawn(tmp_path: Path) -> None:
    made = outcome()
    fifo, ours = made.schemes["fifo"], made.schemes["fabricpilot"]
    for number in range(12):
        made.schemes[f"more-{number}"] = fifo
    eight = [{"time_s": 0.0, "thresholds": [10**n for n in range(1, 8)], "reason": "of the scheme"}]
    made.schemes["las"] = replace(ours, thresholds=eight)
    made.schemes["mlfq"] = ours
    report = document(made)
    assert [entry["scheme"] for entry in report["thresholds"]] == ["fabricpilot"] * 2 + ["las"] + ["mlfq"] * 2
    draw({n: s.results for n, s in made.schemes.items()}, 0.1, report["thresholds"], tmp_path / "fct.png")
    assert (tmp_path / "fct.png").read_bytes().startswith(b"\x89PNG")


def test_page_stands_alone(tmp_path: Path) -> None:
    made = outcome()
    report = document(made)
    draw({n: s.results for n, s in made.schemes.items()}, 0.1, report["thresholds"], tmp_path / "fct.png")
    assert (tmp_path / "fct.png").read_bytes().startswith(b"\x89PNG")
    write_page(report, tmp_path / "fct.png", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<table>") == 1
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched from anywhere
    assert "3.9 times lower" in page


def test_table_shows_every_class_and_the_change() -> None:
    made = outcome()
    summaries = {name: summarise(s.results, IDEAL, 0.1) for name, s in made.schemes.items()}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(fct_table(summaries))
    text = console.export_text()
    for shown in ("(0, 100 KB]", "(100 KB, 10 MB]", "(10 MB, ∞)", "fifo", "fabricpilot", "-74.2%"):
        assert shown in text

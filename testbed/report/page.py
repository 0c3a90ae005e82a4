"""One HTML page with the table, the picture and what they depend on; it needs no other file and no network."""

import base64
import html
from pathlib import Path
from typing import Any

from testbed.report.fct import SIZE_CLASS_TITLES
from testbed.report.sentences import sentences

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ed; --paper: #fff; --good: #1a7f4b;
  --bad: #b3402a; --tint: #f5f7fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3340; --paper: #12161c;
  --good: #5fd39a; --bad: #ff8f73; --tint: #1a2029; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 68rem; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p.lead { color: var(--soft); margin: 0 0 1.4rem; } ul.facts { padding-left: 1.1rem; } ul.facts li { margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, th.name, td.name { text-align: left; }
th { color: var(--soft); font-weight: 600; } tr.change td { background: var(--tint); font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
img { width: 100%; border-radius: 8px; background: #fff; } .scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
_COLUMNS = {"mean_us": "mean (ms)", "p50_us": "median (ms)", "p99_us": "p99 (ms)", "mean_slowdown": "mean slowdown"}


def write_page(report: dict[str, Any], picture: Path, path: Path) -> None:
    """Write the page.

    Args:
        report: as `document` makes it.
        picture: PNG to embed.
        path: of the page.
    """
    image = base64.b64encode(picture.read_bytes()).decode()
    facts = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(report))
    body = f"""<h1>fabricpilot testbed</h1>
<p class="lead">{report["flows"]:,} flows of {html.escape(report["workload"])} (sizes &times; {report["scale"]:g})
at load {report["load"]:g}, seed {report["seed"]}, the same arrivals under every scheme.</p>
<ul class="facts">{facts}</ul>
<h2>Flow completion times</h2><div class="scroll">{_table(report)}</div>
<h2>Distributions and thresholds</h2><img alt="FCT distributions by size class, and thresholds over time"
src="data:image/png;base64,{image}">
<h2>What the numbers depend on</h2>{_definitions(report["environment"])}
"""
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fabricpilot testbed</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _table(report: dict[str, Any]) -> str:
    heads = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
    rows = [f'<tr><th>flow size</th><th class="name">scheme</th><th>flows</th>{heads}</tr>']
    improvement = report["improvement"] or {}
    for size_class, title in SIZE_CLASS_TITLES.items():
        for number, (name, classes) in enumerate(report["schemes"].items()):
            summary = classes[size_class]
            cells = "".join(f"<td>{_number(summary[c], c)}</td>" for c in _COLUMNS)
            first = html.escape(title) if number == 0 else ""
            rows.append(f'<tr><td>{first}</td><td class="name">{name}</td><td>{summary["count"]:,}</td>{cells}</tr>')
        if size_class in improvement:
            cells = "".join(_change(improvement[size_class][c]) for c in _COLUMNS)
            rows.append(f'<tr class="change"><td></td><td class="name">change</td><td></td>{cells}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _number(value: float | None, column: str) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:.2f}" if column == "mean_slowdown" else f"{value / 1000:,.2f}"


def _change(relative: float | None) -> str:
    if relative is None:
        return "<td>&ndash;</td>"
    kind = "good" if relative < 0 else "bad"
    return f'<td class="{kind}">{relative:+.1%}</td>'


def _definitions(environment: dict[str, Any]) -> str:
    entries = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(_readable(value))}</dd>"
        for name, value in environment.items()
    )
    return f"<dl>{entries}</dl>"


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

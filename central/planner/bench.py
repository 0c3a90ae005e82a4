"""`fabricpilot bench planner`: every solver on seeded mappings, side by side; honest numbers as a table or JSON.

Each cell is one checked plan (the checker ends the run if a plan is bad, so violations are 0 or there is no result).
The bound of a problem is the best any solver proved. `--plot` draws FR against moves and against time.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

# What is run by default: (shape, objective). Names of shapes are the generator's.
CASES = (("medium", "fr"), ("large", "fr"), ("affinity", "fr"), ("multi", "multi"), ("medium", "mixed"))
SOLVERS = ("greedy", "packing", "pop", "swap", "lns", "beam", "learned", "exact", "auto")


@click.command()
@click.option("--shape", "shapes", multiple=True, help="Only these shapes; several times for several.")
@click.option("--solver", "solvers", multiple=True, help="Only these solvers.")
@click.option("--mnl", "mnls", multiple=True, type=int, default=(10, 50, 100), show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Mappings per shape.")
@click.option("--deadline", default=5.0, show_default=True, help="Seconds per plan.")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Draw figures into this folder.")
@click.option("--policy-cost", is_flag=True, help="Only: what the policy costs as clusters grow.")
@click.option("--portfolio", is_flag=True, help="Only: `auto` against every single solver with the same time.")
@click.option("--problem", "problems", multiple=True, help="With --portfolio: only these problems.")
@click.option("--time", "times", multiple=True, type=float, help="With --portfolio: only these deadlines.")
@click.option("--cpu", is_flag=True, help="Deadlines in CPU seconds, for a busy machine.")
@click.option("--json", "as_json", is_flag=True)
def planner(
    shapes: tuple[str, ...],
    solvers: tuple[str, ...],
    mnls: tuple[int, ...],
    seeds: int,
    deadline: float,
    plot: Path | None,
    policy_cost: bool,
    portfolio: bool,
    problems: tuple[str, ...],
    times: tuple[float, ...],
    cpu: bool,
    as_json: bool,
) -> None:
    """Run solvers on seeded mappings: FR, slots, gap to the bound, seconds, moves."""
    if policy_cost:
        from central.planner.learned.cost import growth

        for line in growth():
            click.echo(json.dumps(line) if as_json else "  ".join(f"{key} {value}" for key, value in line.items()))
        return
    clock = time.process_time if cpu else time.monotonic
    if portfolio:
        from central.planner import bench_portfolio

        rows = []
        for row in bench_portfolio.compare(problems, times or bench_portfolio.DEADLINES_S, seeds, clock):
            rows.append(row)
            click.echo(bench_portfolio.line(row), err=True)
        found = {"summary": bench_portfolio.summary(rows), "load": list(_load())}
        click.echo(json.dumps({**found, "results": rows} if as_json else found))
        return
    cases = [case for case in CASES if not shapes or case[0] in shapes]
    results = []
    for row in measure(cases, solvers or SOLVERS, mnls, seeds, deadline, clock):
        results.append(row)
        click.echo(
            f"{row['shape']:9} {row['objective']:6} seed {row['seed']} MNL {row['mnl']:3} {row['solver']:8} "
            f"FR {row['fragment_rate']:.4f} slots {row['slots']:4} moves {row['moves']:3} {row['seconds']:6.2f} s",
            err=True,
        )
    report = {"results": with_gaps(results), "deadline_s": deadline, "load": list(_load())}
    if plot:
        from central.planner.plots import draw

        report["figures"] = [str(path) for path in draw(report["results"], plot)]  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report["results"])  # type: ignore[arg-type]


def measure(
    cases: list[tuple[str, str]],
    solvers: tuple[str, ...],
    mnls: tuple[int, ...],
    seeds: int,
    deadline: float,
    clock: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """One row per case, seed, MNL and solver."""
    from central.planner.generator import generate, shape
    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Limits, Problem
    from central.planner.planning import make_plan

    for name, objective in cases:
        for seed in range(1, seeds + 1):
            mapping = generate(shape(name), seed)
            for mnl in mnls:
                problem = Problem(mapping, parse_objective(objective), Limits(mnl))
                for solver in solvers:
                    used_s = _cpu_s()
                    plan = make_plan(problem, solver, deadline, seed, clock)
                    yield {
                        "shape": name,
                        "objective": objective,
                        "seed": seed,
                        "mnl": mnl,
                        "solver": solver,
                        "initial_fragment_rate": plan.initial.fragment_rate,
                        "fragment_rate": plan.final.fragment_rate,
                        "slots": plan.final.slots,
                        "moves": len(plan.moves),
                        "batches": len({move.batch for move in plan.moves}),
                        "seconds": round(plan.seconds, 3),
                        "cpu_seconds": round(_cpu_s() - used_s, 3),
                        "bound": plan.bound,
                        "violations": 0,  # a plan with one never gets here: make_plan raises
                        "prefixes": [round(worth.fragment_rate, 5) for worth in plan.prefixes],
                    }


def with_gaps(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the best bound of their problem, and the gap to it in shares of the free cores."""
    best: dict[tuple[Any, ...], float] = {}
    for row in results:
        if row["bound"] is not None:
            key = _problem(row)
            best[key] = max(best.get(key, 0.0), row["bound"])
    return [
        {
            **row,
            "bound": best.get(_problem(row)),
            "gap": None if _problem(row) not in best else max(0.0, row["fragment_rate"] - best[_problem(row)]),
        }
        for row in results
    ]


def show(results: list[dict[str, Any]]) -> None:
    """FR of every solver per problem, with seconds: the published figures as a table."""
    from rich.console import Console
    from rich.table import Table

    solvers = list(dict.fromkeys(row["solver"] for row in results))
    table = Table(title="fragment rate after the plan (seconds)", box=None)
    table.add_column("mapping")
    table.add_column("MNL", justify="right")
    table.add_column("before", justify="right")
    for name in (*solvers, "bound"):
        table.add_column(name, justify="right")
    for key in dict.fromkeys(_problem(row) for row in results):
        rows = {row["solver"]: row for row in results if _problem(row) == key}
        first = next(iter(rows.values()))
        cells = [
            f"{rows[name]['fragment_rate']:.4f} ({rows[name]['seconds']:.1f})" if name in rows else ""
            for name in solvers
        ]
        bound = "" if first["bound"] is None else f"{first['bound']:.4f}"
        table.add_row(
            f"{key[0]} {key[1]} #{key[2]}", str(key[3]), f"{first['initial_fragment_rate']:.4f}", *cells, bound
        )
    Console(width=max(110, 30 + 16 * len(solvers))).print(table)


def _problem(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["objective"], row["seed"], row["mnl"]


def _cpu_s() -> float:
    """CPU seconds of this process and of the solvers' that have ended."""
    from central.planner.race import settle

    settle()
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _load() -> tuple[float, ...]:
    """Load averages: a timing on a busy machine says so itself."""
    return tuple(round(value, 2) for value in os.getloadavg())

"""Figures: FR against moves and against time for every solver, and a plan as an animation. Needs no screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Plan

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ee8866")
FRAME_MS = 200


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Two figures per (shape, objective); the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for shape, objective in dict.fromkeys((row["shape"], row["objective"]) for row in results):
        rows = [row for row in results if (row["shape"], row["objective"]) == (shape, objective)]
        written.append(_against_moves(rows, folder / f"{shape}-{objective}-moves.png"))
        written.append(_against_time(rows, folder / f"{shape}-{objective}-time.png"))
    return written


def _axes(rows: Sequence[dict[str, Any]], label: str) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=130)
    axes.set_xlabel(label)
    axes.set_ylabel("fragment rate")
    axes.set_title(f"{rows[0]['shape']}, objective {rows[0]['objective']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _against_moves(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """FR after each move of the longest plan of every solver (first seed)."""
    figure, axes = _axes(rows, "moves")
    most = max(row["mnl"] for row in rows)
    for number, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        row = next(one for one in rows if one["solver"] == solver and one["mnl"] == most)
        rates = [row["initial_fragment_rate"], *row["prefixes"]]
        axes.plot(range(len(rates)), rates, color=COLOURS[number % len(COLOURS)], label=solver, linewidth=1.4)
    if rows[0]["bound"] is not None:
        bounds = sorted({(row["mnl"], row["bound"]) for row in rows if row["seed"] == rows[0]["seed"]})
        axes.plot(*zip(*bounds, strict=True), "k_", markersize=12, label="bound")
    return _save(figure, axes, path)


def _against_time(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _axes(rows, "seconds")
    most = max(row["mnl"] for row in rows)
    for number, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        chosen = [row for row in rows if row["solver"] == solver and row["mnl"] == most]
        seconds = [max(row["seconds"], 1e-3) for row in chosen]
        rates = [row["fragment_rate"] for row in chosen]
        axes.plot(seconds, rates, "o", color=COLOURS[number % len(COLOURS)], label=solver)
    axes.set_xscale("log")
    return _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def animate(mapping: Mapping, plan: Plan, path: Path, most_pms: int = 40) -> Path:
    """A GIF of the plan: a column per NUMA node of the PMs it touches, VMs as blocks, whole free slots in green."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.animation import FuncAnimation, PillowWriter

    touched = list(dict.fromkeys(pm for move in plan.moves for pm in (move.source.pm, move.target.pm)))[:most_pms]
    columns = [(pm, node.number, node.cores) for pm in touched for node in mapping.pms[pm].nodes]
    index = {(pm, number): position for position, (pm, number, _) in enumerate(columns)}
    figure, axes = pyplot.subplots(figsize=(10, 4), dpi=90)

    def frame(step: int) -> None:
        axes.clear()
        moved = {move.vm: move.target for move in plan.moves[:step]}
        now = plan.moves[step - 1].vm if step else -1
        used = np.zeros(len(columns))
        for vm_number, vm in enumerate(mapping.vms):
            place = moved.get(vm_number)
            pm = place.pm if place else vm.pm
            numbers = place.nodes if place else tuple(share.node for share in vm.shares)
            for share, number in zip(vm.shares, numbers, strict=True):
                column = index.get((pm, number))
                if column is not None:
                    colour = "#ee6677" if vm_number == now else ("#66ccee" if vm_number in moved else "#b8c4d6")
                    axes.bar(column, share.cores, 0.85, used[column], color=colour, edgecolor="white", linewidth=0.3)
                    used[column] += share.cores
        for column, (_, _, cores) in enumerate(columns):
            whole = (cores - used[column]) // 16 * 16
            axes.bar(column, whole, 0.85, used[column], color="#228833", alpha=0.35)
        rate = plan.prefixes[step - 1] if step else plan.initial
        axes.set_title(f"{step} of {len(plan.moves)} moves, fragment rate {rate.fragment_rate:.4f}, {rate.slots} slots")
        axes.set_xticks([])
        axes.set_ylabel("cores per NUMA node")
        axes.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    film = FuncAnimation(figure, frame, frames=len(plan.moves) + 1, interval=FRAME_MS)
    film.save(path, writer=PillowWriter(fps=1000 // FRAME_MS))
    pyplot.close(figure)
    return path

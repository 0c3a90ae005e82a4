"""A plan for whoever carries it out: a shell script of `virsh migrate`, or JSON that belongs to no cloud system."""

import shlex
from typing import Any

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Plan

HEAD = """#!/bin/sh
# {count} live migrations in {batches} batches: FR {before:.4f} -> {after:.4f}, slots {slots_before} -> {slots_after}.
# Moves of one batch may run at the same time; a batch starts when the one before has ended. Stops at the first error.
# DRY_RUN=1 prints the commands. VIRSH_TARGET is the URI of a target host, %s its name.
set -eu
: "${{VIRSH_TARGET:=qemu+ssh://%s/system}}"
run() {{ if [ -n "${{DRY_RUN:-}}" ]; then echo "$*"; else "$@"; fi; }}
uri() {{ printf "$VIRSH_TARGET" "$1"; }}
all() {{ for job in "$@"; do wait "$job"; done; }}
"""


def shell_script(mapping: Mapping, plan: Plan) -> str:
    """`virsh migrate` for every move, batch by batch."""
    batches = sorted({move.batch for move in plan.moves})
    lines = [
        HEAD.format(
            count=len(plan.moves),
            batches=len(batches),
            before=plan.initial.fragment_rate,
            after=plan.final.fragment_rate,
            slots_before=plan.initial.slots,
            slots_after=plan.final.slots,
        )
    ]
    for batch in batches:
        lines.append(f"# batch {batch}\njobs=")
        for move in plan.moves:
            if move.batch == batch:
                vm = shlex.quote(str(mapping.vms[move.vm].name))
                source = shlex.quote(str(mapping.pms[move.source.pm].name))
                target = shlex.quote(str(mapping.pms[move.target.pm].name))
                nodes = ",".join(map(str, move.target.nodes))
                if move.source.pm == move.target.pm:
                    command = f'virsh -c "$(uri {source})" numatune {vm} --nodeset {nodes} --live'
                else:
                    command = (
                        f'virsh -c "$(uri {source})" migrate --live --persistent --undefinesource {vm} '
                        f'"$(uri {target})"  # NUMA {nodes}'
                    )
                command, _, remark = command.partition("  # ")
                lines.append(f'run {command} & jobs="$jobs $!"' + (f"  # {remark}" if remark else ""))
        lines.append("all $jobs")
    return "\n".join(lines) + "\n"


def neutral(mapping: Mapping, plan: Plan) -> dict[str, Any]:
    """Batches of migrations with every number an orchestrator may want, and no word of any orchestrator."""
    batches: dict[int, list[dict[str, Any]]] = {}
    for move in plan.moves:
        vm = mapping.vms[move.vm]
        batches.setdefault(move.batch, []).append(
            {
                "instance": vm.name,
                "source_host": mapping.pms[move.source.pm].name,
                "source_numa_nodes": list(move.source.nodes),
                "target_host": mapping.pms[move.target.pm].name,
                "target_numa_nodes": list(move.target.nodes),
                "cores": vm.cores,
                "memory_bytes": vm.mem_mb * 2**20,
            }
        )
    return {
        "version": 1,
        "migrations": len(plan.moves),
        "batches": [{"parallel": batches[number]} for number in sorted(batches)],
    }

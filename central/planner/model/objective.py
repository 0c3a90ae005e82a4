"""What a plan is to achieve: few fragments of one or several kinds of request.

A term is a request: cores and memory per NUMA node, on how many nodes of one PM. Its slots are how many more of it
fit; its fragment rate is the share of the free resource (cores, or memory if it asks for no cores) those slots do
not use. The objective is the weighted mean of its terms' fragment rates (VMR2L, NSDI 24, section 5.5), minimised.
With the one term "16 cores on one node" it is sum(free mod 16) / sum(free).

Free resources do not change when VMs move between ACTIVE PMs, so an objective is linear in the numbers of slots.
"""

import re
from dataclasses import dataclass

from fabricpilot.errors import UsageError

_REQUEST = re.compile(r"^(?:(\d+)c)?/?(?:(\d+)G)?(?:/(\d+)numa)?$")


@dataclass(frozen=True)
class SlotTerm:
    """A request and its weight. `cores` and `mem_mb` are per NUMA node; 0 means it asks for none."""

    cores: int
    mem_mb: int
    nodes: int
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The request as the command line writes it: totals over its nodes."""
        parts = [f"{self.cores * self.nodes}c"] if self.cores else []
        parts += [f"{self.mem_mb * self.nodes // 1024}G"] if self.mem_mb else []
        parts += [f"{self.nodes}numa"] if self.nodes > 1 else []
        return "/".join(parts)


@dataclass(frozen=True)
class Objective:
    """Weighted terms, and a fragment rate to reach with the fewest moves if `goal` is given."""

    terms: tuple[SlotTerm, ...]
    goal: float | None = None
    text: str = "fr"
    cost_per_gb: float = 0.0  # slots (of the first term) that copying one GB is held to cost


def parse_request(text: str) -> SlotTerm:
    """`64c/128G/2numa`: 64 cores and 128 GB in all, on two nodes of one PM, evenly.

    Raises:
        UsageError: not of that form, nothing asked for, or not divisible by the number of nodes.
    """
    found = _REQUEST.match(text)
    cores, mem_gb, nodes = (int(part) if part else 0 for part in found.groups()) if found else (0, 0, 0)
    nodes = nodes or 1
    if cores + mem_gb == 0:
        raise UsageError(f"request {text!r}: expected CORES'c' and GIGABYTES'G', for example 64c/128G/2numa")
    if cores % nodes or (mem_gb * 1024) % nodes:
        raise UsageError(f"request {text!r}: {nodes} NUMA nodes must share its cores and memory evenly")
    return SlotTerm(cores // nodes, mem_gb * 1024 // nodes, nodes)


def parse_objective(text: str) -> Objective:
    """An objective from the command line.

    `fr` 16-core slots; `fr-goal:0.35` the fewest moves to that fragment rate; `mixed[:W]` 16-core slots with weight
    1-W and 64-core slots on two nodes with weight W (default 0.5); `multi[:W]` 16-core slots and 64 GB of memory
    likewise; or requests with weights, `16c*0.7+64c/2numa*0.3`.

    Raises:
        UsageError: unknown, or a number out of range.
    """
    kind, _, argument = text.partition(":")
    sixteen = SlotTerm(16, 0, 1)
    if kind == "fr" and not argument:
        return Objective((sixteen,), None, text)
    if kind == "fr-goal":
        return Objective((sixteen,), _number(text, argument), text)
    if kind in ("mixed", "multi"):
        weight = _number(text, argument or "0.5")
        other = SlotTerm(32, 0, 2, weight) if kind == "mixed" else SlotTerm(0, 65536, 1, weight)
        terms = (SlotTerm(16, 0, 1, 1.0 - weight), other)
        return Objective(tuple(term for term in terms if term.weight > 0), None, text)
    return Objective(_weighted_terms(text), None, text)


def _weighted_terms(text: str) -> tuple[SlotTerm, ...]:
    terms = []
    for part in text.split("+"):
        request, _, weight = part.partition("*")
        if not re.match(r"^\d+[cG]", request):
            raise UsageError(
                f"objective {text!r} is unknown: expected fr, fr-goal:RATE, mixed[:W], multi[:W], or requests with "
                "weights such as 16c*0.7+64c/2numa*0.3"
            )
        term = parse_request(request)
        terms.append(SlotTerm(term.cores, term.mem_mb, term.nodes, _number(text, weight or "1")))
    total = sum(term.weight for term in terms)
    if total <= 0:
        raise UsageError(f"objective {text!r}: at least one weight must be above 0")
    return tuple(SlotTerm(t.cores, t.mem_mb, t.nodes, t.weight / total) for t in terms if t.weight > 0)


def _number(text: str, part: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"objective {text!r}: {part!r} is no number between 0 and 1")
    return value

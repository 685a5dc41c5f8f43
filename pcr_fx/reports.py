"""What was rewritten, how, and why the rest was not."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from pcr_fx.chain import Chain
from pcr_fx.errors import BodyError
from pcr_fx.linear import sequential_depth
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.passes.detect import Rejected
from pcr_fx.passes.plan import PlannedChain
from pcr_fx.passes.rewrite import depth
from pcr_fx.planner import Choice, Plan

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ChainEntry:
    """One chain of the report. It follows its solve node: printed after a run, it tells of that run."""

    chain: Chain
    options: Options
    planned: Plan | None = None
    choice: Choice | None = None
    node: SolveNode | None = None

    @property
    def plan(self) -> Plan | None:
        outcome = self.node.outcome if self.node is not None else None
        return outcome if isinstance(outcome, Plan) else self.planned

    @property
    def present_choice(self) -> Choice | None:
        return (self.node.choice if self.node is not None else None) or self.choice

    @property
    def reason(self) -> str:
        """Why these solvers."""
        outcome = self.node.outcome if self.node is not None else None
        if isinstance(outcome, BodyError):
            return f"block by block: {outcome}"
        choice = self.present_choice
        return choice.reason if choice is not None else "chosen at the first call"

    def _memory(self, plan: Plan, forward: str, backward: str) -> int:
        """Bytes of the Jacobians `[L, *batch, d, d]`, which a reduction in PyTorch's ops holds about twice over.

        Native code holds those of one sample a thread.
        """
        one = plan.program.length * plan.program.dimension**2 * plan.program.dtype.itemsize
        in_ops = [
            solver == "newton" and not self._is_native(solver, direction)
            for direction, solver in (("forward", forward), ("backward", backward))
        ]
        if any(in_ops):
            return 2 * _samples(plan) * one
        return min(_samples(plan), torch.get_num_threads()) * one if forward == "newton" else 0

    def _is_native(self, solver: str, direction: str) -> bool:
        """Whether `solver` runs as native code in this direction."""
        choice = self.present_choice
        if choice is None or choice.kernel is None:
            return False
        if solver == "newton":
            return direction == "forward" and self.options.linear_solver == "auto"
        return solver == "sequential"

    def to_dict(self) -> dict[str, Any]:
        plan, record = self.plan, self.node.record if self.node is not None else None
        last = record.last if record is not None else None
        dimension = plan.program.dimension if plan else None
        samples = _samples(plan) if plan else None
        forward = (record and record.solver_forward) or (self.choice.forward if self.choice else "not yet known")
        backward = (record and record.solver_backward) or (self.choice.backward if self.choice else "not yet known")
        iterations = last.iterations if last else None
        steps = None
        if iterations is not None and forward == "newton" and last is not None and last.fallback is None:
            native = self._is_native(forward, "forward")
            depth = (
                _native_depth(plan)
                if native and plan
                else sequential_depth(self.chain.length, self.options.linear_solver)
            )
            steps = iterations * depth
        return {
            "modules": self.chain.origin.modules,
            "source": self.chain.origin.source,
            "length": self.chain.length,
            "body_ops": list(self.chain.origin.ops),
            "state_shape": _shapes(plan),
            "dimension": dimension,
            "batch_dims": list(plan.program.layout.batch_dims) if plan else None,
            "coupled_dims": dict(plan.program.batch.reasons) if plan else {},
            "rewritten": self.node is not None,
            "solver_forward": forward,
            "solver_backward": backward,
            "native_forward": self._is_native(forward, "forward"),
            "native_backward": self._is_native(backward, "backward"),
            "reason": self.reason,
            "calls": record.forward_calls if record else 0,
            "iterations": iterations,
            "residual": last.residual if last else None,
            "tolerance": plan.newton.tolerance if plan else self.options.tolerance,
            "outcome": str(last.outcome) if last else None,
            "fallbacks": record.fallbacks + record.fallbacks_backward if record else 0,
            "fallback_reason": str(last.fallback) if last and last.fallback else None,
            "sequential_depth_before": self.chain.length,
            "sequential_depth_after": steps if steps is not None else (self.chain.length if last else None),
            "extra_memory_bytes": self._memory(plan, forward, backward) if plan else 0,
            "samples": samples,
        }


@dataclass(eq=False)
class RewriteReport:
    """The report of one model: `print` it, or take `to_dict()`.

    Attributes:
        chains: the chains found, rewritten or left alone.
        rejected: near misses, each with its reason.
        depth: ops on the longest path through the model.
        depth_in_chains: how many of them lie in chains.
        nodes: ops of the model.
        notes: what else there is to know.
    """

    chains: list[ChainEntry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    depth: int = 0
    depth_in_chains: int = 0
    nodes: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as plain values."""
        return {
            "chains": [entry.to_dict() for entry in self.chains],
            "rejected": [
                {"modules": miss.modules, "reason": miss.reason, "length": miss.length, "source": miss.source}
                for miss in self.rejected
            ],
            "depth": self.depth,
            "depth_in_chains": self.depth_in_chains,
            "ops": self.nodes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = [self._headline()]
        for number, entry in enumerate(self.chains, 1):
            parts.append(_chain_table(number, entry.to_dict()))
        if self.rejected:
            rows = [
                (miss.modules, miss.length or "", miss.source, textwrap.fill(miss.reason, 70)) for miss in self.rejected
            ]
            parts.append("Not parallelised:\n" + tabulate(rows, ("modules", "blocks", "source", "reason"), "simple"))
        parts += [f"Note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def _headline(self) -> str:
        if not self.chains:
            return f"pcr_fx: NO CHAIN FOUND in {self.nodes} ops. The model runs as it was."
        count = len(self.chains)
        share = 100 * self.depth_in_chains / max(self.depth, 1)
        return (
            f"pcr_fx: {count} chain{'s' if count > 1 else ''}; {self.depth_in_chains} of the {self.depth} ops on the "
            f"model's longest path ({share:.0f} %) lie in chains."
        )


def build_report(
    graph: fx.Graph,
    planned: Sequence[PlannedChain],
    nodes: Mapping[int, SolveNode],
    rejected: Sequence[Rejected],
    options: Options,
) -> RewriteReport:
    """The report of one rewrite of `graph`. `nodes` are the solve nodes by `id` of the planned chain."""
    entries = [ChainEntry(item.found.chain, options, item.plan, item.choice, nodes.get(id(item))) for item in planned]
    ops = sum(node.op.startswith("call_") for node in graph.nodes)
    report = RewriteReport(entries, list(rejected), *depth(graph, [item.found for item in planned]), ops)
    if not entries:
        log.warning("no chain found in %d ops; the model runs as it was%s", ops, _first_reason(rejected))
    log.debug("%s", report)
    return report


def merge_reports(reports: Sequence[RewriteReport]) -> RewriteReport:
    """One report for the graphs that a model was broken into."""
    if len(reports) == 1:
        return reports[0]
    merged = RewriteReport()
    for report in reports:
        merged.chains += report.chains
        merged.rejected += report.rejected
        merged.depth += report.depth
        merged.depth_in_chains += report.depth_in_chains
        merged.nodes += report.nodes
        merged.notes += [note for note in report.notes if note not in merged.notes]
    if len(reports) > 1:
        merged.notes.append(f"torch.compile broke the model into {len(reports)} graphs; a chain cannot span two")
    return merged


def _first_reason(rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return " (nothing in it repeats)"
    return f" ({rejected[0].modules}: {rejected[0].reason})"


def _samples(plan: Plan) -> int:
    state = plan.program.signature.states[0]
    return math.prod(state.shape[dim] for dim in plan.program.layout.batch_dims)


def _native_depth(plan: Plan) -> int:
    """Steps one after another in an iteration of native Newton: threads that samples leave idle share the blocks."""
    parts = max(1, torch.get_num_threads() // max(_samples(plan), 1))
    return math.ceil(plan.program.length / parts)


def _shapes(plan: Plan | None) -> Any:
    if plan is None:
        return None
    shapes = [list(spec.shape) for spec in plan.program.signature.states]
    return shapes[0] if len(shapes) == 1 else shapes


def _bytes(count: int) -> str:
    amount, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and unit != "GiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.4g} {unit}"


def _chain_table(number: int, entry: dict[str, Any]) -> str:
    state = "known at the first call"
    if entry["state_shape"] is not None:
        batch = ", ".join(map(str, entry["batch_dims"])) or "none"
        state = f"{entry['state_shape']}, d = {entry['dimension']} per sample, batch dims: {batch}"
    residual = "not run yet"
    if entry["residual"] is not None:
        residual = f"{entry['residual']:.1e} (tolerance {entry['tolerance']:.1e})"
    after = entry["sequential_depth_after"]
    rows = [
        ("blocks", f"{entry['length']} of {' > '.join(entry['body_ops'])}"),
        ("source", entry["source"] or "unknown"),
        ("state", state),
        ("solver", ", ".join(_solver(entry, direction) for direction in ("forward", "backward"))),
        ("because", textwrap.fill(entry["reason"], 90)),
        ("iterations", "-" if entry["iterations"] is None else entry["iterations"]),
        ("residual", residual),
        ("fallbacks", _fallbacks(entry)),
        ("sequential depth", f"{entry['length']} -> {'?' if after is None else after}"),
        ("extra memory", _bytes(entry["extra_memory_bytes"])),
    ]
    for dim, reason in entry["coupled_dims"].items():
        rows.append((f"dim {dim} is coupled", reason))
    title = f"Chain {number}: {entry['modules']}" + ("" if entry["rewritten"] else " (found and left alone)")
    return f"{title}\n" + tabulate(rows, tablefmt="presto", disable_numparse=True)


def _solver(entry: dict[str, Any], direction: str) -> str:
    native = " (native kernel)" if entry[f"native_{direction}"] else ""
    return f"{direction} {entry[f'solver_{direction}']}{native}"


def _fallbacks(entry: dict[str, Any]) -> str:
    if not entry["fallbacks"]:
        return "0"
    return f"{entry['fallbacks']} in {entry['calls']} calls" + (
        f": {entry['fallback_reason']}" if entry["fallback_reason"] else ""
    )

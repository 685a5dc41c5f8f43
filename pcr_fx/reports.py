"""What was rewritten, how, and why the rest was not."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from pcr_fx.chain import Chain, NearMiss
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.pages import fragment, page
from pcr_fx.planner import ADAM, BESIDE, FUSED_ADAM, HANDING, Choice, Plan, Timing
from pcr_fx.reproduction import script_of
from pcr_fx.solvers import Outcome, SolveStats
from pcr_fx.switches import OFF
from pcr_fx.ways import EAGER, Way, in_units

_DIRECTIONS = ("forward", "backward")
# Near misses, and places where graphs end, that are printed.
_MOST_LINES = 12


@dataclass(eq=False)
class ChainEntry:
    """One chain of the report. It follows its solve node: printed after a run, it tells of that run.

    Attributes:
        parameters: the names of those that the blocks have of their own, each a tensor for itself.
        is_packed: whether those that can be are packed, and these are what is left.
    """

    chain: Chain
    options: Options
    planned: Plan | BodyError | None = None
    choice: Choice | None = None
    node: SolveNode | None = None
    parameters: set[str] = field(default_factory=set)
    is_packed: bool = False

    @property
    def plan(self) -> Plan | None:
        outcome = self.node.outcome if self.node is not None else None
        latest = outcome if isinstance(outcome, Plan) else self.planned
        return latest if isinstance(latest, Plan) else None

    @property
    def _refusal(self) -> BodyError | None:
        """Why there is no plan."""
        latest = (self.node.outcome if self.node is not None else None) or self.planned
        return latest if isinstance(latest, BodyError) else None

    @property
    def present_choice(self) -> Choice | None:
        return (self.node.choice if self.node is not None else None) or self.choice

    @property
    def reason(self) -> str:
        """Why these solvers."""
        if self._refusal is not None:
            return f"block by block: {self._refusal}"
        choice = self.present_choice
        return choice.reason if choice is not None else "chosen at the first call"

    def _way(self, direction: str) -> Way | None:
        choice = self.present_choice
        return getattr(choice, direction) if choice is not None else None

    def _solver(self, direction: str) -> str:
        """What ran last, or else what is going to run."""
        record, way = self.node.record if self.node is not None else None, self._way(direction)
        ran = getattr(record, f"solver_{direction}", None)
        return ran or (way.solver if way is not None else "not yet known")

    def _way_name(self, direction: str) -> str | None:
        """The way that was chosen, as timings name it; `None` before that."""
        way = self._way(direction)
        return None if way is None else EAGER if self.is_left_alone else way.name

    def _is_generated(self, direction: str) -> bool:
        """Whether generated code runs in this direction."""
        way, choice, plan = self._way(direction), self.present_choice, self.plan
        if way is None or choice is None or plan is None or self.is_left_alone:
            return False
        if self._solver(direction) == way.solver:
            return bool(way.kind)
        return bool(plan.fallback(plan.expected_samples).kind)

    @property
    def is_left_alone(self) -> bool:
        """Whether the chain runs, or is going to run, in the model's own ops."""
        if self.node is None:
            return True
        if self.node.record.forward_calls:
            return self.node.record.left_alone
        choice = self.present_choice
        return choice is not None and choice.leaves_alone(torch.is_grad_enabled())

    def _memory(self, plan: Plan) -> int:
        """Bytes that the linear systems take at a time."""
        needed = 0
        for direction in () if self.is_left_alone else ("forward", "backward"):
            way = self._way(direction)
            if way is not None and self._solver(direction) != "sequential":
                needed = max(needed, way.memory(plan.program, plan.expected_samples, plan.settings))
        return needed

    def _depth(self, plan: Plan, last: SolveStats) -> int:
        """Steps one after another of the latest solve."""
        way = self._way("forward")
        if way is None or self._solver("forward") == "sequential" or last.fallback is not None:
            return self.chain.length
        return way.depth(plan.program, plan.expected_samples, last.iterations, plan.settings)

    @property
    def training_step(self) -> dict[str, float] | None:
        """The seconds of the parts of a training step where the blocks have parameters of their own, as far as measured."""
        choice = self.present_choice
        if choice is None or not self.parameters or self.is_left_alone:
            return None
        seconds = {(timing.direction, timing.way): timing.seconds for timing in choice.timings}
        beside = {"handing_out": HANDING, "adam": ADAM, "adam_fused": FUSED_ADAM}
        # What is beside the chain was measured with all operands, of which some may be no parameters.
        share = len(self.parameters) / max(self.chain.length * self.chain.num_operands, 1)
        step = {direction: seconds.get((direction, getattr(choice, direction).name)) for direction in _DIRECTIONS}
        step |= {name: seconds.get(("backward", thing)) for name, thing in beside.items()}
        found = {name: value * (share if name in beside else 1) for name, value in step.items() if value is not None}
        return found if len(found) == len(step) else None

    def to_dict(self) -> dict[str, Any]:
        plan, record = self.plan, self.node.record if self.node is not None else None
        last = record.last if record is not None else None
        choice, way = self.present_choice, self._way("forward")
        return {
            "modules": self.chain.origin.modules,
            "source": self.chain.origin.source,
            "length": self.chain.length,
            "body_ops": list(self.chain.origin.ops),
            "state_shape": _shapes(plan),
            "dimension": plan.program.dimension if plan else None,
            "batch_dims": list(plan.program.layout.batch_dims) if plan else None,
            "coupled_dims": dict(plan.program.batch.reasons) if plan else {},
            "rewritten": self.node is not None,
            "left_alone": self.is_left_alone,
            **{f"way_{direction}": self._way_name(direction) for direction in _DIRECTIONS},
            "solver_forward": self._solver("forward"),
            "solver_backward": self._solver("backward"),
            "kernel_kind": "native" if plan is None or isinstance(plan.kernel, str) else plan.kernel.kind,
            "native_forward": self._is_generated("forward"),
            "native_backward": self._is_generated("backward"),
            "window": way.window if way else None,
            "reason": self.reason,
            "timings": [asdict(timing) for timing in choice.timings] if choice else [],
            "calls": record.forward_calls if record else 0,
            "iterations": last.iterations if last else None,
            "residual": last.residual if last else None,
            "tolerance": plan.settings.tolerance if plan else self.options.tolerance,
            "outcome": str(last.outcome) if last else None,
            "fallbacks": record.fallbacks + record.fallbacks_backward if record else 0,
            "fallback_reason": str(last.fallback) if last and last.fallback else None,
            "calls_until_next_try": record.rest.calls if record else 0,
            "sequential_depth_before": self.chain.length,
            "sequential_depth_after": self._depth(plan, last) if plan and last else None,
            "extra_memory_bytes": self._memory(plan) if plan else 0,
            "samples": plan.expected_samples if plan else None,
            "own_parameters": len(self.parameters),
            "packed": self.is_packed,
            "training_step": self.training_step,
        }


@dataclass(frozen=True)
class RegionEntry:
    """Blocks of which the inner backend compiled one body.

    Attributes:
        modules: where they stand in the model.
        source: the line of the model that they come from.
        length: how many blocks they are.
        ops: those of a block.
    """

    modules: str
    source: str
    length: int
    ops: tuple[str, ...]


@dataclass(eq=False)
class RewriteReport:
    """The report of one model: `print` it, or take `to_dict()`.

    Attributes:
        chains: the chains found, rewritten or left alone.
        rejected: near misses, each with its reason, the longest first.
        depth: ops on the longest path through the model.
        depth_in_chains: how many of them lie in chains.
        nodes: ops of the model.
        notes: what else there is to know.
        outside: what `torch.compile` runs outside of all graphs, and why.
        is_off: whether nothing was looked for, since everything is switched off.
        regions: what no solver runs, and the inner backend compiled once for all blocks.
    """

    chains: list[ChainEntry] = field(default_factory=list)
    rejected: list[NearMiss] = field(default_factory=list)
    depth: int = 0
    depth_in_chains: int = 0
    nodes: int = 0
    notes: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    is_off: bool = False
    regions: list[RegionEntry] = field(default_factory=list)

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
            "outside": list(self.outside),
            "is_off": self.is_off,
            "regions": [asdict(region) for region in self.regions],
        }

    def summary(self) -> str:
        """The report in a line a chain, and as many for near misses as it prints."""
        lines = [self._headline()]
        lines += [f"{number}. {_summary(entry.to_dict())}" for number, entry in enumerate(self.chains, 1)]
        misses = [f"not {miss.modules}: {miss.reason}" for miss in self.rejected[:_MOST_LINES]]
        return "\n".join([*lines, *misses, *_rest(self.rejected)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML file, which needs no network.

        Args:
            path: of the file; what is there is overwritten.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(page(self.to_dict(), self._headline()), encoding="utf-8")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return fragment(self.to_dict(), self._headline())

    def repro(self, number: int = 1) -> str:
        """A chain as one script for a bug report: its ops, shapes and options, numbers from a seed, and none of the model's.

        Args:
            number: of the chain, as the report counts them.

        Raises:
            UnsupportedError: there is no such chain, it has not run yet, or a script cannot say what it does.
        """
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(self.chains):
            raise UnsupportedError(f"number must be one of the report's {len(self.chains)} chains, got {number!r}")
        entry = self.chains[number - 1]
        return script_of(entry.chain, entry.plan or entry._refusal, entry.options)

    def __str__(self) -> str:
        parts = [self._headline()]
        if self.outside:
            lines = (textwrap.fill(words, 120, subsequent_indent="  ") for words in self.outside[:_MOST_LINES])
            parts.append("\n".join(["Outside of the graphs that torch.compile made:", *lines, *_rest(self.outside)]))
        for number, entry in enumerate(self.chains, 1):
            parts.append(_chain_table(number, entry.to_dict()))
        if self.regions:
            shown = self.regions[:_MOST_LINES]
            found = [(one.modules, one.length, len(one.ops), one.source) for one in shown]
            table = tabulate(found, ("modules", "blocks", "ops each", "source"), "simple")
            parts.append(
                "\n".join(["Compiled once for all blocks, by the inner backend:", table, *_rest(self.regions)])
            )
        if self.rejected:
            rows = [
                (miss.modules, miss.length or "", miss.source, textwrap.fill(miss.reason, 70))
                for miss in self.rejected[:_MOST_LINES]
            ]
            table = tabulate(rows, ("modules", "blocks", "source", "reason"), "simple")
            parts.append("\n".join(["Not parallelised:", table, *_rest(self.rejected)]))
        parts += [f"Note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def _headline(self) -> str:
        if self.is_off:
            return f"pcr_fx: SWITCHED OFF. {OFF}."
        if not self.chains:
            rest = "Blocks that are alike are compiled once." if self.regions else "The model runs as it was."
            return f"pcr_fx: NO CHAIN FOUND in {self.nodes} ops. {rest}"
        count = len(self.chains)
        share = 100 * self.depth_in_chains / max(self.depth, 1)
        return (
            f"pcr_fx: {count} chain{'s' if count > 1 else ''}; {self.depth_in_chains} of the {self.depth} ops on the "
            f"model's longest path ({share:.0f} %) lie in chains."
        )


def _rest(items: Sequence[Any]) -> list[str]:
    """That there is more than was printed."""
    more = len(items) - _MOST_LINES
    return [f"and {more} more, which to_dict() has"] if more > 0 else []


def merge_reports(reports: Sequence[RewriteReport]) -> RewriteReport:
    """One report for the graphs that a model was broken into: what many of them have is said once."""
    if len(reports) == 1:
        return reports[0]
    merged = RewriteReport()
    rejected: dict[NearMiss, None] = {}
    for report in reports:
        merged.chains += report.chains
        rejected |= dict.fromkeys(report.rejected)
        merged.depth += report.depth
        merged.depth_in_chains += report.depth_in_chains
        merged.nodes += report.nodes
        merged.is_off |= report.is_off
        merged.regions += report.regions
        merged.notes += [note for note in report.notes if note not in merged.notes]
    merged.rejected = sorted(rejected, key=lambda miss: -miss.length)
    if len(reports) > 1:
        merged.notes.append(f"torch.compile broke the model into {len(reports)} graphs; a chain cannot span two")
    return merged


def _shapes(plan: Plan | None) -> Any:
    if plan is None:
        return None
    shapes = [list(spec.shape) for spec in plan.program.signature.states]
    return shapes[0] if len(shapes) == 1 else shapes


def _summary(entry: dict[str, Any]) -> str:
    """A chain in a line: how many blocks of what, and how much faster each direction was measured than the model's own ops."""
    seconds = {(timing["direction"], timing["way"]): timing["seconds"] for timing in entry["timings"]}
    words = []
    for direction in _DIRECTIONS:
        own, ours = seconds.get((direction, EAGER)), seconds.get((direction, entry[f"way_{direction}"]))
        gain = f" {own / ours:.3g}x" if own and ours and not entry["left_alone"] else ""
        words.append(_solver(entry, direction) + gain)
    size = "" if entry["dimension"] is None else f", d = {entry['dimension']}"
    return f"{entry['modules']}: {entry['length']} blocks{size}; {', '.join(words)}"


def _chain_table(number: int, entry: dict[str, Any]) -> str:
    state = "known at the first call"
    if entry["state_shape"] is not None:
        batch = ", ".join(map(str, entry["batch_dims"])) or "none"
        state = f"{entry['state_shape']}, d = {entry['dimension']} per sample, batch dims: {batch}"
    residual = "not run yet"
    if entry["residual"] is not None:
        tolerance = "none" if entry["tolerance"] is None else f"{entry['tolerance']:.1e}"
        residual = f"{entry['residual']:.1e} (tolerance {tolerance})"
        if entry["outcome"] == str(Outcome.ROUNDING):
            residual += ", which is the rounding level of the blocks"
    after = entry["sequential_depth_after"]
    rows = [
        ("blocks", f"{entry['length']} of {' > '.join(entry['body_ops'])}"),
        ("source", entry["source"] or "unknown"),
        ("state", state),
        ("solver", ", ".join(_solver(entry, direction) for direction in _DIRECTIONS)),
        ("because", textwrap.fill(entry["reason"], 90)),
        *_measured(entry),
        *_around(entry),
        ("iterations", "-" if entry["iterations"] is None else entry["iterations"]),
        ("residual", residual),
        ("fallbacks", _fallbacks(entry)),
        ("sequential depth", f"{entry['length']} -> {'?' if after is None else after}"),
        ("extra memory", in_units(entry["extra_memory_bytes"])),
    ]
    if entry["window"]:
        rows.insert(4, ("window", f"{entry['window']} of {entry['length']} blocks at a time"))
    for dim, reason in entry["coupled_dims"].items():
        rows.append((f"dim {dim} is coupled", reason))
    title = f"Chain {number}: {entry['modules']}" + ("" if entry["rewritten"] else " (found and left alone)")
    return f"{title}\n" + tabulate(rows, tablefmt="presto", disable_numparse=True)


def _solver(entry: dict[str, Any], direction: str) -> str:
    if entry["left_alone"]:
        return f"{direction} the model's own ops"
    kernel = f" ({entry['kernel_kind']} kernel)" if entry[f"native_{direction}"] else ""
    return f"{direction} {entry[f'solver_{direction}']}{kernel}"


def _measured(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """What each way would cost, a row for each direction."""
    rows = []
    for direction in _DIRECTIONS:
        timings = [Timing(**timing) for timing in entry["timings"] if timing["direction"] == direction]
        timings = [timing for timing in timings if timing.way not in (ADAM, FUSED_ADAM)]
        timings.sort(key=lambda timing: (timing.way in BESIDE, timing.seconds is None, timing.seconds))
        if timings:
            rows.append((f"{direction} by", "\n".join(textwrap.fill(_timing(timing), 90) for timing in timings)))
    return rows


def _around(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a training step goes, if that is less into the chain than into its many parameters."""
    step = entry["training_step"]
    if step is None or step["handing_out"] + step["adam"] < step["forward"] + step["backward"]:
        return []
    ms = {name: f"{1e3 * seconds:.3g}" for name, seconds in step.items()}
    text = (
        f"{entry['own_parameters']:,} parameters, in a training step: handing out their gradients {ms['handing_out']} ms, and "
        f"Adam over them {ms['adam']} ms ({ms['adam_fused']} ms with fused=True)."
    )
    if not entry["packed"]:
        text += " Packed, they are few: transform(model, x, pack_parameters=True, optimizer=optimizer)"
    return [("beside it", textwrap.fill(text, 90))]


def _timing(timing: Timing) -> str:
    return f"and {timing}, {BESIDE[timing.way]}" if timing.way in BESIDE else str(timing)


def _fallbacks(entry: dict[str, Any]) -> str:
    if not entry["fallbacks"]:
        return "0"
    text = f"{entry['fallbacks']} in {entry['calls']} calls"
    if entry["fallback_reason"]:
        text += f": {entry['fallback_reason']}"
    if entry["calls_until_next_try"]:
        text += f"; tried again in {entry['calls_until_next_try']} calls"
    return text

"""Options of every entry point: one frozen record, given as an object or as a dict."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pcr_fx.errors import OptionError

CHOICES: dict[str, tuple[str, ...]] = {
    "solver": ("auto", "newton", "quasi-newton", "picard", "jacobi", "sequential"),
    "linear_solver": ("auto", "cyclic_reduction", "parallel_cyclic_reduction", "sequential"),
    "start": ("repeat", "previous", "picard"),
    "planning": ("measured", "estimated"),
    "on_failure": ("fallback", "raise"),
}


@dataclass(frozen=True)
class Number:
    """What an option that is a number may be.

    Attributes:
        type: what it is kept as; others that are the same number, as NumPy has them, are made one of these.
        accept: whether a number is allowed.
        allowed: the same in words.
        optional: whether it may be `None`.
    """

    name: str
    type: type[int] | type[float]
    accept: Callable[[Any], bool]
    allowed: str
    optional: bool = True

    def kept(self, value: Any) -> Any:
        """`value` as it is kept.

        Raises:
            ValueError, OverflowError: it is not allowed.
        """
        if value is None and self.optional:
            return None
        kind = numbers.Integral if self.type is int else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(self.allowed)
        number = float(value) if self.type is float else int(value)  # type: ignore[arg-type, call-overload]
        if not self.accept(number):
            raise ValueError(self.allowed)
        return number


NUMBERS = (
    Number("tolerance", float, lambda value: 0 < value < math.inf, "a positive number or None"),
    Number("max_iterations", int, lambda value: value >= 1, "a whole number >= 1 or None"),
    Number("damping", float, lambda value: 0 < value <= 1, "a number above 0 and up to 1", optional=False),
    Number("window", int, lambda value: value >= 2, "a whole number >= 2 or None"),
    Number("memory_limit", int, lambda value: value >= 0, "a whole number of bytes or None"),
    Number("checkpoint", int, lambda value: value >= 1, "a whole number >= 1 or None"),
    Number("diagonal_probes", int, lambda value: value >= 1, "a whole number >= 1 or None"),
    Number("planning_budget", float, lambda value: 0 < value < math.inf, "a positive number", optional=False),
    Number("min_length", int, lambda value: value >= 2, "a whole number >= 2", optional=False),
)


@dataclass(frozen=True)
class Options:
    """How chains are found and solved.

    Attributes:
        solver: how chains are evaluated. Iterations on all blocks at once, which differ in what stands in for the
            blocks' Jacobians in the linear system for the next correction: `"newton"` (the Jacobians),
            `"quasi-newton"` (their diagonals), `"picard"` (the identity), `"jacobi"` (zero). `"sequential"`: block by
            block. `"auto"`: what is fastest, forward and backward each. Gradients are exact with every solver.
        linear_solver: how a linearised chain is solved: `"cyclic_reduction"` (O(L) work in 2 log2 L steps),
            `"parallel_cyclic_reduction"` (O(L log L) work in log2 L steps), `"sequential"` (L steps), or `"auto"`.
        tolerance: the largest accepted `|z_l - f_l(z_{l-1})|`, relative to the size of what block l computes: that of
            `|z_l|`, plus `|J_l| |z_{l-1}|` where terms cancel in it; per sample and carried tensor. What rounding in a
            block leaves is accepted too. `None`: a few ulps of the dtype.
        max_iterations: iterations before a solve is given up; in windows, for each length of one. `None`: at most as
            many as blocks, and 32 (newton), 64 (quasi-newton) or 256; up to 32 times as many where they are damped.
        damping: the share of each correction that is made, above 0 and up to 1.
        window: blocks that are solved at a time. The window moves on to the first block that is not solved yet.
            `None`: all blocks, or as many as fit into `memory_limit`.
        memory_limit: bytes that the linear systems of a chain may take, and the states that a loop keeps for its backward.
            `None`: a quarter of what is free.
        checkpoint: a loop (`pcr_fx.scan`, PyTorch's own) keeps its states after each so many steps, and its backward computes
            those between anew. `None`: all are kept, or, where these would exceed `memory_limit`, those after each square
            root of the number of steps. Not for chains of blocks, which the model itself can checkpoint, nor within what
            another compiler makes of the loop.
        start: the trajectory that an iteration starts from: `"repeat"` (the initial state), `"previous"` (the last
            trajectory of the same shape at this place in the model) or `"picard"` (two sweeps of Picard's iteration).
        diagonal_probes: `"quasi-newton"` estimates diagonals from so many random vectors (Hutchinson). `None`: they are
            exact, at the cost of a Jacobian.
        planning: how `solver="auto"` decides: `"measured"` tries what an estimate cannot rule out, on the shapes and
            the device at hand; `"estimated"` follows a fixed rule, the same in every run.
        planning_budget: seconds that measuring may take for each chain and batch size, compilation apart.
        plan_cache: whether measurements are kept on disk, in `PCR_FX_CACHE_DIR`, and taken from there.
        kernels: whether a chain may run as one generated native kernel: where its ops can be printed, and the body is
            small enough to gain by it. A compiler is needed; without one chains run in PyTorch's ops.
        min_length: the fewest blocks that are worth a chain, at least 2.
        on_failure: when a solve misses its tolerance: `"fallback"` evaluates the chain sequentially and says so in
            the report and the log, `"raise"` raises `SolveError`.
        inner_backend: the `torch.compile` backend that gets the rest of the graph: a registered name or a callable
            `(graph_module, example_inputs) -> callable`. Only used by `torch.compile(backend="deeppcr")`.
        regions: whether an inner backend that takes regions compiles blocks that are alike once, where no solver runs
            them. Off, since Inductor of PyTorch 2.13 gets the gradients of regions wrong for some graphs; where gradients
            are taken, it gets none here. Only used by `torch.compile(backend="deeppcr")`.

    Raises:
        OptionError: an unknown name, or a value that is not allowed.
    """

    solver: str = "auto"
    linear_solver: str = "auto"
    tolerance: float | None = None
    max_iterations: int | None = None
    damping: float = 1.0
    window: int | None = None
    memory_limit: int | None = None
    checkpoint: int | None = None
    start: str = "repeat"
    diagonal_probes: int | None = None
    planning: str = "measured"
    planning_budget: float = 2.0
    plan_cache: bool = True
    kernels: bool = True
    min_length: int = 8
    on_failure: str = "fallback"
    inner_backend: str | Callable[..., Any] = "inductor"
    regions: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                _refuse(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        for number in NUMBERS:
            value = getattr(self, number.name)
            try:
                object.__setattr__(self, number.name, number.kept(value))
            except (ValueError, OverflowError):
                _refuse(number.name, value, number.allowed)
        for name in ("kernels", "plan_cache", "regions"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        self._check_solver()
        if not (callable(self.inner_backend) or isinstance(self.inner_backend, str)):
            _refuse("inner_backend", self.inner_backend, "the name of a torch.compile backend, or a callable")
        if self.inner_backend == "deeppcr":
            _refuse("inner_backend", self.inner_backend, "a torch.compile backend other than 'deeppcr' itself")

    def _check_solver(self) -> None:
        """No option may be given that the solver does not have."""
        if self.diagonal_probes is not None and self.solver != "quasi-newton":
            _refuse(
                "diagonal_probes",
                self.diagonal_probes,
                f'None with solver="{self.solver}": only "quasi-newton" has them',
            )
        for name, default in {"damping": 1.0, "window": None, "start": "repeat"}.items():
            if self.solver == "sequential" and getattr(self, name) != default:
                _refuse(name, getattr(self, name), f'{default!r} with solver="sequential", which does not iterate')

    @classmethod
    def of(cls, options: Options | Mapping[str, Any] | None) -> Options:
        """The options given as an `Options`, as a mapping of its fields, or as `None` for the defaults."""
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise OptionError(f"options must be a pcr_fx.Options, a dict or None, got {type(options).__name__}")
        valid = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in valid]
        if unknown:
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; valid options are {', '.join(valid)}")
        return cls(**options)


def _refuse(name: str, value: Any, allowed: str) -> None:
    raise OptionError(f"option {name}={value!r} is not allowed; it must be {allowed}")

"""Options of every entry point: one frozen record, given as an object or as a dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pcr_fx.errors import OptionError

CHOICES: dict[str, tuple[str, ...]] = {
    "solver": ("auto", "newton", "sequential"),
    "linear_solver": ("auto", "cyclic_reduction", "parallel_cyclic_reduction", "sequential"),
    "on_failure": ("fallback", "raise"),
}


@dataclass(frozen=True)
class Options:
    """How chains are found and solved.

    Attributes:
        solver: `"newton"` (Newton + cyclic reduction, forward and backward), `"sequential"`, or `"auto"`, which
            picks one for the forward and one for the backward by a stated rule (see `pcr_fx.planner`).
        linear_solver: how a linearised chain is solved: `"cyclic_reduction"` (O(L) work in 2 log2 L steps),
            `"parallel_cyclic_reduction"` (O(L log L) work in log2 L steps), `"sequential"` (L steps), or `"auto"`.
        tolerance: the largest accepted `|z_l - f_l(z_{l-1})|`, relative to the size of what block l computes: that of
            `|z_l|`, plus `|J_l| |z_{l-1}|` where terms cancel in it; per sample and carried tensor. `None`: a few
            ulps of the dtype.
        max_iterations: Newton iterations before a solve is given up. `None`: `min(L, 32)`.
        kernels: whether a chain may run as one generated native kernel: where its ops can be printed, and the body is
            small enough to gain by it. A compiler is needed; without one chains run in PyTorch's ops.
        min_length: the fewest blocks that are worth a chain, at least 2.
        on_failure: when a solve misses its tolerance: `"fallback"` evaluates the chain sequentially and says so in
            the report and the log, `"raise"` raises `SolveError`.
        inner_backend: the `torch.compile` backend that gets the rest of the graph: a registered name or a callable
            `(graph_module, example_inputs) -> callable`. Only used by `torch.compile(backend="deeppcr")`.

    Raises:
        OptionError: an unknown name, or a value that is not allowed.
    """

    solver: str = "auto"
    linear_solver: str = "auto"
    tolerance: float | None = None
    max_iterations: int | None = None
    kernels: bool = True
    min_length: int = 8
    on_failure: str = "fallback"
    inner_backend: str | Callable[..., Any] = "inductor"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                _refuse(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        _check_number(
            "tolerance", self.tolerance, (int, float), lambda value: 0 < value < math.inf, "a positive number or None"
        )
        _check_number(
            "max_iterations", self.max_iterations, (int,), lambda value: value >= 1, "a whole number >= 1 or None"
        )
        if not isinstance(self.kernels, bool):
            _refuse("kernels", self.kernels, "True or False")
        if self.min_length is None:
            _refuse("min_length", None, "a whole number >= 2")
        _check_number("min_length", self.min_length, (int,), lambda value: value >= 2, "a whole number >= 2")
        if not (callable(self.inner_backend) or isinstance(self.inner_backend, str)):
            _refuse("inner_backend", self.inner_backend, "the name of a torch.compile backend, or a callable")
        if self.inner_backend == "deeppcr":
            _refuse("inner_backend", self.inner_backend, "a torch.compile backend other than 'deeppcr' itself")

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


def _check_number(name: str, value: Any, types: tuple[type, ...], accept: Callable[[Any], bool], allowed: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, types) or not accept(value):
        _refuse(name, value, allowed)


def _refuse(name: str, value: Any, allowed: str) -> None:
    raise OptionError(f"option {name}={value!r} is not allowed; it must be {allowed}")

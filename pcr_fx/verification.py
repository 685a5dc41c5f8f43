"""Whether a model with its chains solved computes what it computed before, and how fast: `pcr_fx.verify`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pcr_fx.backend import NAME, last_report
from pcr_fx.comparison import SEED, Errors, Judge, Results, Runner
from pcr_fx.errors import OptionError, UnsupportedError
from pcr_fx.explicit import transform
from pcr_fx.options import CHOICES, Options
from pcr_fx.reports import RewriteReport

_THROUGH = ("transform", "compile")
_FLOAT64 = "the model in float64"
# How often Dynamo may compile a forward.
_COMPILATIONS = 64
# Rounds of timing, at the least and the most, and the seconds that they may take together.
_FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 50, 3.0


@dataclass(frozen=True)
class Checked:
    """One way through the chains of a model, compared with the model as it is.

    Attributes:
        solver: the option that was tried.
        ran: what ran each chain, in words.
        errors: against the reference; `None` where it could not be run.
        failure: why it could not be run, if so.
        fallbacks: solves that missed their tolerance, and went block by block.
        seconds: of a forward call without gradients, the least of several.
        seconds_with_gradients: of a forward call and its gradients; `None` where nothing has one.
        speedup, speedup_with_gradients: how many times as fast as the model as it is.
        report: what `pcr_fx.report` says of it.
    """

    solver: str
    ran: str
    errors: Errors | None = None
    failure: str = ""
    fallbacks: int = 0
    seconds: float | None = None
    seconds_with_gradients: float | None = None
    speedup: float | None = None
    speedup_with_gradients: float | None = None
    report: RewriteReport | None = field(default=None, repr=False)

    @property
    def is_right(self) -> bool:
        """Whether it ran, and computes what the model does."""
        return self.errors is not None and self.errors.are_allowed


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `print` it, or take `to_dict()`.

    Attributes:
        reference: what results were compared with, in words.
        own: the model as it is, compared with the same.
        ways: each way that was tried.
    """

    reference: str
    own: Checked
    ways: tuple[Checked, ...]

    @property
    def is_right(self) -> bool:
        """Whether every way computes what the model does; one that could not be run does not."""
        return all(way.is_right for way in self.ways)

    @property
    def verdict(self) -> str:
        """A sentence for each way."""
        return "\n".join(map(self._sentence, self.ways))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, but for the reports of the ways, which are theirs."""

        def plain(one: Checked) -> dict[str, Any]:
            return {**asdict(replace(one, report=None)), "is_right": one.is_right}

        own, ways = plain(self.own), [plain(way) for way in self.ways]
        return {
            "reference": self.reference,
            "is_right": self.is_right,
            "own": own,
            "ways": ways,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        header = ("solver", "what ran", "outputs off", "gradients off", "forward", "with gradients", "fallbacks")
        table = tabulate([_row(one) for one in (self.own, *self.ways)], header, "simple", disable_numparse=True)
        return f"pcr_fx: compared with {self.reference}.\n\n{table}\n\n{self.verdict}"

    def _sentence(self, way: Checked) -> str:
        if way.failure:
            return f"{way.solver}: NOT RUN: {way.failure}."
        assert way.errors is not None and self.own.errors is not None
        if not way.is_right:
            return (
                f"{way.solver}: WRONG: {way.errors.worst} is {way.errors.share:.2g} times as far from {self.reference} as is "
                "allowed. Please report it; PCR_FX_DISABLE=1 switches everything off meanwhile."
            )
        return f"{way.solver}: right, and {_pace(way)}."


def verify(
    model: nn.Module,
    *inputs: Any,
    solver: str | None = None,
    options: Any = None,
    through: str = "transform",
) -> Verification:
    """Compare a model whose chains are solved with the model as it is: outputs, gradients and time.

    Both are copied, run twice with gradients and once without, from the same random numbers, and compared with the model in
    float64. Gradients are those of a fixed random sum of the outputs, for all parameters and inputs that require any. Each
    tensor may be 10 times as far from float64 as the model's own ops leave it, and 10 roundings further. A model that draws
    random numbers, or cannot be run in float64, is compared with itself in its own dtype, to the root of its rounding.

    Args:
        model: any module; neither it nor its inputs are changed.
        inputs: what its forward takes.
        solver: a value of the option of this name in place of that in `options`, or `"all"` to try each in turn.
        options: an `Options`, or a dict of its fields.
        through: which way in: `"transform"`, or `"compile"` for `torch.compile`.

    Raises:
        UnsupportedError: an argument of the wrong kind, or a model that cannot be copied.
        OptionError: an option that is not allowed.
        Exception: whatever the model itself raises for these inputs.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"verify takes a torch.nn.Module, got {type(model).__name__}")
    if through not in _THROUGH:
        raise OptionError(f"through must be one of {', '.join(map(repr, _THROUGH))}, got {through!r}")
    settings = Options.of(options)
    if solver not in (None, "all"):
        settings = replace(settings, solver=solver)
    solvers = CHOICES["solver"] if solver == "all" else (settings.solver,)
    own = Runner(model, inputs)
    truth, reference = _reference(model, inputs, own)
    judge = Judge(truth, own.results(), reference == _FLOAT64, settings)
    tried = [_try(name, settings, model, inputs, through, judge) for name in solvers]
    seconds = _timed([own, *(one.runner for one in tried)])
    first = Checked("-", "the model as it is", judge.errors(judge.own), **_times(seconds[0], seconds[0]))
    ways = [replace(one.checked, **_times(found, seconds[0])) for one, found in zip(tried, seconds[1:], strict=True)]
    return Verification(reference, first, tuple(ways))


# --- running --------------------------------------------------------------------------------------------------------------


def _reference(model: nn.Module, inputs: Sequence[Any], own: Runner) -> tuple[Results, str]:
    """What to compare with, and that in words."""
    first, again = Runner(model, inputs).results(), Runner(model, inputs).results(SEED + 1)
    if any(not _is_same(again.outputs[name], one) for name, one in first.outputs.items()):
        return first, "the model in its own dtype, since the random numbers that it draws differ in float64"
    try:
        return Runner(model, inputs, torch.float64).results(), _FLOAT64
    except Exception as error:
        return first, f"the model in its own dtype, since it does not run in float64 ({_first_line(error)})"


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Tried(NamedTuple):
    checked: Checked
    runner: Runner | None


def _try(solver: str, settings: Options, model: nn.Module, inputs: Sequence[Any], through: str, judge: Judge) -> _Tried:
    """Run a copy of the model by a solver."""

    def made(copied: nn.Module) -> Callable[..., Any]:
        if through == "transform":
            return transform(copied, tuple(inputs), options)
        given = {name: value for name, value in vars(options).items() if value != getattr(Options(), name)}
        return torch.compile(copied, backend=NAME, options=given)

    try:
        options = replace(settings, solver=solver)
        runner = Runner(model, inputs, made=made)
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):  # of one forward, for each solver
            results = runner.results()
    except Exception as error:  # the model itself ran: whatever is raised now is told of this way
        return _Tried(Checked(solver, "-", failure=_first_line(error)), None)
    report: Any = runner.run.report if through == "transform" else last_report()  # type: ignore[attr-defined]
    entries = report.to_dict()["chains"]
    fallbacks = sum(entry["fallbacks"] for entry in entries)
    ran = "; ".join(dict.fromkeys(map(_ran, entries))) or "no chain found"
    return _Tried(Checked(solver, ran, judge.errors(results), "", fallbacks, report=report), runner)


def _ran(entry: Mapping[str, Any]) -> str:
    if entry["left_alone"]:
        return "the model's own ops"
    words = [
        entry[f"solver_{direction}"] + (f" ({entry['kernel_kind']})" if entry[f"native_{direction}"] else "")
        for direction in ("forward", "backward")
    ]
    return " / ".join(dict.fromkeys(words))


# --- timing ---------------------------------------------------------------------------------------------------------------


def _timed(runners: Sequence[Runner | None]) -> list[tuple[float | None, float | None]]:
    """The least seconds of a call without gradients and with, all taken in turn."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    ends = time.perf_counter() + _SECONDS
    with torch.random.fork_rng():
        for number in range(_MOST_ROUNDS):
            if number >= _FEWEST_ROUNDS and time.perf_counter() > ends:
                break
            for runner, (forward, step) in zip(runners, found, strict=True):
                if runner is not None:
                    forward.append(_seconds(runner.forward))
                    if runner.moving:
                        step.append(_seconds(runner.step))
    return [(min(forward, default=None), min(step, default=None)) for forward, step in found]


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _times(found: tuple[float | None, float | None], own: tuple[float | None, float | None]) -> dict[str, Any]:
    speedups = [b / a if a and b else None for a, b in zip(found, own, strict=True)]
    return dict(
        zip(
            ("seconds", "seconds_with_gradients", "speedup", "speedup_with_gradients"), (*found, *speedups), strict=True
        )
    )


# --- in words -------------------------------------------------------------------------------------------------------------


def _row(one: Checked) -> tuple[str, ...]:
    errors = one.errors
    outputs, gradients = ("-", "-") if errors is None else (_number(errors.outputs), _number(errors.gradients))
    times = _time(one.seconds, one.speedup), _time(one.seconds_with_gradients, one.speedup_with_gradients)
    return one.solver, one.failure or one.ran, outputs, gradients, *times, str(one.fallbacks)


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _time(seconds: float | None, speedup: float | None) -> str:
    return "-" if seconds is None or speedup is None else f"{1e3 * seconds:.3g} ms ({speedup:.2g}x)"


def _pace(way: Checked) -> str:
    found = {"forward": way.speedup, "with gradients": way.speedup_with_gradients}
    words = [f"{speedup:.2g} times as fast {name}" for name, speedup in found.items() if speedup is not None]
    fell_back = f"; {way.fallbacks} solves went block by block after all" if way.fallbacks else ""
    return " and ".join(words) + fell_back

"""What each printer makes of two small bodies, beside what it made of them before: `tests/golden/`.

`PCR_FX_RENEW_GOLDEN=1 python -m pytest tests/test_codegen_prints.py` writes the files anew; look at what has changed.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowered_bodies import pullback_of, traced
from torch import Tensor

from pcr_fx.codegen import Function, lower
from pcr_fx.codegen.simplify import restricted
from pcr_fx.targets.cpp.printer import begun_sums, print_function
from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.unroll import Known, Scalar, Scalars
from pcr_fx.targets.triton.tiles.printer import Sum, TilePrinter

GOLDEN = Path(__file__).parent / "golden"


def residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + 0.1 * torch.tanh(x @ w + b)


def residual_pullback(x: Tensor, w: Tensor, b: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    y = torch.tanh(x @ w + b)
    inner = 0.1 * cotangent * (1 - y * y)
    return cotangent + inner @ w.t(), x.t() @ inner, inner.sum(0)


def normalised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inverse = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return torch.relu(x - x.amax(-1, keepdim=True)) + x * inverse * b.flip(0)


def normalised_pullback(x: Tensor, w: Tensor, b: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Right where the largest number is one alone: its own relu and all others are at rest."""
    inverse = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    scaled = cotangent * b.flip(0)
    centred = scaled * inverse - x * inverse**3 * (scaled * x).mean(-1, keepdim=True)
    moved = torch.where(x > x.amax(-1, keepdim=True), cotangent, 0.0)
    return moved + centred, torch.zeros_like(w), (cotangent * x * inverse).flip(1).sum(0)


# With their numbers. The pullbacks are written out, for what PyTorch makes of them differs between its versions.
BODIES = {"residual": (residual, residual_pullback, 2), "normalised": (normalised, normalised_pullback, 3)}


def functions(name: str) -> dict[str, Function]:
    """A block, whose parameters all samples share, and its pullback."""
    body, pullback, d = BODIES[name]
    tensors = [torch.zeros(shape) for shape in ((1, d), (d, d), (d,), (1, d))]
    step, back = traced(body, tensors[:3]), traced(pullback, tensors)
    return {
        "step": lower(step.graph, step, [True, False, False], [False]),
        "pullback": lower(back.graph, back, [True, False, False, True], [False, True, True]),
    }


@pytest.mark.parametrize("name", BODIES)
def test_the_pullbacks_are_right(name: str) -> None:
    body, pullback, d = BODIES[name]
    draw = torch.Generator().manual_seed(0)
    *inputs, cotangent = (torch.randn(shape, generator=draw) for shape in ((1, d), (d, d), (d,), (1, d)))
    for ours, theirs in zip(pullback(*inputs, cotangent), pullback_of(body)(*inputs, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs)


def in_cpp(function: Function, name: str) -> list[str]:
    return print_function(name, function, begun_sums(function)).splitlines()


def in_scalars(function: Function, name: str) -> list[str]:
    """Of numbers that all have names; the first of a cotangent is known to be 1, as in a unit vector, the others 0."""
    scalars = Scalars()
    inputs: list[list[Scalar]] = [[f"{one.name}_{e}" for e in range(one.size)] for one in function.inputs]
    if name == "pullback":
        inputs[-1] = [Known.ZERO if e else Known.ONE for e in range(function.inputs[-1].size)]
    outputs = scalars.run(function, inputs)
    results = [
        f"{out.name}_{e} = {print_scalar(value, 'tl.float32')}"
        for out, numbers in zip(function.outputs, outputs, strict=True)
        for e, value in enumerate(numbers)
    ]
    return [*print_assignments(scalars.assignments, "tl.float32"), *results]


def in_tiles(function: Function, name: str) -> list[str]:
    """The state and a cotangent in registers; of the pullback to the state alone, for four cotangents at once, too."""
    lines = _tiles(function, 0)
    return lines if name == "step" else [*lines, *_tiles(restricted(function, function.outputs[:1]), 4)]


def _tiles(function: Function, lanes: int) -> list[str]:
    state, *parameters = function.inputs
    cotangents = parameters[2:]
    registers = {one.name: f"{one.name}_held" for one in (state, *cotangents)}
    pointers = {one.name: f"{one.name}_at" for one in (*parameters[:2], *function.constants)}
    sums = {one.name: Sum(f"{one.name}_at", "is_first") for one in function.outputs if not one.varying}
    batched = [one.name for one in cotangents] if lanes else []
    printed = TilePrinter(function, "tl.float32", registers, pointers, sums, "v_", 16384, lanes, batched).run()
    return [
        f"# {lanes or 'no'} lanes, {printed.warps} warps, {printed.scratch} numbers of scratch",
        *(f"{one.name} = {one.load(one.pointer)}" for one in printed.fetches),
        *printed.once,
        *printed.lines,
        *(f"# {name}: {value}" for name, value in printed.results.items()),
    ]


PRINTERS: dict[str, Callable[[Function, str], list[str]]] = {
    "cpp.txt": in_cpp,
    "scalars.txt": in_scalars,
    "tiles.txt": in_tiles,
}


@pytest.mark.parametrize("printer", PRINTERS)
@pytest.mark.parametrize("name", BODIES)
def test_prints_are_as_they_were(name: str, printer: str) -> None:
    lines = []
    for function, lowered in functions(name).items():
        lines += [f"--- {function}", *PRINTERS[printer](lowered, function), ""]
    text, file = "\n".join(lines), GOLDEN / f"{name}-{printer}"
    if os.environ.get("PCR_FX_RENEW_GOLDEN") == "1":
        file.write_text(text)
    assert text == file.read_text(), f"{file.name} has another text: if it should, renew it as this file says"

"""The C++ source of a chain's kernels: what is printed of its body, between headers that never change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

from pcr_fx.body import Program
from pcr_fx.body.sample import SampleBody
from pcr_fx.codegen import Function, lower, matrix_sums, print_function

_NATIVE = Path(__file__).parent / "native"
REALS = {torch.float32: "float", torch.float64: "double"}
_DRIVERS = {"forward": "sequential.h", "adjoint": "sequential.h", "newton": "newton.h"}
_ENTRY = """
}  // namespace

extern "C" __attribute__((visibility("default"))) void run(const Call* call) { k_run(*call); }
"""


def chain_source(program: Program, body: SampleBody, direction: str, vectors_of_samples: bool) -> str:
    """The source of one shared library with one function `run`.

    Args:
        direction: "forward" or "adjoint", block by block; or "newton", forward.
        vectors_of_samples: a sample in each lane of a vector, instead of vectors of one sample's features; not for
            Newton, which puts a row of a Jacobian in each.

    Raises:
        Unprintable: the body has an op that cannot be printed.
    """
    lowered = {
        "forward": {"step": lower_step},
        "adjoint": {"pullback": lower_pullback},
        "newton": {"step": lower_step, "pull": lower_pull},
    }
    functions = {name: lower_one(program, body) for name, lower_one in lowered[direction].items()}
    return "\n".join(
        [
            f"#define REAL {REALS[program.dtype]}",
            f"#define VARYING {'vec' if vectors_of_samples else 'real'}",
            f"#define {direction.upper()}",
            (_NATIVE / "numbers.h").read_text(),
            (_NATIVE / "products.h").read_text(),
            *(print_function(name, function) for name, function in functions.items()),
            _body_struct(program, body, functions),
            (_NATIVE / "call.h").read_text(),
            (_NATIVE / _DRIVERS[direction]).read_text(),
            _ENTRY,
        ]
    )


def lower_step(program: Program, body: SampleBody) -> Function:
    return lower(body.step.graph, body.step, [True, *body.own], [False])


def lower_pullback(program: Program, body: SampleBody) -> Function:
    sums = [not own for own, needs in zip(body.own, differentiable(program), strict=True) if needs]
    return lower(body.pullback.graph, body.pullback, [True, *body.own, True], [False, *sums])


def lower_pull(program: Program, body: SampleBody) -> Function:
    """The pullback to the state alone."""
    graph = fx.Graph()
    before, *_ = graph.graph_copy(body.pullback.graph, {})  # type: ignore[misc]
    graph.output([before])
    graph.eliminate_dead_code()
    return lower(graph, body.pullback, [True, *body.own, True], [False])


def summed_numbers(program: Program, body: SampleBody, pullback: Function) -> tuple[int, int, int]:
    """Numbers of gradients that are sums over samples: of matrices, of what else is a block's, of what else is shared."""
    sizes, needs, matrix = input_sizes(program, body), differentiable(program), _matrices(program, pullback)
    summed = [need and not own for need, own in zip(needs, body.own, strict=True)]
    rest = [s and not m for s, m in zip(summed, matrix, strict=True)]
    blocks = len(program.signature.operands) + len(program.literals)
    return _total(sizes, matrix), _total(sizes[:blocks], rest[:blocks]), _total(sizes[blocks:], rest[blocks:])


def _matrices(program: Program, pullback: Function) -> list[bool]:
    """For each operand, literal and shared operand whether its gradient is a sum of matrices."""
    matrices, outputs = matrix_sums(pullback), iter(pullback.outputs[1:])
    return [needs and next(outputs) in matrices for needs in differentiable(program)]


def differentiable(program: Program) -> list[bool]:
    """For each operand, literal and shared operand whether it has a gradient."""
    literals = [False for _ in program.literals]
    return [*program.differentiable_operands, *literals, *program.differentiable_shared]


def input_sizes(program: Program, body: SampleBody) -> list[int]:
    """How many numbers a block (and, if it is a sample's own, a sample) has of each input."""
    nodes = [node for node in body.step.graph.nodes if node.op == "placeholder"]
    return [node.meta["val"].numel() for node in nodes[1:]]


def _body_struct(program: Program, body: SampleBody, functions: dict[str, Function]) -> str:
    sizes, needs = input_sizes(program, body), differentiable(program)
    operands = len(program.signature.operands) + len(program.literals)
    shared = [index >= operands for index in range(len(sizes))]
    pullback = functions.get("pullback")
    matrix = [False for _ in sizes] if pullback is None else _matrices(program, pullback)
    _, own_sums, shared_sums = (0, 0, 0) if pullback is None else summed_numbers(program, body, pullback)
    arguments = [f"static_cast<const {'V' if own else 'real'}*>(in[{index}])" for index, own in enumerate(body.own)]
    outputs = [
        f"static_cast<{'real' if m else 'V'}*>(out[{index}])"
        for index, (need, m) in enumerate(zip(needs, matrix, strict=True))
        if need
    ]
    counted = ["count"] if pullback is not None and any(not buffer.varying for buffer in pullback.outputs) else []
    calls = {
        "step": f"step(const V* z, const void* const* in, V* next) {{ ::step<V>({', '.join(['z', *arguments, 'next'])}); }}",
        "pullback": (
            "pullback(const V* z, const void* const* in, const V* adjoint, V* before, void* const* out, int64_t count) "
            f"{{ ::pullback<V>({', '.join(['z', *arguments, 'adjoint', 'before', *outputs, *counted])}); }}"
        ),
        "pull": (
            "pull(const V* z, const void* const* in, const V* adjoint, V* before) "
            f"{{ ::pull<V>({', '.join(['z', *arguments, 'adjoint', 'before'])}); }}"
        ),
    }
    numbers = {
        "dimension": body.dimension,
        "carried": len(program.layout.counts),
        "inputs": len(sizes),
        "own_numbers": sum(size for size, own in zip(sizes, body.own, strict=True) if own),
        "summed_numbers": own_sums,
        "kept_numbers": shared_sums,
    }
    tables = {"own": body.own, "shared": shared, "differentiable": needs, "matrix": matrix}
    return "\n".join(
        [
            "struct Body {",
            *(f"  static constexpr int {name} = {value};" for name, value in numbers.items()),
            f"  static constexpr int sizes[] = {{{', '.join(map(str, [*sizes, 0]))}}};",
            f"  static constexpr int counts[] = {{{', '.join(map(str, program.layout.counts))}}};",
            *(f"  static constexpr bool {name}[] = {{{_flags(values)}}};" for name, values in tables.items()),
            *(f"  template <class V> static INLINE_MEMBER void {calls[name]}" for name in functions),
            "};",
        ]
    )


def _total(sizes: Sequence[int], chosen: Sequence[bool]) -> int:
    return sum(size for size, take in zip(sizes, chosen, strict=True) if take)


def _flags(values: Sequence[bool]) -> str:
    return ", ".join("true" if value else "false" for value in [*values, False])

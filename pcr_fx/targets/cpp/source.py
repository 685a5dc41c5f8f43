"""The C++ source of a chain's kernels: what is printed of its body, between headers that never change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from pcr_fx import stopping
from pcr_fx.codegen import Function, Stages, split
from pcr_fx.codegen.ir import Buffer
from pcr_fx.targets.cpp.printer import begun_sums, factored_sums, matrix_shape, matrix_sums, print_function
from pcr_fx.targets.kernel import Input, LoweredBody

_NATIVE = Path(__file__).parent / "native"
REALS = {torch.float32: "float", torch.float64: "double"}
WHOLE = {
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    **{getattr(torch, f"int{bits}"): f"int{bits}_t" for bits in (8, 16, 32, 64)},
}
_DRIVERS = {"forward": "sequential.h", "adjoint": "sequential.h", "newton": "newton.h"}
# The functions of the body that each direction's driver calls.
_FUNCTIONS = {"forward": ("step",), "adjoint": ("pullback",), "newton": ("step", "pull")}
_ENTRY = """
}  // namespace

extern "C" __attribute__((visibility("default"))) void run(const Call* call) { k_run(*call); }
"""


def chain_source(
    body: LoweredBody, direction: str, vectors_of_samples: bool, alone: bool = False, staged: bool = True
) -> str:
    """The source of one shared library with one function `run`.

    Args:
        direction: "forward" or "adjoint", block by block; or "newton", forward.
        vectors_of_samples: a sample in each lane of a vector, instead of vectors of one sample's features; not for
            Newton, which puts a row of a Jacobian in each.
        alone: for one sample, and no vectors of samples. Its gradients need not be added to those of others.
        staged: whether what is known of blocks before they are gone through may be computed for a vector of them at once.

    Raises:
        Unprintable: the body has an op that cannot be printed.
    """
    functions: dict[str, Function] = {name: getattr(body, name) for name in _FUNCTIONS[direction]}
    stages = None
    if staged and direction != "newton" and not vectors_of_samples:
        (name,) = functions
        stages = _stages(body, functions[name])
        functions = functions if stages is None else {"early": stages.early, name: stages.late}
    return "\n".join(
        [
            f"#define REAL {REALS[body.program.dtype]}",
            f"#define VARYING {'vec' if vectors_of_samples else 'real'}",
            f"#define {direction.upper()}",
            f"#define ALONE {'true' if alone else 'false'}",
            (_NATIVE / "numbers.h").read_text(),
            (_NATIVE / "products.h").read_text(),
            (_NATIVE / "factors.h").read_text(),
            *(
                print_function(name, function, _begun(body), _factored(body, vectors_of_samples))
                if name == "pullback"
                else print_function(name, function)
                for name, function in functions.items()
            ),
            _body_struct(body, functions, vectors_of_samples, stages),
            (_NATIVE / "call.h").read_text(),
            *([] if direction == "newton" else [(_NATIVE / "early.h").read_text()]),
            *([_stopping(body.program.dtype)] if direction == "newton" else []),
            (_NATIVE / _DRIVERS[direction]).read_text(),
            _ENTRY,
        ]
    )


def _stages(body: LoweredBody, function: Function) -> Stages | None:
    """The two stages of a step or a pullback: all but the state, or the cotangents, is known of all blocks before."""
    is_step = len(function.inputs) == 1 + len(body.inputs)
    cotangents = [False for _ in function.inputs[1 + len(body.inputs) :]]
    known = [not is_step, *(True for _ in body.inputs), *cotangents]
    return split(function, known, [False, *(one.shared for one in body.inputs), *cotangents])


def _stopping(dtype: torch.dtype) -> str:
    """The outcomes and constants of `pcr_fx.stopping`, for newton.h."""
    constants = {
        "stalled": stopping.STALLED,
        "progress": stopping.PROGRESS,
        "rounding_level": stopping.rounding_level(dtype),
        "smallest_scale": stopping.smallest_scale(dtype),
    }
    return "\n".join(
        [
            f"enum Outcome {{ {', '.join(outcome.name for outcome in stopping.Outcome)} }};",
            f"constexpr int k_patience = {stopping.PATIENCE};",
            *(f"constexpr double k_{name} = {value!r};" for name, value in constants.items()),
        ]
    )


def summed_numbers(body: LoweredBody) -> tuple[int, int, int]:
    """Numbers of gradients that are sums over samples: of matrices, of what else is a block's, of what else is shared."""
    matrix = _matrices(body)
    rest = [one for one, is_matrix in zip(body.inputs, matrix, strict=True) if _is_summed(one) and not is_matrix]
    matrices = sum(one.size for one, is_matrix in zip(body.inputs, matrix, strict=True) if is_matrix)
    return matrices, sum(one.size for one in rest if not one.shared), sum(one.size for one in rest if one.shared)


def _is_summed(one: Input) -> bool:
    return one.differentiable and not one.own


def _matrices(body: LoweredBody) -> list[bool]:
    """For each input whether its gradient is a sum of matrices where lanes are samples."""
    matrices = matrix_sums(body.pullback) + _factored(body, True)
    outputs = iter(body.pullback.outputs[1:])
    return [one.differentiable and next(outputs) in matrices for one in body.inputs]


def _factored(body: LoweredBody, vectors_of_samples: bool) -> list[Buffer]:
    """The sums of the pullback over all blocks, whose factors are kept."""
    gradients = zip(_differentiable(body), body.pullback.outputs[1:], strict=True)
    of_all = [buffer for one, buffer in gradients if _is_summed(one) and one.shared]
    return [buffer for buffer in factored_sums(body.pullback, vectors_of_samples) if buffer in of_all]


def _factored_shapes(body: LoweredBody, pullback: Function | None, vectors_of_samples: bool) -> list[tuple[int, int]]:
    """For each input the rows and columns of its gradient, if its factors are kept; else 0 and 0."""
    if pullback is None:
        return [(0, 0) for _ in body.inputs]
    factored, outputs = _factored(body, vectors_of_samples), iter(pullback.outputs[1:])
    gradients = [next(outputs) if one.differentiable else None for one in body.inputs]
    return [matrix_shape(pullback, one) if one in factored else (0, 0) for one in gradients]


def _begun(body: LoweredBody) -> list[Buffer]:
    """The sums of the pullback that are a block's alone, and that it need not find set to zero."""
    gradients = zip(_differentiable(body), body.pullback.outputs[1:], strict=True)
    of_blocks = [buffer for one, buffer in gradients if _is_summed(one) and not one.shared]
    return [buffer for buffer in begun_sums(body.pullback) if buffer in of_blocks]


def _differentiable(body: LoweredBody) -> list[Input]:
    return [one for one in body.inputs if one.differentiable]


def _body_struct(
    body: LoweredBody, functions: dict[str, Function], vectors_of_samples: bool, stages: Stages | None
) -> str:
    inputs, pullback = body.inputs, functions.get("pullback")
    matrix = [False for _ in inputs] if pullback is None else _matrices(body)
    begun = [] if pullback is None else _begun(body)
    shapes = _factored_shapes(body, pullback, vectors_of_samples)
    gradients = iter(() if pullback is None else pullback.outputs[1:])
    _, own_sums, shared_sums = (0, 0, 0) if pullback is None else summed_numbers(body)
    arguments = [f"static_cast<const {'V' if one.own else 'real'}*>(in[{index}])" for index, one in enumerate(inputs)]
    summed = [
        f"*static_cast<Factors*>(out[{index}])" if rows else f"static_cast<{'real' if m else 'V'}*>(out[{index}])"
        for index, (one, m, (rows, _)) in enumerate(zip(inputs, matrix, shapes, strict=True))
        if one.differentiable
    ]
    counted = ["count"] if pullback is not None and any(not buffer.varying for buffer in pullback.outputs) else []
    outputs = body.results[len(body.results) - len(body.body.outputs) :]
    given = [f"next + {one.offset}" for one in outputs]
    pulled = [f"adjoint + {one.offset}" for one in outputs if one.dtype.is_floating_point]
    handed = _handed(stages)
    pulls = ["z", *arguments, "adjoint", *pulled, *handed, "before", *summed, *counted]
    calls = {
        "early": f"early(const V* z, const void* const* in, V* early) {{ {_early_call(stages)} }}",
        "step": (
            "step(const V* z, const void* const* in, V* next, const real* early = nullptr) "
            f"{{ ::step<V>({', '.join(['z', *arguments, *handed, 'next', *given])}); }}"
        ),
        "pullback": (
            "pullback(const V* z, const void* const* in, const real* early, const V* adjoint, V* before, void* const* out, "
            f"int64_t count) {{ ::pullback<V>({', '.join(pulls)}); }}"
        ),
        "pull": (
            "pull(const V* z, const void* const* in, const V* adjoint, V* before) "
            f"{{ ::pull<V>({', '.join(['z', *arguments, 'adjoint', 'before'])}); }}"
        ),
    }
    numbers = {
        "dimension": body.dimension,
        "numbers": sum(one.size for one in body.results),
        "results": len(body.results),
        "carried": len(body.program.layout.counts),
        "inputs": len(inputs),
        "own_numbers": sum(one.size for one in inputs if one.own),
        "summed_numbers": own_sums,
        "kept_numbers": shared_sums,
        "early_state": int(stages is not None and any(buffer.name == "in0" for buffer in stages.early.inputs)),
        "early_numbers": 0 if stages is None else stages.numbers,
    }
    read_early = [] if stages is None else [buffer.name for buffer in stages.early.inputs]
    sizes = {
        "sizes": [one.size for one in inputs],
        "rows": [rows for rows, _ in shapes],
        "columns": [columns for _, columns in shapes],
    }
    tables = {
        "own": [one.own for one in inputs],
        "shared": [one.shared for one in inputs],
        "differentiable": [one.differentiable for one in inputs],
        "matrix": matrix,
        "read_early": [f"in{index}" in read_early for index in range(1, len(inputs) + 1)],
        "begun": [pullback is not None and one.differentiable and next(gradients) in begun for one in inputs],
    }
    return "\n".join(
        [
            "struct Body {",
            *(f"  static constexpr int {name} = {value};" for name, value in numbers.items()),
            *(
                f"  static constexpr int {name}[] = {{{', '.join(map(str, [*row, 0]))}}};"
                for name, row in sizes.items()
            ),
            f"  static constexpr int counts[] = {{{', '.join(map(str, body.program.layout.counts))}}};",
            *(f"  static constexpr bool {name}[] = {{{_flags(values)}}};" for name, values in tables.items()),
            *(
                f"  template <class V> static INLINE_MEMBER void {calls[name]}"
                for name in dict.fromkeys(["early", *functions])
            ),
            f"  template <class F> static INLINE_MEMBER void each_result(F f) {{ {_each_result(body)} }}",
            "};",
        ]
    )


def _handed(stages: Stages | None) -> list[str]:
    """Where what the early stage handed on lies, of one block and sample."""
    sizes = [] if stages is None else [buffer.size for buffer in stages.early.outputs]
    return [f"early + {offset}" for offset in accumulate(sizes, initial=0)][: len(sizes)]


def _early_call(stages: Stages | None) -> str:
    if stages is None:
        return ""
    of_inputs = [
        f"static_cast<const {'V' if buffer.varying else 'real'}*>(in[{int(buffer.name[2:]) - 1}])"
        for buffer in stages.early.inputs
        if buffer.name != "in0"
    ]
    state = ["z"] if any(buffer.name == "in0" for buffer in stages.early.inputs) else []
    return f"::early<V>({', '.join([*state, *of_inputs, *_handed(stages)])});"


def _each_result(body: LoweredBody) -> str:
    """Calls of `f` for each result, with a number of its type, its index, and which numbers of a sample it is."""
    names = REALS | WHOLE
    results = enumerate(body.results)
    return " ".join(f"f({names[one.dtype]}(), {index}, {one.offset}, {one.size});" for index, one in results)


def _flags(values: Sequence[bool]) -> str:
    return ", ".join("true" if value else "false" for value in [*values, False])

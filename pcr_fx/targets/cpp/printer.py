"""C++ from the language of kernels: one function template a body, for one sample or for a vector of them.

Printed functions are templates over `V`, what a varying number is: `real` itself, or a vector with a sample in each lane.
In the first case the compiler finds its vectors along the features, in the second there is nothing left to find.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from pcr_fx.codegen.functions import FUNCTIONS
from pcr_fx.codegen.ir import Apply, Buffer, Constant, Expression, Function, Load, Loop, View, contiguous, views

# Numbers of a matrix from which on it is better to turn its factors, so that lanes are summed at once, than to sum whole
# vectors of samples.
_MATRIX_NUMBERS = 256
# Numbers of a matrix that all blocks share from which on its factors are kept, to be multiplied later: where lanes are features,
# and where they are samples. These make a product of some depth of each block, which is as fast while the nearest cache holds
# the matrix: on an EPYC with AVX2, 0.9 times at 48 by 16 numbers, 1.0 at 64 by 64, 1.4 at 192 by 64 and at 768 by 256; with
# features 12, 1.8, 2.4 and 3.5 times, 3.8 at 15 by 5.
FACTORED_NUMBERS, FACTORED_NUMBERS_OF_SAMPLES = 64, 8192


def print_function(
    name: str, function: Function, begun: Collection[Buffer] = (), factored: Collection[Buffer] = ()
) -> str:
    """`template <class V> void name(const V* or const real* in0, ..., V* or real* out0, ..., int64_t count)`.

    Outputs that are sums over samples are added to: in `V`, so that lanes are added up once, when all have been; those
    in `matrix_sums` in `real`, from the first `count` lanes. There is no `count` where there are no sums. Those of `begun`,
    some of `begun_sums`, are added to zero instead where `ALONE` says that there is one tile. Of those of `factored`, some of
    `factored_sums`, the factors are kept: they are given as `Factors&`.
    """
    matrices = matrix_sums(function)
    waiting = {buffer.name for buffer in begun}
    parameters = [f"const {_number(buffer)}* RESTRICT {buffer.name}" for buffer in function.inputs]
    for buffer in function.outputs:
        number = "real" if buffer in matrices else "V"
        parameters.append(f"Factors& {buffer.name}" if buffer in factored else f"{number}* RESTRICT {buffer.name}")
    sums = {buffer.name for buffer in function.outputs if not buffer.varying}
    parameters += ["int64_t count"] if sums else []
    lines = [f"template <class V> INLINE void {name}({', '.join(parameters)}) {{"]
    for buffer in function.constants:
        values = ", ".join(map(_literal, buffer.values or ()))
        lines.append(f"  static constexpr real {buffer.name}[] = {{{values}}};")
    lines += [f"  {_number(buffer)} {buffer.name}[{buffer.size}];" for buffer in function.locals]
    for loop in function.loops:
        out = loop.out.buffer.name
        begins = out in waiting
        waiting.discard(out)
        if loop.out.buffer in factored:
            printed = [_print_collecting(term) for term in _terms(loop)]
        elif loop.out.buffer in matrices:
            first, *others = _terms(loop)
            printed = [_print_product(first, begins), *(_print_product(term, False) for term in others)]
        else:
            printed = _print_loop(loop, "" if out not in sums else "k_begin" if begins else "k_add")
        lines += [f"  {line}" for line in printed]
    return "\n".join([*lines, "}"])


def begun_sums(function: Function) -> list[Buffer]:
    """The outputs that are sums over samples, and whole once the first loop that adds to them has run."""
    first: dict[Buffer, Loop] = {}
    for loop in function.loops:
        first.setdefault(loop.out.buffer, loop)
    return [
        buffer
        for buffer in function.outputs
        if not buffer.varying and buffer in first and _is_whole(first[buffer].out, first[buffer].shape)
    ]


def _is_whole(view: View, shape: Sequence[int]) -> bool:
    """Whether a view of such a shape is all of its buffer, each number once."""
    return view.offset == 0 and view.strides == contiguous(shape) and math.prod(shape) == view.buffer.size


def matrix_sums(function: Function) -> list[Buffer]:
    """The outputs that are sums over samples of products `a[i] * b[j]`, and large.

    Such are the gradients of weights; not of those that a block scales, adds up or takes a part of first.
    """
    return [
        buffer
        for buffer in _sums_of_products(function, _MATRIX_NUMBERS)
        if all(
            view.buffer.varying for loop in function.loops if loop.out.buffer == buffer for view in views(loop.value)
        )
    ]


def factored_sums(function: Function, vectors_of_samples: bool) -> list[Buffer]:
    """The outputs that are such sums, of numbers that samples may share, whose factors had better be multiplied later."""
    whole = [loop.out.buffer for loop in function.loops if _is_whole(loop.out, loop.shape)]
    least = FACTORED_NUMBERS_OF_SAMPLES if vectors_of_samples else FACTORED_NUMBERS
    return [buffer for buffer in _sums_of_products(function, least) if whole.count(buffer) == 1]


def matrix_shape(function: Function, factored: Buffer) -> tuple[int, int]:
    """Rows and columns of a sum of products."""
    rows, columns = next(loop.shape for loop in function.loops if loop.out.buffer == factored)
    return rows, columns


def _sums_of_products(function: Function, least: int) -> list[Buffer]:
    """The outputs of at least so many numbers that are sums over samples of products `a[i] * b[j]`."""
    found = []
    for buffer in function.outputs:
        terms = [term for loop in function.loops if loop.out.buffer == buffer for term in _terms(loop)]
        if not buffer.varying and buffer.size >= least and terms and all(map(_factors, terms)):
            found.append(buffer)
    return found


def _terms(loop: Loop) -> list[Loop]:
    """What adds the same to a sum: a loop for each term of the value."""
    if isinstance(loop.value, Apply) and loop.value.function == "add" and not loop.reduced:
        return [term for value in loop.value.arguments for term in _terms(replace(loop, value=value))]
    return [loop]


def _factors(loop: Loop) -> tuple[View, View] | None:
    """a and b, where a loop is `out[i, j] = a[i] * b[j]`, `out` in order."""
    value = loop.value
    if len(loop.shape) != 2 or loop.reduced or loop.out.strides != contiguous(loop.shape):
        return None
    if not isinstance(value, Apply) or value.function != "mul":
        return None
    found = [one.view for one in value.arguments if isinstance(one, Load)]
    if len(found) != 2:
        return None
    left, right = sorted(found, key=lambda view: view.strides[1] != 0)
    return None if left.strides[1] or right.strides[0] else (left, right)


def _print_product(loop: Loop, begins: bool) -> str:
    factors = _factors(loop)
    assert factors is not None
    left, right = factors
    numbers = ", ".join(map(str, (*loop.shape, left.strides[0], right.strides[1])))
    places = ", ".join(f"{view.buffer.name} + {view.offset}" for view in (loop.out, left, right))
    return f"k_add_products<V, {numbers}, {'k_alone' if begins else 'false'}>({places}, count);"


def _print_collecting(loop: Loop) -> str:
    factors = _factors(loop)
    assert factors is not None
    left, right = factors
    numbers = ", ".join(map(str, (*loop.shape, left.strides[0], right.strides[1])))
    places = ", ".join(f"{view.buffer.name} + {view.offset}" for view in (left, right))
    return f"k_collect<V, {numbers}>({loop.out.buffer.name}, {places}, count);"


def _number(buffer: Buffer) -> str:
    return "V" if buffer.varying else "real"


def _print_loop(loop: Loop, adds: str) -> list[str]:
    """A loop, whose results are set; or, where they are sums, go through the function of numbers.h that `adds` names."""
    if not loop.reduced:
        outer = [f"i{dim}" for dim in range(len(loop.shape))]
        store = _store(loop, outer, _expression(loop.value, outer), adds)
        return _nest(list(zip(outer, loop.shape, strict=True)), [store])
    by_sums = _print_by_sums(loop, adds)
    if not (loop.shape and _runs_along_the_output(loop)):
        return by_sums
    if _type(loop) == "real":
        return _print_by_rows(loop, adds)
    # With a sample in each lane nothing has to run along anything, and sums are better kept in registers.
    return ["if constexpr (k_is_vector<V>) {", *by_sums, "} else {", *_print_by_rows(loop, adds), "}"]


def _runs_along_the_output(loop: Loop) -> bool:
    """Whether memory lies along the output, so that vectors of features do too: `out[:] += a[r] * b[r, :]`."""
    last = len(loop.shape) - 1
    inner = len(loop.shape) + len(loop.reduced) - 1
    both = [view for view in views(loop.value) if view.strides[last] and inner > last and view.strides[inner]]
    return any(view.strides[last] == 1 for view in both) and not any(view.strides[inner] == 1 for view in both)


def _print_by_rows(loop: Loop, adds: str) -> list[str]:
    """The reduced index outside the last one of the output."""
    outer = [f"i{dim}" for dim in range(len(loop.shape))]
    inner = [f"r{dim}" for dim in range(len(loop.reduced))]
    *front, (last, size) = list(zip(outer, loop.shape, strict=True))
    varies = _type(loop)
    combine = loop.reduction.function.cpp.format(f"sum[{last}]", _expression(loop.value, [*outer, *inner]))
    *before, (index, many) = zip(inner, loop.reduced, strict=True)
    # Sums stay in registers from one term to the next where the compiler sees several; by itself it does not unroll this.
    terms = [
        f"UNROLL for (int {index} = 0; {index} < {many}; ++{index})",
        *_nest([(last, size)], [f"sum[{last}] = {combine};"]),
    ]
    body = [
        f"{varies} sum[{size}];",
        *_nest([(last, size)], [f"sum[{last}] = {_filled(varies, loop)};"]),
        *_nest(before, terms),
        *_nest([(last, size)], [_store(loop, outer, f"sum[{last}]", adds)]),
    ]
    return _nest(front, ["{", *(f"  {line}" for line in body), "}"])


def _print_by_sums(loop: Loop, adds: str) -> list[str]:
    """The reduced index innermost, some sums at a time."""
    outer = [f"i{dim}" for dim in range(len(loop.shape))]
    front = list(zip(outer, loop.shape, strict=True))
    if not front:
        return ["{", *(f"  {line}" for line in _sums(loop, outer, False, adds)), "}"]
    *front, (last, size) = front
    lines = [
        "{",
        f"  constexpr int many = k_unrolled<V>({size}), whole = {size} - {size} % many;",
        f"  for (int {last}_ = 0; {last}_ < whole; {last}_ += many) {{",
        *(f"    {line}" for line in _sums(loop, outer, True, adds)),
        "  }",
        f"  for (int {last} = whole; {last} < {size}; ++{last}) {{",
        *(f"    {line}" for line in _sums(loop, outer, False, adds)),
        "  }",
        "}",
    ]
    return _nest(front, lines)


def _sums(loop: Loop, outer: Sequence[str], many: bool, adds: str) -> list[str]:
    """`many` neighbouring sums, or one; one where vectors run along the features, each then in as many parts as a
    vector has.

    The parts are written out, for the compiler may not reorder sums: it would reorder all, `a * (1 - b)` included.
    """
    varies = _type(loop)
    inner = list(zip((f"r{dim}" for dim in range(len(loop.reduced))), loop.reduced, strict=True))
    combine = loop.reduction.function.cpp
    *before, (index, size) = inner
    # Wider vectors cost more to add up in the end than they save on the way, until the sum is long.
    parts = min(4 if size <= 16 else 8, 1 << max(size.bit_length() - 1, 0))
    names = [*outer, *(name for name, _ in before), f"({index} + p)"]
    value = _expression(loop.value, names)
    last = outer[-1] if outer else "i"
    each = f"UNROLL for (int u = 0; u < many; ++u) {{ const int {last} = {last}_ + u; " if many else "{ "
    sums = "sum[u]" if many else "sum[0]"
    step = f"UNROLL for (int p = 0; p < parts; ++p) {sums}[p] = {combine.format(f'{sums}[p]', value)};"
    rest = f"{{ constexpr int p = 0; {sums}[p] = {combine.format(f'{sums}[p]', value)}; }}"
    half = f"UNROLL for (int p = 0; p < h; ++p) {sums}[p] = {combine.format(f'{sums}[p]', f'{sums}[p + h]')};"
    return [
        f"constexpr int parts = k_is_vector<V> ? 1 : {parts};",
        f"{varies} sum[{'many' if many else 1}][parts];",
        f"{each}UNROLL for (int p = 0; p < parts; ++p) {sums}[p] = {_filled(varies, loop)}; }}",
        *_nest(
            before,
            [
                f"int {index} = 0;",
                f"for (; {index} + parts <= {size}; {index} += parts) {each}{step} }}",
                f"for (; {index} < {size}; ++{index}) {each}{rest} }}",
            ],
        ),
        f"{each}UNROLL for (int h = parts / 2; h > 0; h /= 2) {half} {_store(loop, outer, f'{sums}[0]', adds)} }}",
    ]


def _type(loop: Loop) -> str:
    return "V" if any(view.buffer.varying for view in views(loop.value)) else "real"


def _filled(number: str, loop: Loop) -> str:
    """The start of a sum. A vector plus a number is a vector, but a vector cannot be made from one."""
    return f"k_fill<{number}>({_literal(loop.reduction.start)})"


def _store(loop: Loop, indices: Sequence[str], value: str, adds: str) -> str:
    place = _element(loop.out, indices)
    return f"{adds or 'k_set'}({place}, {value});"


def _nest(loops: Sequence[tuple[str, int]], body: Sequence[str]) -> list[str]:
    lines = list(body)
    for index, size in reversed(loops):
        lines = [f"for (int {index} = 0; {index} < {size}; ++{index}) {{", *(f"  {line}" for line in lines), "}"]
    return lines


def _expression(value: Expression, indices: Sequence[str]) -> str:
    if isinstance(value, Load):
        return _element(value.view, indices)
    if isinstance(value, Constant):
        return _literal(value.value)
    assert isinstance(value, Apply)
    function = FUNCTIONS[value.function]
    text = function.cpp.format(*(_expression(argument, indices) for argument in value.arguments))
    return f"({text})" if function.infix else text


def _element(view: View, indices: Sequence[str]) -> str:
    terms = [
        index if stride == 1 else f"{index} * {stride}"
        for index, stride in zip(indices, view.strides, strict=True)
        if stride
    ]
    if view.offset or not terms:
        terms.append(str(view.offset))
    return f"{view.buffer.name}[{' + '.join(terms)}]"


def _literal(value: float) -> str:
    if math.isnan(value):
        return "real(NAN)"
    if math.isinf(value):
        return "real(INFINITY)" if value > 0 else "real(-INFINITY)"
    return f"real({value!r})"

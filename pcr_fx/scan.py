"""A loop of any length: `pcr_fx.scan`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.exports import exported_step
from pcr_fx.loops import Loop
from pcr_fx.marks import Framed, NotCaptured, scan_op, step_between_marks
from pcr_fx.options import Options
from pcr_fx.steps import captures_of, described, may_be_captured
from pcr_fx.switches import is_disabled

log = logging.getLogger(__name__)

_DEFAULT = Options()
# The structure of a tensor by itself.
_LEAF = pytree.tree_structure(0)


def scan(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    dim: int = 0,
    length: int | None = None,
    reverse: bool = False,
    options: Any = None,
) -> tuple[Any, Any]:
    """Run `carry, y = combine_fn(carry, x)` for every slice x of `xs`, from `carry = init`.

    The step is traced once for each form of its arguments, whatever the number of steps, and the loop runs as one chain.
    What it closes over is read at each call. A step that cannot be traced, since it branches on values, prints or draws
    numbers in Python, runs as it is, step by step; the log says so. A step that asks how what it is given lies in memory, or
    whether that requires gradients, is answered as for contiguous tensors that do.

    Differentiable with respect to `init`, `xs` and every tensor that `combine_fn` closes over.

    Args:
        combine_fn: one step, which writes into nothing that it is given. It returns a carry of the structure, shapes
            and dtypes of `init`, and what there is to say of the step: a pytree of tensors, or `None`.
        init: the carry before the first step: a tensor, or a pytree of them, of any dtype.
        xs: a pytree of tensors of one size in dimension `dim`, the number of steps; or `None`.
        dim: that dimension.
        length: the number of steps; needed where `xs` has no tensors.
        reverse: whether to begin with the last slice; what is returned of it comes last then, too.
        options: an `Options`, or a dict of its fields. Inside `torch.compile` those of its backend are taken.

    Returns:
        The last carry, and what the steps said, each tensor stacked along dimension `dim` (0 where it has fewer). No steps
        return `init`, and empty tensors.

    Raises:
        UnsupportedError: arguments that are no tensors, sizes that disagree, or a step that returns another carry than it
            was given.
    """
    loop = _checked(combine_fn, init, xs, dim, length, reverse)
    if is_disabled():
        carry, ys = _step_by_step(combine_fn, loop) if loop.length else _without_steps(combine_fn, loop)
    elif torch.compiler.is_dynamo_compiling():
        carry, ys = _in_a_compiler(combine_fn, loop, options)
    else:
        carry, ys = _run(combine_fn, loop, _DEFAULT if options is None else Options.of(options))
    if loop.reverse:
        ys = pytree.tree_map_only(Tensor, lambda y: y.flip(0), ys)
    if loop.dim:
        ys = pytree.tree_map_only(Tensor, lambda y: y.movedim(0, loop.dim) if loop.dim < y.ndim else y, ys)
    return carry, ys


@dataclass(eq=False, slots=True)
class _Loop:
    """What a loop is given, in one form.

    Attributes:
        init, xs: the tensors; the latter `[length, ...]`, the first step's in front.
        carry_spec, xs_spec, places: the trees that they belong into, and where among the leaves: others are `None`.
    """

    init: list[Tensor]
    xs: list[Tensor]
    carry_spec: Any
    xs_spec: Any
    places: tuple[tuple[bool, ...], tuple[bool, ...]]
    length: int
    dim: int
    reverse: bool

    def carry(self, tensors: Sequence[Any]) -> Any:
        return _tree(tensors, self.carry_spec, self.places[0])

    def x(self, tensors: Sequence[Any]) -> Any:
        return _tree(tensors, self.xs_spec, self.places[1])


def _tree(tensors: Sequence[Any], spec: Any, places: tuple[bool, ...]) -> Any:
    if spec is _LEAF:
        return tensors[0] if tensors else None
    waiting = iter(tensors)
    return pytree.tree_unflatten([next(waiting) if is_tensor else None for is_tensor in places], spec)


def _flat(tree: Any, what: str) -> tuple[list[Tensor], Any, tuple[bool, ...]]:
    """The tensors of a tree, its structure, and which of its leaves they are."""
    if isinstance(tree, Tensor):
        return [tree], _LEAF, (True,)
    if tree is None:
        return [], _LEAF, (False,)
    leaves, spec = pytree.tree_flatten(tree)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise UnsupportedError(f"all leaves of {what} must be tensors, got {type(leaf).__name__} {leaf!r:.50}")
    return [leaf for leaf in leaves if leaf is not None], spec, tuple([leaf is not None for leaf in leaves])


def _checked(combine_fn: Any, init: Any, xs: Any, dim: Any, length: Any, reverse: Any) -> _Loop:
    if not callable(combine_fn):
        raise UnsupportedError(f"combine_fn must be callable, got {type(combine_fn).__name__}")
    if type(reverse) is not bool:
        raise UnsupportedError(f"reverse must be True or False, got {reverse!r}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise UnsupportedError(f"dim must be a whole number, got {dim!r}")
    carry, carry_spec, carry_places = _flat(init, "init")
    slices, xs_spec, xs_places = _flat(xs, "xs")
    if not carry:
        raise UnsupportedError("init holds no tensor; a carry is a tensor or a pytree of them")
    if slices:
        dim, slices = _along(slices, dim)
    count = _length(slices, length)
    if reverse:
        slices = [x.flip(0) for x in slices]
    return _Loop(carry, slices, carry_spec, xs_spec, (carry_places, xs_places), count, dim, reverse)


def _along(xs: list[Tensor], dim: int) -> tuple[int, list[Tensor]]:
    """The dimension counted from the front, and `xs` with it in front."""
    rank = xs[0].ndim
    if not -rank <= dim < rank:
        raise UnsupportedError(f"xs are scanned along dimension {dim}, got a tensor of shape {list(xs[0].shape)}")
    dim %= rank
    for x in xs:
        if x.ndim <= dim:
            raise UnsupportedError(f"xs are scanned along dimension {dim}, got a tensor of shape {list(x.shape)}")
    return dim, xs if dim == 0 else [x.movedim(dim, 0) for x in xs]


def _length(xs: list[Tensor], length: Any) -> int:
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | torch.SymInt) or length < 0):
        raise UnsupportedError(f"length must be a whole number of at least 0, got {length!r}")
    if not xs:
        if length is None:
            raise UnsupportedError("without xs there is no telling how many steps there are; length says so")
        return length  # type: ignore[return-value]
    count = xs[0].shape[0]
    for size in (*(x.shape[0] for x in xs[1:]), *(() if length is None else (length,))):
        if size != count:
            raise UnsupportedError(f"xs and length must agree on the number of steps, got {count} and {size}")
    return count


# --- captured -----------------------------------------------------------------------------------------------------------


def _run(combine_fn: Callable[..., Any], loop: _Loop, options: Options) -> tuple[Any, Any]:
    every = (*loop.init, *loop.xs)
    if not may_be_captured(every):
        found = _exported(combine_fn, loop, options) if torch.compiler.is_exporting() else None
        return found or _step_by_step(combine_fn, loop)
    form = (
        loop.carry_spec,
        loop.xs_spec,
        loop.places,
        tuple([(one.shape, one.dtype, one.device) for one in loop.init]),
        tuple([(one.shape[1:], one.dtype, one.device) for one in loop.xs]),
        torch.is_grad_enabled(),
    )
    captures = captures_of(combine_fn, form, partial(_stand_ins, loop))
    if not captures.failure:
        call = _Call(loop, options)
        try:
            return call.checked(*captures(combine_fn, call))
        except NotCaptured as reason:
            if captures.failure:
                log.warning("%s runs step by step, as it is written: %s", captures.name, reason)
    return _step_by_step(combine_fn, loop)


def _stand_ins(loop: _Loop) -> tuple[Any, Any]:
    """What one step is traced with."""
    with torch.inference_mode(False), torch.no_grad():
        carry = [torch.zeros(one.shape, dtype=one.dtype, device=one.device) for one in loop.init]
        xs = [torch.zeros(one.shape[1:], dtype=one.dtype, device=one.device) for one in loop.xs]
        return loop.carry(carry), loop.x(xs)


class _Call:
    """A call of a captured step, which runs all steps."""

    def __init__(self, loop: _Loop, options: Options) -> None:
        self.loop, self.options = loop, options
        self.framed: Framed | None = None

    def __call__(self, framed: Framed, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """What the graph of a step returns, of all steps."""
        loop, chain = self.loop, framed.loop(self.options)
        self.framed = framed
        if not framed.is_checked:
            _check_carry(loop, [(tuple(one.shape), one.dtype) for one in chain.specs[: len(loop.init)]])
        final, ys = chain.run(loop.init, loop.xs, [inputs[at] for at in framed.shared], loop.length)
        every = [*final, *ys]
        return [every[index] for index in framed.results]

    def checked(self, carry: Any, ys: Any) -> tuple[Any, Any]:
        """What the step returned, whose form is looked at once."""
        assert self.framed is not None, "the step was called"
        if not self.framed.is_checked:
            _, spec, places = _flat(carry, "the carry that combine_fn returns")
            _check_structure(self.loop, spec, places)
            _check_leaves(pytree.tree_leaves(ys))
            self.framed.is_checked = True
        return carry, ys


# --- exported ------------------------------------------------------------------------------------------------------------


def _exported(combine_fn: Callable[..., Any], loop: _Loop, options: Options) -> tuple[Any, Any] | None:
    """What an exporter is to note down that runs the model's own Python; nothing where the step has to run as it is."""
    form: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        carry, y = _pair(combine_fn(loop.carry(tensors[: len(loop.init)]), loop.x(tensors[len(loop.init) :])))
        new, spec, places = _flat(carry, "the carry that combine_fn returns")
        _check_structure(loop, spec, places)
        _check_carry(loop, [(tuple(one.shape), one.dtype) for one in new])
        leaves, spec = pytree.tree_flatten(y)
        _check_leaves(leaves)
        form[:] = spec, [leaf is not None for leaf in leaves]
        return *new, *(leaf for leaf in leaves if leaf is not None)

    name, _ = described(combine_fn)
    try:
        step, closed_over = exported_step(flat, loop.init, loop.xs, name)
    except BodyError as reason:
        log.info("%s is exported step by step: %s", name, reason)
        return None
    final, outputs = Loop(step, options).run_at_once(loop.init, loop.xs, closed_over, loop.length)
    waiting = iter(outputs)
    ys = [next(waiting) if is_tensor else None for is_tensor in form[1]]
    return loop.carry(final), pytree.tree_unflatten(ys, form[0])


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise UnsupportedError(f"combine_fn must return a pair, the new carry and ys, got {type(result).__name__}")
    return result


# --- as it is -----------------------------------------------------------------------------------------------------------


def _step_by_step(combine_fn: Callable[..., Any], loop: _Loop) -> tuple[Any, Any]:
    carry: Any = loop.carry(loop.init)
    each: list[list[Any]] = []
    ys_spec: Any = None
    if not loop.length:
        name, _ = described(combine_fn)
        raise UnsupportedError(f"{name} cannot be traced, and without a step it is not known what ys it returns")
    for index in range(loop.length):
        carry, y = _pair(combine_fn(carry, loop.x([x[index] for x in loop.xs])))
        tensors, spec, places = _flat(carry, "the carry that combine_fn returns")
        _check_structure(loop, spec, places)
        _check_carry(loop, [(tuple(one.shape), one.dtype) for one in tensors])
        leaves, spec = pytree.tree_flatten(y)
        _check_leaves(leaves)
        if ys_spec is not None and spec != ys_spec:
            raise UnsupportedError(f"ys must have one structure in all steps, got {ys_spec} and {spec}")
        ys_spec = spec
        each.append(leaves)
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    return carry, pytree.tree_unflatten(stacked, ys_spec)


def _without_steps(combine_fn: Callable[..., Any], loop: _Loop) -> tuple[Any, Any]:
    """No steps; one is made, of zeros, to see what `ys` it returns."""
    _, y = combine_fn(loop.carry(loop.init), loop.x([x.new_zeros(x.shape[1:]) for x in loop.xs]))
    return loop.carry(loop.init), pytree.tree_map_only(Tensor, lambda one: one.new_empty((0, *one.shape)), y)


def _check_leaves(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise UnsupportedError(f"all leaves of ys must be tensors or None, got {type(leaf).__name__} {leaf!r:.50}")


def _check_structure(loop: _Loop, spec: Any, places: tuple[bool, ...]) -> None:
    if spec != loop.carry_spec or places != loop.places[0]:
        raise UnsupportedError(
            f"the carry that combine_fn returns must have the structure of init, {loop.carry_spec}, got {spec}"
        )


def _check_carry(loop: _Loop, found: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
    for tensor, (shape, dtype) in zip(loop.init, found, strict=True):
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise UnsupportedError(
                "the carry that combine_fn returns must have the shapes and dtypes of init: "
                f"{list(tensor.shape)} {tensor.dtype} became {list(shape)} {dtype}"
            )


# --- within what torch.compile captures ---------------------------------------------------------------------------------


def _in_a_compiler(combine_fn: Callable[..., Any], loop: _Loop, options: Any) -> tuple[Any, Any]:
    """The loop as one operator of the graph that Dynamo captures."""
    if not loop.length:
        return _without_steps(combine_fn, loop)
    carry, ys = scan_op(step_between_marks, combine_fn, loop.carry(loop.init), loop.x(loop.xs), loop.length, False)
    _, spec, places = _flat(carry, "the carry that combine_fn returns")
    _check_structure(loop, spec, places)
    _check_leaves(pytree.tree_leaves(ys))
    return carry, ys

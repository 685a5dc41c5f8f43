"""The per-block operands of a chain: where they are kept, how they are stacked, or read where they lie."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pcr_fx import ops
from pcr_fx.body.isolation import is_plain_call, is_transformed, wants_every_op
from pcr_fx.body.reals import to_real
from pcr_fx.targets import PointerTable
from pcr_fx.watched import Changes

# A list where the parts cannot be stacked, or nobody wants them to be.
Operand: TypeAlias = "Tensor | list[Tensor] | StackedAttributes | PointerTable"

# Those of compilers stand for ordinary tensors.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_NO_OPS = torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl


def is_plain(tensor: Any) -> bool:
    """Whether it is an ordinary tensor whose memory holds its values as they are."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg()


def is_ordinary(tensor: Tensor) -> bool:
    """Whether its class has no ops of its own, as those of quantised and distributed weights have."""
    kind = type(tensor)
    return kind in _ORDINARY or (kind.__torch_function__, kind.__torch_dispatch__) == _NO_OPS


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return ops.stack(list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return cotangent.unbind(0)


def stack_operands(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """`torch.stack(tensors)` as one operator that no compiler takes apart; a list where each block is to have its own."""
    if is_transformed() or wants_every_op() or not all(map(is_ordinary, tensors)):
        return list(tensors)
    return _Stack.apply(*tensors)


def stack_parts(whole: Tensor, dim: int, first: int, count: int, step: int) -> Tensor:
    """`torch.stack` of `count` parts `whole.select(dim, index)`, from index `first` on in steps, at once.

    In memory of its own like a stack, which a backward finds as it was.
    """
    last = first + step * (count - 1)
    size: Any = whole.shape[dim]
    if type(size) is int and max(first, last) >= size:  # a slice would have fewer parts and not say so
        raise IndexError(f"index {max(first, last)} is out of bounds for dimension {dim} with size {size}")
    parts = whole.movedim(dim, 0)[min(first, last) : max(first, last) + 1 : abs(step)]
    return parts.clone(memory_format=torch.contiguous_format) if step > 0 else parts.flip(0).contiguous()


# Some states of a trajectory, in place of a list of them: (trajectory, first block, number of states, step).
# The trajectory is a list itself where the model's own ops made it.
Cut: TypeAlias = "tuple[Tensor | Sequence[Tensor], int, int, int]"


def collect(parts: Sequence[Tensor | Cut], dim: int, joins: bool) -> Tensor:
    """`torch.stack`, or where it `joins` `torch.cat`, of tensors and of states that lie in trajectories, in one copy."""
    if any(isinstance(part, tuple) and not isinstance(part[0], Tensor) for part in parts):
        every = [each for part in parts for each in (_listed(part) if isinstance(part, tuple) else [part])]
        return torch.cat(every, dim) if joins else torch.stack(every, dim)
    pieces = [_piece(part, dim, joins) for part in parts]
    if len(pieces) == 1:
        return pieces[0].clone(memory_format=torch.contiguous_format)
    return torch.cat(pieces, dim)


def complete(
    whole: Tensor | list[Tensor], before: Sequence[Tensor], after: Sequence[Tensor], dim: int, joins: bool
) -> Tensor:
    """`torch.stack` or `torch.cat` of some tensors, those of all blocks of a chain, and others.

    Args:
        whole: what a solve node returned in place of the blocks' parts: the result with them in it, or a list of them.
    """
    if isinstance(whole, list):
        every = [*before, *whole, *after]
        return torch.cat(every, dim) if joins else torch.stack(every, dim)
    if not before and not after:
        return whole
    dim = dim % whole.dim()
    others = [*before, *after]
    shape = (*whole.shape[:dim], *whole.shape[dim + 1 :])
    if is_plain_call() and all(is_plain(one) and one.shape == shape and one.dtype == whole.dtype for one in others):
        if torch.is_grad_enabled():
            return _Completed.apply(whole, dim, len(before), *others)
        return _write_around(whole, dim, len(before), others)
    middle = whole.narrow(dim, len(before), whole.shape[dim] - len(others))
    pieces = [one.unsqueeze(dim) for one in before], [one.unsqueeze(dim) for one in after]
    return torch.cat([*pieces[0], middle, *pieces[1]], dim)


class _Completed(torch.autograd.Function):
    """Writes what stands around the blocks' parts, which is nobody else's yet: no copy of those."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, before: int, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dim, ctx.places = dim, _around(whole, dim, before, len(others))
        ctx.mark_dirty(whole)
        return _write_around(whole, dim, before, others)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return cotangent, None, None, *(cotangent.select(ctx.dim, place) for place in ctx.places)


def _write_around(whole: Tensor, dim: int, before: int, others: Sequence[Tensor]) -> Tensor:
    for place, other in zip(_around(whole, dim, before, len(others)), others, strict=True):
        whole.select(dim, place).copy_(other)
    return whole


def _around(whole: Tensor, dim: int, before: int, count: int) -> list[int]:
    """The places that are not the blocks'."""
    size = whole.shape[dim]
    return [*range(before), *range(size - count + before, size)]


def _piece(part: Tensor | Cut, dim: int, joins: bool) -> Tensor:
    """One part as it stands in the result, as a view if that is possible."""
    if isinstance(part, Tensor):
        return part if joins else part.unsqueeze(dim)
    whole, first, count, step = part
    assert isinstance(whole, Tensor)
    last = first + step * (count - 1)
    states = whole[min(first, last) : max(first, last) + 1 : abs(step)]
    states = states if step > 0 else states.flip(0)
    if not joins:
        return states.movedim(0, dim)
    # The blocks come just before what each has of the dimension; counted from behind, that one keeps its number.
    at = dim if dim >= 0 else dim - 1
    return states.movedim(0, at).flatten(at, at + 1)


def _listed(part: Cut) -> list[Tensor]:
    whole, first, count, step = part
    return [whole[first + step * index] for index in range(count)]


def parts_of(operand: Operand) -> Sequence[Tensor]:
    """The tensor of each block."""
    if isinstance(operand, StackedAttributes):
        return operand.values()
    if isinstance(operand, PointerTable):
        return operand.tensors
    return operand if isinstance(operand, list) else operand.unbind(0)


def first_part(operand: Operand) -> Tensor:
    """The tensor of the first block."""
    if isinstance(operand, StackedAttributes):
        return operand.first()
    return operand.tensors[0] if isinstance(operand, PointerTable) else operand[0]


def dtype_of(operand: Operand) -> torch.dtype:
    return first_part(operand).dtype if isinstance(operand, StackedAttributes | list) else operand.dtype


def look(operand: Operand) -> Tensor | PointerTable:
    """What tells where a call goes, without stacking: the tensor or table itself; for what is neither one that is not plain."""
    if isinstance(operand, StackedAttributes):
        return operand.look()
    return _unusual(operand) if isinstance(operand, list) else operand


def _unusual(values: Sequence[Tensor]) -> Tensor:
    """One that is no plain tensor, if there is any."""
    return next((value for value in values if not is_plain(value)), values[0])


def in_place(operand: Operand, seen: Tensor | PointerTable) -> Tensor | PointerTable:
    """For a kernel: where the parts lie, if they can be read there; else stacked.

    Args:
        seen: the operand's look.
    """
    return stacked(operand) if isinstance(operand, StackedAttributes) and isinstance(seen, Tensor) else seen


def stacked(operand: Operand) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    return operand.stacked() if isinstance(operand, StackedAttributes) else torch.stack(list(parts_of(operand)))


class Given(NamedTuple):
    """What a solve node is called with.

    Attributes:
        states: the initial states.
        operands: per-block operands, `[L, ...]`, or what can stack them or tell where they lie.
        shared: shared operands.
        head_operands, head_shared: those of its head.
    """

    states: Sequence[Tensor]
    operands: Sequence[Operand]
    shared: Sequence[Tensor]
    head_operands: Sequence[Operand] = ()
    head_shared: Sequence[Tensor] = ()

    def stacked(self) -> Given:
        """The same with a tensor `[L, ...]` for each per-block operand."""
        operands, head_operands = list(map(stacked, self.operands)), list(map(stacked, self.head_operands))
        return self._replace(operands=operands, head_operands=head_operands)


def parts_of_complex(operand: Operand) -> Tensor | list[Tensor]:
    """The real and imaginary parts of complex numbers, `[..., 2]`."""
    if isinstance(operand, list):
        return [to_real(part) for part in operand]
    return to_real(stacked(operand))


def complex_of_parts(parts: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The reverse, of what a solve node returned: of a list where it returned one."""
    if isinstance(parts, list):
        return [complex_of_parts(part) for part in parts]  # type: ignore[misc]
    # A state may lie among others in memory, as complex numbers cannot.
    return torch.view_as_complex(parts.clone(memory_format=torch.contiguous_format) if _lies_apart(parts) else parts)


def _lies_apart(parts: Tensor) -> bool:
    *others, last = parts.stride()
    return last != 1 or any(stride % 2 for stride in others) or parts.storage_offset() % 2 != 0


@dataclass
class Source:
    """Where a module keeps a tensor, to be looked up at each call: so `.to()`, `load_state_dict(assign=True)` and
    optimisers that exchange parameters are seen.

    Attributes:
        path: the attribute's name in the model.
        holder: `module._parameters`, `module._buffers`, or whatever else holds it by `name`.
    """

    path: str
    holder: Any
    name: Any


class Attributes(nn.Module):
    """The present values of some attributes, as a list; of per-block operands what can stack or read them.

    One module for all of a graph, called once or seldom: that costs a microsecond.
    """

    def __init__(self, sources: Sequence[Source | StackedAttributes]) -> None:
        super().__init__()
        self.sources = list(sources)

    def forward(self, first: int, end: int) -> list[Any]:
        """Those from `first` up to `end`."""
        return [
            source if type(source) is StackedAttributes else source.holder[source.name]  # type: ignore[union-attr]
            for source in self.sources[first:end]
        ]


class StackedAttributes:
    """One per-block operand, of the parameters or buffers of the blocks.

    It stacks them, `[L, ...]`, or tells a kernel where they lie.

    Args:
        sources: the attributes of the blocks.
        changes: what counts when any attribute of the model is exchanged for another.
    """

    def __init__(self, sources: Sequence[Source], changes: Changes) -> None:
        self.sources = list(sources)
        self.changes = changes
        self.table: PointerTable | None = None
        self._seen = (-1, -1)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.sources)

    def values(self) -> list[Any]:
        return [source.holder[source.name] for source in self.sources]

    def first(self) -> Any:
        """That of the first block."""
        return self.sources[0].holder[self.sources[0].name]

    def stacked(self) -> Tensor:
        return torch.stack(self.values())

    def look(self) -> PointerTable | Tensor:
        """Where they lie, if kernels can read them there; else one of them, and one that is no plain tensor if there is one."""
        table = self._present_table()
        if table is not None:
            return table
        return _unusual(self.values())

    def _present_table(self) -> PointerTable | None:
        changes, table = (self.changes.count, self.changes.listings), self.table
        # The same tensors may be of another class, which the table does not tell.
        is_known = self._seen == changes or (
            self._seen[0] == changes[0] and table is not None and all(map(is_plain, table.tensors))
        )
        if not is_known or (table is not None and not table.holds()):
            # Parts of a packed parameter are views, made anew each time.
            in_place = all(isinstance(source.holder, dict) for source in self.sources)
            self.table = PointerTable.of(self.values()) if in_place else None
        self._seen = changes  # last: another thread takes the table for that of these changes
        return self.table

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, which lie elsewhere.
        return {**self.__dict__, "table": None}


class InputOperand(nn.Module):
    """One per-block operand of tensors that each call is given, as a compiler gives parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table: PointerTable | None = None

    def forward(self, tensors: list[Tensor]) -> Operand:
        """For a kernel: where they lie, if they can be read there; else as `stack_operands` has them."""
        if not is_plain_call():
            return stack_operands(tensors)
        table = self.table
        if table is None or not all(map(operator.is_, tensors, table.tensors)) or not table.holds():
            table = self.table = PointerTable.of(tensors)
        return stack_operands(tensors) if table is None else table

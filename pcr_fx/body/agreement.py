"""Whether a program of all blocks computes what the model's own ops make of one block at a time.

PyTorch batches a block op by op, and its rule for an op may be wrong, or right only for the sizes that a program was traced at.
So each such program is compared once, on random numbers, before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pcr_fx.body.isolation import apart
from pcr_fx.chain import TensorSpec
from pcr_fx.errors import is_out_of_memory

if TYPE_CHECKING:
    from pcr_fx.body.program import Program

# Sizes of batch dimensions, where these may have any: odd, and others than anything is traced at.
_BATCH = (3, 5)
# Numbers that a program may be tried on; a longer chain is looked at in a shorter one of the same blocks.
_NUMBERS = 2**24
# Epsilons that blocks may differ by from one block by itself, relative to the largest number. A wrong rule makes errors as large
# as the numbers themselves.
BATCHED_EPS = 2.0**13


class _Block(NamedTuple):
    """What the model's own ops make of one block: the new state, and the cotangents of all that is differentiable."""

    value: Tensor
    cotangents: tuple[Tensor, ...]


@apart
def disagreement(program: Program, name: str) -> str:
    """Why a program may not be used, or nothing.

    Args:
        name: `evaluate`, `linearise` or `pullback`.

    Raises:
        Exception: memory ran out, which says nothing of the program.
    """
    tried = _short_enough(program, name)
    if tried is None:
        return ""  # what is linearised is judged by its residuals, as all solves are
    try:
        return _Comparison(tried).of(name)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = str(error).strip().splitlines()
        return f"its blocks cannot be batched: {type(error).__name__}{': ' + text[0] if text else ''}"


def _short_enough(program: Program, name: str) -> Program | None:
    """The program, or one of as many blocks as can be tried; `None` where a few are too many."""
    batch, d = math.prod(_batch_sizes(program)), program.dimension
    each = batch * d * (d if name == "linearise" else 1)
    each += sum(math.prod(spec.shape) for spec in program.signature.operands)
    length = min(program.length, _NUMBERS // max(each, 1))
    if length == program.length:
        return program
    return program.of_length(max(length, 2)) if length >= 2 or name != "linearise" else None


def _batch_sizes(program: Program) -> tuple[int, ...]:
    dims = program.layout.batch_dims
    if not program.generality.any_batch:
        return tuple(program.signature.states[0].shape[dim] for dim in dims)
    return tuple(_BATCH[index % len(_BATCH)] for index in range(len(dims)))


class _Comparison:
    """A program's results beside those of a few of its blocks, on tensors made up for that.

    Attributes:
        states: that each block starts from, `[L, *batch, d]`.
        cotangents: of the new states, zero but for the blocks that are looked at.
        blocks: the numbers of these.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.draw = torch.Generator().manual_seed(0)
        batch, first = _batch_sizes(program), program.signature.states[0]
        self.sizes = [first.shape[dim] for dim in program.layout.batch_dims], batch
        length = program.length
        flat = TensorSpec((*batch, program.dimension), first.dtype, first.device)
        follows = iter(program.generality.follows)
        self.states = self._random(flat, length)
        self.operands = [
            self._random(self._resized(spec, next(follows)), length) for spec in program.signature.operands
        ]
        self.operands += program.literals
        self.shared = [self._random(self._resized(spec, next(follows))) for spec in program.signature.shared]
        self.blocks = sorted({0, length // 3, length // 2, length - 1})
        self.cotangents = torch.zeros_like(self.states)
        for block in self.blocks:
            self.cotangents[block] = self._random(flat)

    def of(self, name: str) -> str:
        """What differs, in words."""
        expected = [self._block(block) for block in self.blocks]
        given = (self.states, *self.operands, *self.shared)
        with torch.no_grad():
            if name == "evaluate":
                values = self.program.evaluate(*given)
                return differing("what the blocks compute", values[self.blocks], [one.value for one in expected])
            if name == "linearise":
                return self._linearised(self.program.linearise(*given), expected)
            return self._pulled(self.program.pullback(*given, self.cotangents), expected)

    def _linearised(self, got: tuple[Tensor, Tensor], expected: Sequence[_Block]) -> str:
        values, jacobians = got
        pulled = (self.cotangents[self.blocks].unsqueeze(-2) @ jacobians[self.blocks]).squeeze(-2)
        return differing("what the blocks compute", values[self.blocks], [one.value for one in expected]) or differing(
            "their Jacobians", pulled, [one.cotangents[0] for one in expected]
        )

    def _pulled(self, got: Sequence[Tensor], expected: Sequence[_Block]) -> str:
        each = 1 + sum(self.program.differentiable_operands)
        for index, (ours, theirs) in enumerate(
            zip(got, zip(*(one.cotangents for one in expected), strict=True), strict=True)
        ):
            if index < each:
                difference = differing("their gradients", ours[self.blocks], theirs)
            else:
                difference = differing("their gradients", ours, [sum(theirs[1:], theirs[0])], stacked=False)
            if difference:
                return difference
        return ""

    def _block(self, block: int) -> _Block:
        program = self.program
        operands = [operand[block] for operand in self.operands]
        needs = [*program.differentiable_operands, *(False for _ in program.literals), *program.differentiable_shared]
        given = [tensor.clone() for tensor in (self.states[block], *operands, *self.shared)]
        active = [tensor.requires_grad_() for tensor, need in zip(given, [True, *needs], strict=True) if need]
        value = program.layout.flatten(program.chain.body.forward(*program.layout.unflatten(given[0]), *given[1:]))
        if not value.requires_grad:
            return _Block(value, tuple(map(torch.zeros_like, active)))
        pulled = torch.autograd.grad(value, active, self.cotangents[block], allow_unused=True, materialize_grads=True)
        return _Block(value.detach(), pulled)

    def _resized(self, spec: TensorSpec, follows: Sequence[tuple[int, int]]) -> TensorSpec:
        """An operand for these sizes of the batch; 1, to broadcast, stays as it is."""
        before, now = self.sizes
        shape = list(spec.shape)
        for dim, number in follows:
            shape[dim] = now[number] if shape[dim] == before[number] else shape[dim]
        return TensorSpec(tuple(shape), spec.dtype, spec.device)

    def _random(self, spec: TensorSpec, *leading: int) -> Tensor:
        """Reals of either sign, some above 1; whole numbers are 0, which is an index of anything."""
        shape = (*leading, *spec.shape)
        if not spec.is_differentiable:
            return torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        return torch.randn(shape, generator=self.draw, dtype=spec.dtype).to(spec.device)


def differing(what: str, got: Tensor, expected: Sequence[Tensor], stacked: bool = True) -> str:
    """How what PyTorch batched differs from what it should be, in words; nothing where it does not."""
    true = torch.stack(list(expected)) if stacked else expected[0]
    if got.shape != true.shape:
        return f"batched by PyTorch, {what} have the shape {list(got.shape)} in place of {list(true.shape)}"
    finite = true.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return f"batched by PyTorch, {what} are finite elsewhere than one by one"
    ours, theirs = (torch.where(finite, tensor, 0) for tensor in (got, true))
    size, error = (float(tensor.abs().amax()) if tensor.numel() else 0.0 for tensor in (theirs, ours - theirs))
    if error > BATCHED_EPS * torch.finfo(true.dtype).eps * size:
        return f"batched by PyTorch, {what} differ by {error / size if size else math.inf:.2g} from those one by one"
    return ""

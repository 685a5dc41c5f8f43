"""What tensors a chain is called with, and for which other sizes a trace of it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pcr_fx.chain import TensorSpec


@dataclass(frozen=True)
class Signature:
    """The tensors of one block: states, per-block operands (without their leading L) and shared operands."""

    states: tuple[TensorSpec, ...]
    operands: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]

    @property
    def number(self) -> TensorSpec:
        """What a literal of the block is as a tensor."""
        return TensorSpec((), self.states[0].dtype, self.states[0].device)


@dataclass(frozen=True)
class Generality:
    """The sizes for which a trace is right beside its own.

    Attributes:
        any_batch: whether the batch dimensions of the state may have any size.
        operand_dims: for each operand, then each shared operand, the dimensions that may follow the batch.
    """

    any_batch: bool
    operand_dims: tuple[tuple[int, ...], ...]

    def widen(self, signature: Signature, batch_dims: tuple[int, ...]) -> tuple[Any, ...]:
        """`signature` with every free size left out: signatures that widen alike share a program."""
        state_dims = batch_dims if self.any_batch else ()
        batch = {signature.states[0].shape[dim] for dim in state_dims}
        states = [_without(spec, state_dims, batch) for spec in signature.states]
        others = zip((*signature.operands, *signature.shared), self.operand_dims, strict=True)
        return batch_dims, *states, *(_without(spec, dims, batch) for spec, dims in others)


def _without(spec: TensorSpec, dims: tuple[int, ...], batch: set[int]) -> TensorSpec:
    """`spec` without its sizes along `dims` that follow the batch; others, such as 1 to broadcast, are kept."""
    shape = tuple(-1 if dim in dims and size in batch else size for dim, size in enumerate(spec.shape))
    return TensorSpec(shape, spec.dtype, spec.device)

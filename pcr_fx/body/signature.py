"""What tensors a chain is called with, and for which other sizes a trace of it is right."""

from __future__ import annotations

from collections.abc import Sequence
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
        follows: for each operand, then each shared operand, its dimensions that have the size of a batch dimension, whatever
            that is, each with the number of that batch dimension.
    """

    any_batch: bool
    follows: tuple[tuple[tuple[int, int], ...], ...]

    def widen(self, signature: Signature, batch_dims: tuple[int, ...]) -> tuple[Any, ...]:
        """`signature` with every free size left out: signatures that widen alike share a program."""
        free = tuple((dim, number) for number, dim in enumerate(batch_dims)) if self.any_batch else ()
        batch = [signature.states[0].shape[dim] for dim, _ in free]
        states = [_without(spec, free, batch) for spec in signature.states]
        others = zip((*signature.operands, *signature.shared), self.follows, strict=True)
        return batch_dims, *states, *(_without(spec, pairs, batch) for spec, pairs in others)


def _without(spec: TensorSpec, follows: Sequence[tuple[int, int]], batch: Sequence[int]) -> TensorSpec:
    """`spec` without its sizes that follow the batch; others, such as 1 to broadcast, are kept."""
    shape = list(spec.shape)
    for dim, number in follows:
        if dim < len(shape) and shape[dim] == batch[number]:
            shape[dim] = -1 - number
    return TensorSpec(tuple(shape), spec.dtype, spec.device)

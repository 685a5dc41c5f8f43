"""The chain: a maximal run of L isomorphic blocks, as one record that every other room passes on; and near misses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class TensorSpec:
    """What a program needs to know of a tensor before it sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_differentiable(self) -> bool:
        """Whether such a tensor has a cotangent."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Origin:
    """Where a chain stands in the user's model: what the report says of it."""

    modules: str = ""
    source: str = ""
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Head:
    """What the blocks of a chain give away beside their states: their outputs.

    Attributes:
        body: of one block, called as `body(*states, *new_states, *operands, *literals, *shared)`, a tuple of the outputs.
            What a block computes on the way to its new states, it computes again.
        block: the block as a whole, called as the chain's body with these operands, literals and shared operands behind
            its own, a tuple of the new states and the outputs. What is among the chain's too is read there.
        num_outputs, num_operands, num_shared, literals: as a chain's; operands and literals may be the chain's too.
    """

    body: fx.GraphModule
    block: fx.GraphModule
    num_outputs: int
    num_operands: int = 0
    num_shared: int = 0
    literals: tuple[tuple[float, ...], ...] = ()

    def reads_old_states(self, num_states: int) -> bool:
        """Whether an output depends on the states that a block is given, and not only on those that it returns."""
        return any(node.users for node in self.body.graph.find_nodes(op="placeholder")[:num_states])


@dataclass(frozen=True)
class Complex:
    """Which tensors of a chain are complex.

    Attributes:
        states, operands, shared, head_operands, head_shared, outputs: of each whether it is.
    """

    states: tuple[bool, ...]
    operands: tuple[bool, ...]
    shared: tuple[bool, ...]
    head_operands: tuple[bool, ...] = ()
    head_shared: tuple[bool, ...] = ()
    outputs: tuple[bool, ...] = ()

    def __bool__(self) -> bool:
        """Whether any is."""
        return any(
            map(any, (self.states, self.operands, self.shared, self.head_operands, self.head_shared, self.outputs))
        )


@dataclass(frozen=True, eq=False)
class Chain:
    """L blocks z_l = f_l(z_{l-1}) that run the same body.

    Attributes:
        body: one block, called as `body(*states, *operands, *literals, *shared)`, a tuple of the new states. Written
            in the ops that the model was captured in.
        length: L.
        num_states: tensors carried from block to block.
        num_operands: tensors that differ from block to block.
        num_shared: tensors that are the same in every block.
        literals: numbers that differ from block to block, `L` values each.
        origin: where it was found.
        head: its outputs; `None` where it has none.
        is_checkpoint: whether its author has what lies between the states computed again in the backward.
        num_outputs: outputs that the body itself returns, behind the new states.
        own_op: the op that the model has in place of the blocks, such as `torch.gru`, if it has one: `(states, operands, shared)
            ->` what leaves the chain.
        as_written: the chain of complex tensors that this one has real and imaginary parts in place of, `[..., 2]`, and which
            tensors these are; `None` where there are none.
    """

    body: fx.GraphModule
    length: int
    num_states: int = 1
    num_operands: int = 0
    num_shared: int = 0
    literals: tuple[tuple[float, ...], ...] = ()
    origin: Origin = field(default_factory=Origin)
    head: Head | None = None
    is_checkpoint: bool = False
    num_outputs: int = 0
    own_op: Callable[..., Any] | None = None
    as_written: tuple[Chain, Complex] | None = None

    def of_length(self, length: int) -> Chain:
        """A chain of the same blocks, another number of them; they have no numbers of their own."""
        if length == self.length:
            return self
        assert not self.literals, "a number for each block is for that many blocks"
        return replace(self, length=length)


@dataclass(frozen=True)
class Place:
    """Where the parts of all blocks stand in what a graph makes of them, which is theirs alone.

    Attributes:
        dim: the dimension that blocks follow each other in, as the graph has it.
        joins: whether that is one that the parts have, and not a further one.
        before, after: how many others stand in front of them and behind; none where they are joined.
    """

    dim: int
    joins: bool = False
    before: int = 0
    after: int = 0

    def shape(self, length: int, part: Sequence[int]) -> tuple[int, ...]:
        """That of the whole, of the shape of a block's part."""
        at = self._at(len(part))
        if self.joins:
            return (*part[:at], length * part[at], *part[at + 1 :])
        return (*part[:at], self.before + length + self.after, *part[at:])

    def blocks_of(self, whole: Tensor, length: int) -> Tensor:
        """The parts of all blocks, `[L, ...]`, as a view."""
        if self.joins:
            at = self._at(whole.dim())
            return whole.unflatten(at, (length, whole.shape[at] // length)).movedim(at, 0)
        at = self._at(whole.dim() - 1)
        return whole.narrow(at, self.before, length).movedim(at, 0)

    def filled(self, parts: Tensor) -> Tensor:
        """The whole in memory of its own, of the parts of all blocks, `[L, ...]`; zero where others are to stand."""
        at = self._at(parts.dim() - 1)
        moved = parts.movedim(0, at)
        if self.joins:
            return moved.flatten(at, at + 1).clone(memory_format=torch.contiguous_format)
        if self.before or self.after:
            margins = [0, 0] * (parts.dim() - 1 - at) + [self.before, self.after]
            return torch.constant_pad_nd(moved, margins)
        return moved.clone(memory_format=torch.contiguous_format)

    def _at(self, rank: int) -> int:
        return self.dim % (rank if self.joins else rank + 1)


@dataclass(frozen=True)
class Leaving:
    """What leaves a chain: the states that the rest of a graph takes of it, and the outputs, which are counted behind them.

    Attributes:
        taps: those that are taken one by one: (which state or output, of which block).
        whole: those that are taken of all blocks, `[L, ...]`; they come first.
        places: for each of these where it stands in what is taken in its place, if it is; others there are left open.
    """

    taps: tuple[tuple[int, int], ...]
    whole: tuple[int, ...] = ()
    places: tuple[Place | None, ...] = ()

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of the taps, in order."""
        return tuple(sorted({block for _, block in self.taps}))

    def of_solve(self, chain: Chain) -> Leaving:
        """What has to be taken of the states: all of them where there are outputs to compute."""
        taps = tuple(tap for tap in self.taps if tap[0] < chain.num_states)
        if chain.head is not None:
            return Leaving(taps, tuple(range(chain.num_states)))
        return Leaving(taps, self.whole)


@dataclass(frozen=True)
class NearMiss:
    """Blocks that have the makings of a chain, or broke one.

    Attributes:
        modules: where they stand in the model.
        reason: why they are no chain, or none as a whole.
        length: how many blocks they are; 0 if that is not known.
        source: the line of the model that they come from; empty if that is not known.
    """

    modules: str
    reason: str
    length: int = 0
    source: str = ""

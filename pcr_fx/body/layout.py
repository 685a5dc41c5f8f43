"""How the carried tensors of a chain lie in one state vector per sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateLayout:
    """States `[*shape_i]` against one tensor `[*batch, d]`: batch dimensions in front, all else flattened and joined.

    Attributes:
        shapes: the shape of each state; entries at batch dimensions are not read.
        batch_dims: positions of the batch dimensions, the same in every state.
    """

    shapes: tuple[tuple[int, ...], ...]
    batch_dims: tuple[int, ...]

    @property
    def features(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of each state without its batch dimensions."""
        return tuple(
            tuple(size for dim, size in enumerate(shape) if dim not in self.batch_dims) for shape in self.shapes
        )

    @functools.cached_property
    def is_flat(self) -> bool:
        """Whether the one state is flat as it is, as the common `[batch, features]` is: then nothing is to be done."""
        (shape, *others) = self.shapes
        return not others and len(shape) > 0 and self.batch_dims == tuple(range(len(shape) - 1))

    @property
    def counts(self) -> list[int]:
        """How many numbers per sample each state holds."""
        return [math.prod(sizes) for sizes in self.features]

    @property
    def dimension(self) -> int:
        """d: numbers carried per sample."""
        return sum(self.counts)

    def flatten(self, states: Sequence[Tensor], leading: int = 0) -> Tensor:
        """States, each with `leading` further dimensions in front, as one tensor `[*leading, *batch, d]`."""
        if self.is_flat:
            return states[0]
        parts = []
        for state, sizes in zip(states, self.features, strict=True):
            front = state.movedim(self._positions(leading), self._front(leading))
            kept = leading + len(self.batch_dims)
            # One feature dimension is already flat: no op at all for the common [batch, features] state.
            parts.append(front if len(sizes) == 1 else front.reshape((*front.shape[:kept], math.prod(sizes))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor, leading: int = 0) -> tuple[Tensor, ...]:
        """The inverse of `flatten`."""
        if self.is_flat:
            return (flat,)
        parts = (flat,) if len(self.shapes) == 1 else flat.split(self.counts, dim=-1)
        states = []
        for part, sizes in zip(parts, self.features, strict=True):
            front = part if len(sizes) == 1 else part.reshape((*part.shape[:-1], *sizes))
            states.append(front.movedim(self._front(leading), self._positions(leading)))
        return tuple(states)

    def _front(self, leading: int) -> tuple[int, ...]:
        return tuple(range(leading, leading + len(self.batch_dims)))

    def _positions(self, leading: int) -> tuple[int, ...]:
        return tuple(leading + dim for dim in self.batch_dims)

"""How the indices of a loop lie in a tile, and where in memory the numbers of a view at these indices are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pcr_fx.codegen.ir import View


@dataclass(frozen=True)
class Axes:
    """How the indices of a loop lie in a tile `[seeds, height, width]`.

    Attributes:
        rows: the sizes of the indices along the rows, the last one fastest.
        columns: of those along the columns; `None` where a tile has rows only.
        height, width: rows and columns of the tile, powers of two. Where there are more indices, a loop goes through them.
        seeds: 0 where the tile has no such axis.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...] | None
    height: int
    width: int = 1
    seeds: int = 0

    @property
    def slices_rows(self) -> bool:
        return self.height < math.prod(self.rows)

    @property
    def slices_columns(self) -> bool:
        return self.columns is not None and self.width < math.prod(self.columns)

    @property
    def is_sliced(self) -> bool:
        return self.slices_rows or self.slices_columns

    @property
    def numbers(self) -> int:
        return max(self.seeds, 1) * self.height * self.width

    @property
    def shape(self) -> str:
        return f"[{', '.join(map(str, self._sizes))}]"

    @property
    def _sizes(self) -> list[int]:
        columns = [] if self.columns is None else [self.width]
        return [*([self.seeds] if self.seeds else []), self.height, *columns]

    def spread(self, tensor: str, *axes: str) -> str:
        """A tensor along the axes "seed", "row" or "column", in this order, such that it is broadcast over the others."""
        every = [*(["seed"] if self.seeds else []), "row", *(["column"] if self.columns is not None else [])]
        if list(axes) == every:
            return tensor
        return f"{tensor}[{', '.join(':' if axis in axes else 'None' for axis in every)}]"

    @property
    def seed(self) -> str:
        return self.spread(f"tl.arange(0, {self.seeds})", "seed")

    @property
    def row(self) -> str:
        index = f"tl.arange(0, {self.height})"
        return self.spread(f"(row + {index})" if self.slices_rows else index, "row")

    @property
    def column(self) -> str:
        if self.columns is None:
            return ""
        index = f"tl.arange(0, {self.width})"
        return self.spread(f"(column_ + {index})" if self.slices_columns else index, "column")

    def split(self, view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A view's strides along the rows and along the columns."""
        return view.strides[: len(self.rows)], view.strides[len(self.rows) :]

    @property
    def masks(self) -> tuple[str, str]:
        """Which of the tile's rows and columns there are; empty if all."""
        rows, columns = math.prod(self.rows), math.prod(self.columns or ())
        row = f"({self.row} < {rows})" if rows % self.height else ""
        column = (
            f"({self.column} < {columns})" if self.columns is not None and (columns % self.width or not columns) else ""
        )
        return row, column

    def offsets(self, view: View, seeded: bool) -> tuple[str, str, int]:
        """Where the numbers of a view are, which of them there are, and how many a tile holds.

        Args:
            seeded: whether each seed has such a buffer, one after another.
        """
        rows, columns = self.split(view)
        along_rows, along_columns = _terms(self.row, self.rows, rows), _terms(self.column, self.columns or (), columns)
        masks = [mask for mask, used in zip(self.masks, (along_rows, along_columns), strict=True) if mask and used]
        seeds = [f"{self.seed} * {view.buffer.size}"] if seeded else []
        terms = [*seeds, *along_rows, *along_columns, *([str(view.offset)] if view.offset else [])]
        numbers = (self.height if along_rows else 1) * (self.width if along_columns else 1)
        return " + ".join(terms) or "0", " & ".join(masks), numbers


def _terms(index: str, sizes: Sequence[int], strides: Sequence[int]) -> list[str]:
    terms, inner = [], math.prod(sizes)
    for position, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        inner //= max(size, 1)
        if stride == 0:
            continue
        this = index if inner == 1 else f"{index} // {inner}"
        this = this if position == 0 else f"{this} % {size}"
        terms.append(this if stride == 1 and this == index else f"({this}) * {stride}")
    return terms


def load_at(pointer: str, offsets: str, mask: str) -> str:
    return f"tl.load({pointer} + {offsets}, mask={mask}, other=0)" if mask else f"tl.load({pointer} + {offsets})"

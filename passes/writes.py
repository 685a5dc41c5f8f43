"""Write ops that write into fresh memory as ordinary ones, which return what it then holds.

A chain is made of ordinary ops, and what a model writes is mostly one in disguise: a result filled step by step is a stack of
the a state that lives in a buffer is handed from step to step, zeros filled by column are a stack of columns. All
that reads the memory afterwards, under any name, reads the value that stands for it then.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import (
    FILLING,
    MULTIPLYING_DROPOUTS,
    RESHAPING_METHODS,
    drawn,
    is_barrier,
    is_fresh,
    is_inplace_variant,
    is_random,
    shared_inputs,
    writes,
    written_memory,
)
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.cuts import Path, Step, cut_by, cut_of, is_view, known_sizes, shape_behind, value_of
from pcr_fx.passes.memories import Emit, EmitNodes, Memory

# Copies of a whole memory, or of several of its parts, that may stand in for what was none.
_MOST_COPIES = 4

_FUNCTIONAL_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}


def write_out(graph: fx.Graph) -> None:
    """Replace what writes into memory that nobody else sees, where all that touches it is understood."""
    memory = written_memory(graph)
    if not memory:
        return
    position = {node: index for index, node in enumerate(graph.nodes)}
    found = [(aliases, _understood(aliases, writers, position)) for aliases, writers in memory]
    while True:
        # What is kept in place of a copy may not be written to by ops that stay as they are.
        stay = set[fx.Node]().union(*(aliases for aliases, touched in found if touched is None))
        kept = [(a, None if touched is None or touched.holds_any(stay) else touched) for a, touched in found]
        if kept == found:
            break
        found = kept
    _Rewriting([touched for _, touched in found if touched is not None]).run(graph)


# --- what is understood ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Touched:
    """A fresh tensor that is written to: all views of it that are written to or read before that, and its writers."""

    root: fx.Node
    paths: dict[fx.Node, Path]
    writers: list[fx.Node]

    def holds_any(self, nodes: set[fx.Node]) -> bool:
        """Whether a writer writes any of these values, which is kept instead of being copied."""
        return any(not nodes.isdisjoint(writer.all_input_nodes) for writer in self.writers)


def _understood(aliases: set[fx.Node], writers: list[fx.Node], position: dict[fx.Node, int]) -> _Touched | None:
    roots = [node for node in aliases if not any(source in aliases for source in shared_inputs(node))]
    if len(roots) != 1 or not is_fresh(roots[0]) or not isinstance(value_of(roots[0]), (torch.Tensor, type(None))):
        return None
    first, *_, final = sorted(position[node] for alias in aliases for node in (alias, *alias.users))
    if any(is_barrier(node) and first < at < final for node, at in position.items()):
        return None  # what is written without gradients, say, is to be computed there
    touched = _Touched(roots[0], {roots[0]: ()}, sorted(writers, key=position.__getitem__))
    written = set(writers)
    # What may be a view of something, for all that is known: of which parts.
    vague: dict[fx.Node, list[Path]] = {}
    for node in sorted(aliases - {roots[0]}, key=position.__getitem__):
        if node in written:
            path = _written_path(node, touched)
            if path is None:
                return None
            touched.paths[node] = path
        elif is_view(node) and node.args[0] in touched.paths and (steps := cut_of(node)) is not None:
            touched.paths[node] = touched.paths[node.args[0]] + steps  # type: ignore[index]
        else:
            sources = [source for source in node.all_input_nodes if source in aliases]
            vague[node] = [
                path
                for source in sources
                for path in ([touched.paths[source]] if source in touched.paths else vague[source])
            ]
    if any(_is_written_later(node, paths, touched, position) for node, paths in vague.items()):
        return None
    return touched if _copies(touched, position) <= _MOST_COPIES else None


def _is_written_later(node: fx.Node, paths: Sequence[Path], touched: _Touched, position: dict[fx.Node, int]) -> bool:
    """Whether any of these parts, of which `node` may be a view, is written to behind it."""
    later = itertools.takewhile(lambda writer: position[writer] > position[node], reversed(touched.writers))
    return any(not _disjoint(path, _part_written(writer, touched)) for writer in later for path in paths)


def _part_written(writer: fx.Node, touched: _Touched) -> Path:
    return touched.paths[writer] + _steps_written(writer)


def _disjoint(a: Path, b: Path) -> bool:
    return bool(a and b) and a[0].dim == b[0].dim and (a[0].stop <= b[0].start or b[0].stop <= a[0].start)


def _written_path(node: fx.Node, touched: _Touched) -> Path | None:
    """Which part of the memory a writer writes to, if it is known to write all of that."""
    target = node.args[0] if node.args else None
    if writes(node) != [target] or target not in touched.paths or "out" in node.kwargs:
        return None
    path = touched.paths[target]  # type: ignore[index]
    if is_random(node):
        return path if _fills(node, path) or _drops(node) else None
    if not _sets(node):
        return path if _functional(node) is not None else None
    value = node.args[-1] if len(node.args) > 1 else 0
    if not isinstance(value_of(target), torch.Tensor) or not _can_be_written(value, value_of(target)):
        return None
    if not _is_setitem(node):
        return path if len(node.args) <= 2 and not node.kwargs else None
    if _is_mask(node.args[1]):
        # More than one number, and it is one for each place that the mask chooses.
        rest = value_of(target).dim() - value_of(node.args[1]).dim()
        return path if not isinstance(value, fx.Node) or value_of(value).dim() <= rest else None
    if _chosen(node) is not None:
        return path if not isinstance(value, fx.Node) or value_of(value).dim() <= value_of(target).dim() else None
    return path if cut_by(node.args[1], value_of(target)) is not None else None


def _fills(node: fx.Node, path: Path) -> bool:
    """Whether an op fills all of a new tensor with random numbers, which another that lies alike would be filled with too."""
    value = value_of(node.args[0])
    known = isinstance(value, torch.Tensor) and known_sizes(value) is not None and value.is_contiguous()
    return node.op == "call_method" and node.target in FILLING and not path and known


def _drops(node: fx.Node) -> bool:
    """Whether an op is a dropout in place that draws as others do."""
    value = value_of(node.args[0])
    on_cpu = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return on_cpu and node.target in MULTIPLYING_DROPOUTS and is_inplace_variant(node)


def _is_setitem(node: fx.Node) -> bool:
    return node.target is operator.setitem or (node.op == "call_method" and node.target == "__setitem__")


def _sets(node: fx.Node) -> bool:
    """Whether an op writes what it is given, and not what it computes from what was there."""
    return _is_setitem(node) or (node.op == "call_method" and node.target in ("copy_", "fill_", "zero_"))


def _can_be_written(value: Any, target: torch.Tensor) -> bool:
    if isinstance(value, fx.Node):
        known = value_of(value)
        return isinstance(known, torch.Tensor) and known.device == target.device and known_sizes(known) is not None
    return isinstance(value, (bool, int, float))


def _is_mask(index: Any) -> bool:
    value = value_of(index)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _chosen(writer: fx.Node) -> tuple[int, fx.Node] | None:
    """The dimension of which `x[:, index, ...] = y` writes some entries, and the whole numbers that say which."""
    if not _is_setitem(writer) or not isinstance(whole := value_of(writer.args[0]), torch.Tensor):
        return None
    index = writer.args[1]
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    places = [at for at, item in enumerate(items) if isinstance(item, fx.Node)]
    gaps = [at for at, item in enumerate(items) if item is ...]
    others = [item for item in items if not isinstance(item, fx.Node) and item is not ...]
    if len(places) != 1 or len(gaps) > 1 or not all(isinstance(item, slice) and item == slice(None) for item in others):
        return None
    at, value = places[0], value_of(items[places[0]])
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype is not torch.int64:
        return None
    return at - len(items) + whole.dim() if gaps and gaps[0] < at else at, items[at]


def _writes_some(writer: fx.Node) -> bool:
    """Whether what is written to is not all written, but in places that numbers of a tensor choose."""
    return _is_setitem(writer) and (_is_mask(writer.args[1]) or _chosen(writer) is not None)


# --- the values in place of what is written ---------------------------------------------------------------------------


def _copies(touched: _Touched, position: dict[fx.Node, int]) -> int:
    """How often more than one part of a memory would be copied at once."""
    root = value_of(touched.root)
    shape = known_sizes(root) if isinstance(root, torch.Tensor) else ()
    if shape is None:
        return _MOST_COPIES + 1
    emit = Emit()
    memory = Memory(None, shape, emit)
    readers = {user for node in touched.paths for user in node.users if user not in touched.paths}
    for node in sorted({*readers, *touched.writers}, key=position.__getitem__):
        for source in _read_by(node, touched.paths):
            memory.read(touched.paths[source])
        if node in touched.writers:
            memory.write(_part_written(node, touched), None)
    return emit.copies


def _read_by(node: fx.Node, paths: Container[fx.Node]) -> list[fx.Node]:
    """The views that an op reads: a writer that sets what it is given does not read what it writes to."""
    overwrites = _sets(node) and not _writes_some(node)
    return [
        source for source in node.all_input_nodes if source in paths and not (overwrites and source is node.args[0])
    ]


def _steps_written(writer: fx.Node) -> Path:
    """What a writer writes of its first argument."""
    if not _is_setitem(writer) or _writes_some(writer):
        return ()
    return cut_by(writer.args[1], value_of(writer.args[0])) or ()


class _Rewriting:
    """Goes through a graph, and keeps what each memory holds."""

    def __init__(self, touched: Sequence[_Touched]) -> None:
        self.of_root = {each.root: each for each in touched}
        self.of = {node: each for each in touched for node in each.paths}
        self.writers = {writer for each in touched for writer in each.writers}
        self.memories: dict[_Touched, Memory] = {}
        self.emit: dict[_Touched, EmitNodes] = {}
        # Views as they were when they were last read: how many writes there had been, and the value.
        self.seen: dict[tuple[_Touched, Path], tuple[int, fx.Node]] = {}
        self.count: Counter[_Touched] = Counter()

    def run(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node in self.of_root:
                self._read_inputs(node)  # of other memory
                value = value_of(node)
                shape = value.shape if isinstance(value, torch.Tensor) else ()
                emit = self.emit[self.of_root[node]] = EmitNodes(node)
                self.memories[self.of_root[node]] = Memory(node, shape, emit)
            if node in self.writers:
                self._write(node)
            elif node not in self.of:
                self._read_inputs(node)
            elif not self.count[self.of[node]]:
                self.seen[self.of[node], self.of[node].paths[node]] = 0, node
        for node in reversed(list(graph.nodes)):
            if node in self.of and not node.users and not is_random(node):
                graph.erase_node(node)

    def _read_inputs(self, node: fx.Node) -> None:
        for source in _read_by(node, self.of):
            node.replace_input_with(source, self._read(source))

    def _read(self, view: fx.Node) -> fx.Node:
        touched = self.of[view]
        key, count = (touched, touched.paths[view]), self.count[touched]
        if key not in self.seen or self.seen[key][0] != count:
            self.seen[key] = count, self.memories[touched].read(touched.paths[view])
        return self.seen[key][1]

    def _write(self, writer: fx.Node) -> None:
        touched, path = self.of[writer], _part_written(writer, self.of[writer])
        self._read_inputs(writer)
        emit = self.emit[touched]
        emit.before = writer
        if not _sets(writer):
            value = _make_functional(writer)
        elif _is_setitem(writer) and _is_mask(writer.args[1]):
            value = _masked(emit, *writer.args)
        elif (chosen := _chosen(writer)) is not None:
            value = _replaced(emit, writer.args[0], *chosen, writer.args[2])
        else:
            value = self._fitted(writer.args[-1] if len(writer.args) > 1 else 0, touched, path, emit)
        # Behind what was written, and not where it is read: that may be within the first block of many.
        emit.before = writer.next if _sets(writer) else value.next
        self.memories[touched].write(path, value)
        self.count[touched] += 1

    def _fitted(self, value: Any, touched: _Touched, path: Path, emit: EmitNodes) -> fx.Node:
        """A value as the part of a memory that it is written to."""
        memory = self.memories[touched]
        if not isinstance(value, fx.Node):
            return emit.call(torch.full_like, memory.read(path), value)
        root: torch.Tensor = value_of(touched.root)
        shape = functools.reduce(shape_behind, path, list(root.shape))
        while value_of(value).dim() > len(shape):
            value = emit.cut(value, Step(0, 0, 1, True))
        if list(value_of(value).shape) != shape:
            value = emit.call("expand_as", value, memory.read(path))
        if value_of(value).dtype != root.dtype:
            value = emit.call("to", value, root.dtype)
        # All of a memory is not to be another tensor under a second name.
        return value if path or is_fresh(value) else emit.call("clone", value)


def _masked(emit: EmitNodes, current: Any, mask: Any, value: Any) -> fx.Node:
    """What a tensor holds after `current[mask] = value`."""
    for _ in range(value_of(current).dim() - value_of(mask).dim()):
        mask = emit.call("unsqueeze", mask, -1)
    if not isinstance(value, fx.Node):
        return emit.call("masked_fill", current, mask, value)
    if value_of(value).dtype != value_of(current).dtype:
        value = emit.call("to", value, value_of(current).dtype)
    return emit.call(torch.where, mask, value, current)


def _replaced(emit: EmitNodes, current: Any, dim: int, index: fx.Node, value: Any) -> fx.Node:
    """What a tensor holds after some entries of a dimension were replaced."""
    if not isinstance(value, fx.Node):
        value = emit.call("new_full", current, (), value)
    elif value_of(value).dtype != value_of(current).dtype:
        value = emit.call("to", value, value_of(current).dtype)
    return emit.call(torch.ops.aten.index_put.default, current, [*(None for _ in range(dim)), index], value)


# --- ops that compute what they write --------------------------------------------------------------------------------


def _functional(node: fx.Node) -> Any:
    """The op that returns what an op in place would write; `None` where none is known."""
    if node.target in _FUNCTIONAL_OPERATORS:
        return _FUNCTIONAL_OPERATORS[node.target]
    if node.op == "call_function" and is_inplace_variant(node):
        return node.target
    name = op_name(node).removesuffix("_")
    if node.op == "call_method":
        known = op_name(node) not in RESHAPING_METHODS and callable(getattr(torch.Tensor, name, None))
        return name if known and op_name(node).endswith("_") else None
    return getattr(torch, name, None) if getattr(torch, f"{name}_", None) is node.target else None


def _make_functional(node: fx.Node) -> fx.Node:
    """Have an op in place return what it would write; what that is in the end."""
    written, target = node.args[0], _functional(node)
    if node.op == "call_method" and node.target in FILLING:
        value: torch.Tensor = value_of(written)
        form = tuple(value.shape), value.dtype, value.device, node.target
        node.op, node.target, node.args = "call_function", drawn, (*form, *node.args[1:])
        return node
    if target is node.target:
        _switch_off_inplace(node)
        return node
    node.target = target
    if all(_dtype(value) is not None and _dtype(value) == _dtype(written) for value in node.all_input_nodes):
        return node
    # It keeps the dtype of what it writes to, where an ordinary one would promote it.
    with node.graph.inserting_after(node):
        kept = node.graph.call_method("type_as", (node, written))
    kept.meta = dict(node.meta)
    return kept


def _switch_off_inplace(node: fx.Node) -> None:
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        # Given by position, `inplace` is the last argument of all these functions.
        node.args = (*node.args[:-1], False)


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(value_of(node), "dtype", None)

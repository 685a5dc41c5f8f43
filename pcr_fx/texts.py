"""A chain as a text, which an exported program holds: data that is parsed, and never run, evaluated or unpickled.

The text is JSON: the graphs of a block as lists of ops with their arguments, and what else a chain is. Whoever wrote it may be
anybody, so that only ops are read that compute results from their arguments and do nothing else.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from pcr_fx.chain import Chain, Head, Leaving, Origin
from pcr_fx.errors import OptionError, TextError
from pcr_fx.options import Options

_FORMAT = "pcr_fx chain 1"
# What PyTorch has no name for in a text by itself.
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in (torch.strided,)}
_MEMORY_FORMATS = {str(value): value for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}
# Arithmetic of sizes.
_OF_SIZES: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
}
_SIZE, _ITEM = "size", "item"
_OP = re.compile(r"(aten|prims)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?")
_ARGUMENTS = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|Scalar|int|SymInt|float|bool|complex|Device|Layout|MemoryFormat|ScalarType|str)\]*"
)
_RESULTS = re.compile(r"(List\[)?Tensor\]?")
# Ops for internal use trust what they are given, but for these.
_INTERNAL = frozenset(
    "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data _to_copy _unsafe_view _cdist_forward "
    "_euclidean_dist _prelu_kernel _assert_scalar".split()
)
_WITH_NAMES = frozenset(
    "gelu gelu_backward div einsum pad scatter_reduce index_reduce searchsorted bucketize meshgrid linalg_qr".split()
)
# They read files, or memory that nobody has written to.
_REFUSED = frozenset(
    "from_file empty empty_like empty_strided empty_permuted new_empty new_empty_strided as_strided".split()
)
# Blocks of a chain whose number the text says; more would not end.
_MOST_BLOCKS = 2**31


@dataclass(frozen=True, eq=False)
class Described:
    """What a text says.

    Attributes:
        chain: of as many blocks as `length`, or of one where calls say how many.
        leaving: what leaves it. Of a chain of any length, the taps count from its last block, which is -1.
        length: L; `None` where it is the size of the operands.
    """

    chain: Chain
    leaving: Leaving
    options: Options
    length: int | None

    def leaving_of(self, length: int) -> Leaving:
        """What leaves a chain of so many blocks."""
        taps = tuple((index, block + length if block < 0 else block) for index, block in self.leaving.taps)
        return Leaving(taps, self.leaving.whole)


# --- writing -----------------------------------------------------------------------------------------------------------


def write_text(
    chain: Chain, graphs: dict[str, fx.Graph], leaving: Leaving, options: Options, device: torch.device, is_open: bool
) -> str:
    """The text of a chain.

    Args:
        graphs: its body as an aten graph, "body"; with a head also its body, "head", and "block".
        leaving: what leaves it, as `Described` has it.
        device: that of its states, which the text leaves open.
        is_open: whether calls say how many blocks there are.

    Raises:
        TextError: a block does what a text may not say.
    """
    head = chain.head
    said: dict[str, Any] = {
        "format": _FORMAT,
        "length": None if is_open else chain.length,
        "states": chain.num_states,
        "operands": chain.num_operands,
        "shared": chain.num_shared,
        "literals": chain.literals,
        "is_checkpoint": chain.is_checkpoint,
        "name": [chain.origin.modules, chain.origin.source],
        "whole": leaving.whole,
        "taps": leaving.taps,
        "options": _changed(options),
        "graphs": {name: _written(graph, device) for name, graph in graphs.items()},
    }
    if head is not None:
        counts = {"outputs": head.num_outputs, "operands": head.num_operands, "shared": head.num_shared}
        said["head"] = {**counts, "literals": head.literals}
    return json.dumps(said, separators=(",", ":"))


def _changed(options: Options) -> dict[str, Any]:
    """The options that are not the default's, but for what finds chains and what compiles the rest."""
    names = [one.name for one in fields(options) if one.name not in ("inner_backend", "min_length")]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(Options(), name)}


def _written(graph: fx.Graph, device: torch.device) -> dict[str, Any]:
    """A graph in the form that `_read` reads."""
    numbers: dict[fx.Node, int] = {}

    def value(given: Any) -> Any:
        if isinstance(given, fx.Node):
            return {"value": numbers[given]}
        if isinstance(given, (list, tuple)):
            return [value(one) for one in given]
        if given is None or type(given) in (bool, int, float, str):
            return given
        for kind, table in (("dtype", _DTYPES), ("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
            if str(given) in table and table[str(given)] is given:
                return {kind: str(given)}
        if isinstance(given, torch.device):
            return {"device": "" if given == device else str(given)}
        raise TextError(f"an argument that is a {type(given).__name__} cannot be written down")

    inputs, ops, outputs = 0, list[Any](), list[Any]()
    for node in graph.nodes:
        if node.op == "output":
            outputs = [value(one) for one in node.args[0]]
            continue
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            inputs += 1
        else:
            name = _name_of(node)
            ops.append([name, value(node.args), {key: value(one) for key, one in node.kwargs.items()}])
    return {"inputs": inputs, "ops": ops, "outputs": outputs}


def _name_of(node: fx.Node) -> str:
    if node.op == "call_function" and node.target is torch.ops.aten.sym_size.int:
        return _SIZE
    if node.op == "call_function" and node.target is operator.getitem:
        return _ITEM
    for name, function in _OF_SIZES.items():
        if node.target is function:
            return name
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        raise TextError(f"{node.target} cannot be written down")
    name = str(node.target)
    _op(name)
    return name


# --- reading -----------------------------------------------------------------------------------------------------------


def read_text(text: str, device: torch.device) -> Described:
    """What a text says, for states on this device.

    Raises:
        TextError: it is none, was written by a version that is not known, or says what it may not say.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"the text of a chain is no JSON: {error}") from None
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        found = said.get("format") if isinstance(said, dict) else type(said).__name__
        raise TextError(f"the text of a chain must have the format {_FORMAT!r}, got {found!r}")
    try:
        return _described(said, device)
    except TextError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OptionError, RecursionError) as error:
        raise TextError(f"the text of a chain is not as it should be: {type(error).__name__}: {error}") from None


def _described(said: dict[str, Any], device: torch.device) -> Described:
    length = said["length"]
    if length is not None:
        _count(length, "length", 1)
    blocks = 1 if length is None else length
    states, operands, shared = (_count(said[name], name) for name in ("states", "operands", "shared"))
    _check(states > 0, "a chain has a state")
    literals = _literals(said["literals"], blocks, length)
    graphs = said["graphs"]
    given = states + operands + len(literals) + shared
    body = _read(graphs["body"], given, states, (states + operands, len(literals)), device)
    head = None
    if "head" in said:
        head = _head(said["head"], graphs, (states, operands, len(literals), shared), blocks, length, device)
    given = operands if head is None else operands + head.num_operands
    _check(length is not None or given > 0, "a chain without operands has a length")
    names = said["name"]
    _check(
        isinstance(names, list) and len(names) == 2 and all(type(one) is str for one in names), "a name is two texts"
    )
    checkpoint = said["is_checkpoint"]
    _check(type(checkpoint) is bool, "is_checkpoint is true or false")
    origin = Origin(*names)
    chain = Chain(body, blocks, states, operands, shared, literals, origin, head, checkpoint)
    _check(isinstance(said["options"], dict) and "inner_backend" not in said["options"], "options are a dict")
    leaving = _leaving(said, states + (0 if head is None else head.num_outputs), length)
    return Described(chain, leaving, Options.of(said["options"]), length)


def _head(
    said: Any, graphs: Any, counts: tuple[int, int, int, int], blocks: int, length: int | None, device: torch.device
) -> Head:
    states, operands, numbers, shared = counts
    outputs, further, more = (_count(said[name], name) for name in ("outputs", "operands", "shared"))
    literals = _literals(said["literals"], blocks, length)
    beside = further + len(literals) + more
    body = _read(graphs["head"], 2 * states + beside, outputs, (2 * states + further, len(literals)), device)
    own = states + operands + numbers + shared
    places = (states + operands, numbers), (own + further, len(literals))
    block = _read(graphs["block"], own + beside, states + outputs, places[0], device, places[1])
    return Head(body, block, outputs, further, more, literals)


def _leaving(said: dict[str, Any], count: int, length: int | None) -> Leaving:
    whole, taps = tuple(said["whole"]), tuple(map(tuple, said["taps"]))
    first, end = (-1, 0) if length is None else (0, length)
    for index in (*whole, *(index for index, _ in taps)):
        _check(type(index) is int and 0 <= index < count, "what leaves a chain is one of its states or outputs")
    for _, block in taps:
        _check(type(block) is int and first <= block < end, "what leaves a chain is of one of its blocks")
    return Leaving(taps, whole)


def _literals(given: Any, blocks: int, length: int | None) -> tuple[tuple[float, ...], ...]:
    literals = tuple(map(tuple, given))
    _check(not literals or length is not None, "a chain with numbers of its blocks has a length")
    for values in literals:
        _check(len(values) == blocks, "a number for each block")
        _check(all(type(value) in (int, float) for value in values), "numbers of blocks are numbers")
    return literals


def _count(given: Any, name: str, least: int = 0) -> int:
    _check(type(given) is int and least <= given <= _MOST_BLOCKS, f"{name} is a whole number")
    return int(given)


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise TextError(f"the text of a chain is not as it should be: {rule}")


def _read(
    said: Any,
    given: int,
    returned: int,
    literals: tuple[int, int],
    device: torch.device,
    further: tuple[int, int] = (0, 0),
) -> fx.GraphModule:
    """A graph.

    Args:
        given, returned: how many inputs and outputs it has to have.
        literals, further: the first of its inputs that are numbers, and how many there are.
    """
    _check(said["inputs"] == given, f"a graph takes {given} inputs")
    graph = fx.Graph()
    values = [graph.placeholder(f"input_{index}") for index in range(given)]
    for first, count in (literals, further):
        for index in range(first, first + count):
            values[index] = graph.call_function(as_tensor, (values[index], device))
    for name, args, kwargs in said["ops"]:
        _check(type(name) is str and isinstance(args, list) and isinstance(kwargs, dict), "an op has arguments")
        args = tuple(_value(one, values, device) for one in args)
        kwargs = {key: _value(one, values, device) for key, one in kwargs.items()}
        values.append(_call(graph, name, args, kwargs))
    outputs = tuple(_value(one, values, device) for one in said["outputs"])
    _check(len(outputs) == returned, f"a graph returns {returned} results")
    _check(all(isinstance(one, fx.Node) for one in outputs), "a graph returns tensors")
    graph.output(outputs)
    return fx.GraphModule({}, graph)


def _call(graph: fx.Graph, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if name == _SIZE:
        _check(len(args) == 2 and isinstance(args[0], fx.Node) and type(args[1]) is int, "a size has a dimension")
        return graph.call_method("size", args)
    if name == _ITEM:
        _check(len(args) == 2 and isinstance(args[0], fx.Node) and type(args[1]) is int, "an item has a number")
        return graph.call_function(operator.getitem, args)
    if name in _OF_SIZES:
        _check(not kwargs and all(type(one) is int or isinstance(one, fx.Node) for one in args), "sizes are numbers")
        return graph.call_function(_OF_SIZES[name], args)
    return graph.call_function(_op(name), args, kwargs)


def _value(given: Any, values: Sequence[fx.Node], device: torch.device) -> Any:
    if given is None or type(given) in (bool, int, float, str):
        return given
    if isinstance(given, list):
        return [_value(one, values, device) for one in given]
    _check(
        isinstance(given, dict) and len(given) == 1,
        "an argument is a number, a text, a list or one thing with its kind",
    )
    ((kind, name),) = given.items()
    if kind == "value":
        _check(type(name) is int and 0 <= name < len(values), "an op takes what was computed before it")
        return values[name]
    if kind == "device":
        _check(type(name) is str and (not name or _DEVICE.fullmatch(name) is not None), "a device has a name")
        return torch.device(name) if name else device
    table: Any = {"dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _MEMORY_FORMATS}.get(kind, {})
    _check(name in table, f"{kind} {name!r} is not known")
    return table[name]


def _op(name: str) -> OpOverload:
    """The op of this name.

    Raises:
        TextError: there is none, or it is not one of those that a text may name.
    """
    parts = _OP.fullmatch(name)
    if parts is None:
        raise TextError(f"the text of a chain names {name!r:.80}, which is no op of PyTorch's")
    space, op, overload = parts.groups()
    found = getattr(getattr(getattr(torch.ops, space), op, None), overload, None)
    if not isinstance(found, OpOverload):
        raise TextError(f"the text of a chain names {name}, which this PyTorch does not have")
    if not _is_harmless(found, op):
        raise TextError(
            f"the text of a chain names {name}, which does more than to compute a result from its arguments"
        )
    return found


def _is_harmless(op: OpOverload, name: str) -> bool:
    schema = op._schema
    kinds = [str(one.type) for one in schema.arguments]
    return (
        not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
        and bool(schema.returns)
        and all(_RESULTS.fullmatch(str(one.type)) for one in schema.returns)
        and all(_ARGUMENTS.fullmatch(kind) for kind in kinds)
        and (name in _WITH_NAMES or not any("str" in kind for kind in kinds))
        and (name in _INTERNAL or not name.startswith("_") or name.startswith("__"))
        and name not in _REFUSED
    )


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """A number of a block as the tensor that its graph was traced for."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=device)

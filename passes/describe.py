"""Words for nodes: module paths and source lines as a model's author knows them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence

import torch
from torch import fx

from pcr_fx.graphs.nodes import op_name

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_INDEXED = re.compile(r"\._modules\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]")


def module_path(node: fx.Node) -> str:
    """The path of the module that called the op: `blocks.17.linear1`; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    path = entry[0] if isinstance(entry, tuple) else str(entry)
    # Dynamo writes L['self'].blocks.17 or L['self']._modules['blocks']._modules['17'].
    if path.startswith("L["):
        path = path[path.index("]") + 1 :]
    path = _INDEXED.sub(lambda match: "." + (match.group(1) or match.group(2)), path)
    return path.strip(".")


def module_range(blocks: Sequence[Sequence[fx.Node]]) -> str:
    """A run of blocks by the modules they come from: `blocks.0..1023`."""
    first, last = (".".join(common_modules(block)) for block in (blocks[0], blocks[-1]))
    if first != last:
        return _range(first, last)
    # Blocks that are no modules of their own: name the modules that they call, by where their paths part.
    spans: dict[str, list[str]] = {}
    for a, b in zip(blocks[0], blocks[-1], strict=False):
        left, right = module_path(a).split("."), module_path(b).split(".")
        parting = next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
        if parting is not None:
            spans.setdefault(".".join(left[:parting]), [left[parting]]).append(right[parting])
    ranges = [f"{prefix}.{span[0]}..{span[-1]}".lstrip(".") for prefix, span in spans.items()]
    return ", ".join(ranges) or first or "forward"


def common_modules(ops: Sequence[fx.Node]) -> list[str]:
    """The path of the innermost module that all ops come from; empty for the model itself."""
    levels = zip(*(module_path(node).split(".") for node in ops), strict=False)
    names = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]
    return names if names != [""] else []


def _range(first: str, last: str) -> str:
    if first == last:
        return first
    left, right = first.split("."), last.split(".")
    if len(left) == len(right):
        differ = [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
        if len(differ) == 1:
            index = differ[0]
            return ".".join([*left[:index], f"{left[index]}..{right[index]}", *left[index + 1 :]])
    return f"{first or 'forward'}..{last or 'forward'}"


def describe_source(node: fx.Node) -> str:
    """`model.py:31`, the innermost line of the user's code; empty when it is not known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    if not users:
        return ""
    file, line = users[-1]
    return f"{os.path.basename(file)}:{line}"


def describe_node(node: fx.Node) -> str:
    """An op and where it stands: `add_ in blocks.3 (model.py:31)`."""
    if node.op == "output":
        return "the model's output"
    place = module_path(node)
    source = describe_source(node)
    return op_name(node) + (f" in {place}" if place else "") + (f" ({source})" if source else "")

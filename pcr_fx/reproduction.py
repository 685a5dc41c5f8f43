"""A chain as one script for a bug report: its ops, shapes and options, with numbers drawn from a seed and none of the model's."""

from __future__ import annotations

import importlib.metadata
import math
import operator
import platform
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.carried import check_says_all, traced_graphs
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.options import Options
from pcr_fx.planner import Plan

# A constant in a block that has more numbers is drawn, as a weight is.
_FEW_NUMBERS = 64

_SCRIPT = '''"""A chain of {length} blocks, as pcr_fx found it, for a bug report.

All numbers are drawn: none is of the model.{notes}
Written with pcr_fx {version}, PyTorch {torch}, Python {python} on {system}.
"""

import operator

import torch

import pcr_fx

LENGTH = {length}
OPTIONS = {options}

generator = torch.Generator().manual_seed(0)


def drawn(shape, dtype, device):
    """Numbers of a size that keeps chains of products from growing; zeros where they are whole or truth values."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype, device=device)
    fan_in = shape[-1] if shape else 1
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5
    return numbers.to(dtype).to(device).requires_grad_(dtype.is_floating_point)


# One of each for all blocks, carried from block to block.
states = ({states})
# One for each block, [LENGTH, ...]; then the numbers of each block, if any.
operands = ({operands})
# The same for all blocks.
shared = ({shared})


def step(states, operands):
    {unpack}
{body}
    return new, new


def loop(states, operands):
    every = []
    for index in range(LENGTH):
        states, said = step(states, tuple(operand[index] for operand in operands))
        every.append(said)
    return states, tuple(map(torch.stack, zip(*every)))


def with_gradients(run):
    final, every = run()
    results = [one for one in (*final, *every) if one.requires_grad]
    moving = [one for one in (*states, *operands, *shared) if one.requires_grad]
    gradients = torch.autograd.grad([one.double().sum() for one in results], moving, allow_unused=True)
    return [*final, *every], [torch.zeros_like(a) if b is None else b for a, b in zip(moving, gradients)]


def largest_difference(ours, theirs):
    return max((float((a - b).detach().abs().max()) for a, b in zip(ours, theirs) if a.numel()), default=0.0)


if __name__ == "__main__":
    print("pcr_fx", "{version} then; PyTorch", torch.__version__)
    for _ in range(2):
        results, gradients = with_gradients(lambda: pcr_fx.scan(step, states, operands, length=LENGTH, options=OPTIONS))
    expected, expected_gradients = with_gradients(lambda: loop(states, operands))
    print(pcr_fx.report(step))
    print(f"largest difference to a plain loop: {{largest_difference(results, expected):.1e}} of states, ", end="")
    print(f"{{largest_difference(gradients, expected_gradients):.1e}} of gradients")
'''


def script_of(chain: Chain, plan: Plan | BodyError | None, options: Options) -> str:
    """The script of a chain. It needs nothing but PyTorch and this package, runs the chain, and compares it with a plain loop.

    Args:
        plan: the chain's, which knows the shapes of its tensors.

    Raises:
        UnsupportedError: there is no script of it.
    """
    if not isinstance(plan, Plan):
        raise UnsupportedError(
            f"the shapes of a chain are known once it ran, and this one has no plan: {plan or 'not run'}"
        )
    signature, notes = plan.program.signature, []
    try:
        check_says_all(chain)
    except BodyError as reason:
        notes.append(f"The ops below are not all of it: {reason}.")
    if chain.head is not None:
        notes.append("The outputs that its blocks have beside their states are left out.")
    states, operands, shared = signature.states, signature.operands, signature.shared
    groups = [[(one.shape, one.dtype, one.device) for one in group] for group in (states, operands, shared, (), ())]
    graph = traced_graphs(replace(chain, head=None), groups, FakeTensorMode())["body"]
    names = [
        *_names("state", states),
        *_names("operand", operands),
        *_names("number", chain.literals),
        *_names("common", shared),
    ]
    number = states[0]
    numbers = [
        f"torch.tensor({list(each)!r}, dtype={number.dtype}, device={str(number.device)!r})" for each in chain.literals
    ]
    own = [*names[: len(states)], *names[len(states) : len(names) - len(shared)]]
    unpack = [f"{_tuple(own[: len(states)])} = states"]
    unpack += [f"{_tuple(own[len(states) :])} = operands"] if own[len(states) :] else []
    unpack += [f"{_tuple(names[len(own) :])} = shared"] if shared else []
    given = {
        "states": [_drawn(one) for one in states],
        "operands": [_drawn(one, "LENGTH") for one in operands] + numbers,
        "shared": [_drawn(one) for one in shared],
    }
    return _SCRIPT.format(
        length=chain.length,
        notes="".join(f"\n{note}" for note in notes),
        version=_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        options=_changed(options),
        unpack="\n    ".join(unpack),
        body="\n".join(f"    {line}" for line in _lines(graph, names, len(states))),
        **{name: "".join(f"\n    {each}," for each in group) + "\n" * bool(group) for name, group in given.items()},
    )


def _version() -> str:
    try:
        return importlib.metadata.version("pcr_fx")
    except importlib.metadata.PackageNotFoundError:  # a bare checkout
        return "of a checkout"


def _names(word: str, group: Sequence[Any]) -> list[str]:
    return [f"{word}_{index}" for index in range(len(group))]


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)},)"


def _drawn(spec: TensorSpec, *leading: str) -> str:
    sizes = [*leading, *map(str, spec.shape)]
    shape = f"({', '.join(sizes)},)" if sizes else "()"
    return f"drawn({shape}, {spec.dtype}, {str(spec.device)!r})"


def _changed(options: Options) -> dict[str, Any]:
    """What differs from the defaults, and says nothing of the rest of a graph."""
    plain, left_out = Options(), ("inner_backend", "min_length")
    names = [one.name for one in fields(options) if one.name not in left_out]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(plain, name)}


def _lines(graph: fx.Graph, names: Sequence[str], num_states: int) -> list[str]:
    """A body as Python, an op a line."""
    lines, given = [], iter(names)
    known: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            lines.append(f"new = {_tuple([_word(one, known) for one in node.args[0][:num_states]])}")
        else:
            known[node] = f"value_{len(known) - len(names)}"
            lines.append(f"{known[node]} = {_call(node, known)}")
    return lines


def _call(node: fx.Node, known: dict[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return _constant(getattr(node.graph.owning_module, str(node.target)))
    if isinstance(node.target, OpOverload):
        space, _, name = node.target._schema.name.partition("::")
        called = f"torch.ops.{space}.{name}.{node.target._overloadname}"
    elif node.op == "call_function" and getattr(operator, getattr(node.target, "__name__", ""), None) is node.target:
        called = f"operator.{node.target.__name__}"  # type: ignore[union-attr]
    else:
        raise UnsupportedError(f"a script has PyTorch's ops alone, and this chain calls {node.target}")
    args = [_word(one, known) for one in node.args]
    args += [f"{name}={_word(one, known)}" for name, one in node.kwargs.items()]
    return f"{called}({', '.join(args)})"


def _constant(value: Any) -> str:
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"a script has tensors and numbers alone, and this chain holds a {type(value).__name__}")
    if value.numel() > _FEW_NUMBERS:
        return _drawn(TensorSpec.of(value))
    return f"torch.tensor({_word(value.tolist(), {})}, dtype={value.dtype}, device={str(value.device)!r})"


def _word(value: Any, known: dict[fx.Node, str]) -> str:
    """An argument as Python writes it."""
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (list, tuple)):
        words = [_word(one, known) for one in value]
        return f"[{', '.join(words)}]" if isinstance(value, list) else (_tuple(words) if words else "()")
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    raise UnsupportedError(f"a script has tensors and numbers alone, and this chain holds a {type(value).__name__}")

"""`python -m benchmarks.sources`: whether the C++ and Triton source of the kernels of 40 chains is what was recorded.

    PYTHONPATH=tests python -m benchmarks.sources [--update | --list | --show CHAIN | --write FOLDER]

The bodies are those of the tests and of other benchmarks. Nothing is compiled, and no GPU is needed. Comments, blank lines
and the place of what a Triton module imports may differ; all else is compared exactly. A kernel that cannot be printed
counts by the reason. Fails where anything differs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import batch_bodies
import gpu_chains
import kernel_cases
import torch
from models import ResidualBlock
from node_cases import CASES, Case
from random_bodies import Composer
from tabulate import tabulate
from torch import Tensor, fx, nn

from benchmarks.gpu.problem import layer
from benchmarks.measure import RESULTS
from benchmarks.models import residual_block
from pcr_fx.body import Program, Signature, build_program
from pcr_fx.body.sample import SampleBody, trace_sample
from pcr_fx.chain import TensorSpec
from pcr_fx.errors import PcrFxError
from pcr_fx.targets.cpp.source import chain_source
from pcr_fx.targets.kernel import LoweredBody
from pcr_fx.targets.triton.scalars import launch as scalars
from pcr_fx.targets.triton.tiles import launch as tiles

RECORD = RESULTS / "sources.json"
# No operand has 11 of anything, so none looks like a sample's own by chance.
LENGTH, SAMPLES = 5, 11
NOT_PRINTED = "not printed: "
WAYS = ("forward", "adjoint")
CPP = [*((direction, lanes) for direction in WAYS for lanes in ("features", "samples")), ("newton", "features")]

# --- chains -----------------------------------------------------------------------------------------------------------


def weighted(body: Callable[..., tuple[Tensor]], d: int, layers: int = 1) -> Case:
    """States `[B, d]`; each block has so many pairs of a matrix `[d, d]` and a vector `[d]` of its own."""
    return Case(body, (("B", d),), operands=((d, d), (d,)) * layers)


def fused(name: str, d: int) -> Case:
    """A body of `gpu_chains`."""
    body = gpu_chains.BODIES[name]
    return weighted(lambda x, w, b: (body(x, w, b),), d)


def native(name: str) -> Case:
    """A body of `kernel_cases`; each block has a matrix and a vector."""
    d, body = kernel_cases.WIDTH, kernel_cases.BODIES[name]
    state = ("B", 3, 2) if name == "attention" else ("B", d)
    return Case(lambda x, w, b: (body(x, {"w": w, "b": b}),), (state,), operands=((d, d), (d,)))


def recurrence(cell: type[nn.RNNCellBase], d: int, inputs: int = 3) -> Case:
    """A cell unrolled over time: all steps share its weights, and each sample has its own input `[inputs]` at each."""
    steps = {
        nn.RNNCell: (1, lambda h, x, w, v, b, c: (torch.rnn_tanh_cell(x, h, w, v, b, c),)),
        nn.GRUCell: (3, lambda h, x, w, v, b, c: (torch.gru_cell(x, h, w, v, b, c),)),
        nn.LSTMCell: (4, lambda h, s, x, w, v, b, c: torch.lstm_cell(x, [h, s], w, v, b, c)),
    }
    gates, step = steps[cell]
    states = (("B", d),) * (2 if cell is nn.LSTMCell else 1)
    weights = ((gates * d, inputs), (gates * d, d), (gates * d,), (gates * d,))
    return Case(step, states, operands=(("B", inputs),), shared=weights)


def module(block: nn.Module, *state: int) -> Case:
    """Blocks of a module, each with parameters of its own, on one sample, whose shape is `state`."""
    names, parameters = zip(*block.named_parameters(), strict=True)
    shapes = tuple(tuple(each.shape) for each in parameters)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    return Case(batch_bodies.trace(call, (1, *state), *shapes), ((1, *state),), operands=shapes)


def traced(graph: fx.GraphModule, *states: tuple[int, ...]) -> Case:
    """A graph for states of just these shapes; its constants, which no program holds, become shared operands."""
    body = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    constants = list(body.graph.find_nodes(op="get_attr"))
    last = list(body.graph.find_nodes(op="placeholder"))[-1]
    for index, constant in enumerate(constants):
        with body.graph.inserting_after(last):
            last = body.graph.placeholder(f"shared{index}")
        constant.replace_all_uses_with(last)
        body.graph.erase_node(constant)
    body.recompile()
    return Case(body, states, shared=tuple(tuple(getattr(graph, constant.target).shape) for constant in constants))


def function(name: str) -> Case:
    return traced(batch_bodies.graph_of("functions", name), *batch_bodies.FUNCTIONS[name][1])


def composed(seed: int, *states: tuple[int, ...]) -> Case:
    return traced(batch_bodies.trace(lambda *tensors: Composer(seed)(*tensors), *states), *states)


SINGLE = {
    **{f"residual-{d}": weighted(residual_block, d, 2) for d in (1, 3, 8, 64)},
    "plain-4": weighted(layer, 4),
    **{f"{name}-4": fused(name, 4) for name in ("gated", "attention", "piecewise")},
    "normed-16": fused("normed", 16),
    **{f"{name}-6".replace(" ", "-"): native(name) for name in ("rearranged", "log softmax", "reduced", "low rank")},
    "rnn-3": recurrence(nn.RNNCell, 3),
    "gru-4": recurrence(nn.GRUCell, 4),
    "lstm-4": recurrence(nn.LSTMCell, 4),
    "module-5": module(ResidualBlock(5), 5),
    "mixer-20": module(batch_bodies.Mixer(), 5, 4),
    "literals-3": CASES["literals"],
}
DOUBLE = {
    **{f"residual-{d}": weighted(residual_block, d, 2) for d in (2, 4, 64)},
    "plain-16": weighted(layer, 16),
    "coupled-1": fused("coupled", 1),
    "normed-3": fused("normed", 3),
    "attention-8": fused("attention", 8),
    **{f"{name}-6".replace(" ", "-"): native(name) for name in ("gated", "attention", "batch norm", "transcendental")},
    "lstm-2": recurrence(nn.LSTMCell, 2),
    "shared-3": CASES["operands and shared"],
    "two-states-5": CASES["states of other widths"],
    "batch-last-3": CASES["batch last"],
    "pad-4": function("pad and crop at once"),
    "first-4": function("selected from the back"),
    "constants-4": function("operands of every shape"),
    "random3-4": composed(3, (1, 4)),
    "random25-4": composed(25, (1, 4)),
    "random18-24": composed(18, (2, 2, 6)),
}
# The name of a chain ends with the numbers a sample and the dtype.
CHAINS = {f"{name}-float32": (case, torch.float32) for name, case in SINGLE.items()}
CHAINS |= {f"{name}-float64": (case, torch.float64) for name, case in DOUBLE.items()}

# --- kernels ----------------------------------------------------------------------------------------------------------


def texts(case: Case, dtype: torch.dtype) -> dict[str, str]:
    """The source of every kernel, or why it cannot be printed; named like a file."""
    program = program_of(case, dtype)
    return {name: _printed(printer) for name, printer in printers(program, trace_sample(program)).items()}


def program_of(case: Case, dtype: torch.dtype) -> Program:
    inputs = case.inputs(LENGTH, SAMPLES, dtype)
    groups = inputs.states, [operand[0] for operand in inputs.operands], inputs.shared
    return build_program(case.node(LENGTH).chain, Signature(*(tuple(map(TensorSpec.of, group)) for group in groups)))


def printers(program: Program, body: SampleBody) -> dict[str, Callable[[], str]]:
    lowered = LoweredBody(program, body)
    found: dict[str, Callable[[], str]] = {
        f"{direction}-{lanes}.cpp": partial(chain_source, lowered, direction, lanes == "samples")
        for direction, lanes in CPP
    }
    for name, direction in tiles.NAMES:
        found[f"tiles-{name}-{direction}.py"] = partial(_tile_text, lowered, name, direction)
    if body.dimension <= scalars.MAX_DIMENSION:
        for name, direction in scalars.NAMES:
            found[f"scalars-{name}-{direction}.py"] = partial(scalars.kernel_text, lowered, name, direction)
    return found


def _tile_text(lowered: LoweredBody, name: str, direction: str) -> str:
    """With what a launch is told beside it: numbers of memory for each program, and warps."""
    text = tiles.kernel_text(lowered, name, direction)
    return f"{text.module}\nscratch, warps = {text.scratch}, {text.warps}\n"


def _printed(printer: Callable[[], str]) -> str:
    try:
        return printer()
    except PcrFxError as reason:
        return f"{NOT_PRINTED}{reason}\n"


def normalised(name: str, text: str) -> str:
    """`text` without comments, blank lines, and the name of the module that Triton's functions come from."""
    comment = "//" if name.endswith(".cpp") else "#"
    bare = (line.split(comment)[0].rstrip() for line in text.splitlines())
    lines = [re.sub(r"^from pcr_fx\S* import \*$", "from pcr_fx import *", line) for line in bare if line]
    return "\n".join(lines) + "\n"


def digest(name: str, text: str) -> str:
    """What the record keeps of a kernel: a hash of its source, or in full why there is none."""
    if text.startswith(NOT_PRINTED):
        return text.strip()
    return hashlib.sha256(normalised(name, text).encode()).hexdigest()[:16]


# --- the command ------------------------------------------------------------------------------------------------------


def show(chain: str) -> None:
    for name, text in texts(*CHAINS[chain]).items():
        print(f"=== {chain}/{name}\n\n{text}")


def write(folder: Path) -> None:
    """All texts as they are compared, a folder for each chain."""
    for chain, (case, dtype) in CHAINS.items():
        (folder / chain).mkdir(parents=True, exist_ok=True)
        for name, text in texts(case, dtype).items():
            (folder / chain / name).write_text(normalised(name, text))


def digests() -> dict[str, str]:
    """By chain and kernel."""
    return {
        f"{chain}/{name}": digest(name, text)
        for chain, (case, dtype) in CHAINS.items()
        for name, text in texts(case, dtype).items()
    }


def compare(found: dict[str, str], recorded: dict[str, str]) -> list[str]:
    """Prints how many kernels there are; the names of those that differ, are missing or are new."""
    differing = [name for name in {**recorded, **found} if found.get(name) != recorded.get(name)]
    reasons = sum(value.startswith(NOT_PRINTED) for value in found.values())
    row = [len(CHAINS), len(found), reasons, len(differing)]
    print(tabulate([row], ["chains", "kernels", "of these not printed", "differing"], tablefmt="github"))
    return differing


def check(record: dict[str, Any]) -> None:
    """Fails where a kernel is not as recorded."""
    differing = compare(digests(), record["kernels"])
    for name in differing:
        print(name)
    if differing and record["torch"] != torch.__version__:
        print(f"The record was made with PyTorch {record['torch']}, and this is {torch.__version__}.")
    sys.exit(bool(differing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--update", action="store_true", help="record the sources as they are")
    ways.add_argument("--list", action="store_true", help="print the names of the chains")
    ways.add_argument("--show", choices=CHAINS, metavar="CHAIN", help="print all sources of a chain")
    ways.add_argument("--write", type=Path, metavar="FOLDER", help="write all sources as they are compared")
    arguments = parser.parse_args()
    if arguments.list:
        print(*CHAINS, sep="\n")
    elif arguments.show:
        show(arguments.show)
    elif arguments.write:
        write(arguments.write)
    elif arguments.update:
        found = digests()
        RECORD.write_text(json.dumps({"torch": torch.__version__, "kernels": found}, indent=1) + "\n")
        compare(found, found)
    else:
        check(json.loads(RECORD.read_text()))


if __name__ == "__main__":
    main()

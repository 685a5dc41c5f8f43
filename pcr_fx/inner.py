"""The inner backend: what compiles the rest of a graph, and blocks that are alike as one body where it takes regions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from pcr_fx.errors import OptionError
from pcr_fx.graphs.attributes import attributes_of
from pcr_fx.graphs.nodes import op_name
from pcr_fx.options import Options
from pcr_fx.passes.inline import holds_regions, inline_regions
from pcr_fx.passes.normalise import tie_noise_to_neighbours
from pcr_fx.passes.outline import body_of, outline
from pcr_fx.passes.regions import Region, find_regions
from pcr_fx.reports import RegionEntry, RewriteReport

log = logging.getLogger(__name__)

NAME = "deeppcr"

CompileRest = Callable[..., Callable[..., Any]]
# Backends of PyTorch that take regions: `torch.ops.higher_order.invoke_subgraph`.
_TAKING_REGIONS = ("inductor", "aot_eager", "aot_eager_decomp_partition")


def inner_backend(options: Options, mode: str | None) -> CompileRest:
    """What compiles the rest: `(graph_module, example_inputs) -> callable`.

    Raises:
        OptionError: there is no such backend, or it has no such mode.
    """
    inner = options.inner_backend
    if not isinstance(inner, str):
        return inner
    known = [name for name in torch._dynamo.list_backends(exclude_tags=()) if name != NAME]
    if inner not in known:
        raise OptionError(f"option inner_backend={inner!r} is not allowed; it must be one of {', '.join(known)}")
    compile_rest = torch._dynamo.lookup_backend(inner)
    if mode is None or mode == "default":
        return compile_rest
    if inner != "inductor":
        raise OptionError(f"mode={mode!r} is for the inner backend 'inductor', and this one is {inner!r}")
    patches = torch._inductor.list_mode_options(mode)
    return lambda module, inputs: compile_rest(module, inputs, config_patches=patches)  # type: ignore[call-arg]


def takes_regions(options: Options) -> bool:
    """Whether blocks that are alike are to be compiled once, and can be."""
    if not options.regions or options.inner_backend not in _TAKING_REGIONS:
        return False
    if options.inner_backend != "inductor":
        return True
    # The wrapper in C++ has no calls of bodies, and weights that are folded into kernels are no arguments.
    from torch._inductor import config

    return not (config.cpp_wrapper or config.freezing)


def trains_regions(options: Options) -> bool:
    """Whether regions may have a backward.

    Inductor's of PyTorch 2.13 is wrong for some graphs on a CPU, with `nested_compile_region` too: three blocks of GPT-2 between
    embeddings and a head have other gradients than in eager mode, by one part in a hundred and more.
    """
    return options.inner_backend != "inductor"


class Regional:
    """An inner backend that compiles blocks which are alike once.

    Args:
        report: has an entry for each body.
        with_gradients: whether regions may have a backward.
    """

    def __init__(self, compile_rest: CompileRest, report: RewriteReport, with_gradients: bool) -> None:
        self.compile_rest, self.report, self.with_gradients = compile_rest, report, with_gradients
        self.names = map("pcr_fx_region_{}".format, itertools.count())

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        whole = module.graph
        if any(node.target is invoke_subgraph for node in whole.nodes):
            return self.compile_rest(module, inputs)  # its author has said which
        graph = inline_regions(module) if holds_regions(whole) else whole
        tie_noise_to_neighbours(graph)
        found = find_regions(graph, attributes_of(module, graph), self.with_gradients)
        if not found:
            return self.compile_rest(module, inputs)
        regions = {next(self.names): region for region in found}
        try:
            for name, region in regions.items():
                module.add_submodule(name, body_of(region))
            module.graph = outline(graph, regions)
            module.recompile()
            compiled = self.compile_rest(module, inputs)
        except Exception as reason:
            log.warning("blocks are compiled one by one: the inner backend does not take them as regions (%s)", reason)
            module.graph = whole
            module.recompile()
            module.delete_all_unused_submodules()
            return self.compile_rest(module, inputs)
        self.report.regions += map(_entry, regions.values())
        return compiled


def _entry(region: Region) -> RegionEntry:
    block = region.blocks[0]
    return RegionEntry(region.modules, region.source, len(region.blocks), tuple(op_name(node) for node in block.ops))

"""The body of a chain: what one block computes, which dimensions are batch, and the programs that run all blocks."""

from pcr_fx.body.agreement import BATCHED_EPS
from pcr_fx.body.batch import BatchDimensions
from pcr_fx.body.joined import Joined, join
from pcr_fx.body.layout import StateLayout
from pcr_fx.body.outputs import OutputProgram, build_outputs, output_program
from pcr_fx.body.program import Interface, Program, block_key, build_program, some_results, wanted_among
from pcr_fx.body.signature import Signature
from pcr_fx.body.tracer import trace_block

__all__ = [
    "BATCHED_EPS",
    "BatchDimensions",
    "Interface",
    "Joined",
    "OutputProgram",
    "Program",
    "Signature",
    "StateLayout",
    "block_key",
    "build_outputs",
    "build_program",
    "join",
    "output_program",
    "some_results",
    "trace_block",
    "wanted_among",
]

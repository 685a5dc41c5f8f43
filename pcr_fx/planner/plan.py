"""A plan: a chain's program with the settings it is solved by. Operator calls name plans by their content."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pcr_fx.body import Program, Signature, build_program
from pcr_fx.body.isolation import isolated
from pcr_fx.chain import Chain
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.kernels import ChainKernel
from pcr_fx.options import Options
from pcr_fx.planner.rule import Choice, choose
from pcr_fx.solvers import Newton


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs a chain: `key` names equal content, in every process (compiled graphs on disk name their plan).

    Attributes:
        kernel: the chain's native kernel, or why it has none.
    """

    key: str
    program: Program
    options: Options
    newton: Newton
    kernel: ChainKernel | str

    def __reduce__(self) -> Any:
        # Made again from what it was made of: native code and caches stay with their process.
        return make_plan, (self.program.chain, self.program.signature, self.options)

    def choice(self, state: Tensor) -> Choice:
        """The solvers for a flat state `[*batch, d]`."""
        samples = int(math.prod(state.shape[:-1]))  # `torch.jit.trace` makes tensors of sizes
        return choose(self.options.solver, self.program, samples, self.kernel)


_plans: dict[str, Plan] = {}


def plan_by_key(key: str) -> Plan:
    """The plan that an operator call names."""
    return _plans[key]


@isolated
def make_plan(chain: Chain, signature: Signature, options: Options) -> Plan:
    """The plan of `chain` for tensors of `signature`; equal content gives one plan.

    Raises:
        BodyError: the block cannot be solved as a chain; the message is the reason.
    """
    program = build_program(chain, signature)
    # What finds the chain and what compiles the rest does not matter to how it is solved.
    settings = replace(options, inner_backend="eager", min_length=2)
    key = hashlib.sha256(f"{program.key} {settings!r}".encode()).hexdigest()[:32]
    if key not in _plans:
        dtype = signature.states[0].dtype
        newton = Newton.of(dtype, chain.length, options.tolerance, options.max_iterations, options.linear_solver)
        _plans[key] = Plan(key, program, options, newton, _kernel(program, options))
    return _plans[key]


def _kernel(program: Program, options: Options) -> ChainKernel | str:
    if not options.kernels:
        return "kernels=False asks for none"
    try:
        return ChainKernel.of(program)
    except (BodyError, UnsupportedError) as reason:
        return str(reason)

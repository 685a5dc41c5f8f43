"""A plan: a chain's program with the settings it is solved by. Operator calls name plans by their content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.body import Program, Signature, block_key, build_program, trace_block, wanted_among
from pcr_fx.body.isolation import apart, is_undisturbed, isolated
from pcr_fx.body.sample import trace_sample
from pcr_fx.call import Call
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError, PlanError, UnsupportedError
from pcr_fx.locks import fork_safe_lock
from pcr_fx.options import Options
from pcr_fx.planner.cache import load_timings, measurement_key, store_timings
from pcr_fx.planner.choice import Choice, Timing
from pcr_fx.planner.fastest import fastest_ways, joined
from pcr_fx.planner.measure import is_plausible, measure
from pcr_fx.planner.rounds import along
from pcr_fx.planner.rule import estimated_choice
from pcr_fx.planner.watch import Watch
from pcr_fx.progress import stage
from pcr_fx.registry import Registry
from pcr_fx.solvers import Settings, SolveStats, default_tolerance
from pcr_fx.targets import KERNELS, CppKernel, Kernel
from pcr_fx.ways import EAGER, Case, Native, Sequential, Way, fallback

log = logging.getLogger(__name__)

# What took another time than was measured is looked at again after so long, then after twice that, and so on.
_SOONEST_SECONDS = 5.0
_WATCHES = 64

# A second derivative is a chain of states and tangents, with an adjoint: some eight times the arithmetic of a training call,
# for some three times the model's own ops. Measured on 20 to 100 blocks: a chain that kernels make 11 times faster or more
# gains 1.4 to 2.7 times, one of 3 nothing, one of 1.3 loses.
_TWICE = 8.0

# What a choice is for: bits of the number of samples, and which of the kernel's code serves them.
Size = tuple[int, tuple[bool, ...]]


@dataclass(eq=False)
class Learnt:
    """What is known of a plan's ways by now.

    Attributes:
        choices: by size.
        drifted: sizes whose solves go otherwise than when their ways were chosen.
        looks: by size, how often it was looked at again because of what its calls took, and when that may be next.
        watches: of operators, by blocks, samples and direction, each for a choice.
        lock: held where the way of a first call is found, which other threads' first calls then take too.
    """

    choices: dict[Size, Choice] = field(default_factory=dict)
    drifted: set[Size] = field(default_factory=set)
    looks: dict[Size, tuple[int, float]] = field(default_factory=dict)
    watches: dict[tuple[int, int, str], tuple[Choice, Watch | None]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=fork_safe_lock, repr=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs a chain: `key` names equal content, in every process (compiled graphs on disk name their plan).

    What was chosen for one number of samples is chosen for all up to the next power of two.

    Attributes:
        kernel: the chain's kernel, or why it has none.
        bound: the sizes beside those of its program that alone the plan is for, as from `SampleBody.bound_to`.
        learnt: what measurements and solves showed; copies of a plan share it.
        lengths: what is known of plans of more or fewer of the same blocks, by bits of their number.
        origin: the plan that this is a copy of for another signature. The registry lets go of plans that nobody holds,
            and by this who holds a copy holds that.
    """

    key: str
    program: Program
    options: Options
    settings: Settings
    kernel: Kernel | str
    bound: tuple[int, ...] | Signature = ()
    learnt: Learnt = field(default_factory=Learnt, repr=False)
    lengths: dict[int, Learnt] = field(default_factory=dict, repr=False)
    origin: Plan | None = field(default=None, repr=False)

    def __reduce__(self) -> Any:
        # Made again from what it was made of: native code and caches stay with their process.
        return make_plan, (self.program.chain, self.program.signature, self.options)

    def called_with(self, signature: Signature) -> Plan:
        """The same plan, choices and all, for tensors of another signature that it serves."""
        if signature == self.program.signature:
            return self
        return replace(self, program=self.program.called_with(signature), origin=self.origin or self)

    def for_chain(self, chain: Chain) -> Plan:
        """The plan of more or fewer of the same blocks, for which a kernel on a CPU is neither traced nor compiled.

        What is chosen for so many blocks is chosen for all up to the next power of two.
        """
        before = self.program.chain
        if (chain.length, chain.literals) == (before.length, before.literals):
            return self
        if not isinstance(self.kernel, str | CppKernel):  # it is made for its length
            return make_plan(chain, self.program.signature, self.options)
        key = _digest(self.key, chain.length, chain.literals)
        known = _plans.get(key)
        if known is None:
            learnt, program = self._learnt_of(chain), self.program.for_chain(chain)
            known = _plans.keep(key, replace(self, key=key, program=program, learnt=learnt, origin=None))
        return known.called_with(self.program.signature)

    def _learnt_of(self, chain: Chain) -> Learnt:
        """What is known of so many blocks: at first, how native code goes that does not depend on their number.

        How iterations go depends on the numbers that blocks differ by; and a few blocks may be best left alone, but not many.
        """
        length = chain.length
        self.lengths.setdefault(_bits(self.program.length), self.learnt)
        if _bits(length) not in self.lengths or chain.literals:
            longest = max(length, self.program.length)
            carried_over = {
                size: replace(
                    choice,
                    timings=(),
                    alone=tuple(one for one in choice.alone if not one[1]),
                    reason=f"{choice.reason} (of {self.program.length} blocks)",
                )
                for size, choice in list(self.learnt.choices.items())
                if choice.timings
                and all(isinstance(w, Native) and w.is_alone(longest, choice.samples) for w in choice.needed(True))
            }
            if chain.literals:
                return Learnt(carried_over)
            self.lengths.setdefault(_bits(length), Learnt(carried_over))
        return self.lengths[_bits(length)]

    @property
    def queues(self) -> bool:
        """Whether the chain's kernel, if it has one, returns before the device is done."""
        return not isinstance(self.kernel, str) and self.kernel.queues

    @property
    def free_batch_dims(self) -> int:
        """How many batch dimensions, from the first on, may have any size."""
        if not self.program.generality.any_batch or isinstance(self.bound, Signature):
            return 0
        return len(self.program.layout.batch_dims) - len(self.bound)

    def samples(self, state: Tensor) -> int:
        """Independent samples in a flat state `[*batch, d]`."""
        return int(math.prod(state.shape[:-1]))  # `torch.jit.trace` makes tensors of sizes

    def samples_of(self, states: Sequence[Tensor | TensorSpec]) -> int:
        """Independent samples in states of the chain as the model has them."""
        return math.prod(int(states[0].shape[dim]) for dim in self.program.layout.batch_dims)

    @property
    def expected_samples(self) -> int:
        """Those of the tensors that the plan was made for."""
        return self.samples_of(self.program.signature.states)

    def choice(self, samples: int) -> Choice:
        """What runs so many samples: what was measured, or else what the rule says."""
        size = self._size(samples)
        known = self.learnt.choices.get(size)
        # A kernel that turned out not to compile is chosen no more.
        if known is None or known.has_failed:
            known = self.learnt.choices[size] = estimated_choice(self._case(samples))
        return known

    def serves_twice(self, samples: int) -> bool:
        """Whether second derivatives of so many samples are faster as a chain than in the model's own ops."""
        return self.choice(samples).gain >= _TWICE

    def wants_measuring(self, samples: int, needs_gradient: bool) -> bool:
        """Whether `choice` would be a guess, or is out of date."""
        if self.options.solver != "auto" or self.options.planning != "measured":
            return False
        if not samples or not self.program.dimension:  # nothing to time
            return False
        return self.wants_another_look(samples) or needs_gradient not in dict(self.choice(samples).alone)

    def measure(
        self,
        call: Call,
        needs_gradient: bool,
        are_stacked: bool = False,
        with_eager: bool = True,
        wanted: Sequence[bool] | None = None,
    ) -> Choice:
        """Choose by measurement: one made before, in this process or another, or one made now on `call`.

        Args:
            are_stacked: whether operands came from the blocks' own tensors, which each call has to stack again.
            with_eager: whether the chain could be left as the model has it.
            wanted: whose gradients calls like this want, of operands and shared operands; without it all that there are.
        """
        samples = self.samples(call.initial)
        size, device = self._size(samples), call.initial.device
        with self.learnt.lock:
            if not self.wants_measuring(samples, needs_gradient):
                return self.choice(samples)
            some = wanted_among(self.program.differentiable, wanted) if needs_gradient and wanted else None
            case = Case(self.program.wanting(some), samples, self.kernel, self.options)
            named = self.key if some is None else _digest(self.key, some)
            key = measurement_key(named, size, device) + ("_gradient" if needs_gradient else "")
            is_first = size not in self.learnt.looks and size not in self.learnt.drifted
            kept = self._kept(key, case, call, needs_gradient, are_stacked) if is_first else None
            timings = kept or self._measured(case, call, needs_gradient, are_stacked, with_eager)
            disturbed = any(timing.disturbed for timing in timings)
            if kept is None and with_eager and self.options.plan_cache and not disturbed:
                store_timings(key, self._description(samples), timings)
            found = replace(fastest_ways(case, timings, needs_gradient), samples=samples, is_disturbed=disturbed)
            if kept is not None:
                found = replace(found, reason=f"{found.reason} (by measurements kept on disk)")
            elif disturbed:
                found = replace(found, reason=f"{found.reason} (measured on a busy machine; to be measured again)")
            self.learnt.choices[size] = joined(
                self.learnt.choices.get(size), found, needs_gradient, size in self.learnt.drifted
            )
            self.learnt.drifted.discard(size)
            return self.learnt.choices[size]

    def _kept(
        self, key: str, case: Case, call: Call, needs_gradient: bool, are_stacked: bool
    ) -> tuple[Timing, ...] | None:
        """What is kept on disk, if a few calls bear it out: it may have been measured on a busy machine, or by another."""
        kept = load_timings(key) if self.options.plan_cache else None
        if kept is None:
            return None
        check = is_plausible if is_undisturbed() else apart(is_plausible)
        return kept if check(case, self.settings, call, needs_gradient, are_stacked, kept) else None

    def _measured(
        self, case: Case, call: Call, needs_gradient: bool, are_stacked: bool, with_eager: bool
    ) -> tuple[Timing, ...]:
        # In the thread that is going to call, if it may be: another has memory and a team of threads of its own, and
        # what is wide took four times as long there.
        run = measure if is_undisturbed() else apart(measure)
        name = self.program.chain.origin.modules or "a chain"
        with stage(f"measuring what runs {name} fastest"):
            return run(case, self.settings, call, needs_gradient, are_stacked, with_eager)

    def wants_another_look(self, samples: int) -> bool:
        """Whether solves go otherwise than when they were chosen."""
        return self._size(samples) in self.learnt.drifted

    def fallback(self, samples: int) -> Native | Sequential:
        """What goes block by block where an iteration failed."""
        return fallback(self._case(samples))

    def learn(self, samples: int, stats: SolveStats) -> None:
        """Take note of how a solve went: where it needs far more iterations than it was chosen for, look again."""
        choice = self.learnt.choices.get(self._size(samples))
        if choice is None or not choice.timings or not choice.forward.iterates:
            return
        expected = next((t.iterations for t in choice.timings if t.way == choice.forward.name and t.iterations), 0)
        if stats.fallback is not None or stats.iterations > 1.5 * expected + 1:
            log.info("%d iterations where %d were measured: measured anew at the next call", stats.iterations, expected)
            self.learnt.drifted.add(self._size(samples))

    def doubt(self, samples: int) -> bool:
        """Have the ways of so many samples measured anew, where that was not done a short while ago; whether it will be."""
        size, now = self._size(samples), time.monotonic()
        count, earliest = self.learnt.looks.get(size, (0, 0.0))
        if now < earliest or self.options.planning != "measured" or self.options.solver != "auto":
            return False
        self.learnt.looks[size] = count + 1, now + _SOONEST_SECONDS * 2**count
        self.learnt.drifted.add(size)
        log.info("calls of %d samples take another time than was measured: measured anew", samples)
        return True

    def watch(self, samples: int, direction: str, alone: bool = False) -> Watch | None:
        """What compares calls of so many samples with what was measured of them; `None` where nothing was."""
        choice = self.choice(samples)
        name = EAGER if alone else getattr(choice, direction).name
        found = next((t for t in choice.timings if (t.way, t.direction) == (name, direction) and t.points), None)
        if found is None:
            return None
        length, most = self.program.length, found.points[-1][0]
        expected = along(found.points, max(length, most)) * min(1.0, length / most)
        # What was measured on a busy machine is out in any case, once that may have passed.
        return Watch(0.0 if choice.is_disturbed else expected, samples / max(choice.samples, 1))

    def watch_of(self, samples: int, direction: str, way: Way) -> Watch | None:
        """The same for calls of operators, which have no place of their own to keep it; ways that queue return at once."""
        choice = self.choice(samples)
        if not choice.timings or way.queues or way != getattr(choice, direction):
            return None
        key = self.program.length, samples, direction
        known = self.learnt.watches.get(key)
        if known is None or known[0] is not choice:
            known = self.learnt.watches[key] = choice, self.watch(samples, direction)
            if len(self.learnt.watches) > _WATCHES:
                self.learnt.watches.pop(next(iter(list(self.learnt.watches))), None)  # other threads may be at it, too
        return known[1]

    def _size(self, samples: int) -> Size:
        """What numbers of samples share a choice: those up to the next power of two that the same code serves."""
        variant = () if isinstance(self.kernel, str) else self.kernel.variant(samples)
        return samples.bit_length(), variant

    def _case(self, samples: int) -> Case:
        return Case(self.program, samples, self.kernel, self.options)

    def _description(self, samples: int) -> dict[str, Any]:
        origin, program = self.program.chain.origin, self.program
        return {
            "modules": origin.modules,
            "source": origin.source,
            "length": program.length,
            "dimension": program.dimension,
            "samples": samples,
            "dtype": str(program.dtype),
            "device": str(program.signature.states[0].device),
            "torch": torch.__version__,
        }


# By content: a compiled graph names its plan. What the backend returns to a compiler holds its plans.
_plans: Registry[str, Plan] = Registry()
# One of them, of some number of the same blocks, by what these are, and the options.
_of_block: weakref.WeakValueDictionary[tuple[str | None, Options], Plan] = weakref.WeakValueDictionary()


def plan_by_key(key: str) -> Plan:
    """The plan that an operator call names."""
    plan = _plans.get(key)
    if plan is None:
        raise PlanError(
            f"a compiled graph names the plan {key} of a chain, which is no longer known here: the module that it was "
            "compiled from is gone; compile it again"
        )
    return plan


@isolated
def make_plan(chain: Chain, signature: Signature, options: Options) -> Plan:
    """The plan of `chain` for tensors of `signature`; equal content gives one plan, but for the signature.

    Raises:
        BodyError: the block cannot be solved as a chain; the message is the reason.
    """
    # What finds the chain and what compiles the rest does not matter to how it is solved.
    content = replace(options, inner_backend="eager", min_length=2)
    block = trace_block(chain, signature)
    of_block = block_key(chain, signature, block), content
    like = None if of_block[0] is None else _of_block.get(of_block)
    if like is not None and like.key in _plans and isinstance(like.kernel, str | CppKernel):
        return like.called_with(signature).for_chain(chain)
    with stage(f"tracing a block of {chain.origin.modules or 'a chain'}"):
        program = build_program(chain, signature, block).called_with(signature)
    found = _plan_of(program, options, content)
    found = _narrower(found, chain, signature, block, options, content) or found
    if of_block[0] is not None:
        _of_block[of_block] = found
    return found.called_with(signature)


def _narrower(
    plan: Plan, chain: Chain, signature: Signature, block: fx.GraphModule, options: Options, content: Options
) -> Plan | None:
    """The plan with a kernel in which fewer dimensions tell samples apart, where the block fixes the size of others.

    It may compute with operands alone, and what comes of that has a size. One state is taken so by its kernel itself.
    """
    if not options.kernels or not isinstance(plan.kernel, str) or len(signature.states) == 1:
        return None
    with contextlib.suppress(BodyError):
        trace_sample(plan.program)
        return None  # that there is no kernel has other reasons
    for count in range(len(plan.program.layout.batch_dims) - 1, 0, -1):
        program = build_program(chain, signature, block, count)
        if program.generality.any_batch:
            narrower = _plan_of(program.called_with(signature), options, content)
            if not isinstance(narrower.kernel, str):
                return narrower
    return None


def _plan_of(program: Program, options: Options, content: Options) -> Plan:
    """The plan of a program, perhaps for another signature.

    Args:
        content: the options, as far as they matter to it.
    """
    key = _digest(program.key, content)
    if (known := _plans.get(key)) is not None:
        return known
    kernel = _kernel(program, options)
    bound = _bound_to(program, kernel) if options.kernels else ()
    if bound:  # for other sizes there is another kernel
        key = _digest(program.key, content, bound)
    return _plans.get(key) or _plans.keep(key, Plan(key, program, options, _settings(options, program), kernel, bound))


def _settings(options: Options, program: Program) -> Settings:
    return Settings(
        options.tolerance or default_tolerance(program.dtype),
        options.max_iterations,
        options.linear_solver,
        options.damping,
        options.window,
        options.start,
        options.diagonal_probes,
    )


def _bound_to(program: Program, kernel: Kernel | str) -> tuple[int, ...] | Signature:
    """The sizes for which alone there is this kernel, or none: `SampleBody.bound_to`."""
    if not isinstance(kernel, str):
        return kernel.body.bound_to(program)
    if not any(program.generality.follows):
        return ()
    try:
        return trace_sample(program).bound_to(program)
    except BodyError:
        return program.signature


def _bits(length: int) -> int:
    """Numbers of blocks up to the same power of two have as many."""
    return (length - 1).bit_length()


def _digest(*content: object) -> str:
    return hashlib.sha256(" ".join(map(repr, content)).encode()).hexdigest()[:32]


def _kernel(program: Program, options: Options) -> Kernel | str:
    if not options.kernels:
        return "kernels=False asks for none"
    device = program.signature.states[0].device
    if device.type not in KERNELS:
        return f"kernels are generated for {' and '.join(KERNELS)}, and the chain is on {device}"
    try:
        return KERNELS[device.type].of(program)
    except (BodyError, UnsupportedError) as reason:
        return str(reason)

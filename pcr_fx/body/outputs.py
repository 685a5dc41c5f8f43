"""The outputs of a chain, for all blocks at once: traced once to aten graphs, as the programs of its body are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from pcr_fx.body.agreement import differing
from pcr_fx.body.isolation import isolated
from pcr_fx.body.tracer import Run, trace
from pcr_fx.body.written_out import write_out_fused
from pcr_fx.chain import Head, TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.registry import Registry


@dataclass(frozen=True, eq=False)
class OutputProgram:
    """What computes the outputs of all blocks, from tensors of these shapes alone.

    Its inputs are the states that the blocks were given, those that they returned, per-block operands and literals, each
    `[L, ...]`, and shared operands.

    Attributes:
        key: it is found by this.
        specs: of the outputs, `[L, ...]`.
        active: which inputs have cotangents.
        evaluate: `(*inputs) -> outputs`.
        pullback: `(*inputs, *cotangents) -> cotangents` of the active inputs, from those of all floating outputs.
    """

    key: str
    specs: tuple[TensorSpec, ...]
    active: tuple[bool, ...]
    evaluate: Run
    pullback: Run

    @property
    def moving(self) -> tuple[bool, ...]:
        """Which outputs have cotangents."""
        return tuple(spec.is_differentiable for spec in self.specs)


_programs: Registry[str, OutputProgram] = Registry()


def output_program(key: str) -> OutputProgram:
    """The program that has this key; somebody holds it."""
    program = _programs.get(key)
    assert program is not None, "whoever names a program holds it"
    return program


@isolated
def build_outputs(head: Head, stacked: Sequence[TensorSpec], shared: Sequence[TensorSpec]) -> OutputProgram:
    """Trace `head` for such tensors.

    Args:
        stacked: old states, new states, operands and literals, each `[L, ...]`.
        shared: the shared operands.

    Raises:
        BodyError: it cannot be traced, or PyTorch batches it to something else than it is one by one.
    """
    body = write_out_fused(head.body)
    in_dims = (*(0 for _ in stacked), *(None for _ in shared))
    read = [bool(node.users) for node in head.body.graph.find_nodes(op="placeholder")]
    specs = [*stacked, *shared]
    numbers = range(len(stacked) - len(head.literals), len(stacked))
    active = tuple(
        spec.is_differentiable and is_read and index not in numbers
        for index, (spec, is_read) in enumerate(zip(specs, read, strict=True))
    )

    def batched(*tensors: Any) -> tuple[Any, ...]:
        return tuple(torch.vmap(lambda *one: tuple(body(*one)), in_dims=in_dims)(*tensors))

    def evaluate(*tensors: Any) -> tuple[Any, ...]:
        return _apart(batched(*tensors), tensors)

    def pullback(*tensors: Any) -> tuple[Any, ...]:
        inputs, cotangents = tensors[: len(specs)], tensors[len(specs) :]

        def moving(*some: Any) -> tuple[Any, ...]:
            waiting = iter(some)
            results = batched(
                *(next(waiting) if is_active else given for is_active, given in zip(active, inputs, strict=True))
            )
            return tuple(one for one in results if one.is_floating_point() or one.is_complex())

        return torch.func.vjp(moving, *(one for one, is_active in zip(inputs, active, strict=True) if is_active))[1](
            cotangents
        )

    with FakeTensorMode():
        given = [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in specs]
        forward = trace(evaluate, given)
        results = [node.meta["val"] for node in forward.graph.output_node().args[0]]
        found = tuple(map(TensorSpec.of, results))
        ones = [
            torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in found if spec.is_differentiable
        ]
        backward = trace(pullback, [*given, *ones]) if ones and any(active) else None
    digest = hashlib.sha256(repr((specs, active)).encode())
    for graph in filter(None, (forward, backward)):
        digest.update(graph.code.encode())
        for tensor in graph.buffers():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    key = digest.hexdigest()[:32]
    known = _programs.get(key)
    if known is not None:
        return known
    program = OutputProgram(key, found, active, forward.forward, backward.forward if backward is not None else pullback)
    if fault := _fault(head, program, specs, len(stacked)):
        raise BodyError(fault)
    return _programs.keep(key, program)


def _apart(results: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results of which none shares memory with what was given, nor with another: who gets them may write to them."""
    seen = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
    made = []
    for result in results:
        memory = StorageWeakRef(result.untyped_storage())
        made.append(result.clone() if memory in seen else result)
        seen.add(memory)
    return tuple(made)


def _fault(head: Head, program: OutputProgram, specs: Sequence[TensorSpec], stacked: int) -> str:
    """Why a program is not used, or nothing: on random numbers, beside the first and the last block one by one."""
    draw = torch.Generator().manual_seed(0)

    def random(spec: TensorSpec) -> Tensor:
        if not spec.is_differentiable:
            return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
        return torch.randn(spec.shape, generator=draw, dtype=spec.dtype).to(spec.device)

    inputs = [random(spec) for spec in specs]
    length = specs[0].shape[0]
    blocks = sorted({0, length - 1})
    outputs = program.evaluate(*inputs)
    weights = [random(spec) for spec in program.specs]
    for weight in weights:
        weight[[block for block in range(length) if block not in blocks]] = 0
    moving = [weight for weight, moves in zip(weights, program.moving, strict=True) if moves]
    pulled = program.pullback(*inputs, *moving) if moving and any(program.active) else ()
    of_active = dict(zip((index for index, is_active in enumerate(program.active) if is_active), pulled, strict=False))
    totals: dict[int, Tensor] = {}
    for block in blocks:
        one = [tensor[block] if index < stacked else tensor for index, tensor in enumerate(inputs)]
        one = [tensor.clone().requires_grad_(is_active) for tensor, is_active in zip(one, program.active, strict=True)]
        with torch.enable_grad():
            results = head.body.forward(*one)
        for ours, theirs in zip(outputs, results, strict=True):
            if theirs.is_floating_point() and (
                fault := differing("the outputs", ours[block : block + 1], [theirs.detach()])
            ):
                return fault
        flowing = [
            (result, weight[block]) for result, weight in zip(results, weights, strict=True) if result.requires_grad
        ]
        if not flowing:
            continue
        wanted = [index for index, is_active in enumerate(program.active) if is_active]
        gradients = torch.autograd.grad(
            [result for result, _ in flowing],
            [one[index] for index in wanted],
            [weight for _, weight in flowing],
            allow_unused=True,
            materialize_grads=True,
        )
        for index, gradient in zip(wanted, gradients, strict=True):
            if index >= stacked:
                totals[index] = totals.get(index, torch.zeros_like(gradient)) + gradient
            elif fault := differing("their gradients", of_active[index][block : block + 1], [gradient]):
                return fault
    for index, total in totals.items():
        if fault := differing("their gradients", of_active[index][None], [total]):
            return fault
    return ""

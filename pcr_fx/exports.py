"""Steps of loops for an exporter that runs the model's own Python: a step's graph, with what it closes over as inputs.

Dynamo, which captures steps elsewhere, cannot look at the tensors that such an exporter has in place of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pcr_fx.body.isolation import isolated
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.loop_step import Step

Flat = Callable[..., tuple[Tensor, ...]]


class _Lifting(TorchFunctionMode):
    """Exchanges what a step closes over for stand-ins.

    Args:
        given: the tensors that the step is given.
        known: stand-ins by the ids of what they stand for; `None` where these are to be found out.
    """

    def __init__(self, given: Sequence[Tensor], known: dict[int, Tensor] | None) -> None:
        super().__init__()
        self.own = {id(one): one for one in given}
        self.finds = known is None
        self.stand_ins = {} if known is None else dict(known)
        self.closed_over: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled:
            raise BodyError("a step switches gradients on or off")
        args, kwargs = pytree.tree_map_only(Tensor, self._exchanged, (args, kwargs or {}))
        found = function(*args, **kwargs)
        for one in pytree.tree_leaves(found):
            if isinstance(one, Tensor):
                self.own[id(one)] = one
        return found

    def _exchanged(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.own:
            return tensor
        if id(tensor) not in self.stand_ins:
            if not self.finds:
                raise BodyError("a step closes over other tensors each time that it is called")
            self.closed_over[id(tensor)] = tensor
            made = self.stand_ins[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self.own[id(made)] = made
        return self.stand_ins[id(tensor)]


def exported_step(flat: Flat, init: Sequence[Tensor], xs: Sequence[Tensor], name: str) -> tuple[Step, list[Tensor]]:
    """A step as an aten graph for tensors of sizes that may be symbols, and what it closes over.

    Args:
        flat: `(*carry, *x) -> (*carry, *y)`, tensors alone.
        init, xs: as the loop is given them.

    Raises:
        BodyError: it cannot be traced.
    """
    specs = [(tuple(one.shape), one.dtype, one.device) for one in init]
    specs += [(tuple(one.shape[1:]), one.dtype, one.device) for one in xs]
    mode = detect_fake_mode([*init, *xs]) or FakeTensorMode()
    graph, closed_over = _traced(flat, specs, mode)
    for node in graph.graph.nodes:
        node.meta["example_value"] = node.meta.get("val")
    for node in graph.graph.output_node().args[0]:  # type: ignore[union-attr]
        if not isinstance(node, fx.Node):
            raise BodyError("a step returns what is not its own")
    return Step(graph, len(init), len(xs), name), closed_over


@isolated
def _traced(flat: Flat, specs: Sequence[Any], mode: FakeTensorMode) -> tuple[fx.GraphModule, list[Tensor]]:
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        given = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in specs]
        try:
            with _Lifting(given, None) as lifting:
                flat(*given)
            closed_over = lifting.closed_over

            def lifted(*tensors: Tensor) -> tuple[Tensor, ...]:
                own, others = tensors[: len(given)], tensors[len(given) :]
                with _Lifting(tensors, dict(zip(closed_over, others, strict=True))):
                    return flat(*own)

            graph = make_fx(lifted)(*given, *(lifting.stand_ins[key] for key in closed_over))
        except (BodyError, UnsupportedError):
            raise
        except Exception as error:
            raise BodyError(f"it cannot be traced: {type(error).__name__}: {error}") from error
    return graph, list(closed_over.values())

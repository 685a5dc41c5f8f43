"""Drawing digits with the model and the loop of `examples/diffusion_digits.py`."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.gpu.problem import DEVICE, Measured, error
from benchmarks.gpu.timing import median_us

_EXAMPLE = Path(__file__).parents[2] / "examples/diffusion_digits.py"
_ETA = {"DDIM": 0.0, "DDPM": 1.0}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A trained sampler, and for each kind of sampling its inputs: `x` `[B, 64]`, noise `[T, B, 64]`, the steps."""

    sampler: nn.Module
    inputs: dict[str, Any]

    @classmethod
    @functools.cache
    def of(cls, count: int, batch: int, training: int) -> Drawing:
        """`batch` digits in `count` steps, by a model trained for `training` steps."""
        example = _example()
        torch.manual_seed(0)
        model = example.train(example.load_images(), argparse.Namespace(hidden=96, training_steps=training))
        x, noise = torch.randn(batch, 64, device=DEVICE), torch.randn(count, batch, 64, device=DEVICE)
        steps = {name: example.Steps.of(count, eta) for name, eta in _ETA.items()}
        inputs = {name: (x, noise, example.Steps(*(t.to(DEVICE) for t in each))) for name, each in steps.items()}
        return cls(example.Sampler(model).to(DEVICE).requires_grad_(False), inputs)

    @functools.cache  # noqa: B019 - it lives as long as the process
    def exact(self, kind: str) -> Tensor:
        x, noise, steps = self.inputs[kind]
        inputs = x.double(), noise.double(), type(steps)(*(table.double() for table in steps))
        digits: Tensor = copy.deepcopy(self.sampler).double()(*inputs)
        return digits

    @functools.cache  # noqa: B019
    def eager(self, kind: str) -> Measured:
        return self._measured("eager", self.sampler, kind)

    def solved(self, solver: str, kind: str) -> Measured:
        """By a solver of pcr_fx, called from Python."""
        fast = self._transformed(solver)
        found = self._measured("", fast, kind)
        (chain,) = fast.report.to_dict()["chains"]
        name = chain["solver_forward"] + (", then block by block" if chain["fallbacks"] else "")
        return Measured(name, found.us, found.error, chain["iterations"])

    @functools.cache  # noqa: B019
    def _transformed(self, solver: str) -> Any:
        """One reading serves both kinds: they differ in numbers only."""
        inputs = self.inputs["DDIM"]
        options: dict[str, object] = {"solver": solver, "min_length": 2}
        if solver == "picard":
            options["max_iterations"] = len(inputs[1])  # exact by then at the latest
        if DEVICE.type == "cpu":
            options["planning"] = "estimated"
        return pcr_fx.transform(self.sampler, inputs, options)

    def _measured(self, name: str, draw: nn.Module, kind: str) -> Measured:
        with torch.no_grad():
            us = median_us(lambda: draw(*self.inputs[kind]))
            return Measured(name, us, error([draw(*self.inputs[kind])], [self.exact(kind)]))


@functools.cache
def _example() -> ModuleType:
    """The example's module. It needs scikit-learn, matplotlib and tqdm."""
    spec = importlib.util.spec_from_file_location(_EXAMPLE.stem, _EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module

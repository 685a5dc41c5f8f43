"""Where there is no GPU, Triton interprets its kernels, which it has to know before it is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains go to the GPU's kernels wherever they are, and no memory is clean that was not written to."""
    from pcr_fx.kernels import GpuKernel
    from pcr_fx.planner import plan

    monkeypatch.setitem(plan.KERNELS, "cuda" if torch.cuda.is_available() else "cpu", GpuKernel)
    monkeypatch.setattr(plan, "_plans", {})
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

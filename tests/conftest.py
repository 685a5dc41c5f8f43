"""What Triton, cuBLAS and the package have to know before they are used, and fixtures of several tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a process of its own; a team of threads in each would only wait for the others. PyTorch reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# All that is lowered is checked.
os.environ.setdefault("PCR_FX_CHECK", "1")
# Without it PyTorch refuses every product of matrices on a GPU where algorithms are to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo knows nothing of what was compiled before, and models are seeded."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains go to the GPU's kernels wherever they are, and no memory is clean that was not written to."""
    from pcr_fx.planner import plan
    from pcr_fx.registry import Registry
    from pcr_fx.targets import TritonKernel

    monkeypatch.setitem(plan.KERNELS, "cuda" if torch.cuda.is_available() else "cpu", TritonKernel)
    monkeypatch.setattr(plan, "_plans", Registry())
    # This fills new memory with NaN. What has no deterministic form on a GPU is allowed: results are compared, not bits.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels compiled by this run, kept for it only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCR_FX_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture
def plan_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements of one test alone."""
    from pcr_fx.planner import plan

    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path))
    plan._plans.clear()
    return tmp_path / "plans"


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """So many threads, however little there is to do, and whatever else the machine does."""
    from pcr_fx.targets.cpp.threads import insisting

    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._OPERATIONS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with insisting():
        yield request.param
    torch.set_num_threads(before)

"""Large results lie in huge pages, where the system has them."""

import mmap
from pathlib import Path

import pytest
import torch

from pcr_fx.targets.cpp import memory
from pcr_fx.targets.cpp.memory import LARGE, empty

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that `address` lies in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 5), (LARGE // 8 + 1, 2)])
def test_memory_is_like_what_it_is_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = empty(torch.zeros(2, dtype=dtype), shape)
    assert (made.shape, made.dtype, made.device.type) == (shape, dtype, "cpu")
    assert made.is_contiguous() and not made.requires_grad
    made.fill_(3.0)
    assert (made == 3.0).all()


@pytest.mark.skipif(not (SMAPS.exists() and hasattr(mmap, "MADV_HUGEPAGE")), reason="no advice to give")
def test_what_is_large_is_advised() -> None:
    large = empty(torch.zeros(1), (LARGE // 4 + 1,)).fill_(1.0)
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)


def test_what_is_small_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mapping tells nothing: it may lie where a large one did."""
    monkeypatch.setattr(memory, "_advice", lambda: pytest.fail("advised"))
    empty(torch.zeros(1), (LARGE // 4 - 1,))

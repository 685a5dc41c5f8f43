"""Kernels on disk, and machines where they cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after a chain of eight blocks has been run as `fast(x)`, beside `model(x)`.

    The solver is named: what `auto` measures, and so which kernels it compiles, depends on the machine.
    """
    root = Path(__file__).parents[1]
    start = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
        "import torch, pcr_fx\nfrom models import Diverging, plain_mlp\n"
        "model, x = plain_mlp(8), torch.randn(3, 4)\nfast = pcr_fx.transform(model, x, options={'solver': 'sequential'})\n"
        "with torch.no_grad(): assert torch.allclose(fast(x), model(x), atol=1e-6)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_corrupt_cache_entry_is_built_anew(tmp_path: Path) -> None:
    done = in_a_new_process("", PCR_FX_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    entries = list(tmp_path.glob("*.so"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    done = in_a_new_process("", PCR_FX_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "it is compiled anew" in done.stderr
    assert all(entry.stat().st_size > 100 for entry in entries)


def test_a_kept_kernel_needs_no_compilation(tmp_path: Path) -> None:
    assert in_a_new_process("", PCR_FX_CACHE_DIR=str(tmp_path)).returncode == 0
    times = {entry: entry.stat().st_mtime_ns for entry in tmp_path.glob("*.so")}
    assert in_a_new_process("", PCR_FX_CACHE_DIR=str(tmp_path)).returncode == 0
    assert times == {entry: entry.stat().st_mtime_ns for entry in tmp_path.glob("*.so")}


def test_without_a_compiler_the_answer_is_right_and_the_report_says_why(tmp_path: Path) -> None:
    code = "print(fast.report)"
    done = in_a_new_process(code, PCR_FX_CACHE_DIR=str(tmp_path), CXX="no-such-compiler", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


def test_a_compiler_that_fails_is_reported_once(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) echo g++ 0;; *) echo error: broken >&2; exit 1;; esac\n")
    compiler.chmod(0o755)
    done = in_a_new_process("fast(x); fast(x)", PCR_FX_CACHE_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("runs in PyTorch's ops instead") == 1, done.stderr

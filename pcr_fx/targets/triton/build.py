"""Triton source to kernels: written to a file once, since Triton reads a kernel's source where Python found it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType

from pcr_fx.targets.cpp.build import cache_directory


@functools.cache
def load_module(source: str) -> ModuleType:
    """The module of `source`. What Triton compiles of it, Triton keeps in a cache of its own."""
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"chain_{key}.py"
    if not path.exists() or path.read_text() != source:
        _write(path, source)
    spec = importlib.util.spec_from_file_location(f"pcr_fx_chain_{key}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    """To a file of this process's own, then moved: other processes see all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".py")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    os.replace(name, path)

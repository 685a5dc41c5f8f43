"""C++ source to a loaded library: compiled once per source, compiler and processor, and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pcr_fx.errors import UnsupportedError

log = logging.getLogger(__name__)

# After those of PyTorch's own C++ builder. Products may be fused with sums, but nothing is reordered, and NaN and
# infinities keep their meaning: no -ffast-math, nor parts of it. With -fassociative-math alone the gradients of 1024
# tanh blocks were four times as far from float64 as eager's, since `g * (1 - t * t)` became `g - g * t * t`.
_FLAGS = (
    "-ffp-contract=fast -fwrapv -fno-math-errno -fno-signed-zeros -fno-trapping-math -fvisibility=hidden -w -g0"
).split()
# Clang does what these say without being told, and knows none of them.
_GCC_FLAGS = ["-ftree-loop-vectorize", "-fno-gnu-unique"]
# Apple's compiler comes without OpenMP: kernels on a Mac keep to one thread.
_OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


class CompilerError(UnsupportedError):
    """There is no C++ compiler, or it does not compile a kernel."""


def cache_directory() -> Path:
    """Where compiled kernels are kept: `PCR_FX_CACHE_DIR`, or a folder in the user's cache."""
    given = os.environ.get("PCR_FX_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcr_fx"


def check_compiler() -> None:
    """Raise `CompilerError` where nothing can be compiled."""
    _toolchain()


def load(source: str) -> ctypes.CDLL:
    """The library compiled from `source`.

    Raises:
        CompilerError: it cannot be compiled here.
    """
    key = hashlib.sha256("\0".join((source, *_toolchain())).encode()).hexdigest()[:32]
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load_from_disk(key, source)
        return _loaded[key]


def _load_from_disk(key: str, source: str) -> ctypes.CDLL:
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="pcr_fx_"))
        log.warning(
            "kernels cannot be kept in %s (%s); they are compiled anew in each process", cache_directory(), error
        )
    path = folder / f"{key}.so"
    if path.exists():
        try:
            return _open(path)
        except OSError as error:
            log.warning("the kernel kept in %s cannot be loaded (%s); it is compiled anew", path, error)
    _compile(source, path)
    try:
        return _open(path)
    except OSError as error:
        raise CompilerError(f"a compiled kernel cannot be loaded: {error}") from error


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "run"):
        raise OSError("it has no function `run`")
    library.run.restype = None
    library.run.argtypes = [ctypes.c_char_p]
    return library


def _compile(source: str, path: Path) -> None:
    """Compile to a file of this process's own, then move it: other processes see all of it or nothing."""
    from torch._inductor import cpp_builder, exc

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "chain.cpp"
        file.write_text(source)
        try:
            options = cpp_builder.CppOptions(extra_flags=_flags())
            builder = cpp_builder.CppBuilder("chain", [str(file)], options, folder)
            builder.build()
        except (
            exc.CppCompileError,
            exc.InvalidCxxCompiler,
            subprocess.SubprocessError,
            OSError,
            RuntimeError,
        ) as error:
            raise CompilerError(f"no kernel could be compiled: {_first_line(error)}") from error
        os.replace(builder.get_target_file_path(), path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower() or "not found" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or [''])[0]}"


@functools.cache
def _toolchain() -> tuple[str, ...]:
    """Everything beside the source that decides what a compiled kernel is."""
    compiler, version = _compiler()
    return compiler, version, processor(), *_flags()


@functools.cache
def _compiler() -> tuple[str, str]:
    """The C++ compiler and what it says of itself."""
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError, RuntimeError) as error:
        raise CompilerError(f"no C++ compiler was found: {_first_line(error)}") from error
    if shutil.which(compiler) is None:
        raise CompilerError(f"no C++ compiler was found: {compiler} is not on the PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return compiler, version.partition("\n")[0]


def _flags() -> list[str]:
    _, version = _compiler()
    return [*_FLAGS, *_OPENMP_FLAGS, *([] if "clang" in version else _GCC_FLAGS)]


@functools.cache
def processor() -> str:
    """What `-march=native` reads, and speed depends on: the processor's name and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(dict.fromkeys(lines))

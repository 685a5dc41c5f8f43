"""C++ source to a loaded library: compiled once per source, compiler and processor, and kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pcr_fx import artifacts, disk
from pcr_fx.body.isolation import stop_if_abandoned
from pcr_fx.errors import UnsupportedError
from pcr_fx.locks import fork_safe_lock
from pcr_fx.progress import stage
from pcr_fx.registry import Registry
from pcr_fx.targets.cpp.kept import keep_source

log = logging.getLogger(__name__)

# After those of PyTorch's own C++ builder, which allow more. Products may be fused with sums, which changes roundings, and
# whether a product overflows whose sum does not. No other flag changes a value: NaN, infinities and the signs of zeros keep
# their meaning, and nothing is reordered. Without signed zeros compilers drop `0 * NaN`, and take `0 - x` for `-x`; with
# -fassociative-math the gradients of 1024 tanh blocks were four times as far from float64 as eager's, since
# `g * (1 - t * t)` became `g - g * t * t`.
_FLAGS = (
    "-ffp-contract=fast -fwrapv -fno-math-errno -fsigned-zeros -fno-trapping-math -fvisibility=hidden -w -g0"
).split()
# Clang does what these say without being told, and knows none of them.
_GCC_FLAGS = ["-ftree-loop-vectorize", "-fno-gnu-unique"]
# Apple's compiler comes without OpenMP: kernels on a Mac keep to one thread.
_OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
# A kernel compiles in some two seconds, on a busy machine in twenty. Who takes longer is not waited for again.
_COMPILE_SECONDS = 100.0
_VERSION_SECONDS = 20.0
_LISTENING_SECONDS = 0.1
_lock = fork_safe_lock()
# What is let go stays mapped, as Python unloads no library; to open it again costs little.
_loaded: Registry[str, ctypes.CDLL] = Registry()
_hanging: set[str] = set()


class CompilerError(UnsupportedError):
    """There is no C++ compiler, or it does not compile a kernel."""


def check_compiler() -> None:
    """Raise `CompilerError` where nothing can be compiled."""
    _toolchain()


def compiler_in_words() -> str:
    """The command that compiles kernels, and what it says of itself.

    Raises:
        CompilerError: there is none.
    """
    return f"{shlex.join(_compiler())}: {_version()}"


def load(source: str) -> ctypes.CDLL:
    """The library compiled from `source`.

    Raises:
        CompilerError: it cannot be compiled here.
    """
    key = hashlib.sha256("\0".join((source, *_toolchain())).encode()).hexdigest()[:32]
    with _lock:
        library = _loaded.get(key)
        return library if library is not None else _loaded.keep(key, _from_disk(key, source))


def _from_disk(key: str, source: str) -> ctypes.CDLL:
    """The library that is kept, or one compiled now, in the first folder where that can be done."""
    failures: dict[Path | None, Exception] = {}
    try:
        for folder in disk.directories():
            try:
                library = _kept(folder / f"{key}.so") or _built(folder / f"{key}.so", source)
            except (CompilerError, OSError) as error:
                failures[folder] = error
                continue
            for place, reason in failures.items():
                disk.give_up(place, reason)
            artifacts.record(folder, f"{key}.so")
            return library
    except OSError as error:  # there is no further folder
        failures[None] = error
    first = next(iter(failures.values()))
    raise (
        first if isinstance(first, CompilerError) else CompilerError(f"no kernel could be compiled: {first}")
    ) from first


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library kept in a file, if it is what was kept there: a damaged one would kill who opens it."""
    try:
        disk.verify(path)
    except FileNotFoundError:
        return None
    except disk.DamagedError as error:
        log.warning("a kept kernel is not loaded (%s); it is compiled anew", error)
        return None
    return _opened(path)


def _built(path: Path, source: str) -> ctypes.CDLL:
    with stage("compiling a kernel"):
        disk.keep(path, _compile(source, path.parent))
    try:
        library = _opened(path)
    except OSError:
        disk.delete(path)
        raise
    keep_source(path, source)
    return library


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "run"):
        raise OSError(f"{path} has no function `run`")
    library.run.restype = None
    library.run.argtypes = [ctypes.c_char_p]
    return library


# --- the compiler ---------------------------------------------------------------------------------------------------------


def _compile(source: str, folder: Path) -> bytes:
    """The library of `source`, made within `folder`: in one of its own, by names that need no quoting.

    Raises:
        CompilerError: the compiler fails.
        OSError: `folder` cannot be written to.
    """
    from torch._inductor import cpp_builder, exc

    with disk.workshop(folder) as workshop:
        (workshop / "chain.cpp").write_text(source)
        try:
            options = cpp_builder.CppOptions(extra_flags=_flags(), compiler=shlex.join(_compiler()))
            builder = cpp_builder.CppBuilder("chain", ["chain.cpp"], options)
        except (exc.InvalidCxxCompiler, OSError, RuntimeError) as error:
            raise CompilerError(f"no kernel could be compiled: {type(error).__name__}: {error}") from error
        _run(shlex.split(builder.get_command_line()), workshop, _COMPILE_SECONDS)
        made = workshop / builder.get_target_file_path()
        library = made.read_bytes() if made.is_file() else b""
    if not _is_whole(library):
        raise CompilerError("no kernel could be compiled: the compiler reports no error, and made no library")
    return library


def _is_whole(library: bytes) -> bool:
    """Whether a library has its end, where the format says so: one that has not would kill who opens it."""
    if library[:6] != b"\x7fELF\x02\x01":  # of 64 bits, the lowest first
        return bool(library)
    if len(library) < 64:
        return False
    (table,), (size, count) = struct.unpack_from("<Q", library, 40), struct.unpack_from("<HH", library, 58)
    return table + size * count <= len(library)


def _run(words: Sequence[str], folder: Path | None, seconds: float) -> str:
    """What a command prints.

    It leads a group of processes, all of which end when this does: a compiler calls others.

    Args:
        folder: where it runs, and keeps its temporary files.
        seconds: that it may take.

    Raises:
        CompilerError: it cannot be run, fails, or takes longer.
    """
    name = words[0]
    if name in _hanging:
        raise CompilerError(f"{name} did not end in time before")
    environment = {**os.environ, "LC_ALL": "C", **({} if folder is None else {"TMPDIR": str(folder)})}
    try:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise CompilerError(f"{name} cannot be run: {error.strerror}") from error
    try:
        printed = _listen(process, time.monotonic() + seconds)
    except TimeoutError:
        _hanging.add(name)
        raise CompilerError(f"{name} did not end within {seconds:g} s") from None
    finally:
        _end(process)
    if process.returncode:
        raise CompilerError(f"{name} fails: {_telling_line(printed) or _ending(process.returncode)}")
    return printed


def _listen(process: subprocess.Popen[bytes], deadline: float) -> str:
    """What a process prints until it ends, which whoever waits for it may have stopped waiting for."""
    while True:
        try:
            return process.communicate(timeout=_LISTENING_SECONDS)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            stop_if_abandoned()
            if time.monotonic() > deadline:
                raise TimeoutError from None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _ending(code: int) -> str:
    return f"signal {-code} ended it" if code < 0 else f"it ends with code {code}"


def _telling_line(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "not found" in line.lower()]
    return (telling or lines or [""])[0]


@functools.cache
def _toolchain() -> tuple[str, ...]:
    """Everything beside the source that decides what a compiled kernel is."""
    return *_compiler(), _version(), processor(), *_flags()


def _version() -> str:
    """What the compiler says of itself."""
    try:
        return _run([*_compiler(), "--version"], None, _VERSION_SECONDS).partition("\n")[0]
    except CompilerError as error:
        raise CompilerError(f"no C++ compiler was found: {error}") from error


def _flags() -> list[str]:
    return [*_FLAGS, *_OPENMP_FLAGS, *([] if "clang" in _version() else _GCC_FLAGS)]


def _compiler() -> tuple[str, ...]:
    """The words of the command that PyTorch compiles C++ by. Unlike there `CXX` may call it by another, and with flags."""
    from torch._inductor import config, cpp_builder, exc

    named = config.cpp.cxx
    for name in filter(None, named if isinstance(named, (tuple, list)) else (named,)):
        for words in ([name], _split(name)):
            if words and shutil.which(words[0]) is not None:
                # The compiler runs in another folder.
                return os.path.abspath(words[0]) if os.sep in words[0] else words[0], *words[1:]
    try:
        return (cpp_builder.get_cpp_compiler(),)  # which installs one, where PyTorch is asked to
    except (exc.InvalidCxxCompiler, OSError, RuntimeError) as error:
        raise CompilerError(f"no C++ compiler was found: none of {named} is on the PATH") from error


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote without an end
        return []


@functools.cache
def processor() -> str:
    """What `-march=native` reads, and speed depends on: the processor's name and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(dict.fromkeys(lines))

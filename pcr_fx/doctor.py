"""What a user has, what of it works, and what to do about the rest: `python -m pcr_fx doctor`."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import stat
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from pcr_fx import disk
from pcr_fx.backend import NAME
from pcr_fx.explicit import transform
from pcr_fx.switches import is_disabled
from pcr_fx.targets import CompilerError
from pcr_fx.targets.cpp.build import compiler_in_words
from pcr_fx.ways import in_units

_WIDTH = 88
# The chain that is tried: how long, how wide, how many samples, and what is forgiven of rounding.
_BLOCKS, _FEATURES, _SAMPLES, _TOLERANCE = 16, 4, 3, 1e-4
# Settings of the environment that change what happens here, and how.
_SETTINGS = {
    "PCR_FX_CHECK": "kernels are checked, for work on pcr_fx itself",
    "PCR_FX_CACHE_DIR": "names the cache folder",
    "CXX": "names the compiler of kernels",
    "OMP_NUM_THREADS": "how many threads kernels may use",
    "TRITON_INTERPRET": "GPU kernels are interpreted, very slowly",
    "TORCH_LOGS": "what PyTorch and pcr_fx log",
}
# Those that switch something off, and what.
_SWITCHES = {
    "PCR_FX_DISABLE": "pcr_fx: models and loops run as they were written",
    "TORCH_COMPILE_DISABLE": "torch.compile, and with it this backend; transform, solve_chain and scan are left",
    "TORCHDYNAMO_DISABLE": "torch.compile, and with it this backend; transform, solve_chain and scan are left",
}


class State(Enum):
    """How a thing is."""

    GOOD = "ok"
    NOTE = "note"
    OFF = "off"
    BROKEN = "BROKEN"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        state: how it is.
        says: what was found, in words.
        remedy: what to do about it; empty where nothing is to be done.
    """

    topic: str
    state: State
    says: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """As plain values."""
        return {**asdict(self), "state": self.state.value}


def examine() -> list[Finding]:
    """Look at everything, and run a small chain. That compiles kernels where none are kept."""
    looks: Sequence[Callable[[], list[Finding]]] = (
        *(_versions, _backend, _headers, _compiler, _processor, _cache, _gpu, _triton, _switches, _settings, _chain),
    )
    found = []
    for look in looks:
        try:
            found += look()
        except Exception as error:  # one thing that is broken must not hide the others
            found.append(Finding(look.__name__.strip("_"), State.BROKEN, f"{type(error).__name__}: {error}"))
    return found


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken."""
    return all(finding.state is not State.BROKEN for finding in findings)


def as_table(findings: Sequence[Finding]) -> str:
    """The findings for people, with a verdict."""
    rows = []
    for one in findings:
        says = textwrap.fill(one.says, _WIDTH)
        remedy = textwrap.fill(f"-> {one.remedy}", _WIDTH, subsequent_indent="   ") if one.remedy else ""
        rows.append((one.topic, one.state.value, "\n".join(filter(None, (says, remedy)))))
    broken = [one.topic for one in findings if one.state is State.BROKEN]
    off = [one.topic for one in findings if one.state is State.OFF]
    verdict = f"Broken: {', '.join(broken)}." if broken else "Nothing is broken."
    verdict += f" Switched off: {', '.join(off)}." if off else ""
    return f"{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n\n{verdict}"


# --- what there is --------------------------------------------------------------------------------------------------------


def _versions() -> list[Finding]:
    python = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    return [
        Finding("pcr_fx", State.GOOD, f"{_version('pcr_fx')} in {Path(__file__).parent}"),
        Finding("Python", State.GOOD, f"{python} ({sys.executable})"),
        Finding("PyTorch", State.GOOD, f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend() -> list[Finding]:
    if NAME in torch._dynamo.list_backends(exclude_tags=()):
        return [Finding("backend", State.GOOD, f'torch.compile knows backend="{NAME}"')]
    return [Finding("backend", State.BROKEN, f'torch.compile knows no backend "{NAME}"', "import pcr_fx before it")]


def _headers() -> list[Finding]:
    folder = sysconfig.get_paths()["include"]
    if os.path.exists(os.path.join(folder, "Python.h")):
        return [Finding("headers of Python", State.GOOD, folder)]
    remedy = "install them (python3-dev, or python3-devel); kernels on a CPU do without"
    return [Finding("headers of Python", State.NOTE, f"not in {folder}: Inductor and Triton need them", remedy)]


def _compiler() -> list[Finding]:
    try:
        return [Finding("compiler", State.GOOD, compiler_in_words())]
    except CompilerError as error:
        remedy = "install g++ or clang++, or have CXX name one; until then chains run in PyTorch's ops"
        return [Finding("compiler", State.BROKEN, str(error), remedy)]


def _processor() -> list[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    bits = {"AVX512": 512, "AVX2": 256}.get(capability, 128)
    words = f"{platform.machine()}, {os.cpu_count()} cores, {capability}: vectors of {bits} bits, {bits // 32} float32"
    return [Finding("processor", State.GOOD, words)]


def _cache() -> list[Finding]:
    folder, error = disk.meant_folder()
    remedy = "chmod go-w it, or have PCR_FX_CACHE_DIR name a folder of your own"
    if folder is None or error is not None:
        words = "nothing is kept, and each process compiles and measures anew: "
        return [Finding("cache folder", State.BROKEN, f"{words}{folder or ''} {error}", remedy)]
    status = folder.stat()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    words = (
        f"{folder}: {len(sizes)} files, {in_units(sum(sizes))}; of {_owner(status.st_uid)}, "
        f"mode {stat.S_IMODE(status.st_mode):04o}"
    )
    try:
        with disk.workshop(folder):
            return [Finding("cache folder", State.GOOD, f"{words}, writable")]
    except OSError as reason:
        return [Finding("cache folder", State.BROKEN, f"{words}, not writable: {disk.reason_in(reason)}", remedy)]


def _owner(number: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except (ImportError, KeyError):
        return f"user {number}"


def _gpu() -> list[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return [Finding("GPU", State.GOOD, f"{', '.join(names)}; CUDA {torch.version.cuda}")]
    if torch.version.cuda is not None:
        words = f"none that this PyTorch, built for CUDA {torch.version.cuda}, can use"
        return [Finding("GPU", State.NOTE, words, "where there is one, nvidia-smi says whether its driver works")]
    return [Finding("GPU", State.GOOD, "none: this PyTorch is built for the CPU")]


def _triton() -> list[Finding]:
    version, needs = _version("triton"), torch.cuda.is_available()
    if version != "not installed":
        return [Finding("Triton", State.GOOD, version)]
    if needs:
        words = "not installed, and chains on the GPU run in PyTorch's ops"
        return [Finding("Triton", State.BROKEN, words, f"install the one that PyTorch {torch.__version__} brings")]
    return [Finding("Triton", State.GOOD, "not installed; only GPUs need it")]


def _switches() -> list[Finding]:
    found = []
    for name, what in _SWITCHES.items():
        if os.environ.get(name) == "1":
            found.append(Finding(name, State.OFF, f"{name}=1 switches off {what}", f"unset {name}"))
    if torch._dynamo.config.disable and not any(one.topic.startswith("TORCH") for one in found):
        words = "torch._dynamo.config.disable switches off torch.compile, and with it this backend"
        found.append(Finding("Dynamo", State.OFF, words, "set it to False"))
    return found or [Finding("switches", State.GOOD, "nothing is switched off")]


def _settings() -> list[Finding]:
    present = {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    return [Finding(name, State.NOTE, f"{value}: {_SETTINGS[name]}") for name, value in present.items()]


# --- whether it works -----------------------------------------------------------------------------------------------------


def _chain() -> list[Finding]:
    """Run a chain by the solver that every machine should have kernels for, and compare it with the model."""
    if is_disabled():
        return [Finding("a chain", State.OFF, "not tried: PCR_FX_DISABLE=1")]
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(_BLOCKS) for layer in (nn.Linear(_FEATURES, _FEATURES), nn.Tanh())))
    x = torch.randn(_SAMPLES, _FEATURES, generator=generator)
    log, began = logging.getLogger("pcr_fx"), time.perf_counter()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        fast = transform(model, x, {"solver": "sequential", "planning": "estimated"})
        expected, got = _with_gradients(model, x), _with_gradients(fast, x)
    finally:
        log.setLevel(level)
    seconds = time.perf_counter() - began
    error = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
    entry: dict[str, Any] = fast.report.to_dict()["chains"][0]
    is_native = entry["native_forward"] and entry["native_backward"]
    ran = f"{_BLOCKS} blocks, forward and backward, by {'a kernel' if is_native else 'PyTorch ops'} in {seconds:.2g} s"
    words = f"{ran}, at most {error:.1e} from the model's own ops"
    if not error <= _TOLERANCE:
        return [Finding("a chain", State.BROKEN, words, "report it, with all that is written here; PCR_FX_DISABLE=1")]
    if not is_native:
        return [
            Finding("a chain", State.BROKEN, f"{words}; {entry['reason']}", "see the compiler and the cache folder")
        ]
    return [Finding("a chain", State.GOOD, words)]


def _with_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    result = model(x)
    return [result.detach(), *torch.autograd.grad(result.sum(), list(model.parameters()))]

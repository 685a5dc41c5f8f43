"""The command line: what `doctor` finds, and the kernels that are kept on disk."""

import copy
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pcr_fx import disk, doctor
from pcr_fx.__main__ import main
from pcr_fx.doctor import State
from pcr_fx.targets import CompilerError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder for these tests alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCR_FX_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""
    monkeypatch.setattr(doctor, "_chain", lambda: [])


def finding(topic: str) -> doctor.Finding:
    (found,) = [one for one in doctor.examine() if one.topic == topic]
    return found


def test_a_machine_that_works_has_nothing_broken(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {one["topic"]: one for one in said["findings"]}
    assert said["is_well"] and torch.__version__ in found["PyTorch"]["says"]
    assert "by a kernel" in found["a chain"]["says"] and found["compiler"]["state"] == "ok"
    mode = stat.S_IMODE(cache.stat().st_mode)
    assert str(cache) in found["cache folder"]["says"] and f"mode {mode:04o}, writable" in found["cache folder"]["says"]


def test_kernels_are_listed_shown_and_cleared(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(5, 5), nn.Tanh())))
    fast = doctor.transform(model, torch.randn(2, 5), {"solver": "sequential"})
    with torch.no_grad():
        fast(torch.randn(2, 5))
    main(["kernels", "list"])
    listed = capsys.readouterr().out
    key = next(line.split()[0] for line in listed.splitlines() if "forward, float32, d = 5" in line)
    assert main(["kernels", "show", key[:12]]) == 0
    shown = capsys.readouterr().out
    assert "#define FORWARD" in shown and 'extern "C"' in shown
    assert main(["kernels", "show", "zz"]) == 2 and capsys.readouterr().err
    (cache / f"{key}.cpp.gz").write_bytes(b"damaged")
    assert main(["kernels", "show", key]) == 2 and "is not kept" in capsys.readouterr().err
    (cache / "plans").mkdir(exist_ok=True)
    main(["kernels", "clear"])
    count = int(listed.split()[0])
    assert f"{count} kernels deleted" in capsys.readouterr().out and count >= 1
    assert [path.name for path in cache.iterdir()] == ["plans"]
    main(["kernels", "list"])
    assert capsys.readouterr().out.startswith("0 kernels")


@pytest.mark.usefixtures("no_chain")
def test_what_is_broken_has_a_remedy_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise CompilerError("no C++ compiler was found")

    monkeypatch.setattr(doctor, "compiler_in_words", refuse)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "Broken: compiler, cache folder." in said and "-> install g++" in said and "others may write to" in said
    assert finding("cache folder").remedy.startswith("chmod")


@pytest.mark.usefixtures("no_chain")
def test_a_folder_that_cannot_be_written_to_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "workshop", refuse)
    found = finding("cache folder")
    assert found.state is State.BROKEN and "not writable: No space left on device" in found.says


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda model, *_: nn.Sequential(copy.deepcopy(model), nn.Softplus()), "has no attribute 'report'"),
        (lambda model, x, options: doctor_transform(model, x, {**options, "kernels": False}), "by PyTorch ops"),
    ],
)
def test_a_chain_that_does_not_run_as_it_should_is_broken(
    changed: Callable[..., Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "transform", changed)
    broken = [one for one in doctor.examine() if one.state is State.BROKEN]
    assert len(broken) == 1 and words in broken[0].says


doctor_transform = doctor.transform


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    truly = doctor._with_gradients
    monkeypatch.setattr(
        doctor,
        "_with_gradients",
        lambda model, x: [one + hasattr(model, "report") * 1e-3 for one in truly(model, x)],
    )
    assert finding("a chain").state is State.BROKEN
    monkeypatch.setattr(
        doctor,
        "_with_gradients",
        lambda model, x: [one / (not hasattr(model, "report")) for one in truly(model, x)],
    )
    assert finding("a chain").state is State.BROKEN  # not a number is no small difference


@pytest.mark.parametrize("name", ["PCR_FX_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_what_is_switched_off_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "PCR_FX_DISABLE":
        monkeypatch.setattr(doctor, "_chain", lambda: [])
    monkeypatch.setenv(name, "1")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "Switched off: " in said and f"-> unset {name}" in said

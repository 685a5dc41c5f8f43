"""accelerate's list of backends takes this one's name, whenever it is imported."""

import importlib
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType

import pytest

import pcr_fx
from pcr_fx import frameworks


class DynamoBackend(str, Enum):  # noqa: UP042, as accelerate has it
    NO = "NO"
    INDUCTOR = "INDUCTOR"


def test_a_name_is_added_once() -> None:
    module = ModuleType(frameworks._MODULE)
    module.DynamoBackend = DynamoBackend  # type: ignore[attr-defined]
    for _ in range(2):
        frameworks._add(module, "deeppcr")
    made = DynamoBackend("DEEPPCR")
    assert made is DynamoBackend["DEEPPCR"] is DynamoBackend.DEEPPCR  # type: ignore[attr-defined]
    assert made == "DEEPPCR" and made.value == "DEEPPCR" and made is not DynamoBackend.NO
    assert [one.name for one in DynamoBackend] == ["NO", "INDUCTOR", "DEEPPCR"]
    with pytest.raises(ValueError, match="OTHER"):
        DynamoBackend("OTHER")


def test_what_is_no_list_of_names_is_left_alone() -> None:
    frameworks._add(ModuleType(frameworks._MODULE), "deeppcr")
    module = ModuleType(frameworks._MODULE)
    module.DynamoBackend = None  # type: ignore[attr-defined]
    frameworks._add(module, "deeppcr")
    assert module.DynamoBackend is None  # type: ignore[attr-defined]


def test_a_later_import_has_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["accelerate", "accelerate.utils", frameworks._MODULE]
    if any(name in sys.modules for name in names):
        pytest.skip("accelerate was imported before")
    folder = tmp_path / "accelerate" / "utils"
    folder.mkdir(parents=True)
    (tmp_path / "accelerate" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "dataclasses.py").write_text("from enum import Enum\nclass DynamoBackend(str, Enum):\n    NO = 'NO'\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        module = importlib.import_module(frameworks._MODULE)
        assert module.DynamoBackend("DEEPPCR").value.lower() == pcr_fx.backend.NAME
        assert module.__spec__ is not None and module.__spec__.name == frameworks._MODULE
    finally:
        for name in names:
            sys.modules.pop(name, None)

"""The backend's name, where a framework keeps a list of those that it takes.

`Accelerator(dynamo_backend="deeppcr")` and `TrainingArguments(torch_compile_backend="deeppcr")` look names up in an enum of
accelerate's, which knows no backend that is registered with PyTorch. Importing this package imports none of these: where
accelerate is imported later, it is given the name then.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE, _ENUM = "accelerate.utils.dataclasses", "DynamoBackend"


def introduce(name: str) -> None:
    """Have accelerate take the name of a backend, now or once it is imported."""
    if _MODULE in sys.modules:
        _add(sys.modules[_MODULE], name)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name))


def _add(module: ModuleType, name: str) -> None:
    """A member more of the enum of names, which is the name in capitals; none where there is no such enum."""
    known: Any = getattr(module, _ENUM, None)
    value = name.upper()
    if not (isinstance(known, type) and issubclass(known, Enum) and issubclass(known, str)):
        return
    if value in known._value2member_map_:
        return
    member: Any = str.__new__(known, value)
    member._name_, member._value_, member._sort_order_ = value, value, len(known._member_names_)
    known._member_names_.append(value)
    known._member_map_[value] = known._value2member_map_[value] = member
    type.__setattr__(known, value, member)


class _Waiting(importlib.abc.MetaPathFinder):
    """Waits for the module to be imported."""

    def __init__(self, name: str) -> None:
        self.name, self._looks = name, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != _MODULE or self._looks:
            return None
        self._looks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.name)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads the module as another does, and gives it the name."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self.name = loader, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add(module, self.name)

"""What a trace takes for granted of a model, recorded as the forward reads it, and whether it holds still.

What the modules of the model keep is looked at again only after something of it may have changed (`watched.py` counts that).
What is kept elsewhere, which nobody counts, is looked at at each call: classes, the contents of lists and objects, modules
outside the model, PyTorch's settings. There it is asked whether the very same objects stand where they stood, and only if
not, whether they are equal.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from pcr_fx.graphs.hooks import has_hooks
from pcr_fx.passes.contents import LASTING, describe, describe_lasting
from pcr_fx.passes.places import ABSENT, contents_of, find, place_of
from pcr_fx.passes.reading import Kept, Reading, form_of
from pcr_fx.watched import Changes, Part, is_watched


class Facts:
    """What one trace took for granted of its model.

    Args:
        read: how it was recorded.
        with_shapes: whether that includes shapes, dtypes and devices of parameters and buffers.
        changes: what counts the changes of the modules of the model.
    """

    def __init__(self, read: Reading, with_shapes: bool, changes: Changes) -> None:
        self.with_shapes, self.changes = with_shapes or read.asked_for_shapes, changes
        # Where changes are not counted, there is no knowing without looking.
        uncounted = {key for key, module in read.modules.items() if not is_watched(module, changes)}
        self._inside, self._outside = list[_Fact](), list[_Fact]()
        for module, name, value in read.attributes.values():
            facts = self._outside if id(module) in uncounted else self._inside
            facts.append((module.__dict__, place_of(module, name, value), name, read.kept(value)))
        self._contents = list(read.contents.values())
        self._types = [(module, type(module)) for module in read.modules.values()]
        self._hooked = [(module, hooked) for module, hooked in read.hooked.values()]
        self._unwatched_hooks = [(module, hooked) for module, hooked in self._hooked if id(module) in uncounted]
        self._elsewhere = list(read.elsewhere.values())
        self._settings = list(read.settings.items())
        self._versions = list(read.versions.values())
        self._global_hooks = bool(_has_any_global_hook())
        self._described = read.described
        self._checked, self._listed, self._held = changes.count, changes.listings, True
        self._look()

    def hold(self) -> bool:
        """Whether all is as it was."""
        count, listings = self.changes.count, self.changes.listings
        if self._checked != count or (self._listed != listings and not self._tensors_hold()):
            self._held, self._has_looked = self._hold_inside(), False
        self._checked, self._listed = count, listings
        return self._held and self._hold_elsewhere()

    def changed(self) -> str:
        """What is not as it was in the midst of a call, in words; empty where all is.

        Tensors are read anew there: others may stand in their places, of other classes too, as those of sharded weights.
        """
        return "" if self.hold() else next(self._changed(), "")

    def _changed(self) -> Iterator[str]:
        yield from (f"the class of a {kind.__name__}" for module, kind in self._types if type(module) is not kind)
        for module, hooked in self._hooked:
            if has_hooks(module) and not hooked:
                yield f"the hooks of a {type(module).__name__}"
        for module, name, items in self._contents:
            if contents_of(module, name) != items:
                yield f"the {name[1:]} of a {type(module).__name__}, which the forward goes through"
        for held, place, name, value in [*self._inside, *self._outside]:
            now = find(held, place, name)
            if not (value.holds(now, self.with_shapes, False) if isinstance(value, Kept) else self._holds(now, value)):
                yield f"{name}, which the forward reads"
        for holder, name, value in self._elsewhere:
            if not self._holds(holder.get(name, ABSENT), value):
                yield f"{name}, which the forward reads"
        if any(function(*given) != value for (function, given), value in self._settings):
            yield "a setting of PyTorch, which the forward asks for"
        if any(tensor._version != version for tensor, version in self._versions):
            yield "a tensor, with which the forward computed when it was traced"

    def _look(self) -> None:
        """Take down which objects stand where, for `_hold_elsewhere`."""
        found = [(holder, name, holder.get(name, ABSENT)) for holder, name, _ in self._elsewhere]
        self._seen = _columns([entry for entry in found if entry[2] is not ABSENT])
        self._missing = _columns([entry for entry in found if entry[2] is ABSENT])
        views: list[Any] = []
        self._arrays: list[tuple[Any, Any]] = []
        present = [
            find(held, place, name)
            for held, place, name, value in [*self._inside, *self._outside]
            if id(value) in self._described
        ]
        present += [
            now
            for (_, _, now), (_, _, value) in zip(found, self._elsewhere, strict=True)
            if id(value) in self._described
        ]
        for value in {id(value): value for value in present}.values():
            describe(value, views, self._arrays)
        self._views = list({id(view): view for view in views}.values())
        self._sizes = list(map(len, self._views))
        self._items = list(itertools.chain.from_iterable(self._views))
        tensors = list(self._present_tensors()) if self.with_shapes else []
        self._tensors = list(map(weakref.ref, tensors))
        self._forms = _forms_of(tensors)
        self._has_looked = True

    def _present_tensors(self) -> Iterable[Tensor]:
        """Those of the model's modules that there are facts about; a packed parameter for all its parts."""
        found: dict[int, Tensor] = {}
        for held, place, name, value in self._inside:
            now = find(held, place, name) if isinstance(value, Kept) else None
            if isinstance(now, Part):
                now = now.holder[now.name]
            if isinstance(now, Tensor):
                found[id(now)] = now
        return found.values()

    def _tensors_hold(self) -> bool:
        """Whether all that a forward can ask of the same tensors is as it was, beside their values."""
        return _forms_of([tensor() for tensor in self._tensors]) == self._forms

    def _hold_inside(self) -> bool:
        return (
            all(type(module) is kind for module, kind in self._types)
            and all(has_hooks(module) == hooked for module, hooked in self._hooked)
            and all(contents_of(module, name) == items for module, name, items in self._contents)
        )

    def _hold_elsewhere(self) -> bool:
        if bool(_has_any_global_hook()) != self._global_hooks:
            return False
        if self._settings and any(function(*given) != value for (function, given), value in self._settings):
            return False
        if self._versions and any(tensor._version != version for tensor, version in self._versions):
            return False
        if self._unwatched_hooks and any(has_hooks(module) != hooked for module, hooked in self._unwatched_hooks):
            return False
        if self._outside and not self._hold(self._outside):
            return False
        return self._is_unchanged() or self._look_again()

    def _is_unchanged(self) -> bool:
        """Whether the same objects stand where they stood, as far as that can change without being counted."""
        if not self._has_looked:
            return False
        try:
            # By iterators that are not Python's, and nothing where there is nothing: this is most of what a call of a small
            # model costs here.
            holders, names, values = self._seen
            if not all(map(operator.is_, map(operator.getitem, holders, names), values)):
                return False
            if self._missing[0] and any(map(operator.contains, *self._missing[:2])):
                return False
            if self._views and not (
                list(map(len, self._views)) == self._sizes
                and all(map(operator.is_, itertools.chain.from_iterable(self._views), self._items))
            ):
                return False
            return not self._arrays or all(np.array_equal(array, copy) for array, copy in self._arrays)
        except (KeyError, RuntimeError):  # something is gone, or changes at this moment
            return False

    def _look_again(self) -> bool:
        """Whether other objects that stand there are equal to those that stood there; then they are the ones from now on."""
        held = (
            self._hold(self._inside)
            and self._hold(self._outside)
            and all(self._holds(holder.get(name, ABSENT), value) for holder, name, value in self._elsewhere)
        )
        if held:
            self._look()
        return held

    def _hold(self, facts: Sequence[_Fact]) -> bool:
        for held, place, name, value in facts:
            if place is None and value is ABSENT:
                if name in held:
                    return False
            elif not self._holds(find(held, place, name), value):
                return False
        return True

    def _holds(self, now: Any, value: Any) -> bool:
        if isinstance(value, Kept):
            return value.holds(now, self.with_shapes)
        if now is value and id(value) not in self._described:
            return True
        if isinstance(value, LASTING):
            return describe_lasting(now) == describe_lasting(value)
        described = self._described.get(id(value))
        return described is not None and describe(now) == described


# What a module holds, the place there, the name, and the value.
_Fact: TypeAlias = tuple[dict[str, Any], str | None, str, Any]


def _forms_of(tensors: Sequence[Tensor | None]) -> tuple[list[type], list[Any]]:
    """Their classes and their forms; no forms where one is gone."""
    kinds = list(map(type, tensors))
    return kinds, [] if type(None) in kinds else [form_of(one) for one in tensors if one is not None]


def _columns(rows: Sequence[tuple[Any, str, Any]]) -> tuple[Any, Any, Any]:
    """Holders, names and values, each by itself."""
    return tuple(zip(*rows, strict=True)) or ((), (), ())  # type: ignore[return-value]

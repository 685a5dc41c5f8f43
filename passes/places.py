"""Where modules keep what they have, past what tracers put in the way of those who ask them."""

from __future__ import annotations

from typing import Any

from torch import nn

# What every module has, beside its modes; each is a fact as a whole where it is read.
CONTENTS = ("_modules", "_parameters", "_buffers")
ABSENT = object()


def place_of(module: nn.Module, name: str, value: Any) -> str | None:
    """Where a module keeps what it has under a name: in which dict of its own, `__dict__` itself, or "" for anywhere."""
    if value is ABSENT and not hasattr(type(module), name):
        return ""
    held = module.__dict__
    return next((place for place in CONTENTS if name in (held.get(place) or ()) and name not in held), None)


def find(held: dict[str, Any], place: str | None, name: str) -> Any:
    """What a module, which holds that in its `__dict__`, keeps at a place under a name."""
    if place is None:
        return held.get(name, ABSENT)
    if place:
        kept = held[place]
        value = kept.get(name, ABSENT)
        return getattr(kept, "parts", {}).get(name, ABSENT) if value is ABSENT else value
    places = (place for place in (None, *CONTENTS) if place is None or held.get(place))
    return next((value for place in places if (value := find(held, place, name)) is not ABSENT), ABSENT)


def attribute_of(module: nn.Module, name: str) -> Any:
    """What a module keeps under a name."""
    return find(object.__getattribute__(module, "__dict__"), "", name)


def contents_of(module: nn.Module, name: str) -> Any:
    """The submodules of a module; of parameters and buffers their names: each may be exchanged for another."""
    kept = object.__getattribute__(module, "__dict__")[name]
    if name == "_modules":
        aside = getattr(kept, "aside", ())
        return [(key, value) for key, value in dict.items(kept) if key not in aside]
    return sorted(
        [(key, value is None) for key, value in dict.items(kept)] + [(key, False) for key in getattr(kept, "parts", ())]
    )

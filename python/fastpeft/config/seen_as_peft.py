"""Objects of this package as others see them: `isinstance(model, peft.PeftModel)` is true where PEFT was imported.

Python asks an object for its `__class__` where its type alone does not answer. Ours answer with a class that derives
from their own and from PEFT's of the same purpose, made when it is first asked for. So the answer is right whether PEFT
came before this package or after it, before the object or after it; PEFT is never imported here; and `type(object)`,
by which methods are found, stays the class of this package.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import types
from abc import ABCMeta
from typing import Any

PACKAGE = __name__.partition(".")[0]
MODULES = ("peft", "peft.tuners.tuners_utils", "peft.utils.other", "peft.tuners.lora.config")  # that have the classes
_seen: dict[tuple[type, ...], type] = {}  # by the class here and those of PEFT's


class _Seen(ABCMeta):
    """The type of the classes that objects show, and of those that others derive from them. Calling one makes an object
    without PEFT's classes among its bases, whose `__init__` is not for ours."""

    own: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _of_own(cls)(*args, **kwargs)

    def __dir__(cls) -> list[str]:
        return dir(cls.own)


def module_of_peft(name: str) -> types.ModuleType | None:
    """A module of PEFT's; None if it was not imported, or not to its end."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def class_of_peft(module: str, name: str) -> type | None:
    """A class in a module of PEFT's; None if that is not there, or is this package under PEFT's name."""
    found = vars(where).get(name) if (where := module_of_peft(module)) is not None else None
    return found if isinstance(found, type) and not _is_ours(found) else None


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE


class SeenAsPeft:
    """Base of what is an instance of a class of PEFT's, too: the one with the name of its own class, or of a base."""

    def peft_classes(self) -> tuple[type, ...]:
        """The classes of PEFT's of which this is an instance, where PEFT was imported."""
        for cls in filter(_is_ours, type(self).__mro__):
            for module in MODULES:
                if (found := class_of_peft(module, cls.__name__)) is not None:
                    return (found,)
        return ()

    @property
    def __class__(self) -> Any:
        own = type(self)
        if "peft" not in sys.modules or not (theirs := self.peft_classes()):
            return own
        key = (own, *theirs)
        if (seen := _seen.get(key)) is None:
            names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
            seen = _seen.setdefault(key, _Seen(own.__name__, key, {"own": own, **names}))
        return seen

    @__class__.setter
    def __class__(self, cls: type) -> None:
        """Libraries give a module a class that derives from the one it shows: it gets one that derives from its own."""
        object.__dict__["__class__"].__set__(self, _of_own(cls))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As `object` does it; but pickle wants that an object's `__class__` is the class to be made anew."""
        made: Any = object.__reduce_ex__(self, protocol)
        return (_new, *made[1:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]


@functools.cache
def _of_own(cls: type) -> type:
    """A class without PEFT's among its bases."""
    if not isinstance(cls, _Seen):
        return cls
    if "own" in vars(cls):  # it is one that an object shows
        return cls.own
    bases = tuple(_of_own(base) for base in cls.__bases__)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _same(cls: type) -> type:
    return cls


copyreg.pickle(_Seen, lambda cls: (_same, (cls.own,)))  # type: ignore[arg-type, return-value]

"""Modules that are changed in place to a subclass of their own class.

The module object stays, with its parameters, names and hooks; it goes by its class's name, and is copied and pickled
as what it is. Others may put a class of theirs before ours, as `fully_shard` does; then the classes stay, and ours is
made inactive.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Subclassed(nn.Module):
    """What is put before a module's own class: its `forward` may call `super().forward`.

    Attributes:
        _active: whether it is to do anything; else its forward is that of the module's own class.
    """

    _active: bool = True
    _own_class: ClassVar[type[nn.Module]]
    _before: ClassVar[type[Subclassed]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _rebuilt, (reduced[0], self._before, self._own_class, *reduced[1][1:]), *reduced[2:]


def subclass(module: Any, before: type[Subclassed]) -> None:
    """Put a class before the module's own, or make it active again where it could not be taken away."""
    if isinstance(module, before):
        module.__dict__.pop("_active", None)
    else:
        module.__class__ = _subclass(before, type(module))


def restore(model: nn.Module, before: type[Subclassed]) -> bool:
    """Give the modules of a model that have this class before their own their own back; whether there were any."""
    found: list[Any] = [module for module in model.modules() if isinstance(module, before) and module._active]
    for module in found:
        if vars(type(module)).get("_before") is before:
            module.__class__ = module._own_class
        else:  # another's class, which is not ours to take away
            module._active = False
    return bool(found)


_classes: dict[tuple[type[Subclassed], type[nn.Module]], type[nn.Module]] = {}


def _subclass(before: type[Subclassed], own_class: type[nn.Module]) -> type[nn.Module]:
    if (before, own_class) not in _classes:
        names = {name: getattr(own_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        members = {**names, "_own_class": own_class, "_before": before}
        _classes[before, own_class] = type(own_class.__name__, (before, own_class), members)
    return _classes[before, own_class]


def _rebuilt(rebuild: Any, before: type[Subclassed], own_class: type[nn.Module], *arguments: Any) -> Any:
    return rebuild(_subclass(before, own_class), *arguments)

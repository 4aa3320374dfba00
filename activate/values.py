"""Dataclasses that cost next to nothing at the start.

`dataclasses` writes and compiles six methods for each class, which takes 0.4 ms, and loads
`inspect` for that. Together this was a fifth of an agent's start. Here all classes have the same
methods. Type checkers see the original, and its functions take these values too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:

    def dataclass(decorated: Optional[type] = None, *, frozen: bool = False) -> Any:
        """Give a class the methods of a dataclass. Fields are not inherited."""
        if decorated is None:
            return lambda cls: dataclass(cls, frozen=frozen)
        methods = {**_METHODS, **(_FROZEN if frozen else {"__hash__": None})}
        for name, method in methods.items():
            if name not in vars(decorated):
                setattr(decorated, name, method)
        decorated._plan = _Plan(decorated)
        decorated.__dataclass_fields__ = _Fields()
        return decorated

    class field:
        """What a field has in place of a plain default. `repr`: whether it is shown."""

        def __init__(
            self, *, default: Any = ..., default_factory: Any = None, repr: bool = True
        ) -> None:
            self.default, self.default_factory, self.repr = default, default_factory, repr

    def replace(value: Any, **changes: Any) -> Any:
        """A copy of a value, with changes."""
        return value.__class__(**{**_fields(value), **changes})


def names(cls: Any) -> tuple[str, ...]:
    """The names of the fields of a class that `dataclass` has made."""
    return cls._plan.names  # type: ignore[no-any-return]


class _Plan:
    """The fields of a class. `blank` has the defaults, and the order, of its values."""

    def __init__(self, cls: Any) -> None:
        self.names = tuple(cls.__annotations__)
        self.is_completed = hasattr(cls, "__post_init__")
        given = {name: vars(cls)[name] for name in self.names if name in vars(cls)}
        special = {name: one for name, one in given.items() if type(one) is field}
        self.hidden = {name for name, one in special.items() if not one.repr}
        self.factories: dict[str, Callable[[], Any]] = {}
        for name, one in special.items():
            delattr(cls, name)
            del given[name]
            if one.default_factory is not None:
                self.factories[name] = one.default_factory
            elif one.default is not ...:
                given[name] = one.default
        self.defaults = given
        self.blank = {**dict.fromkeys(self.names), **given}
        self.required = [
            name for name in self.names if name not in given and name not in self.factories
        ]


class _Fields:
    """The attribute that the functions of `dataclasses` ask for, made when they do."""

    def __get__(self, value: Any, owner: Any) -> dict[str, Any]:
        import dataclasses

        plan, rows = owner._plan, []
        for name in plan.names:
            has: dict[str, Any] = {"repr": name not in plan.hidden}
            if name in plan.defaults:
                has["default"] = plan.defaults[name]
            if name in plan.factories:
                has["default_factory"] = plan.factories[name]
            rows.append((name, Any, dataclasses.field(**has)))
        made: Any = dataclasses.make_dataclass(owner.__name__, rows)
        fields: dict[str, Any] = made.__dataclass_fields__
        owner.__dataclass_fields__ = fields
        return fields


def _fields(value: Any) -> dict[str, Any]:
    state = vars(value)
    return {name: state[name] for name in value._plan.names}


def _initialise(self: Any, *values: Any, **named: Any) -> None:
    plan, state = self._plan, vars(self)
    state.update(plan.blank)
    state.update(zip(plan.names, values))
    state.update(named)
    count = len(values)
    for name, make in plan.factories.items():
        if name not in named and name not in plan.names[:count]:
            state[name] = make()
    missing = [name for name in plan.required[count:] if name not in named]
    twice = [name for name in plan.names[:count] if name in named] if named else []
    if missing or twice or len(state) > len(plan.names) or count > len(plan.names):
        raise TypeError(f"{type(self).__name__} has the fields {', '.join(plan.names)}")
    if plan.is_completed:
        self.__post_init__()


def _show(self: Any) -> str:
    plan = self._plan
    parts = (f"{name}={one!r}" for name, one in _fields(self).items() if name not in plan.hidden)
    return f"{type(self).__qualname__}({', '.join(parts)})"


def _equals(self: Any, other: Any) -> bool:
    return type(other) is type(self) and _fields(self) == _fields(other)


def _hash(self: Any) -> int:
    return hash(tuple(_fields(self).values()))


def _refuse(self: Any, name: str, *_: Any) -> None:
    raise AttributeError(f"{name} of a frozen {type(self).__name__} can't be changed")


_METHODS = {"__init__": _initialise, "__repr__": _show, "__eq__": _equals}
_FROZEN = {"__hash__": _hash, "__setattr__": _refuse, "__delattr__": _refuse}

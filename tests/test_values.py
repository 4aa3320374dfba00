"""activate/values.py: values behave as those of `dataclasses`."""

import copy
import dataclasses
import pickle
from typing import Any, Optional

import pytest

from activate import values

KINDS = pytest.mark.parametrize("kind", [values, dataclasses], ids=["ours", "original"])


@values.dataclass(frozen=True)
class Stored:
    """A value that `pickle` finds by its name."""

    name: str
    size: int = 0


def frozen(kind: Any) -> Any:
    @kind.dataclass(frozen=True)
    class Point:
        """A value of every sort of field."""

        x: int
        name: Optional[str] = None
        secret: bytes = kind.field(default=b"s", repr=False)
        marks: dict = kind.field(default_factory=dict)

        @property
        def double(self) -> int:
            return 2 * self.x

    return Point


def changeable(kind: Any) -> Any:
    @kind.dataclass
    class Count:
        """A value that changes, and is completed when it is made."""

        first: float
        repeats: int = 0

        def __post_init__(self) -> None:
            self.repeats += 1

    return Count


@KINDS
def test_fields_come_by_place_by_name_or_by_default(kind):
    point = frozen(kind)
    assert vars(point(1)) == {"x": 1, "name": None, "secret": b"s", "marks": {}}
    full = {"x": 1, "name": "a", "secret": b"", "marks": {"k": 2}}
    assert vars(point(1, "a", b"", {"k": 2})) == full
    assert vars(point(marks={"k": 2}, secret=b"", name="a", x=1)) == full
    assert list(vars(point(marks={}, name="a", x=1))) == list(full)  # in the order of the class
    assert point(4).double == 8
    assert point(1).marks is not point(1).marks
    assert vars(changeable(kind)(0.5)) == {"first": 0.5, "repeats": 1}


@KINDS
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), {}),
        ((), {"name": "a"}),
        ((1, None, b"", {}, 5), {}),
        ((1,), {"x": 1}),
        ((1,), {"y": 1}),
    ],
)
def test_what_does_not_fit_the_fields_is_refused(kind, given, named):
    with pytest.raises(TypeError):
        frozen(kind)(*given, **named)


@KINDS
def test_values_are_compared_by_their_fields(kind):
    point, other = frozen(kind), frozen(kind)
    assert point(1) == point(1) != point(2)
    assert point(1) != other(1) and point(1) != (1, None, b"s", {})
    hashable = dict.fromkeys(("marks",), ())
    assert hash(point(1, **hashable)) == hash(point(1, **hashable))
    with pytest.raises(TypeError):
        hash(changeable(kind)(0.5))


@KINDS
def test_frozen_values_do_not_change(kind):
    point, count = frozen(kind)(1), changeable(kind)(0.5)
    for name in ("x", "new"):
        with pytest.raises(AttributeError):
            setattr(point, name, 2)
    with pytest.raises(AttributeError):
        del point.x
    count.repeats = 7
    assert (vars(point)["x"], count.repeats) == (1, 7)


@KINDS
def test_a_copy_has_changes(kind):
    point = frozen(kind)(1, "a")
    assert kind.replace(point, x=2) == type(point)(2, "a")
    with pytest.raises(TypeError):
        kind.replace(point, y=2)
    assert copy.deepcopy(point) == copy.copy(point) == point


@KINDS
def test_what_is_hidden_is_not_shown(kind):
    shown = repr(frozen(kind)(1, "a"))
    assert shown.endswith("Point(x=1, name='a', marks={})") and "secret" not in shown


def test_the_functions_of_dataclasses_take_them():
    point = frozen(values)
    names = ["x", "name", "secret", "marks"]
    assert [field.name for field in dataclasses.fields(point)] == names
    assert list(values.names(point)) == names
    assert dataclasses.is_dataclass(point) and dataclasses.is_dataclass(point(1))
    assert dataclasses.asdict(point(1)) == {"x": 1, "name": None, "secret": b"s", "marks": {}}
    assert dataclasses.replace(point(1), x=2) == point(2)
    by_name = {field.name: field for field in dataclasses.fields(point)}
    assert by_name["name"].default is None and by_name["marks"].default_factory is dict
    assert by_name["x"].default is dataclasses.MISSING and not by_name["secret"].repr


def test_values_are_stored():
    assert pickle.loads(pickle.dumps(Stored("a", 3))) == Stored("a", 3)

"""The options of a dataclass, known from its fields alone: how a value is read from text, checked and described.

A field's type, default and help are written once, in the dataclass. The command line, ``HfArgumentParser``, texts such
as ``level=block,coverage=0.5`` and the tables of the documentation are all made of them.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from numbers import Real
from typing import Any, Literal

from .errors import SDPConfigError

_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


def option(help: str, *, default: Any = MISSING, positive: bool = False, most: int | None = None) -> Any:
    """A field of a dataclass of options.

    Args:
        positive: :func:`check` refuses numbers that are not above zero, or not finite.
        most: the largest of positive whole numbers.
    """
    return dataclasses.field(default=default, metadata={"help": help, "positive": positive, "most": most})


@dataclass(frozen=True)
class Kind:
    """What the type of a field says about its values.

    Attributes:
        element: bool, int, float, str, or a class with a ``parse`` of its own.
        choices: of a ``Literal``; without one there are none.
        is_list: whether a list of elements is a value, and ``is_single``: whether one element alone is.
        is_optional: whether None is a value.
    """

    element: Any
    choices: tuple
    is_list: bool
    is_single: bool
    is_optional: bool


def kind_of(annotation) -> Kind:
    """Of a type such as ``int | None``, ``Literal["a", "b"]`` or ``float | Sequence[float]``."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = set(typing.get_args(annotation)) if is_union else {annotation}
    lists = {part for part in parts if typing.get_origin(part) is Sequence}
    singles = parts - lists - {types.NoneType}
    (element,) = {typing.get_args(part)[0] for part in lists} | singles
    choices = typing.get_args(element) if typing.get_origin(element) is Literal else ()
    return Kind(
        element=type(choices[0]) if choices else element,
        choices=choices,
        is_list=bool(lists),
        is_single=bool(singles),
        is_optional=types.NoneType in parts,
    )


def parse(annotation, text: str) -> Any:
    """The value of a type that a text stands for; a list is separated by commas. Choices are left to :func:`check`.

    Raises: ValueError for what is no number, no truth value, or no list of such.
    """
    kind = kind_of(annotation)
    if not kind.is_list:
        return _parse_element(kind.element, text.strip())
    try:
        return without_list([_parse_element(kind.element, piece.strip()) for piece in text.split(",")], kind)
    except SDPConfigError:
        raise  # an element's own says more
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers separated by commas.") from None


def _parse_element(element, text: str) -> Any:
    if hasattr(element, "parse"):
        return element.parse(text)
    try:
        return {"true": True, "false": False}[text.lower()] if element is bool else element(text)
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is not {_NAMES[element]}.") from None


def without_list(values: Sequence, kind: Kind) -> Any:
    """The element of a list of one, where it may stand alone; else a tuple."""
    return values[0] if kind.is_single and len(values) == 1 else tuple(values)


def parse_all(fields: Iterable[dataclasses.Field], text: str, *, what: str, example: str) -> dict[str, Any]:
    """Values by name from ``"level=block,coverage=0.75,0.5"``: a list goes on until the next name.

    Args:
        what: says in an error where the text is from.
        example: says in an error how to write it.
    Raises: SDPConfigError that names what is not understood, or is given twice.
    """
    annotations = {field.name: field.type for field in fields}
    values: dict[str, Any] = {}
    for item in re.split(r",(?=[^,=]*=)", text):
        name, equals, value = (word.strip() for word in item.partition("="))
        try:
            if not equals or name in values:
                raise KeyError(name)
            values[name] = parse(annotations[name], value)
        except (KeyError, ValueError):
            raise SDPConfigError(
                f"{what} {text!r}: {item.strip()!r} is not understood. Write it as {example} with any of "
                f"{', '.join(annotations)}."
            ) from None
    return values


def check(options) -> None:
    """Check choices, truth values and positive numbers of a dataclass's instance.

    Raises: SDPConfigError naming the option and its value.
    """
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), kind_of(field.type)
        if value is None and kind.is_optional:
            continue
        expected = None
        if kind.choices and not (isinstance(value, str) and value in kind.choices):
            expected = f"one of {(None, *kind.choices) if kind.is_optional else kind.choices}"
        elif kind.element is bool and not isinstance(value, bool):
            expected = "True or False"
        elif kind.element is int and not kind.is_list and (isinstance(value, bool) or not isinstance(value, int)):
            expected = _number_of(field, kind)
        elif field.metadata.get("positive") and not is_positive(value, kind.element, field.metadata.get("most")):
            expected = _number_of(field, kind)
        if expected is not None:
            raise SDPConfigError(f"{field.name} must be {expected}, got {value!r}.")


def _number_of(field: dataclasses.Field, kind: Kind) -> str:
    what = "integer" if kind.element is int else "number"
    positive, most = field.metadata.get("positive"), field.metadata.get("most")
    expected = f"a positive {what}" if positive else f"an {what}"
    return expected + (f" up to {most}" if most else "") + (" or None" if kind.is_optional else "")


def is_positive(value, element: type, most: int | None = None) -> bool:
    """Whether it is a finite number above zero, up to ``most``: a whole one where ``element`` is int."""
    is_number = isinstance(value, int if element is int else Real) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf and (most is None or value <= most)


def arguments(cls: type, prefix: str) -> type:
    """A dataclass with the fields of ``cls`` under prefixed names, and with types that ``HfArgumentParser`` can read.

    A list is then a ``list``, and a class with ``parse`` is text.
    """
    fields = []
    for field in dataclasses.fields(cls):
        kind, annotation, value = kind_of(field.type), typing.cast(Any, field.type), typing.cast(Any, field.default)
        default: dict[str, Any] = {"default": value}
        if kind.is_list or hasattr(kind.element, "parse"):
            annotation = str if hasattr(kind.element, "parse") else kind.element
            annotation = types.GenericAlias(list, annotation) if kind.is_list else annotation
            annotation = annotation | None if kind.is_optional else annotation
        if kind.is_list and not kind.is_optional:  # of a list the parser looks at the factory only
            default = {"default_factory": [value].copy if kind.is_single else list(value).copy}
        made = dataclasses.field(**default, metadata={"help": field.metadata["help"]})
        fields.append((prefix + field.name, annotation, made))
    return dataclasses.make_dataclass(f"{cls.__name__}Arguments", fields)


def from_arguments(cls: type, given: object, prefix: str) -> dict[str, Any]:
    """Values of ``cls``'s fields by name from an instance of :func:`arguments`."""
    values = {}
    for field in dataclasses.fields(cls):
        kind, value = kind_of(field.type), getattr(given, prefix + field.name)
        values[field.name] = without_list(value, kind) if kind.is_list and value is not None else value
    return values


def markdown(options: type) -> str:
    """A table of a dataclass's options: name, values, default, help."""
    lines = [f"| `{options.__name__}` | values | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(options):
        default = "required" if field.default is MISSING else f"`{field.default!r}`".replace("'", '"')
        lines.append(f"| `{field.name}` | {_values(kind_of(field.type))} | {default} | {field.metadata['help']} |")
    return "\n".join(lines)


def _values(kind: Kind) -> str:
    names = {bool: "`True`, `False`", int: "whole number", float: "number"}
    element = ", ".join(f'`"{choice}"`' for choice in kind.choices)
    element = element or names.get(kind.element) or f"`{kind.element.__name__}`"
    forms = [element] * kind.is_single + [f"list of {element}s"] * kind.is_list
    return " or ".join(forms)

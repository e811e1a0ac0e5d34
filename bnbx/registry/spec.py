"""The frozen base of every spec: a name, a summary, JSON in and out, and a stable digest.

A spec is data that crosses process and machine borders (a pickled optimizer carries its own), so
equality, hash, pickle and copy all go through its canonical JSON.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

from bnbx.errors import SpecError
from bnbx.registry.names import nearest

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def _spec_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError("a name is lower-case letters, digits and underscores, letter first")
    return name


def _no_text(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is a text; expected a number, without quotes")
    return value


SpecName = Annotated[str, AfterValidator(_spec_name)]
NotText = BeforeValidator(_no_text)
"""Of a field for numbers, where pydantic would read them from texts too."""


class Frozen(BaseModel):
    """Immutable, with unknown fields refused; the parts of a spec are made of these."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ignored_types=(cached_property,)
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            label = type(self).__name__
            if "name" in type(self).model_fields:
                label += f" spec {fields.get('name', '(no name)')!r}"
            raise SpecError(f"{label}: {_readable(error, type(self))}") from None

    @classmethod
    def written(cls, value: object) -> str:
        """How to write such a part, for an error about `value` in its place."""
        del value
        return f"{cls.__name__}(...)"


class Spec(Frozen):
    """What is registered: found by `name`, identified by `digest`.

    Raises:
        SpecError: if the fields contradict each other; the message names spec and field.
    """

    name: SpecName
    summary: str
    source: str = ""
    """Where it comes from: a paper ("arXiv:1711.05101"), a section, a library."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build a spec from the JSON that `to_json` wrote.

        Raises:
            SpecError: if the text is not JSON, or not a spec of this class.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise SpecError(f"{cls.__name__} spec from JSON: {_readable(error, cls)}") from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The spec with some fields changed; checked as a new one is."""
        del deep  # all fields are immutable
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **(update or {})})

    def to_json(self) -> str:
        """Canonical JSON: fields in declaration order, no white space, floats round-trip."""
        return self.model_dump_json()

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash((type(self), self.digest))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.digest == other.digest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_json, (self.to_json(),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self


MOST_PROBLEMS = 5  # that a message names: a table has up to 256 numbers


def _readable(error: ValidationError, model: type[Frozen]) -> str:
    """Where in the spec, what is wrong, and what to write: of the first few problems."""
    problems = []
    for problem in error.errors(include_url=False)[:MOST_PROBLEMS]:
        place = ".".join(str(part) for part in problem["loc"])
        message = _message(problem, model)
        problems.append(f"{place}: {message}" if place else message)
    more = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {more} more" if more else "")


def _message(problem: ErrorDetails, model: type[Frozen]) -> str:
    match problem["type"], problem["loc"]:
        case "extra_forbidden", (field,):
            fields = model.model_fields
            return f"no such field{nearest(str(field), fields)}; there are {', '.join(fields)}"
        case "model_type", (_, *_):
            name, given = problem["ctx"]["class_name"], problem["input"]
            part = next(part for part in Frozen.__subclasses__() if part.__name__ == name)
            return f"{reprlib.repr(given)} is no {name}; write {part.written(given)}"
    return problem["msg"].removeprefix("Value error, ")

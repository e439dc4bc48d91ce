"""What a field may hold, for errors: msgspec names only the bound that a value is beyond, and a user wants both."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

_BEYOND = re.compile(r"Expected `(int|float)` (>|>=|<|<=) |\w* ?[Oo]ut of range")


def explained(error: msgspec.ValidationError, kind: Any) -> tuple[str, str]:
    """(the field, what is wrong with it) of a value that is no `kind`; the field is empty where all of it is wrong."""
    reason, _, path = str(error).partition(" - at ")
    field = re.sub(r"^\$\.?", "", path.strip("`"))
    if _BEYOND.match(reason) and (number := _number_at(inspect.type_info(kind), field)) is not None:
        name = "int" if isinstance(number, inspect.IntType) else "float"
        bounds = ((">", number.gt), (">=", number.ge), ("<", number.lt), ("<=", number.le))
        reason = f"Expected `{name}` " + " and ".join(
            f"{sign} {int(bound) if bound == int(bound) else bound}" for sign, bound in bounds if bound is not None
        )
    return field, reason


def _number_at(kind: inspect.Type, field: str) -> inspect.IntType | inspect.FloatType | None:
    """The number that `field`, as msgspec writes paths (`stop_token_ids[0]`), is declared to be."""
    kinds = [kind]
    for step in re.findall(r"\w+|\[", re.sub(r"\[[^]]*\]", "[", field)):
        kinds = [inner for outer in _flat(kinds) for inner in _inside(outer, step)]
    numbers = [k for k in _flat(kinds) if isinstance(k, inspect.IntType | inspect.FloatType)]
    return numbers[0] if numbers else None


def _flat(kinds: list[inspect.Type]) -> list[inspect.Type]:
    return [inner for kind in kinds for inner in (kind.types if isinstance(kind, inspect.UnionType) else (kind,))]


def _inside(kind: inspect.Type, step: str) -> list[inspect.Type]:
    if isinstance(kind, inspect.StructType):
        return [field.type for field in kind.fields if field.encode_name == step]
    if step == "[" and isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return [kind.item_type]
    return []

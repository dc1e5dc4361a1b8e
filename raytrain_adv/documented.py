"""Models of pydantic whose fields are documented by the string under each."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class Documented:
    """Mixed into a model, has the string under each field as its description in the schema.

    It is read when a schema is asked for. pydantic's use_attribute_docstrings reads the source of
    each class as that is defined: a third of the time in which a job is loaded.
    """

    @classmethod
    def sentence(cls, field: str) -> str:
        """Return the string under a field, on one line; empty if there is none."""
        return " ".join(_strings(cls).get(field, "").split())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Add the descriptions to what pydantic makes."""
        found = handler(core_schema)
        properties = handler.resolve_ref_schema(found)["properties"]
        for field, text in _strings(cls).items():
            properties.get(field, {})["description"] = text
        return found


def _strings(kind: type[Documented]) -> dict[str, str]:
    """Return the string under each field in the source of a class and of its bases."""
    found = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, Documented) or owner is Documented:
            continue
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, text in pairwise(getattr(parsed, "body", [])):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = inspect.cleandoc(words)
    return found

"""What `raytrain-adv explain` prints: a feature, several together, or one key of the job file."""

import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from raytrain_adv.config import compatibility
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import RENAMED, WRITTEN_AS
from raytrain_adv.config.problems import Problem, job_error, show
from raytrain_adv.config.schema import describe, schema
from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest

WIDTH = 100


def explain(name: str) -> str:
    """Describe a key of the job file, a feature with its keys, or several features together. Raises
    JobError if there is no such key or feature, naming the nearest.
    """
    word = name.strip().replace("-", "_")
    properties = _properties()
    key = WRITTEN_AS.get(word.lower(), word if word in properties else word.lower())
    own = "\n".join(_key(key, properties[key])) if key in properties else ""
    try:
        of_feature = compatibility.explain(name)
    except JobError:
        if own:
            return own
        near = nearest(word.lower(), [*properties, *compatibility.names()])
        fix = f"did you mean {near}?" if near else "`raytrain-adv schema` lists the keys"
        problem = Problem(f"there is no key or feature {show(name)}", fix)
        raise job_error("The command line", [problem]) from None
    return f"{own}\n\n{of_feature}" if own else of_feature


@cache
def _properties() -> dict[str, Any]:
    properties: dict[str, Any] = schema()["properties"]
    return properties


def _key(key: str, field: dict[str, Any]) -> Iterator[str]:
    default = f"; {show(field['default'])} by default" if "default" in field else ""
    yield from textwrap.wrap(f"{key}: {describe(field)}{default}", WIDTH, subsequent_indent="  ")
    yield from textwrap.wrap(
        str(field.get("description", "")), WIDTH, initial_indent="  ", subsequent_indent="  "
    )
    owner = next((kind for kind in section_types() if key in kind.model_fields), None)
    others = [other for other, ours in (*RENAMED.items(), *WRITTEN_AS.items()) if ours == key]
    if others:
        names = f"elsewhere called: {', '.join(sorted(set(others)))}"
        yield from textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if owner is not None:
        yield f"  section {owner.__name__}; docs/job_file.md has its other keys"

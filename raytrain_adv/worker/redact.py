"""Keep secrets of the job (they can only be in ray_init_kwargs) out of reports and trackers."""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "(not shown)"
_SECRET = re.compile(
    r"(password|passwd|secret|token|credential|api_?key|access_?key|private_?key)s?$", re.IGNORECASE
)


def redact(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved job with its secrets hidden: env_vars, and nested keys named as one.

    Top-level keys are those of the schema; none of them takes a secret.
    """
    return {key: _redact_nested(value) for key, value in job.items()}


def is_secret(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return bool(_SECRET.search(name))


def redact_arguments(command: str) -> str:
    """Return command-line arguments without the value of ray_init_kwargs and what follows it."""
    return re.sub(r"(?s)(ray_init_kwargs=).*", rf"\1{REDACTED}", command)


def _redact_nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _redact_entry(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_nested(inner) for inner in value]
    return value


def _redact_entry(key: str, value: Any) -> Any:
    if key == "env_vars" and isinstance(value, Mapping):
        return dict.fromkeys(value, REDACTED)
    if is_secret(key):
        return REDACTED
    return _redact_nested(value)

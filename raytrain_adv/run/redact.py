"""Keep what a job holds of the environment (env_vars in ray_init_kwargs), and what looks like a
secret, out of reports, checkpoints and trackers.
"""

import re
from collections.abc import Mapping
from typing import Any

from raytrain_adv.redaction import HIDDEN as REDACTED
from raytrain_adv.redaction import hide, is_secret_name


def redact(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved job with its secrets hidden: env_vars, nested keys named as one, and
    what has the form of one.

    Top-level keys are those of the schema; none of them takes a secret.
    """
    return {key: _redact_nested(value) for key, value in job.items()}


def redact_arguments(command: str) -> str:
    """Return command-line arguments without the value of ray_init_kwargs and what follows it, and
    without what has the form of a secret.
    """
    return hide(re.sub(r"(?s)(ray_init_kwargs=).*", rf"\1{REDACTED}", command))


def _redact_nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _redact_entry(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_nested(inner) for inner in value]
    return hide(value) if isinstance(value, str) else value


def _redact_entry(key: str, value: Any) -> Any:
    if key == "env_vars" and isinstance(value, Mapping):
        return dict.fromkeys(value, REDACTED)
    if is_secret_name(key):
        return REDACTED
    return _redact_nested(value)

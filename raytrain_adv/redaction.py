"""What looks like a secret: names that hold one, tokens by their known forms, URLs with a password.

A job file travels into reports, checkpoints, trackers and Ray's API, which shows it in clear, so it
may hold none.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from raytrain_adv.errors import JobError

HIDDEN = "(not shown)"
SHORTEST = 8
"""Characters of a value in the environment that is hidden in text; `none` and `true` are none."""

_NAME = re.compile(
    r"(password|passwd|passphrase|secret|credential|(^|[_.-])key|(api|access|private|secret)key"
    r"|access_key_id)s?$|token$",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(
    r"(^|_)(pad|eos|bos|unk|mask|sep|cls|image|video|audio|special|stop|chat)_token$", re.IGNORECASE
)
"""Names of tokens that are words of a tokenizer."""
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""A git commit looks the same, so the key's name decides."""


@dataclass(frozen=True)
class Kind:
    """A kind of secret: how it looks, and where it belongs."""

    name: str
    pattern: re.Pattern[str]
    """What is found in text; its group `secret`, where it has one, is what must not be shown."""
    names: re.Pattern[str]
    """Keys whose value is one, whatever it looks like."""
    place: str


_NEVER = re.compile(r"(?!)")
_EVERYWHERE = "in the environment of the driver and of every Ray node"
_SECRET = "(Kubernetes: a Secret, as cluster/ has it)"

KINDS = (
    Kind(
        "a Hugging Face token",
        re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,})"),
        re.compile(r"(^|_)(hf|hub|hugging_?face)_", re.IGNORECASE),
        f"HF_TOKEN {_EVERYWHERE} {_SECRET}, or `hf auth login` there",
    ),
    Kind(
        "a key of AWS",
        re.compile(r"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        re.compile(r"(^|_)(aws|s3)_|(^|_)(secret_)?access_?key(_id)?$", re.IGNORECASE),
        f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY {_EVERYWHERE} {_SECRET}, or the nodes' role",
    ),
    Kind(
        "a key of Weights & Biases",
        re.compile(r"(?<![A-Za-z0-9])(wandb_v\d_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40})"),
        re.compile(r"wandb", re.IGNORECASE),
        f"WANDB_API_KEY {_EVERYWHERE} {_SECRET}",
    ),
    Kind(
        "a URL with a password or a signature",
        re.compile(
            r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@?#]*:(?P<secret>(?!\d+(?:/|$))[^\s@]+)@"
            r"|[?&](?:sig|signature|x-amz-signature|x-goog-signature|access_token|token|api_?key"
            r"|secret_?key|access_?key|password)=(?P<query>[^&\s]+)",
            re.IGNORECASE,
        ),
        _NEVER,
        f"the URL alone here, its credentials {_EVERYWHERE} {_SECRET}: AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY for s3://, GOOGLE_APPLICATION_CREDENTIALS for gs://",
    ),
    Kind(
        "a secret",
        re.compile(
            r"(?<![A-Za-z0-9])(gh[oprsu]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
            r"|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|sk-[A-Za-z0-9_-]{32,}"
            r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*)"
            r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*"
        ),
        _NAME,
        f"an environment variable of the process that needs it, {_EVERYWHERE} {_SECRET}",
    ),
)
OTHER = KINDS[-1]


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return bool(_NAME.search(name)) and not _VOCABULARY.search(name)


def kind_of(text: str) -> Kind | None:
    """Return the kind of secret that a text holds, by its form; none when it holds none."""
    return next((kind for kind in KINDS if kind.pattern.search(text)), None)


def hide(text: str) -> str:
    """Return the text without the secrets that are known by their form."""
    for kind in KINDS:
        text = kind.pattern.sub(_without, text)
    return text


def hide_environment(text: str) -> str:
    """Return the text without the values of this process's environment variables that are named as
    secrets: an error of a library may repeat one.

    Args:
        text: plain, or of a JSON or HTML file.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and is_secret_name(name) and not os.path.exists(value):
            for written in {value, str(escape(value)), json.dumps(value)[1:-1]}:
                text = text.replace(written, HIDDEN)
    return text


def secrets_in(key: str, value: Any) -> Iterator[tuple[str, Kind]]:
    """Yield where below a key there is a secret, as key.name.name, and its kind.

    Args:
        key: a key of the job, or a place in it with dots.
        value: any value that YAML can hold.
    """
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield from secrets_in(f"{key}.{inner}", one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secrets_in(key, one)
    else:
        kind = _kind(key, value)
        if kind is not None:
            yield hide(key), kind


def refuse_submitted(job_config: str | None) -> None:
    """Raise if `ray job submit` was given a runtime environment with a secret, which Ray's API
    shows in clear to whoever reaches it.

    Args:
        job_config: what Ray leaves for the job's entry point, as JSON.

    Raises:
        JobError: naming the variables, never their values.
    """
    submitted = json.loads(job_config or "{}")
    found = list(secrets_in("runtime_env", submitted.get("runtime_env")))
    if found:
        places = dict.fromkeys(kind.place for _, kind in found)
        raise JobError(
            "The runtime environment of this Ray job holds a secret, which Ray's API shows in "
            "clear",
            "\n".join(f"{place}: {kind.name}" for place, kind in found),
            "\n".join(f"take it out, and put it where it is not shown: {p}" for p in places),
        )


def _kind(key: str, value: Any) -> Kind | None:
    """Return the kind of secret that one key and its plain value are."""
    text, name = str(value), key.rpartition(".")[2]
    found = kind_of(key) or kind_of(text)
    if found is not None:
        return found
    if isinstance(value, bool) or value is None or value == HIDDEN:
        return None
    by_name = next((kind for kind in KINDS if kind.names.search(key)), OTHER)
    if _WANDB_KEY.fullmatch(text) and "wandb" in key.lower():
        return by_name
    is_path = name.lower().endswith("credentials") and text.startswith(("/", "~/"))
    is_count = not isinstance(value, str) and "pass" not in name.lower()
    if not is_secret_name(name) or not text.strip() or is_path or is_count:
        return None
    return by_name


def _without(match: re.Match[str]) -> str:
    """Return what is found with its secret part hidden; without such a part, hidden as a whole."""
    whole, start = match.group(), match.start()
    for name in ("secret", "query"):
        if match.groupdict().get(name) is not None:
            first, last = match.span(name)
            return whole[: first - start] + HIDDEN + whole[last - start :]
    return HIDDEN

"""Find and hide secrets, which a job must not contain: by their key's name, and by known forms.

Every pattern takes time linear in its text, which users write.
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
"""Fewest characters of an environment variable's value to hide in text: not `none` or `true`."""

_NAME = re.compile(
    r"(password|passwd|passphrase|secret|credential|(^|[_.-])(key|pass|auth|dsn|pat|cookie)|_pwd"
    r"|(api|access|private|secret)key|access_key_id|conn(ection)?_?str(ing)?|webhook(_ur[il])?)s?$"
    r"|token$",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(
    r"(^|_)(pad|eos|bos|unk|mask|sep|cls|image|video|audio|special|stop|chat)_token$", re.IGNORECASE
)
"""Names of tokenizer tokens, which are not secrets."""
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""A git commit has the same form, so the key's name decides."""


@dataclass(frozen=True)
class Kind:
    """A kind of secret: its form, and where it belongs."""

    name: str
    pattern: re.Pattern[str]
    """Its form in text; if it has a group `secret` or `query`, only that part is hidden."""
    names: re.Pattern[str]  # keys that are always of this kind, whatever the form of their value
    place: str


# How services begin the tokens they give out, and the fewest characters that follow. Sources: their
# documentation, and what the detectors gitleaks and detect-secrets know. AWS, Hugging Face and
# Weights & Biases have their own kinds below.
_BEGINNINGS = {
    "gh[oprsu]_": 36,  # GitHub
    "github_pat_": 22,
    r"gl(?:pat|dt|ft|soat|rt|ptt|cbt|agent|oas|imt|ffct)-": 20,  # GitLab
    r"xox[abeoprs]-|xapp-": 10,  # Slack
    r"[rs]k_(?:live|test)_|whsec_": 16,  # Stripe
    "sk-": 32,  # OpenAI and others that follow it
    "sk-ant-": 20,  # Anthropic
    "pypi-AgE": 50,
    "npm_": 36,
    "nvapi-": 20,  # NVIDIA
    "gsk_|xai-|pplx-": 32,  # Groq, xAI, Perplexity
    "r8_": 32,  # Replicate
    "AIza": 35,  # Google
    r"ya29\.|GOCSPX-": 20,
    r"SG\.": 40,  # SendGrid
    r"hv[bs]\.": 20,  # HashiCorp Vault
    r"d(?:op|oo|or)_v1_": 40,  # DigitalOcean
    "dapi[0-9a-f]": 31,  # Databricks
    "shp(?:at|ca|pa|ss)_": 32,  # Shopify
    "lin_api_|lsv2_(?:pt|sk)_": 30,  # Linear, LangSmith
    "gl(?:c|sa)_": 30,  # Grafana
    "PMAK-|figd_|dckr_pat_|dckr_oat_|NRAK-|sntry[su]_|tskey-": 20,
    r"dp\.(?:pt|st|ct|sa)\.": 20,  # Doppler
    "ATATT3|ATBB|LTAI": 16,  # Atlassian, Bitbucket, Alibaba
    "sq0(?:atp|csp)-": 20,  # Square
    "rubygems_|ops_eyJ|AGE-SECRET-KEY-1": 40,
}
_TOKENS = "|".join(rf"(?:{start})[\w-]{{{least},}}" for start, least in _BEGINNINGS.items())
_WEBHOOKS = (
    r"(?:hooks\.slack\.com/(?:services|workflows)|discord(?:app)?\.com/api/webhooks"
    r"|[\w-]{1,63}\.webhook\.office\.com/webhookb?2?|outlook\.office\.com/webhook"
    r"|open\.(?:feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook"
    r"|qyapi\.weixin\.qq\.com/cgi-bin/webhook|hooks\.zapier\.com/hooks)"
)
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
            # Bounded repeats: without them the time is quadratic in a text of many "a://b:c".
            r"[A-Za-z][A-Za-z0-9+.-]{0,40}://[^/\s:@?#]*:(?P<secret>(?!\d+(?:/|$))[^\s@]{1,1024}+)@"
            r"|https?://(?P<user>[^\s/:@?#]{20,1024}+)@"
            rf"|https?://{_WEBHOOKS}/(?P<hook>[^\s\"']{{8,}})"
            r"|[?&](?:sig|signature|x-amz-signature|x-goog-signature|access_token|token|api_?key"
            r"|secret_?key|access_?key|password|key)=(?P<query>[^&\s]+)",
            re.IGNORECASE,
        ),
        _NEVER,
        f"the URL alone here, its credentials {_EVERYWHERE} {_SECRET}: AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY for s3://, GOOGLE_APPLICATION_CREDENTIALS for gs://",
    ),
    Kind(
        "a secret",
        re.compile(
            rf"(?<![A-Za-z0-9])(?:{_TOKENS}"
            r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,}\.[\w-]*|\d{8,10}:[\w-]{35}(?![\w-]))"
            r"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*"
            r"|(?i:\b(?:AccountKey|SharedAccessKey)=(?P<azure>[\w+/=]{40,})"
            r"|\bauthorization[\"']?[:=][\"'\s]{0,4}(?:(?:bearer|basic|token)\s{1,4})?"
            r"(?P<header>[\w.~+/=-]{8,})|\bbearer\s{1,4}(?P<bearer>[\w.~+/=-]{20,}))"
        ),
        _NAME,
        f"an environment variable of the process that needs it, {_EVERYWHERE} {_SECRET}",
    ),
)


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return bool(_NAME.search(name)) and not _VOCABULARY.search(name)


def kind_of(text: str) -> Kind | None:
    """Return the kind of the secret that a text contains, by its form."""
    return next((kind for kind in KINDS if kind.pattern.search(text)), None)


def hide(text: str) -> str:
    """Replace every secret that has a known form."""
    for kind in KINDS:
        text = kind.pattern.sub(_without, text)
    return text


def hide_environment(text: str) -> str:
    """Replace the values of secret environment variables, in plain text, JSON or HTML."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and is_secret_name(name) and not os.path.exists(value):
            for written in {value, str(escape(value)), json.dumps(value)[1:-1]}:
                text = text.replace(written, HIDDEN)
    return text


def secrets_in(key: str, value: Any) -> Iterator[tuple[str, Kind]]:
    """Yield the place of each secret in a YAML value, as key.name.name, and its kind."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield from secrets_in(f"{key}.{inner}", one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secrets_in(key, one)
    elif kind := _kind(key, value):
        yield hide(key), kind


def redact(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved job with its secrets hidden: `env_vars`, nested keys with a secret's name,
    and text in a secret's form. No key of the schema is a secret.
    """
    return {key: _redact_nested(value) for key, value in job.items()}


def redact_arguments(command: str) -> str:
    """Return a command line without secrets, and without ray_init_kwargs and all that follows."""
    return hide(re.sub(r"(?s)(ray_init_kwargs=).*", rf"\1{HIDDEN}", command))


def _redact_nested(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_redact_nested(inner) for inner in value]
    if not isinstance(value, Mapping):
        return hide(value) if isinstance(value, str) else value
    redacted = {
        k: HIDDEN if is_secret_name(str(k)) else _redact_nested(v) for k, v in value.items()
    }
    if isinstance(value.get("env_vars"), Mapping):
        redacted["env_vars"] = dict.fromkeys(value["env_vars"], HIDDEN)
    return redacted


def refuse_submitted(job_config: str | None) -> None:
    """Raise JobError if the runtime environment of a job, as Ray passes it, has secrets."""
    runtime_env = json.loads(job_config or "{}").get("runtime_env")
    found = list(secrets_in("runtime_env", runtime_env))
    if found:
        places = dict.fromkeys(kind.place for _, kind in found)
        what = "The runtime environment of this Ray job contains a secret, which Ray's API shows in"
        lines = "\n".join(f"{place}: {kind.name}" for place, kind in found)
        fix = "\n".join(f"remove it, and put it where it is not shown: {p}" for p in places)
        raise JobError(f"{what} clear text", lines, fix)


def _kind(key: str, value: Any) -> Kind | None:
    text, name = str(value), key.rpartition(".")[2]
    if found := kind_of(key) or kind_of(text):
        return found
    if isinstance(value, bool) or value is None or value == HIDDEN:
        return None
    by_name = next((kind for kind in KINDS if kind.names.search(key)), KINDS[-1])
    if _WANDB_KEY.fullmatch(text) and "wandb" in key.lower():
        return by_name
    is_path = name.lower().endswith("credentials") and text.startswith(("/", "~/"))
    is_count = not isinstance(value, str) and "pass" not in name.lower()
    if not is_secret_name(name) or not text.strip() or is_path or is_count:
        return None
    return by_name


def _without(match: re.Match[str]) -> str:
    """Return the match with its secret group hidden, or hidden as a whole if it has none."""
    for name, secret in match.groupdict().items():
        if secret is not None:
            first, last = match.span(name)
            return match.string[match.start() : first] + HIDDEN + match.string[last : match.end()]
    return HIDDEN

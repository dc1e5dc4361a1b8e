"""A job with a secret is refused: the message names the place for it and does not repeat it.

The tokens here are made up: none was ever valid.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.config.load import load_keys
from raytrain_adv.errors import JobError
from raytrain_adv.redaction import (
    HIDDEN,
    hide,
    is_secret_name,
    kind_of,
    redact,
    redact_arguments,
)

BODY = "Q7wE2rT9yU4iO6pA1sD3fG5hJ8kL0zXcVb"
HF = "hf_" + BODY
AWS = "AKIA" + "Q7WE2RT9YU4IO6PA"
WANDB = "0123456789abcdef" * 2 + "01234567"
PASSWORD = "tr0ub4dor&3"
GITHUB = "ghp_" + BODY + "Zz"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"

PLANTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a token as any key's value": ({"run_name": HF}, HF, "HF_TOKEN"),
    "a token within text": ({"default_system": f"Use {HF}."}, HF, "HF_TOKEN"),
    "a token in a list": ({"dataset": ["a", HF]}, HF, "HF_TOKEN"),
    "LLaMA-Factory's key": ({"hf_hub_token": "whatever"}, "whatever", "HF_TOKEN"),
    "an unknown key": ({"my_api_key": "whatever"}, "whatever", "environment variable"),
    "a token as the key": ({HF: True}, HF, "HF_TOKEN"),
    "a key of AWS": ({"run_name": AWS}, AWS, "AWS_SECRET_ACCESS_KEY"),
    "AWS's other key, by its name": (
        {"ray_init_kwargs": {"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": BODY}}}},
        BODY,
        "AWS_SECRET_ACCESS_KEY",
    ),
    "an environment variable for Ray": (
        {"ray_init_kwargs": {"runtime_env": {"env_vars": {"WANDB_API_KEY": WANDB}}}},
        WANDB,
        "WANDB_API_KEY",
    ),
    "wandb's key under another name": ({"wandb": {"login": WANDB}}, WANDB, "WANDB_API_KEY"),
    "a password": ({"ray_init_kwargs": {"_redis_password": PASSWORD}}, PASSWORD, "environment"),
    "a password that is a number": (
        {"ray_init_kwargs": {"_redis_password": 90210777}},
        "90210777",
        "environment",
    ),
    "a password in a URL": (
        {"ray_storage_path": f"s3://minio:{PASSWORD}@bucket/runs"},
        PASSWORD,
        "the URL alone",
    ),
    "a signed URL": ({"dataset": f"https://x.org/a.json?sig={BODY}"}, BODY, "the URL alone"),
    "a token of GitHub": ({"output_dir": f"out/{GITHUB}"}, GITHUB, "environment variable"),
    "a web token": ({"run_name": JWT}, JWT, "environment variable"),
    "a private key": (
        {"run_name": f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}"},
        BODY,
        "environment variable",
    ),
    "a value of a sweep": (
        {"sweep": {"run_name": ["a", HF], "learning_rate": [1e-4]}},
        HF,
        "HF_TOKEN",
    ),
}


@pytest.mark.parametrize(("changed", "secret", "place"), PLANTED.values(), ids=PLANTED)
def test_a_secret_in_a_job_file_is_refused_and_not_repeated(job_file, changed, secret, place):
    path: Path = job_file(**changed)
    with pytest.raises(JobError) as error:
        load(path)
    text = str(error.value)
    assert secret not in text and place in text and "line " in text
    assert "which a job must not contain" in text
    assert secret not in repr(error.value.args)


@pytest.mark.parametrize(("changed", "secret", "place"), PLANTED.values(), ids=PLANTED)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(job_file, changed, secret, place):
    [(key, value), *_] = changed.items()
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1000)}"
    with pytest.raises(JobError) as error:
        load(job_file(), [override.removesuffix("\n...\n")])
    text = str(error.value)
    assert secret not in text and place in text and "command line" in text


def test_a_secret_is_named_by_its_place(job_file):
    env = {"runtime_env": {"env_vars": {"HF_TOKEN": BODY, "NAME": "plain"}}}
    with pytest.raises(JobError, match=r"line \d+: ray_init_kwargs.runtime_env.env_vars.HF_TOKEN"):
        load(job_file(ray_init_kwargs=env))
    with pytest.raises(JobError, match=r"command line: ray_init_kwargs.env.HF_TOKEN"):
        load(job_file(), [f"ray_init_kwargs.env.HF_TOKEN={BODY}"])


def test_other_problems_of_a_file_with_a_secret_are_not_listed(job_file):
    """Their text may contain the value of another key."""
    with pytest.raises(JobError) as error:
        load(job_file(run_name=HF, no_such_key=1), [f"max_steps={HF}"])
    assert "no_such_key" not in str(error.value) and "(2 problems)" in str(error.value)


@pytest.mark.parametrize("override", [f"--run_name={HF}", HF, f"{HF}=1", f"a={{{HF}", f"{HF}.a=b"])
def test_a_malformed_override_does_not_repeat_it_either(job_file, override):
    with pytest.raises(JobError) as error:
        load(job_file(), [override])
    assert BODY[:8] not in str(error.value) and BODY[-8:] not in str(error.value)


def test_a_broken_file_does_not_repeat_it_either(tmp_path):
    for text in (HF, f"- {HF}", f"a: {HF}\n  b: : {HF}", f"? [{HF}]\n: 1", f"a: !{HF} b"):
        (tmp_path / "job.yaml").write_text(text)
        with pytest.raises(JobError) as error:
            load(tmp_path / "job.yaml")
        assert BODY[:8] not in str(error.value) and BODY[-8:] not in str(error.value)


def test_an_override_of_stored_keys_is_checked_too(keys):
    with pytest.raises(JobError, match="must not contain"):
        load_keys(keys, "run.json", [f"run_name={HF}"])


@pytest.mark.parametrize(
    "changed",
    [
        {"model_revision": WANDB},
        {"run_name": "hf_llama_sft"},
        {"run_name": "akia", "default_system": "Ask for the password: never for a token."},
        {"ray_storage_path": "s3://bucket/runs?endpoint_override=http://minio:9000/a@b"},
        {"ray_init_kwargs": {"address": "ray://head:10001"}},
        {"ray_init_kwargs": {"_redis_password": None}},
        {
            "ray_init_kwargs": {
                "runtime_env": {"env_vars": {"GOOGLE_APPLICATION_CREDENTIALS": "/etc/gcp.json"}}
            }
        },
    ],
)
def test_a_value_that_only_resembles_a_secret_is_accepted(job_file, changed):
    load(job_file(**changed))


def test_names_of_vocabulary_tokens_are_not_secrets():
    for name in ("pad_token", "image_token", "add_tokens", "tokenized_path", "num_tokens"):
        assert not is_secret_name(name), name
    for name in ("HF_TOKEN", "apiKey", "AWS_ACCESS_KEY_ID", "key", "client_secret", "ssh-key"):
        assert is_secret_name(name), name


def test_a_url_keeps_its_other_parts():
    assert hide(f"s3://minio:{PASSWORD}@bucket/runs") == "s3://minio:(not shown)@bucket/runs"
    assert hide(f"https://x.org/a?b=1&sig={BODY}&c=2") == "https://x.org/a?b=1&sig=(not shown)&c=2"
    assert kind_of("http://127.0.0.1:8265/x@y") is None


def test_environment_variables_and_passwords_are_hidden_and_their_names_kept():
    job = {"ray_init_kwargs": {"_redis_password": "p", "runtime_env": {"env_vars": {"A": "x"}}}}
    hidden = redact(job)["ray_init_kwargs"]
    assert hidden == {"_redis_password": HIDDEN, "runtime_env": {"env_vars": {"A": HIDDEN}}}


def test_keys_of_the_schema_are_not_changed():
    job = {"tokenized_path": "/t", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "report_to": ["wandb"]}
    assert redact(job) == job


def test_secrets_in_command_line_arguments_are_hidden():
    command = "launch job.yaml max_steps=3 ray_init_kwargs={env_vars: {A: x=y}} seed=1"
    assert redact_arguments(command) == f"launch job.yaml max_steps=3 ray_init_kwargs={HIDDEN}"


HARD_TEXTS = [
    *("a", "a://", "a.b-", "a://b:c", "a://b:1", "a://b:1:", "u:", "_s3", "pad_", "?sig=", "hf_"),
    *("-eyJaaaaaaaaaa", "-eyJaaaaaaaaaa.eyJaaaaaaaaaa", "sk-", "xoxa-", "glpat-", "github_pat_"),
    *("-----BEGIN ", "-----BEGIN A", "AKIA", "key", "wandb", "\n", " "),
]


@pytest.mark.parametrize("part", HARD_TEXTS)
def test_a_long_text_is_searched_in_linear_time(part):
    text = ("a://b:c" + part * 40_000)[:40_000]
    started = time.process_time()
    hide(text)
    is_secret_name(text)
    kind_of(text)
    redact_arguments(text)
    assert time.process_time() - started < 6  # a quadratic pattern took 18 s for each search


def test_a_secret_at_the_end_of_a_long_text_is_found():
    long = "a://b:c " * 5000
    for secret in (HF, JWT, f"scheme://user:{BODY}@host", f"x-{JWT}"):
        assert BODY not in hide(long + secret) and JWT not in hide(long + secret)


HEX = "0123456789abcdef"
FORMS = {
    "GitLab, a runner's": "glrt-" + BODY,
    "Slack": "xoxb-" + BODY,
    "Slack, an app's": "xapp-1-" + BODY,
    "Stripe": "sk_live_" + BODY,
    "Stripe, restricted": "rk_live_" + BODY,
    "OpenAI": "sk-proj-" + BODY,
    "Anthropic": "sk-ant-api03-" + BODY,
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + 2 * BODY,
    "npm": "npm_" + BODY + "Zz",
    "NVIDIA": "nvapi-" + BODY,
    "Groq": "gsk_" + BODY,
    "xAI": "xai-" + BODY,
    "Replicate": "r8_" + BODY,
    "Google, OAuth": "ya29." + BODY,
    "SendGrid": "SG." + BODY + BODY,
    "Vault": "hvs." + BODY,
    "DigitalOcean": "dop_v1_" + 4 * HEX,
    "Databricks": "dapi" + 2 * HEX,
    "Shopify": "shpat_" + BODY,
    "LangSmith": "lsv2_pt_" + BODY,
    "Grafana": "glsa_" + BODY,
    "Docker": "dckr_pat_" + BODY,
    "Atlassian": "ATATT3" + BODY,
    "Telegram": "123456789:" + BODY + "Z",
    "Azure": f"DefaultEndpointsProtocol=https;AccountKey={BODY}{BODY}==;",
    "a header": f"Authorization: Bearer {BODY}",
    "a header, basic": f"authorization: Basic {BODY}",
    "a bearer": f"bearer {BODY}",
    "a URL with a token": f"https://{BODY}@github.com/org/repo",
    "a DSN": f"https://{2 * HEX}@o1.ingest.sentry.io/1",
    "Slack's webhook": f"https://hooks.slack.com/services/T0/B0/{BODY}",
    "Discord's webhook": f"https://discord.com/api/webhooks/1/{BODY}",
    "Teams' webhook": f"https://x.webhook.office.com/webhookb2/{BODY}",
    "Feishu's webhook": f"https://open.feishu.cn/open-apis/bot/v2/hook/{BODY}",
    "WeCom's webhook": f"https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key={BODY}",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_secret_of_a_known_form_is_found_and_hidden_wherever_it_is(text):
    assert kind_of(text) and kind_of(f"see {text} there")
    assert BODY not in hide(f"see {text} there") and 2 * HEX not in hide(text)
    began = time.process_time()
    hide((text[:-1] * 500)[:20_000])
    assert time.process_time() - began < 3, "not linear"


@pytest.mark.parametrize(
    "name",
    [
        *("DB_PASS", "SENTRY_DSN", "GH_PAT", "AZURE_CONNECTION_STRING", "SLACK_WEBHOOK_URL"),
        *("HTTP_AUTH", "PGPASSWORD", "ADMIN_PWD", "SESSION_COOKIE", "api-key", "ACCESS_TOKEN"),
    ],
)
def test_a_variable_of_this_name_holds_a_secret(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    ["PWD", "compat", "bypass", "num_passes", "first_pass_rate", "author", "path", "auth_method"],
)
def test_a_variable_of_this_name_holds_none(text):
    assert not is_secret_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user@host.org/a.git",
        "abfss://a-container-with-a-long-name@account.dfs.core.windows.net/runs",
        "sk-learn-is-a-library",
        "npm_install",
        "a bearer of bad news",
        "Basic training of language models",
        "saves/llama3-8b-fp8-tensorwise",
        "https://hooks.slack.com/docs",
        "12:30",
    ],
)
def test_a_text_that_only_resembles_a_secret_has_none(text):
    assert kind_of(text) is None

"""Whatever stands in a job file or on a command line: a job, or one message in the house form."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytrain_adv import cli, launch
from raytrain_adv.cli import job_arguments
from raytrain_adv.config import JobConfig, load
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.translate import known_keys
from raytrain_adv.errors import JobError
from tests.conftest import TINY_LLAMA, write_rows

KEYS = sorted({*known_keys(), *(key for kind in section_types() for key in kind.model_fields)})
SMALLEST = {"model_name_or_path": "org/model", "output_dir": "saves/run", "dataset": "rows.jsonl"}
FOLDER = tempfile.TemporaryDirectory()  # removed when the interpreter ends
FILES = Path(FOLDER.name)

fuzz = settings(max_examples=150)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "none", "1e-4", "steps", "no", "full", "lora", "{", "{a: 1}", "\0"])
    | st.dates()
    | st.binary(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)
keys = st.sampled_from(KEYS) | st.text(max_size=20)
jobs = st.dictionaries(keys, values, max_size=6)


def outcome(content: bytes, overrides: list[str] | None = None) -> JobConfig | None:
    """Return the job, or nothing where it is refused as it should be."""
    path = FILES / "job.yaml"
    path.write_bytes(content)
    try:
        job = load(path, overrides or [])
    except JobError as error:
        lines = str(error).splitlines()
        assert "cannot be run as written" in lines[0]
        assert lines[1].startswith("  found: ")
        assert any(line.startswith("  fix:   ") for line in lines)
        str(error).encode()
        return None
    job.fingerprint()
    return job


@fuzz
@given(st.binary(max_size=200))
@example(b"\x00")
@example(b"a: &a [*a]\n")
@example(b"<<: &a {<<: *a}\n")
@example(b"<<: [1]\n")
@example(b"a: !!bool maybe\n")
@example(b"a: !!int x\n")
@example(b"a: " + b"9" * 5000)
@example(b"seed: " + b"9" * 4000)
@example(b"learning_rate: 0x" + b"f" * 4000)
@example(b'a: "\\ud800"\n')
@example(b'"\\ud800": 1\n')
@example(b"? {a: b}\n: c\n")
@example(b"a: << \n")
@example(b"!!str a: 1\n")
@example(b"!!map [a]\n")
@example(b"--- a\n--- b\n")
@example(b"%YAML 9.9\n---\na: 1\n")
@example(b"a: 1__0\n? !!str [x]\n: y\n")
@example(b"\xef\xbb\xbfseed: 1\n")
def test_any_bytes_are_a_job_or_a_message(content: bytes) -> None:
    outcome(content)


@fuzz
@given(jobs)
def test_any_keys_and_values_are_a_job_or_a_message(job: dict[str, Any]) -> None:
    outcome(yaml.dump({**SMALLEST, **job}, allow_unicode=True).encode("utf-8", "replace"))


@fuzz
@given(st.lists(st.tuples(keys, st.text(max_size=20)), max_size=4), st.lists(st.text(max_size=12)))
def test_any_override_is_a_job_or_a_message(
    pairs: list[tuple[str, str]], others: list[str]
) -> None:
    overrides = [f"{key}={value}" for key, value in pairs] + others
    outcome(yaml.safe_dump(SMALLEST).encode(), overrides)


@fuzz
@given(st.sampled_from(KEYS), scalars)
@example("new_special_tokens", "0")
def test_one_key_of_any_value_is_in_the_job_or_in_the_message(key: str, value: Any) -> None:
    path = FILES / "one.yaml"
    path.write_text(yaml.dump({**SMALLEST, key: value}), encoding="utf-8", errors="replace")
    try:
        job = load(path)
    except JobError as error:
        assert key in str(error) or "tag" in str(error) or "character" in str(error)
        return
    assert isinstance(job, JobConfig)


@fuzz
@given(st.text(max_size=40))
def test_any_path_is_a_message(path: str) -> None:
    with contextlib.suppress(JobError):
        load(str(FILES / "nowhere" / path.replace("..", "")))


@fuzz
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--plan", "job.yaml", "a=1", "--a"])))
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    with contextlib.suppress(JobError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        job_arguments(argv, "launch")


@fuzz
@given(
    st.sampled_from(["plan", "launch", "schema", "nonsense"]),
    st.lists(st.text(max_size=12).filter(lambda text: not text.startswith("-o")), max_size=3),
)
def test_no_traceback_leaves_the_console_script(command: str, rest: list[str]) -> None:
    missing = str(FILES / "missing.yaml")
    arguments = [missing, *rest] if command in ("plan", "launch") else ["x", *rest]
    errors = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        assert cli.main([command, *arguments]) == 2
        assert "cannot be run as written" in errors.getvalue()


NASTY = [
    "null",
    "true",
    "-1",
    "0",
    "1e-300",
    "1e400",
    ".nan",
    "2147483647",
    "9" * 30,
    "''",
    "'../../x'",
    "/dev/null",
    '"\\0"',
    "'" + "x" * 5000 + "'",
    "[]",
    "[x, y]",
    "{a: {b: 1}}",
    "{GPU: 1e300}",
    "2020-01-01",
    "&a [*a]",
    "auto",
]
"""Each key is given each of these, one at a time: a sixth of them in `make test`."""
OWNED = sorted(key for kind in section_types() for key in kind.model_fields)


@pytest.fixture(scope="module")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a job whose plan takes a tenth of a second: one layer, eight rows."""
    folder = tmp_path_factory.mktemp("tiny")
    model = folder / "model"
    model.mkdir()
    for file in TINY_LLAMA.iterdir():
        if file.suffix in (".json", ".jinja"):
            (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    (model / "config.json").write_text(json.dumps(config))
    keys = {
        "model_name_or_path": str(model),
        "train_from_scratch": True,
        "finetuning_type": "full",
        "dataset": str(write_rows(folder / "rows.json", 8)),
        "cutoff_len": 128,
        "output_dir": str(folder / "out"),
        "tokenized_path": str(folder / "tokenized"),
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def run(main: Any, *argv: str) -> tuple[int, str]:
    """Return exit code and stderr of a command that runs in this process; what it writes under a
    relative path, even ../../x, stays among the test's files."""
    errors = io.StringIO()
    folder = FILES / "deep" / "deeper"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        code = main(list(argv))
    return code, errors.getvalue()


def test_the_tiny_job_can_be_planned(tiny_job: Path) -> None:
    assert run(cli.main, "plan", str(tiny_job))[0] == 0


@pytest.mark.parametrize(
    "sixth", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))]
)
@pytest.mark.parametrize("key", OWNED)
def test_no_value_of_a_key_brings_a_traceback(key: str, sixth: int, tiny_job: Path) -> None:
    """Keys take turns in which sixth of the values they are given first."""
    for turn, at in enumerate(range((OWNED.index(key) + sixth) % 6, len(NASTY), 6)):
        item, command = f"{key}={NASTY[at]}", ("plan", "launch")[turn % 2]
        if command == "plan":
            code, errors = run(cli.main, "plan", str(tiny_job), item)
        else:
            code, errors = run(launch.main, str(tiny_job), "--plan", item)
        assert code in (0, 2), item
        assert "Traceback" not in errors, item
        assert code == 0 or ("found:" in errors and "fix:" in errors), item


@settings(fuzz, max_examples=60)
@given(jobs, st.booleans())
def test_no_job_file_brings_a_traceback_out_of_a_command(job: dict[str, Any], plan: bool) -> None:
    path = FILES / "command.yaml"
    keys = {**SMALLEST, **job}
    path.write_text(yaml.dump(keys, allow_unicode=True), encoding="utf-8", errors="replace")
    argv = ["plan", str(path)] if plan else ["launch", str(path), "--plan"]
    code, errors = run(cli.main, *argv)
    assert code == 2
    assert "found:" in errors
    assert "Traceback" not in errors


SHARDING = st.sampled_from(
    [
        "zero_optimization",
        "stage",
        "offload_optimizer",
        "offload_param",
        "device",
        "bf16",
        "fp16",
        "enabled",
        "optimizer",
        "tensor_parallel",
        "autotp_size",
        "gradient_clipping",
        "distributed_type",
        "mixed_precision",
        "num_processes",
        "fsdp_config",
        "fsdp_sharding_strategy",
        "fsdp_offload_params",
        "reshard_after_forward",
    ]
)


@fuzz
@given(
    st.sampled_from(["deepspeed", "fsdp", "fsdp_config"]),
    st.recursive(
        scalars | st.sampled_from(["FSDP", "cpu", 1.0, 3]),
        lambda inner: (
            st.dictionaries(SHARDING | st.integers(), inner, max_size=4)
            | st.lists(inner, max_size=2)
        ),
        max_leaves=8,
    ),
)
@example("fsdp_config", {0: None})
@example("deepspeed", {"zero_optimization": {"stage": 1.0}})
@example("deepspeed", {"zero_optimization": 3})
def test_a_mapping_of_deepspeed_or_accelerate_is_keys_or_a_message(key: str, value: Any) -> None:
    path = FILES / "sharding.yaml"
    path.write_text(yaml.dump({**SMALLEST, key: value}), encoding="utf-8", errors="replace")
    with contextlib.suppress(JobError):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff\xfe\x00",
        b"a: 1\na: 2\n",
        b"a: &a [*a]\n",
        b"- " * 20_000,
        b"{" * 50_000,
        b"a: [" + b"[" * 5_000,
        b"? " * 5_000,
        b"x: " + b"9" * 100_000,
        b"x: 0x" + b"f" * 100_000,
        b"a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 8) for n in range(1, 12)),
        b"<<: [{a: 1}, {b: 2}]\n",
        b"when: 2020-01-01 00:00:00\n",
        b"n: .inf\nm: -.INF\nk: .NaN\n",
    ],
    ids=range(15),
)
@pytest.mark.parametrize("command", ["plan", "launch"])
def test_no_bytes_bring_a_traceback_out_of_a_command(content: bytes, command: str) -> None:
    path = FILES / "bytes.yaml"
    path.write_bytes(content)
    argv = ["plan", str(path)] if command == "plan" else ["launch", str(path), "--plan"]
    code, errors = run(cli.main, *argv)
    assert code == 2
    assert "cannot be run as written" in errors

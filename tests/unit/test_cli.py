"""What users type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv import cli, launch
from raytrain_adv.driver.plan import plan
from raytrain_adv.estimate.assumptions import Assumptions

ROOT = Path(__file__).parents[2]
PLAN = ("--workers N", "--verbose", "--assume NAME=VALUE", "gpus_per_node")
COMMANDS = {
    "launch": ("{job.yaml} [key=value]...", "--plan", *PLAN),
    "submit": ("{job.yaml} [key=value]...", "--address URL", "--runtime-env FILE"),
    "status": ("[RUN]", "--address URL"),
    "doctor": ("{RUN}", "--fix"),
    "plan": ("{job.yaml} [key=value]...", *PLAN),
    "preflight": ("[job.yaml] [key=value]...",),
    "kernels lock": ("{job.yaml} [key=value]...", "--output FILE", "--torch X.Y", "--cuda X.Y|cpu"),
    "kernels fetch": ("{FILE}",),
    "kernels verify": ("{FILE}",),
    "export": ("{RUN|MODEL} [key=value]...", "--checkpoint STEP", "--output DIR", "--merge"),
    "explain": ("[FEATURE]...", "--check PAGE", "--write PAGE"),
    "schema": ("-o, --output FILE",),
}


Shown = tuple[str, list[str], tuple[object, ...]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shown]:
    """Return what a command line loads (path and overrides), and the options its plan gets."""
    seen: list[Any] = []
    monkeypatch.setattr(cli, "load", lambda path, overrides: seen.extend([path, overrides]))
    monkeypatch.setattr(cli, "check_workers", lambda *_: None)
    monkeypatch.setattr(plan, "show", lambda job, *options: seen.append(options))

    def run(*argv: str) -> Shown:
        seen.clear()
        assert cli.main(argv) == 0
        return (seen[0], seen[1], seen[2])

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: str) -> str:
        assert cli.main(["launch", *argv]) == 2
        return capsys.readouterr().err

    return run


def test_file_overrides_and_plan_are_told_apart_in_any_order(planned: Callable[..., Shown]) -> None:
    expected = ("job.yaml", ["seed=1", "run_name=a b"], (None, False, None))
    assert planned("launch", "job.yaml", "seed=1", "--plan", "run_name=a b") == expected
    assert planned("launch", "--plan", "seed=1", "run_name=a b", "job.yaml") == expected


def test_a_path_with_an_equals_sign_is_a_path_when_it_is_there(
    planned: Callable[..., Shown], tmp_path: Path
) -> None:
    path = tmp_path / "lr=1.yaml"
    path.write_text("a: 1")
    assert planned("plan", str(path), "lr=2")[:2] == (str(path), ["lr=2"])


@pytest.mark.parametrize(
    "argv",
    [
        ["launch", "job.yaml", "--plan", "--workers", "8", "--verbose", "a=1"],
        ["launch", "--workers=8", "--verbose", "job.yaml", "a=1", "--plan"],
        ["launch", "--plan", "--verbose", "--workers", "8", "job.yaml", "a=1"],
        ["plan", "--workers", "8", "job.yaml", "--verbose", "a=1"],
    ],
)
def test_a_plan_takes_workers_and_verbose_in_any_order(
    planned: Callable[..., Shown], argv: list[str]
) -> None:
    assert planned(*argv) == ("job.yaml", ["a=1"], (8, True, None))


def test_assumptions_are_read_from_the_command_line(planned: Callable[..., Shown]) -> None:
    line = ["job.yaml", "--workers", "512", "--assume", "network_gb_s=80", "--assume=open_files=9"]
    assumed = Assumptions(network_gb_s=80, open_files=9)
    assert planned("plan", *line)[2] == (512, False, assumed)


@pytest.mark.parametrize("option", ["--workers=2", "--verbose", "--assume=network_gb_s=1"])
def test_an_option_of_the_plan_is_refused_without_one(
    refusal: Callable[..., str], option: str
) -> None:
    message = refusal("job.yaml", option)
    assert f"{option.partition('=')[0]} changes only a plan" in message
    assert "add --plan" in message


@pytest.mark.parametrize("number", ["0", "-1", "many", "", "1.5", "1e3", "9" * 30, "²", "\0"])
def test_a_number_of_workers_that_is_none_is_refused(
    refusal: Callable[..., str], number: str
) -> None:
    for argv in (["--workers", number], [f"--workers={number}"]):
        assert "it takes a number of workers" in refusal("job.yaml", "--plan", *argv)


def test_workers_without_a_number_do_not_swallow_the_job_file(refusal: Callable[..., str]) -> None:
    message = refusal("--plan", "--workers", "job.yaml", "seed=1")
    assert "(1 problem)" in message
    assert "--workers '': it takes a number of workers" in message


def test_workers_that_the_jobs_groups_do_not_divide_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model_name_or_path: a/b\noutput_dir: c\ndataset: d\nfsdp_shard_size: 2\n")
    job_keys = [str(job), "ray_num_workers=4", "--workers", "3"]
    assert cli.main(["plan", *job_keys]) == 2
    assert launch.main([*job_keys, "--plan"]) == 2
    assert capsys.readouterr().err.count("fsdp_shard_size and --workers: 3 workers") == 2


def test_both_commands_hand_the_options_to_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model_name_or_path: a/b\noutput_dir: c\ndataset: d\n")
    shown: list[tuple[object, ...]] = []
    monkeypatch.setattr(plan, "show", lambda job, *options: shown.append(options))
    assert cli.main(["plan", str(job), "--workers", "8", "--verbose"]) == 0
    assert launch.main([str(job), "--plan"]) == 0
    assert shown == [(8, True, None), (None, False, None)]


def test_the_usage_of_each_command_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in COMMANDS.items():
        assert cli.main([*command.split(), "-h"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"Usage: raytrain-adv {command} ")
        assert [option for option in options if option not in text] == []


def test_a_flag_says_how_the_key_is_written(refusal: Callable[..., str]) -> None:
    assert "write learning_rate=1e-4" in refusal("job.yaml", "--learning-rate", "1e-4")
    assert "write learning_rate=1e-4" in refusal("job.yaml", "--learning_rate=1e-4")
    assert "write bf16=true" in refusal("job.yaml", "--bf16")


def test_a_secret_in_a_flag_is_not_repeated(refusal: Callable[..., str]) -> None:
    assert "xyzzy" not in refusal("job.yaml", "--hf_hub_token=xyzzy", "--hf_hub_token", "xyzzy")


def test_a_key_without_a_value_says_how_it_is_written(refusal: Callable[..., str]) -> None:
    assert "write bf16=value" in refusal("job.yaml", "bf16")


def test_a_command_line_without_a_file_shows_how_to_name_one(refusal: Callable[..., str]) -> None:
    assert "raytrain-adv launch --help" in refusal()
    message = refusal("seed=1")
    assert "no job file is named" in message
    assert "write raytrain-adv launch job.yaml [key=value ...]" in message


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["lanch", "job.yaml"], "write launch"),
        (["plan", "job.yaml", "--verbos"], "write --verbose"),
        (["status", "--adress=x"], "--address"),
        (["export", "run", "--chekpoint", "x"], "write --checkpoint"),
    ],
)
def test_a_misspelled_command_or_option_names_the_nearest(
    argv: list[str], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert fix in capsys.readouterr().err


def test_all_that_is_wrong_with_an_export_is_in_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["export", "a", "b", "--x", "--y=1"]) == 2
    assert "(3 problems)" in capsys.readouterr().err


def test_submit_does_not_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "job.yaml", "--plan"]) == 2
    assert "raytrain-adv plan job.yaml" in capsys.readouterr().err


def test_all_wrong_arguments_are_in_one_message(refusal: Callable[..., str]) -> None:
    assert "(3 problems)" in refusal("job.yaml", "--a=1", "b", "--c")


@pytest.mark.parametrize("argv", [["plan"], ["plan", "none.yaml"], ["schema", "x"], ["job.yaml"]])
def test_a_wrong_command_line_ends_with_2_and_a_message(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert "fix:" in capsys.readouterr().err


def test_a_job_file_without_a_command_says_launch(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["job.yaml"])
    assert "raytrain-adv launch job.yaml" in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 0
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out.count("COMMAND [ARGS]...") == 3
    assert cli.main(["kernels"]) == cli.main(["--version"]) == cli.main(["version"]) == 0


def test_schema_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.schema.json"
    assert cli.main(["schema"]) == 0
    assert cli.main(["schema", "--output", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())


def test_a_schema_that_cannot_be_written_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["schema", "--output", str(tmp_path / "none" / "x.json")]) != 0
    assert "found:" in capsys.readouterr().err


def test_loading_the_quickstart_is_quick_and_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, time\n"
        "import raytrain_adv.config as c\n"
        "c.load('jobs/quickstart.yaml', ['seed=1'])\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'peft'} & set(sys.modules)\n"
        "print(time.process_time(), *heavy)"
    )
    command = [sys.executable, "-c", code]
    ran = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    printed = [run.stdout.split() for run in ran]
    assert [words[1:] for words in printed] == [[], [], []]
    # Processor time from the interpreter's start, the least of three: what other processes of a
    # busy machine take is no part of the claim.
    assert min(float(words[0]) for words in printed) < 1.0


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m raytrain_adv.cli schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["{", "0"]
    assert ran.stderr == ""

"""What users type."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv import cli, errors, launch
from raytrain_adv.cli import job_arguments
from raytrain_adv.driver.plan import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what launch prints for a command line that it refuses."""

    def refuse(*argv: str) -> str:
        assert launch.main(list(argv)) == 2
        return capsys.readouterr().err

    return refuse


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[object, ...]]]:
    """Return a job file, and a list that gets the options of each plan that is made."""
    job = tmp_path / "job.yaml"
    job.write_text("model_name_or_path: a/b\noutput_dir: c\ndataset: d\n")
    plans: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        plan, "show", lambda job, *options: plans.append((job.train.seed, *options))
    )
    return str(job), plans


def test_file_and_overrides_are_told_apart_in_any_order() -> None:
    expected = ("job.yaml", ["seed=1", "run_name=a b"])
    assert job_arguments(["job.yaml", "seed=1", "run_name=a b"], "launch") == expected
    assert job_arguments(["seed=1", "run_name=a b", "job.yaml"], "launch") == expected


def test_a_path_with_an_equals_sign_is_a_path_when_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "lr=1.yaml"
    path.write_text("a: 1")
    assert job_arguments([str(path), "lr=2"], "launch") == (str(path), ["lr=2"])


@pytest.mark.parametrize(
    "argv",
    [
        ["JOB", "--plan", "--workers", "8", "--verbose", "seed=1"],
        ["--workers=8", "--verbose", "JOB", "seed=1", "--plan"],
        ["--plan", "seed=1", "--verbose", "--workers", "8", "JOB"],
    ],
)
def test_a_plan_takes_workers_and_verbose_in_any_order(argv: list[str], shown: Any) -> None:
    job, plans = shown
    assert launch.main([job if one == "JOB" else one for one in argv]) == 0
    assert plans == [(1, 8, True, None)]


def test_the_plan_command_needs_no_plan_option(shown: Any) -> None:
    job, plans = shown
    assert cli.main(["plan", job, "--workers", "2"]) == 0
    assert plans == [(42, 2, False, None)]


@pytest.mark.parametrize("option", ["--workers=2", "--verbose"])
def test_an_option_of_the_plan_is_refused_without_one(refusal: Any, option: str) -> None:
    message = refusal("job.yaml", option)
    assert f"{option.partition('=')[0]}: only a plan takes it" in message
    assert "write --plan too" in message


@pytest.mark.parametrize("number", ["0", "-1", "many", "", "1.5", "1e3", "9" * 30, "²", "\0"])
def test_a_number_of_workers_that_is_none_is_refused(refusal: Any, number: str) -> None:
    for argv in (["--workers", number], [f"--workers={number}"]):
        message = refusal("job.yaml", "--plan", *argv)
        assert "Invalid value for '--workers'" in message and "launch --help" in message


def test_workers_without_a_number_are_refused_by_name(refusal: Any) -> None:
    message = refusal("--plan", "--workers", "job.yaml")
    assert "(1 problem)" in message and "'--workers': 'job.yaml'" in message


def test_workers_that_the_jobs_groups_do_not_divide_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model_name_or_path: a/b\noutput_dir: c\ndataset: d\nfsdp_shard_size: 2\n")
    job_keys = [str(job), "ray_num_workers=4", "--workers", "3"]
    assert cli.main(["plan", *job_keys]) == 2
    assert launch.main([*job_keys, "--plan"]) == 2
    assert capsys.readouterr().err.count("fsdp_shard_size and --workers: 3 workers") == 2


def test_the_help_of_each_command_lists_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("launch", "plan"):
        assert cli.main([command, "-h"]) == 0
        text = capsys.readouterr().out
        assert ("--plan " in text) == (command == "launch")
        assert "--workers N" in text and "--verbose" in text and "job.yaml [key=value]" in text


def test_the_help_of_launch_names_every_exit_code_of_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["launch", "--help"])
    listed = capsys.readouterr().out.partition("Exit codes:")[2]
    every = {code for name, code in vars(errors).items() if name.startswith("EXIT_")}
    for code in every - {errors.EXIT_NOT_MENDED}:  # doctor's
        assert re.search(rf"\b{code}\s", listed), code


def test_the_usage_of_preflight_shows_that_the_job_file_is_optional(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["preflight", "--help"])
    assert "[job.yaml [key=value]...]" in capsys.readouterr().out


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in cli.app.commands.items():
        assert cli.main([name, "--help"]) == 0
        assert command.help and f"raytrain-adv {name}" in capsys.readouterr().out


def test_a_flag_shows_how_the_key_is_written(refusal: Any) -> None:
    assert "write learning_rate=1e-4" in refusal("job.yaml", "--learning-rate", "1e-4")
    assert "write learning_rate=1e-4" in refusal("job.yaml", "--learning_rate=1e-4")
    assert "write bf16=true" in refusal("job.yaml", "--bf16")


def test_a_secret_in_a_flag_is_not_repeated(refusal: Any) -> None:
    assert "xyzzy" not in refusal("job.yaml", "--hf_hub_token=xyzzy", "--hf_hub_token", "xyzzy")


def test_a_key_without_a_value_shows_how_it_is_written(refusal: Any) -> None:
    assert "write bf16=value" in refusal("job.yaml", "bf16")


def test_no_file_shows_the_usage(refusal: Any) -> None:
    assert "usage: python -m raytrain_adv.launch job.yaml" in refusal()
    assert "no job file is named" in refusal("seed=1")


def test_all_wrong_arguments_are_in_one_message(refusal: Any) -> None:
    assert "(3 problems)" in refusal("job.yaml", "--a=1", "b", "--c")


@pytest.mark.parametrize("argv", [["plan"], ["plan", "none.yaml"], ["schema", "x"], ["job.yaml"]])
def test_a_wrong_command_line_ends_with_2_and_a_message(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert "fix:" in capsys.readouterr().err


def test_a_misspelled_command_or_option_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["laumch", "job.yaml"]) == 2
    assert "did you mean launch?" in capsys.readouterr().err
    assert cli.main(["status", "--adress", "x"]) == 2
    assert "--address" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "meant"), [("train", "launch"), ("eval", "evaluate")])
def test_a_command_of_llamafactory_is_answered_with_the_one_here(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word, "job.yaml"]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_missing_option_is_named_with_its_values_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["verify", "folder"]) == 2
    said = capsys.readouterr().err
    assert "Missing option '--engine'. Choose from: transformers, vllm, llamacpp" in said


def test_a_job_file_without_a_command_means_launch(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["job.yaml"])
    assert "raytrain-adv launch job.yaml" in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 0
    assert "raytrain-adv [OPTIONS] COMMAND" in capsys.readouterr().out


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


def test_a_package_that_is_missing_is_named_also_where_transformers_hides_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own ModuleNotFoundError has no name; the message was `None is not installed`."""
    hidden = ModuleNotFoundError("Could not import module 'PreTrainedModel'")
    hidden.__cause__ = ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    def fail(*options: Any) -> None:
        raise hidden

    monkeypatch.setattr(cli, "_load", fail)
    assert launch.main(["job.yaml"]) == 3
    assert f"tqdm is not installed for {sys.executable}" in capsys.readouterr().err
    hidden.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(ModuleNotFoundError, match="Could not import"):
        launch.main(["job.yaml"])


@pytest.mark.parametrize("start", ["main(['job.yaml'])", "program()"])
def test_ctrl_c_while_the_commands_are_imported_prints_one_line(start: str) -> None:
    """It ended in Python's traceback in the first half second."""
    code = f"""
import signal, sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "raytrain_adv.config.load":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from raytrain_adv import launch
sys.exit(launch.{start})
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == errors.EXIT_STOPPED
    assert ran.stderr.strip().startswith("Stopped. ") and len(ran.stderr.split("\n")) == 3
    assert ran.stdout == ""


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m raytrain_adv.cli schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["{", "0"]
    assert ran.stderr == ""


def test_noise_is_hidden_before_torch_is_imported_in_every_process_of_a_run() -> None:
    """Ray's workers import the driver's package too: their logs began with torchao's warnings."""
    code = (
        "import logging, sys, raytrain_adv.driver\n"
        "from raytrain_adv.errors import NOISE\n"
        "assert 'torch' not in sys.modules\n"
        "for name, start in NOISE.items():\n"
        "    for text in [start] if isinstance(start, str) else start:\n"
        "        logging.getLogger(name).warning(text + '...')\n"
        "    logging.getLogger(name).warning('this matters')\n"
        "print(len(NOISE))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["this matters"] * int(ran.stdout)


def test_what_an_error_quotes_of_another_file_has_no_secret_and_moves_no_cursor(
    job_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
    info = {"own": {"file_name": "rows.json", "columns": {f"{secret}\x1b[2J": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    path = job_file(dataset="own", dataset_dir=str(tmp_path))
    assert cli.main(["plan", str(path)]) == 2
    printed = capsys.readouterr().err
    assert "Unknown name under columns" in printed
    assert secret not in printed and "\x1b" not in printed

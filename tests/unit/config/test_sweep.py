"""The sweep section: what it comes to, and what is refused before any cluster is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrain_adv.config import JobConfig, load
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import RENAMED
from raytrain_adv.config.schema import schema
from raytrain_adv.config.sweep import (
    MAX_TRIALS,
    SweepOptions,
    axis,
    combinations,
    count,
    default_metric,
    names,
)
from raytrain_adv.errors import JobError

SMALLEST = (
    "model_name_or_path: org/model\n"
    "output_dir: saves/run\n"
    "dataset: rows.jsonl\n"
    "val_size: 8\n"
    "finetuning_type: full\n"
)
FIRST_LINE = SMALLEST.count("\n") + 1


def job_of(folder: Path, text: str, *overrides: str) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(SMALLEST + text)
    return load(path, list(overrides))


def message_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        job_of(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def values_of(folder: Path, text: str, *overrides: str) -> list[dict[str, Any]]:
    swept = job_of(folder, text, *overrides).sweep
    assert swept is not None
    return [dict(trial.values) for trial in swept.trials]


def test_every_combination_of_listed_values_is_a_trial(tmp_path: Path) -> None:
    text = "sweep:\n  learning_rate: [1e-4, 1e-3]\n  max_steps: [5, 6]\n"
    assert values_of(tmp_path, text) == [
        {"learning_rate": 1e-4, "max_steps": 5},
        {"learning_rate": 1e-4, "max_steps": 6},
        {"learning_rate": 1e-3, "max_steps": 5},
        {"learning_rate": 1e-3, "max_steps": 6},
    ]


def test_each_trial_has_a_whole_job_in_a_folder_of_its_own(tmp_path: Path) -> None:
    job = job_of(tmp_path, "overwrite_output_dir: true\nsweep:\n  learning_rate: [1e-4, 1e-3]\n")
    assert job.sweep is not None
    one, two = (trial.job for trial in job.sweep.trials)
    assert (one.train.learning_rate, two.train.learning_rate) == (1e-4, 1e-3)
    assert one.output.output_dir == "saves/run/trials/learning_rate=0.0001"
    assert one.output.overwrite_output_dir is False
    assert one.output.resume_from_checkpoint is True
    assert one.sweep is None
    assert one.ray.ray_run_name != two.ray.ray_run_name


def test_draws_stay_inside_and_more_of_them_begin_with_the_same_ones(tmp_path: Path) -> None:
    text = "sweep:\n  learning_rate: {loguniform: [1e-6, 1e-4]}\n  num_samples: 20\n"
    rates = [v["learning_rate"] for v in values_of(tmp_path, text)]
    assert len(rates) == 20 and all(1e-6 <= rate <= 1e-4 for rate in rates)
    assert sum(rate < 1e-5 for rate in rates) in range(5, 16)
    more = [v["learning_rate"] for v in values_of(tmp_path, text, "sweep.num_samples=30")]
    assert more[:20] == rates


def test_draws_are_the_same_for_each_listed_value(tmp_path: Path) -> None:
    text = "sweep:\n  weight_decay: {uniform: [0, 1]}\n  max_steps: [5, 6]\n  num_samples: 3\n"
    values = values_of(tmp_path, text)
    drawn = {n: [v["weight_decay"] for v in values if v["max_steps"] == n] for n in (5, 6)}
    assert len(values) == 6 and drawn[5] == drawn[6]


def test_both_ends_of_randint_are_drawn_and_none_twice(tmp_path: Path) -> None:
    text = "sweep:\n  max_steps: {randint: [1, 3]}\n  num_samples: 40\n"
    assert sorted(v["max_steps"] for v in values_of(tmp_path, text)) == [1, 2, 3]


def test_choice_draws_of_a_list(tmp_path: Path) -> None:
    text = "sweep:\n  optim: {choice: [adamw_torch, adamw_torch_8bit]}\n  num_samples: 20\n"
    drawn = {v["optim"] for v in values_of(tmp_path, text)}
    assert drawn == {"adamw_torch", "adamw_torch_8bit"}


def test_a_required_key_may_be_swept_over(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = SMALLEST.replace("model_name_or_path: org/model\n", "")
    path.write_text(text + "sweep:\n  model_name_or_path: [org/one, org/two]\n")
    job = load(path)
    assert job.sweep is not None
    models = [trial.job.model.model_name_or_path for trial in job.sweep.trials]
    assert models == ["org/one", "org/two"]


def test_null_on_the_command_line_runs_the_job_without_its_sweep(tmp_path: Path) -> None:
    assert job_of(tmp_path, "sweep:\n  seed: [1, 2]\n", "sweep=null").sweep is None


def test_an_override_reaches_into_the_section(tmp_path: Path) -> None:
    assert len(values_of(tmp_path, "sweep:\n  seed: [1, 2]\n", "sweep.seed=[1, 2, 3]")) == 3


def test_a_delay_is_swept_next_to_the_trial_that_never_switches() -> None:
    assert axis("fake_quant_after_n_steps", [0, 50], "").values == (0, 50, "never")
    assert axis("fake_quant_after_n_steps", ["never", 0], "").values == ("never", 0)
    assert axis("max_steps", [1, 50], "").values == (1, 50)


def test_ptq_is_added_to_a_delay_that_is_drawn() -> None:
    keys = [axis("seed", [1, 2], ""), axis("fake_quant_after_n_steps", {"randint": [0, 90]}, "")]
    found = combinations(keys, 3, 0)
    assert [values["fake_quant_after_n_steps"] for values in found].count("never") == 2
    assert len(found) == count(keys, 3) == 8
    chosen = axis("fake_quant_after_n_steps", {"choice": [5, "never"]}, "")
    assert {values["fake_quant_after_n_steps"] for values in combinations([chosen], 9, 0)} == {
        5,
        "never",
    }


def test_trials_are_compared_by_the_held_out_loss_without_qat(tmp_path: Path) -> None:
    job = job_of(tmp_path, "sweep:\n  seed: [1, 2]\n")
    assert job.sweep is not None and default_metric([job]) == job.sweep.metric == "eval_loss"
    assert job.sweep.mode == "min"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("  learning_rat: [1]", "line {1}: sweep.learning_rat: there is no such key"),
        ("  learning_rat: [1]", "did you mean learning_rate?"),
        ("  metrik: eval_loss\n  seed: [1]", "did you mean metric?"),
        ("  seed: 5", "line {1}: sweep.seed: 5 is one value"),
        ("  seed: []", "line {1}: sweep.seed: the list of values is empty"),
        ("  seed: [1, 1]", "1 is listed twice"),
        ("  seed: {normal: [1, 2]}", "not a distribution"),
        ("  seed: {uniform: [2, 1]}", "the lowest value and the highest"),
        ("  seed: {randint: [1.5, 2]}", "whole numbers"),
        ("  weight_decay: {loguniform: [0, 1]}", "above 0"),
        ("  seed: {choice: 3}", "choice takes a list"),
        ("  learning_rate: [1e-4, -1]", "line {1}: learning_rate: -1 is not accepted"),
        ("  seed: [1]\n  max_steps: [soon]", "line {2}: max_steps: 'soon' is not accepted"),
        ("  warmup_ratio: {uniform: [0.5, 1.5]}", "warmup_ratio: 1.5 is not accepted"),
        ("  output_dir: [a, b]", "line {1}: sweep.output_dir: it belongs to the sweep"),
        ("  metric: speed\n  seed: [1]", "line {1}: sweep.metric: 'speed' is not accepted"),
        ("  scheduler: asha", "no key is swept over"),
        ("  seed: [1]\n  mode: min", "the metric decides whether lower or higher is better"),
        ("  seed: [1]\n  num_samples: 3", "line {2}: sweep.num_samples: it changes nothing"),
        ("  seed: [1]\n  grace_steps: 3", "line {2}: sweep.grace_steps: it changes nothing"),
        ("  seed: [1]\n  scheduler: asha", "line {2}: sweep.scheduler: asha needs evaluations"),
        ("  seed: [1]\n  metric: quantized_eval_loss", "a trial without QAT has no quantized"),
        ("  seed: [1]\n  scheduler: asha\n  metric: step_seconds", "known only at a trial's end"),
        ("  seed: {randint: [1, 999]}\n  max_steps: [1, 2]\n  num_samples: 500", "1000 trials"),
        ("  - seed", "not a list of keys with values"),
    ],
)
def test_a_problem_of_a_sweep_is_reported_with_its_line(
    tmp_path: Path, lines: str, says: str
) -> None:
    said = message_of(tmp_path, f"sweep:\n{lines}\n")
    for number in (1, 2):
        says = says.replace(f"{{{number}}}", str(FIRST_LINE + number))
    assert says in said, said


def test_a_key_that_the_file_fixes_is_refused_with_both_lines(tmp_path: Path) -> None:
    said = message_of(tmp_path, "learning_rate: 1e-3\nsweep:\n  learning_rate: [1e-4, 1e-3]\n")
    assert f"line {FIRST_LINE}, line {FIRST_LINE + 2}: learning_rate" in said
    said = message_of(tmp_path, "sweep:\n  learning_rate: [1e-4]\n", "learning_rate=1e-3")
    assert f"command line, line {FIRST_LINE + 1}: learning_rate" in said


def test_a_combination_that_contradicts_itself_is_refused_with_its_lines(tmp_path: Path) -> None:
    text = "sweep:\n  warmup_steps: [0, 5]\n  lr_scheduler_type: [linear, constant]\n"
    said = message_of(tmp_path, text)
    assert f"line {FIRST_LINE + 2}, line {FIRST_LINE + 1}: lr_scheduler_type and warmup" in said
    assert said.count("constant has no warm-up") == 1


def test_a_metric_on_held_out_rows_needs_them_in_every_trial(tmp_path: Path) -> None:
    said = message_of(tmp_path, "sweep:\n  seed: [1, 2]\n", "val_size=0")
    assert "eval_loss, the default" in said and "val_size" in said
    assert values_of(tmp_path, "sweep:\n  seed: [1]\n  metric: train_loss\n", "val_size=0")


def test_a_sweep_does_not_begin_with_a_checkpoint(tmp_path: Path) -> None:
    said = message_of(tmp_path, "resume_from_checkpoint: saves/step_1\nsweep:\n  seed: [1]\n")
    assert f"line {FIRST_LINE}: resume_from_checkpoint" in said


def test_a_twin_for_every_trial_is_refused(tmp_path: Path) -> None:
    text = "enable_qat: true\ncompare: true\nsweep:\n  fake_quant_after_n_steps: [0, 5]\n"
    assert "every trial would train its own twin" in message_of(tmp_path, text)


@pytest.mark.parametrize("values", ["[0, 5, 8]", "{randint: [0, 8]}"])
def test_a_delay_beyond_the_last_step_is_refused_with_its_value(
    tmp_path: Path, values: str
) -> None:
    text = f"enable_qat: true\nmax_steps: 8\nsweep:\n  fake_quant_after_n_steps: {values}\n"
    found = message_of(tmp_path, text)
    assert "fake quantization would never begin" in found
    assert "fake_quant_after_n_steps: 8, and the run has 8 steps" in found
    assert f"line {FIRST_LINE + 3}" in found and f"line {FIRST_LINE + 1}" in found
    job_of(tmp_path, text.replace("8]", "7]"))


@pytest.mark.parametrize("values", ["[null, 0, 5]", "[0, 5, null]", "{choice: [0, null, 5]}"])
def test_two_words_for_fake_quantization_from_the_start_are_one_trial(
    tmp_path: Path, values: str
) -> None:
    text = f"enable_qat: true\nsweep:\n  num_samples: 40\n  fake_quant_after_n_steps: {values}\n"
    text = text if "choice" in values else text.replace("  num_samples: 40\n", "")
    job = job_of(tmp_path, text)
    found = [values["fake_quant_after_n_steps"] for values in values_of(tmp_path, text)]
    assert sorted(map(str, found)) == ["0", "5", "never"]
    assert any("null and 0 are one trial" in note for note in job.notes)
    assert not job_of(tmp_path, text.replace("null", "7")).notes


def test_options_of_a_sweep_are_named_as_no_key_of_a_job() -> None:
    keys = {key for kind in section_types() for key in kind.model_fields}
    assert not (keys | set(RENAMED)) & set(SweepOptions.model_fields)


def test_names_tell_trials_apart_whatever_their_values() -> None:
    values = [{"dataset": value} for value in ("a/b", "a b", "x" * 400, "x" * 401, "..", "")]
    found = names(values)
    assert len(set(found)) == len(found)
    assert all("/" not in name and len(name) <= 120 for name in found)


def test_a_sweep_with_more_values_has_the_same_names_for_the_old_ones() -> None:
    few = combinations([axis("max_steps", [1, 2], "")], 1, 0)
    more = combinations([axis("max_steps", [3, 1, 2], "")], 1, 0)
    assert set(names(few)) < set(names(more))


@pytest.mark.parametrize(
    ("section", "fits"),
    [
        ({"learning_rate": [1e-4, 1e-3], "metric": "eval_loss"}, True),
        ({"learning_rate": {"loguniform": [1e-6, 1e-4]}, "num_samples": 4}, True),
        ({"optim": {"choice": ["adamw_torch"]}}, True),
        ({"optim": ["adamw"]}, False),
        ({"learning_rate": 1e-4}, False),
        ({"learning_rat": [1e-4]}, False),
        ({"output_dir": ["a"]}, False),
        ({"seed": [1], "num_samples": MAX_TRIALS + 1}, False),
    ],
)
def test_the_schema_knows_the_section(tmp_path: Path, section: dict[str, Any], fits: bool) -> None:
    keys = yaml.safe_load(SMALLEST)
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid({**keys, "sweep": section}) is fits
    text = yaml.safe_dump({"sweep": section})
    if fits:
        job_of(tmp_path, text)
    else:
        message_of(tmp_path, text)


def test_a_sweep_loads_without_torch_and_ray(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SMALLEST + "sweep:\n  learning_rate: {loguniform: [1e-6, 1e-4]}\n")
    code = (
        "import sys; from raytrain_adv.config import load; load(sys.argv[1]); "
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)

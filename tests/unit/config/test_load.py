"""From a job file and overrides to a job, or to one message."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raytrain_adv.config import JobConfig, load
from raytrain_adv.errors import JobError
from raytrain_adv.transforms.lora import Lora

SMALLEST = "model_name_or_path: org/model\noutput_dir: saves/run\ndataset: rows.jsonl\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def job_of(folder: Path, text: str, *overrides: str) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(SMALLEST + text)
    return load(path, list(overrides))


def message_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        job_of(folder, text, *overrides)
    return str(caught.value)


def refusal_of(path: Path) -> str:
    with pytest.raises(JobError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_smallest_job_has_three_keys(folder: Path) -> None:
    job = job_of(folder, "")
    assert (job.model.model_name_or_path, job.output.output_dir) == ("org/model", "saves/run")
    assert job.train.learning_rate == 5e-5
    assert job.notes == ()


def test_an_override_wins_over_the_file(folder: Path) -> None:
    job = job_of(folder, "learning_rate: 1e-4\n", "learning_rate=2e-4", "bf16=true")
    assert job.train.learning_rate == 2e-4
    assert job.train.bf16 is True


def test_of_two_overrides_the_last_wins(folder: Path) -> None:
    assert job_of(folder, "", "seed=1", "seed=2").train.seed == 2


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "1E-4"])
def test_a_learning_rate_may_be_written_in_every_usual_way(folder: Path, written: str) -> None:
    assert job_of(folder, f"learning_rate: {written}\n").train.learning_rate == 1e-4


def test_a_dotted_override_reaches_into_a_mapping(folder: Path) -> None:
    text = "lr_scheduler_type: cosine_with_min_lr\n"
    job = job_of(folder, text, "lr_scheduler_kwargs.min_lr=1e-6")
    assert job.train.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_dotted_override_keeps_the_other_entries_of_the_mapping(folder: Path) -> None:
    text = "ray_init_kwargs:\n  runtime_env: {env_vars: {A: '1'}}\n"
    job = job_of(folder, text, "ray_init_kwargs.runtime_env.env_vars.B='2'")
    assert job.ray.ray_init_kwargs == {"runtime_env": {"env_vars": {"A": "1", "B": "2"}}}


def test_a_dotted_override_into_a_number_is_refused(folder: Path) -> None:
    assert "not a mapping" in message_of(folder, "seed: 3\n", "seed.low=1")


def test_a_mapping_may_be_written_as_text(folder: Path) -> None:
    assert job_of(folder, 'ray_init_kwargs: \'{"address": "auto"}\'\n').ray.ray_init_kwargs == {
        "address": "auto"
    }


def test_all_problems_are_in_one_message_with_their_lines(folder: Path) -> None:
    text = "lerning_rate: 1\nbf16: maybe\nmax_steps: 0\nwarmup_ratio: 0.1\nwarmup_steps: 5\n"
    message = message_of(folder, text, "seed=-1", "nonsense")
    lines = message.splitlines()
    assert "(6 problems)" in lines[0]
    for expected in (
        "line 4: lerning_rate: there is no such key",
        "line 5: bf16: 'maybe' is not accepted",
        "line 6: max_steps: 0 steps train nothing",
        "line 7, line 8: warmup_ratio and warmup_steps",
        "command line: seed: -1 is not accepted",
        "command line: 'nonsense' is not key=value",
    ):
        assert expected in message
    assert "lerning_rate: did you mean learning_rate?" in message


def test_dora_and_weights_that_arrive_in_float8_are_refused_together(folder: Path) -> None:
    gathered = "fp8: true\nfp8_enable_fsdp_float8_all_gather: true\nbf16: true\n"
    message = message_of(folder, f"{gathered}finetuning_type: lora\nuse_dora: true\n")
    assert "fp8_enable_fsdp_float8_all_gather and use_dora: DoRA adds to the base" in message


def test_missing_keys_are_named_with_their_meaning(folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_text("bf16: true\n")
    message = refusal_of(path)
    assert "model_name_or_path: missing: Folder of a Hugging Face causal language model" in message
    assert "output_dir: missing" in message
    assert "dataset: missing" in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning-rate", "learning_rate"),
        ("per_device_batch_size", "per_device_train_batch_size"),
        ("Cutoff_Len", "cutoff_len"),
        ("lora_r", "lora_rank"),
        ("eval_step", "eval_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(folder: Path, key: str, nearest: str) -> None:
    assert f"did you mean {nearest}?" in message_of(folder, f"{key}: 1\n")


def test_a_key_like_no_other_is_not_guessed(folder: Path) -> None:
    message = message_of(folder, "zzzzqq: 1\n")
    assert "did you mean" not in message
    assert "raytrain-adv schema" in message


def test_a_key_given_twice_is_refused_with_both_lines(folder: Path) -> None:
    message = message_of(folder, "seed: 1\nseed: 2\n")
    assert "line 5: seed: given twice, first on line 4" in message


@pytest.mark.parametrize("written", ["true", "8.5", "many", "[8]", "0", "-3", "null", "1e400"])
def test_a_wrong_count_names_the_accepted_values(folder: Path, written: str) -> None:
    message = message_of(folder, f"gradient_accumulation_steps: {written}\n")
    assert "line 4: gradient_accumulation_steps" in message
    assert "give a whole number at least 1" in message


def test_a_whole_float_or_quoted_number_is_a_count(folder: Path) -> None:
    job = job_of(folder, "gradient_accumulation_steps: 8.0\ncutoff_len: '512'\n")
    assert (job.train.gradient_accumulation_steps, job.data.cutoff_len) == (8, 512)


@pytest.mark.parametrize("written", [".nan", ".inf", "-1.0", "0"])
def test_a_learning_rate_that_is_not_positive_is_refused(folder: Path, written: str) -> None:
    assert "give a number above 0" in message_of(folder, f"learning_rate: {written}\n")


def test_keys_of_a_feature_whose_switch_is_misspelled_are_not_called_useless(folder: Path) -> None:
    message = message_of(folder, "enable_qatt: true\nqat_weight_dtype: int4\n")
    assert "did you mean enable_qat?" in message and "has no effect" not in message
    assert "has no effect" in message_of(folder, "typo: 1\nqat_weight_dtype: int4\n")


def test_a_misspelled_choice_names_the_nearest(folder: Path) -> None:
    assert "did you mean cosine?" in message_of(folder, "lr_scheduler_type: cosin\n")


def test_a_number_for_text_suggests_quotes(folder: Path) -> None:
    assert "run_name: '2024'" in message_of(folder, "run_name: 2024\n")


@pytest.mark.parametrize("word", ["no", "off", "false", "'no'"])
def test_yamls_unquoted_no_is_a_strategy(folder: Path, word: str) -> None:
    job = job_of(folder, f"save_strategy: {word}\neval_strategy: {word}\n")
    assert (job.output.save_strategy, job.output.eval_strategy) == ("no", "no")


def test_the_word_true_in_quotes_is_not_a_checkpoint_path(folder: Path) -> None:
    assert job_of(folder, "resume_from_checkpoint: 'True'\n").output.resume_from_checkpoint is True


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 10\n", "warmup_ratio and warmup_steps"),
        ("eval_dataset: other\nval_size: 0.1\n", "eval_dataset and val_size"),
        ("mask_history: true\ntrain_on_prompt: true\n", "mask_history and train_on_prompt"),
        ("neat_packing: true\npacking: false\n", "neat_packing and packing"),
        (
            "disable_gradient_checkpointing: true\ngradient_checkpointing: true\n",
            "disable_gradient_checkpointing and gradient_checkpointing",
        ),
        ("use_cpu: true\nresources_per_worker: {GPU: 1}\n", "use_cpu and resources_per_worker"),
        ("use_cpu: true\nflash_attn: fa2\n", "use_cpu and flash_attn"),
        (
            "resume_from_checkpoint: saves/run/checkpoints/1\noverwrite_output_dir: true\n",
            "resume_from_checkpoint and overwrite_output_dir",
        ),
        (
            "resume_from_checkpoint: true\nsave_only_model: true\n",
            "resume_from_checkpoint and save_only_model",
        ),
        ("fsdp_shard_size: 3\nray_num_workers: 4\n", "fsdp_shard_size and ray_num_workers"),
        ("fsdp_shard_size: 8\nray_num_workers: 4\n", "fsdp_shard_size and ray_num_workers"),
        (
            "sequence_parallel_size: 3\nray_num_workers: 4\n",
            "sequence_parallel_size and ray_num_workers",
        ),
        *(
            (
                f"sequence_parallel_size: 2\nray_num_workers: 2\n{line}\n",
                "sequence_parallel_size and",
            )
            for line in ("neftune_noise_alpha: 5", "compute_accuracy: true\nval_size: 1")
        ),
        ("ray_num_workers: [8, 2]\nmax_failures: 1\n", "write [2, 8]"),
        ("ray_num_workers: [2, 8]\n", "ray_num_workers and max_failures"),
        (
            "ray_num_workers: [3, 8]\nmax_failures: 1\n",
            "numbers that work: 1, 2, 4, 8; or change gradient_accumulation_steps",
        ),
        (
            "ray_num_workers: [2, 8]\nfsdp_shard_size: 4\nmax_failures: 1\n",
            "fsdp_shard_size and ray_num_workers",
        ),
        (
            "ray_num_workers: [2, 8]\nsave_strategy: no\nmax_failures: 1\n",
            "ray_num_workers and save_strategy",
        ),
        ("train_from_scratch: true\n", "train_from_scratch and finetuning_type"),
        ("finetuning_type: lora\npure_bf16: true\n", "pure_bf16 and finetuning_type"),
        ("warmup_ratio: 0.0\nwarmup_steps: 10\n", "warmup_ratio and warmup_steps"),
        (
            "lr_scheduler_type: constant\nwarmup_ratio: 0.1\n",
            "lr_scheduler_type and warmup_ratio",
        ),
        ("lr_scheduler_type: constant\nwarmup_steps: 5\n", "lr_scheduler_type and warmup_steps"),
        ("max_failures: 2\nsave_only_model: true\n", "max_failures and save_only_model"),
        (
            "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {min_lr: 1e-6}\n",
            "lr_scheduler_kwargs and lr_scheduler_type",
        ),
        ("lr_scheduler_type: cosine_with_min_lr\n", "lr_scheduler_kwargs and lr_scheduler_type"),
        (
            "resources_per_worker: {GPU: 0.5}\nray_num_workers: 2\n",
            "resources_per_worker and ray_num_workers",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_named(folder: Path, text: str, keys: str) -> None:
    message = message_of(folder, text)
    assert "(1 problem)" in message
    assert keys in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("eval_strategy: steps\n", "eval_strategy: steps without rows"),
        ("eval_steps: 10\nval_size: 0.1\n", "eval_steps without eval_strategy"),
        ("val_size: 1.5\n", "val_size: 1.5 is neither"),
        ("save_steps: 2.5\n", "save_steps: 2.5 is neither"),
        ("resources_per_worker: {gpu: 1}\n", "write GPU"),
        ("resources_per_worker: {GPU: 2}\n", "drives one GPU"),
        ("report_to: [none, wandb]\n", "none is listed together with trackers"),
        ("dataset: ''\n", "given twice"),
        ("tokenized_path: " + "x" * 300 + "\n", "a name of 300 bytes"),
        ("eval_dataset: [a, " + "é/" * 3000 + "]\n", "in a path of 9000"),
        ("tokenized_path: /dev/null\n", "exists but is not a folder"),
        ("eval_steps: 10\n", "hold rows out with val_size or eval_dataset"),
        ("eval_dataset: ' , '\n", "names no dataset"),
        ("report_to: [wandb, wandb]\n", "listed twice"),
        ("ray_init_kwargs: {num_cpus: .nan}\n", "infinite or NaN"),
        ("resources_per_worker: {GPU: true}\n", "give a mapping to a number"),
        ("lora_rank: 99999999999999999999\n", "at most 2147483647"),
        ("lora_target: []\n", "give text, or a list"),
        ("seed: " + "9" * 5000 + "\n", "a whole number of 5000 digits"),
        ("'': 1\n", "a key without a name"),
        ("dataset_dir: '  '\n", "dataset_dir"),
    ],
)
def test_a_value_that_would_do_nothing_or_harm_is_refused(
    folder: Path, text: str, word: str
) -> None:
    assert word in message_of(folder, text)


def test_a_long_list_of_datasets_is_not_a_long_name(folder: Path) -> None:
    names = ",".join(f"rows_{n:03d}.jsonl" for n in range(500))
    assert job_of(folder, "", f"dataset={names}").data.dataset == names


def test_adapter_keys_without_adapters_are_refused(folder: Path) -> None:
    message = message_of(folder, "finetuning_type: full\nlora_rank: 64\nuse_dora: true\n")
    assert "line 5: lora_rank" in message
    assert "line 6: use_dora" in message
    assert "finetuning_type" in message


def test_the_command_line_turns_a_feature_off_without_its_keys_in_the_file(folder: Path) -> None:
    text = "lora_rank: 4\nenable_qat: true\nqat_group_size: 16\n"
    job = job_of(folder, text, "finetuning_type=full", "enable_qat=false")
    assert job.notes == (
        "line 4: lora_rank is left out: finetuning_type='full' turns its feature off",
        "line 6: qat_group_size is left out: enable_qat=false turns its feature off",
    )
    assert not {"lora_rank", "qat_group_size"} & job.flat(exclude_unset=True).keys()


def test_a_key_on_the_command_line_of_a_feature_that_is_off_is_refused(folder: Path) -> None:
    text, overrides = "enable_qat: true\n", ("enable_qat=false", "qat_group_size=16")
    assert "command line: qat_group_size: it has no effect" in message_of(folder, text, *overrides)


def test_adapter_keys_at_their_defaults_are_harmless_without_adapters(folder: Path) -> None:
    text = "finetuning_type: full\nlora_rank: 8\nuse_dora: false\nlora_target: all\n"
    assert not job_of(folder, text).transform(Lora).enabled


def test_a_wrong_value_neither_hides_nor_causes_other_problems(folder: Path) -> None:
    message = message_of(folder, "val_size: lots\neval_strategy: steps\nuse_cpu: perhaps\n")
    assert "(2 problems)" in message or "(3 problems)" in message
    assert "val_size: 'lots'" in message
    assert "use_cpu: 'perhaps'" in message


def test_a_key_made_useless_by_another_is_noted(folder: Path) -> None:
    job = job_of(
        folder, "max_steps: 10\nnum_train_epochs: 2\n", "save_strategy=epoch", "save_steps=7"
    )
    assert any("num_train_epochs: 2 changes nothing" in note for note in job.notes)
    assert any("save_steps: 7 changes nothing" in note for note in job.notes)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("save_strategy: no\nsave_total_limit: 2\n", "save_total_limit: 2 changes nothing"),
        ("save_strategy: no\nsave_only_model: true\n", "save_only_model: true changes nothing"),
        ("save_strategy: no\nmax_failures: 2\n", "max_failures restarts at the first step"),
        ("stage: pt\nmask_history: true\n", "mask_history: true changes nothing: stage is pt"),
        ("stage: pt\ndefault_system: Hi\n", "default_system: 'Hi' changes nothing"),
        ("eval_strategy: no\neval_steps: 5\n", "eval_steps: 5 changes nothing"),
        ("per_device_eval_batch_size: 1\n", "per_device_eval_batch_size: 1 changes nothing"),
        ("run_name: a\n", "run_name: 'a' changes nothing: report_to is none"),
        (
            "finetuning_type: full\npure_bf16: true\nbf16: true\n",
            "bf16: true changes nothing: pure_bf16: true wins",
        ),
    ],
)
def test_a_key_that_another_one_makes_ineffective_is_noted(
    folder: Path, text: str, note: str
) -> None:
    assert any(note in found for found in job_of(folder, text).notes)


def test_a_revision_of_a_folder_is_noted(folder: Path) -> None:
    job = job_of(folder, "", f"model_name_or_path={folder}", "model_revision=v1")
    assert "model_revision: 'v1' changes nothing: model_name_or_path is a folder" in job.notes


@pytest.mark.parametrize("key", [".", "..", "a..b", ".a", "seed.", "ray_init_kwargs." + "a." * 99])
def test_a_dotted_override_has_a_name_on_both_sides_of_each_dot(folder: Path, key: str) -> None:
    message = message_of(folder, "", f"{key}=1")
    assert "(1 problem)" in message
    assert "is not a key, or a key with a dot and a name" in message


@pytest.mark.parametrize("written", ["null", "true", "[]", "3", "''"])
def test_a_wrong_value_of_a_required_key_is_one_problem(folder: Path, written: str) -> None:
    message = message_of(folder, "", f"output_dir={written}")
    assert "(1 problem)" in message
    assert "command line: output_dir" in message


def test_a_folder_is_not_a_job_file(folder: Path) -> None:
    (folder / "quick.yaml").write_text(SMALLEST)
    message = refusal_of(folder)
    assert "it is a folder" in message
    assert "quick.yaml" in message


def test_a_missing_file_names_the_nearest_one(folder: Path) -> None:
    (folder / "quickstart.yaml").write_text(SMALLEST)
    assert "quickstart.yaml?" in refusal_of(folder / "quikstart.yaml")


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "a pipe or a device" in refusal_of(folder / "pipe")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused_and_not_read(path: str) -> None:
    assert "cannot be run as written" in refusal_of(Path(path))


def test_a_file_of_many_values_is_refused_before_all_are_read(folder: Path) -> None:
    started = time.process_time()
    assert "more than 20000 values" in message_of(folder, "a: [" + "1," * 450_000 + "]\n")
    assert time.process_time() - started < 10


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(folder: Path, content: str) -> None:
    path = folder / "job.yaml"
    path.write_text(content)
    assert "it is empty" in refusal_of(path)


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words\n", "42\n"])
def test_a_file_that_is_not_a_mapping_is_refused(folder: Path, content: str) -> None:
    path = folder / "job.yaml"
    path.write_text(content)
    assert "not a list of key: value lines" in refusal_of(path)


def test_a_binary_file_is_refused_with_its_line(folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_bytes(b"a: 1\n\xff\xfe\x00\x01")
    assert "line 2 is not UTF-8" in refusal_of(path)


def test_broken_yaml_names_line_and_column(folder: Path) -> None:
    assert "line 4, column 17" in message_of(folder, "dataset_dir: [a]]\n")
    assert "begun on line 4" in message_of(folder, "dataset_dir: [unclosed\n")
    assert "broken YAML" in message_of(folder, "\tseed: 1\n")


def test_keys_that_are_not_text_are_refused(folder: Path) -> None:
    message = message_of(folder, "1: a\ntrue: b\n? [x]\n: c\n")
    assert "line 4: the key '1' is not text" in message
    assert "line 5" in message
    assert "a list or mapping" in message


def test_an_alias_bomb_is_refused(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    assert "values" in message_of(folder, "\n".join(lines) + "\n")


def test_a_value_that_contains_itself_is_refused(folder: Path) -> None:
    assert "contains itself" in message_of(folder, "ray_init_kwargs: &a {b: *a}\n")


def test_deep_nesting_is_refused(folder: Path) -> None:
    assert "nested too deeply" in message_of(folder, "dataset: " + "[" * 2000 + "]" * 2000 + "\n")


def test_python_objects_are_never_made(folder: Path) -> None:
    assert "tag" in message_of(folder, "run_name: !!python/object/apply:os.system [true]\n")


def test_merge_keys_and_aliases_of_a_careful_file_work(folder: Path) -> None:
    text = "run_name: &name first\nray_run_name: *name\n"
    assert job_of(folder, text).ray.ray_run_name == "first"


def test_a_secret_is_never_repeated(folder: Path) -> None:
    message = message_of(folder, "hf_hub_token: hf_abcdef\n", "ms_hub_token=xyzzy")
    assert "hf_abcdef" not in message
    assert "xyzzy" not in message
    assert "HF_TOKEN" in message


PATHS = (
    "model_name_or_path",
    "cache_dir",
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "tokenized_path",
    "output_dir",
    "resume_from_checkpoint",
    "compare_with",
    "ray_storage_path",
    "kernels_lock",
)


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_begin_with_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "use_kernels: true\n" if key == "kernels_lock" else ""
    assert job_of(folder, text, f"{key}=~/here").flat()[key] == "/home/me/here"
    assert "has no user nobody_here" in message_of(folder, text, f"{key}=~nobody_here/x")


def test_each_dataset_of_a_list_may_begin_with_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert job_of(folder, "", "dataset=a, ~/b.json").data.dataset == "a,/home/me/b.json"
    assert job_of(folder, "", "dataset=[a, ~/b.json]").data.dataset == ["a", "/home/me/b.json"]


@pytest.mark.parametrize(
    "keys",
    [
        "learning_rate=1e30",
        "adam_epsilon=1e10",
        "cutoff_len=2147483647",
        "max_steps=2000000000",
        "num_train_epochs=1e9",
        "weight_decay=50",
        "step_timeout=2",
        "gradient_accumulation_steps=100000",
        "preprocessing_num_workers=1000000000",
        "neftune_noise_alpha=1e300",
    ],
)
def test_a_value_that_a_person_would_question_is_questioned(folder: Path, keys: str) -> None:
    (note,) = job_of(folder, "", keys).notes
    assert note.startswith(keys.partition("=")[0]) and "is unusual" in note


def test_usual_values_are_not_questioned(folder: Path) -> None:
    usual = ("learning_rate=2e-4", "cutoff_len=131072", "weight_decay=0.1", "step_timeout=600")
    assert job_of(folder, "", *usual, "max_steps=100000", "adam_epsilon=1e-5").notes == ()


def test_the_whole_disk_is_no_folder_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert "the whole file system" in message_of(folder, "", "output_dir=/")
    assert "the whole file system" in message_of(folder, "", "output_dir=//..")
    assert "your home folder" in message_of(folder, "", "output_dir=~/")
    assert "step_timeout" in message_of(folder, "", "step_timeout=1e-9")

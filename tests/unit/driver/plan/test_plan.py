import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv import hardware, tables
from raytrain_adv.data.prepare import prepare
from raytrain_adv.driver.output.output_dir import open_output
from raytrain_adv.driver.plan import data
from raytrain_adv.driver.plan.data import DataSummary, measure, summarize
from raytrain_adv.driver.plan.plan import RunPlan, remarks, render, render_brief, resolve, show
from raytrain_adv.driver.plan.text import view
from raytrain_adv.errors import JobError
from raytrain_adv.estimate.advice import Case, Gpu, advise
from raytrain_adv.model.build import build
from tests.tiny_models import job_for, write_checkpoint

DATA = DataSummary(
    num_rows=640,
    num_sequences=640,
    num_tokens=64_000,
    longest=120,
    num_held_out=0,
    packing_efficiency=None,
)
H200 = replace(
    hardware.detect("cpu"),
    device_type="cuda",
    device_name="NVIDIA H200",
    compute_capability=(9, 0),
    device_memory_bytes=int(139.8 * 2**30),
    num_gpus=1,
)


def lora_plan(folder: Path, **keys: Any) -> RunPlan:
    model = write_checkpoint("llama", folder / "model", vocab_size=512)
    job = job_for(model, folder, finetuning_type="lora", bf16=True, **keys)
    return resolve(job, world_size=2, data=DATA)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_plan_shows_keys_batch_transforms_and_memory(tmp_path: Path) -> None:
    text = words(render(lora_plan(tmp_path, per_device_train_batch_size=4, max_steps=30)))
    assert "per_device_train_batch_size 4" in text
    assert "4 per worker x 1 pass x 2 workers = 8 sequences, about 800 tokens" in text
    assert "30 steps = 0.375 epochs (by max_steps)" in text
    assert "model.layers.[0-1].self_attn.q_proj" in text
    assert "lm_head skipped: the language-model head" in text
    assert re.search(r"peak \d+\.\d GiB, at: ", text)
    per_device = {"per_device_train_batch_size": 8}
    text = words(
        render(
            lora_plan(
                tmp_path / "shared", **per_device, sequence_parallel_size=2, ray_num_workers=2
            )
        )
    )
    assert "8 per 2 workers x 1 pass x 1 group = 8 sequences" in text
    assert re.search(r"each worker has \d+ tokens of a sequence at most", text)


def test_keys_at_their_defaults_are_shown_with_verbose(tmp_path: Path) -> None:
    plan = lora_plan(tmp_path)
    assert "adam_beta2" not in render(plan)
    assert "adam_beta2" in render(plan, verbose=True)


def test_no_line_is_wider_than_the_terminal(tmp_path: Path) -> None:
    assert max(map(len, render(lora_plan(tmp_path), verbose=True).splitlines())) <= 100


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_cuts_no_figure_of_memory_and_no_name_in_a_word(
    tmp_path: Path, columns: int
) -> None:
    plan = lora_plan(tmp_path)
    text = tables.plain(view(plan), columns)
    for phase in plan.memory.phases:
        assert f"{phase.total:.2f}" in text and phase.name in text
    pieces = {piece for fqn in plan.transforms["lora"].changes for piece in fqn.split(".")}
    assert pieces - set(re.split(r"[\s.,]+", text)) <= {"0", "1"}, "which are folded to [0-1]"


def test_plain_text_has_no_color_codes(tmp_path: Path) -> None:
    assert "\x1b" not in render(lora_plan(tmp_path))


def test_the_brief_plan_is_a_few_lines(tmp_path: Path) -> None:
    text = render_brief(lora_plan(tmp_path))
    assert "lora" in text
    assert "memory" in text
    assert len(text.splitlines()) < 15


def test_planning_changes_no_module_but_reports_them(tmp_path: Path) -> None:
    plan = lora_plan(tmp_path)
    assert len(plan.transforms["lora"].changes) == 14
    assert plan.model.num_trained < plan.model.num_parameters


def test_without_a_gpu_memory_is_compared_with_examples(tmp_path: Path) -> None:
    text = render(lora_plan(tmp_path))
    assert "H100 80 GB (79 GiB): fits" in text
    assert "H200 141 GB (140 GiB): fits" in text


def test_with_a_gpu_memory_is_compared_with_it(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "model", vocab_size=512)
    job = job_for(model, tmp_path)
    text = render(resolve(job, world_size=1, data=DATA, facts=H200))
    assert "NVIDIA H200 (140 GiB): fits" in text
    assert "H100 80 GB" not in text


def test_room_to_spare_advises_to_keep_activations(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "model", vocab_size=512)
    job = job_for(model, tmp_path)
    plan = resolve(job, world_size=1, data=DATA, facts=H200)
    (advice,) = plan.advice["NVIDIA H200"]
    assert dict(advice.keys) == {"disable_gradient_checkpointing": True}
    assert advice.total > plan.memory.total


def llama_8b_case(folder: Path, **keys: Any) -> Case:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    values = {"train_from_scratch": True, "per_device_train_batch_size": 1, "bf16": True, **keys}
    job = job_for(model, folder, **values)
    return Case(job, build(job), 1, 8192)


@pytest.mark.parametrize(
    "workers", [{}, {"ray_num_workers": [1, 8], "max_failures": -1, "save_strategy": "steps"}]
)
def test_advice_for_a_gpu_that_is_too_small_fits_it_when_followed(
    tmp_path: Path, workers: dict[str, Any]
) -> None:
    case, gpu = llama_8b_case(tmp_path, **workers), Gpu("H100", 79.1)
    assert not case.prediction().fits(gpu.memory_gib)
    advice = advise(case, gpu)
    assert {"bf16": False, "pure_bf16": True} in [dict(a.keys) for a in advice]
    assert any("ray_num_workers" in a.keys for a in advice)
    for change in advice:
        followed = case.with_keys(change.keys).prediction()
        assert followed.fits(gpu.memory_gib)
        assert followed.total == pytest.approx(change.total)


def test_changes_are_combined_if_no_single_one_is_enough(tmp_path: Path) -> None:
    case = llama_8b_case(tmp_path, fsdp_cpu_offload=True, gradient_checkpointing="none")
    gpu = Gpu("small", 10.2)
    advice = advise(case, gpu)
    assert advice
    assert len(advice[0].keys) > 1


def test_prepared_data_is_summarized(make_job: Any) -> None:
    job = make_job(val_size=8)
    prepared = prepare(job, print)
    summary = summarize(prepared)
    assert summary.num_sequences == 56
    assert summary.num_held_out == 8
    assert summary.longest == int(prepared.train.lengths.max())
    assert measure(job, print) == summary


def test_large_data_is_estimated_from_a_sample_within_a_tenth(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Say {n % 7}.", "output": "so " * (n % 40 + 1)} for n in range(600)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    job = make_job(dataset=str(path), val_size=0.1)
    monkeypatch.setattr(data, "COUNTED", 100)
    monkeypatch.setattr(data, "SAMPLE", 200)
    estimate = measure(job, lambda sentence: None)
    counted = summarize(prepare(job, lambda sentence: None))
    assert estimate.estimated_from == 200
    for name in ("num_rows", "num_sequences", "num_tokens", "num_held_out"):
        assert getattr(estimate, name) == pytest.approx(getattr(counted, name), rel=0.1)
    assert measure(job, lambda sentence: None) == counted  # it is in the cache now


def test_show_prints_the_plan(make_job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    show(make_job(ray_num_workers="auto"))
    printed = words(capsys.readouterr().out)
    assert "2 workers (ray_num_workers is auto" in printed
    assert "64 conversations in 64 sequences" in printed


def test_a_row_and_a_path_are_printed_as_they_are(
    make_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither wrapped, nor read as rich's markup."""
    answer = "a long answer without a line break, " * 8
    data = tmp_path / "[draft]" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps({"instruction": "One?", "output": answer}) + "\n")
    show(make_job(dataset=str(data), cutoff_len=1024))
    printed = capsys.readouterr().out
    assert answer.strip() in printed
    assert f"{data}: read as" in printed


def test_show_plans_for_the_requested_workers(
    make_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    show(make_job(), num_workers=4)
    assert "x 4 workers = 8 sequences" in words(capsys.readouterr().out)


def test_the_plan_has_remarks_on_what_its_figures_do_not_show(
    make_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"bf16": True, "pure_bf16": True, "cuda_graph": True}
    show(make_job(resume_from_checkpoint=str(tmp_path / "gone"), **keys))
    printed = words(capsys.readouterr().out)
    assert "bf16: true changes nothing: pure_bf16: true wins" in printed
    assert f"there is no folder {tmp_path / 'gone'}" in printed.replace("- ", "-")
    assert "this machine has no GPU, and the plan is for GPUs" in printed
    assert "cuda_graph: true: a Ray without GPUs refuses this job" in printed
    assert "no cluster was checked for this job: raytrain-adv preflight" in printed


def test_a_plan_names_what_this_machine_would_refuse(make_job: Any) -> None:
    job = make_job(fp8=True, fp8_min_features=0)
    hopper = "not on this machine: FP8 requires Hopper architecture (compute capability 9.0 or "
    assert any(one.startswith(hopper) for one in remarks(job, 1, hardware.detect("cpu")))
    assert not any(one.startswith(hopper) for one in remarks(job, 1, H200))


def test_a_plan_for_cpus_or_existing_gpus_has_no_remark_on_gpus(make_job: Any) -> None:
    assert len(remarks(make_job(use_cpu=True), 2, hardware.detect("cpu"))) == 1
    assert len(remarks(make_job(), 1, H200)) == 1
    assert "this machine has 1 GPU for 8 workers" in remarks(make_job(), 8, H200)


@pytest.mark.parametrize(("capability", "is_slow"), [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_that_computes_it_slowly_is_noted(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, capability: str, is_slow: bool
) -> None:
    """A run seems to hang: a step of a model of 135M parameters took minutes."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for keys, expected in (({"bf16": True}, is_slow), ({}, False)):
        found = remarks(make_job(use_cpu=True, **keys), 2, hardware.detect("cpu"))
        assert any("AVX-512" in remark for remark in found) == expected


def test_a_plan_states_what_a_launch_does_to_a_run_in_output_dir(make_job: Any) -> None:
    """A finished run was deleted by a launch whose plan had not named it."""

    def of_launch(**keys: Any) -> list[str]:
        every = remarks(make_job(use_cpu=True, **keys), 2, hardware.detect("cpu"))
        return [one for one in every if "a launch" in one]

    assert of_launch(compare_with="saves/none") == [
        "a launch is refused: There is no report to read (compare_with: saves/none)"
    ]
    assert not of_launch() and not Path(make_job().output.output_dir).exists()
    open_output(make_job(use_cpu=True)).note(make_job(use_cpu=True), "done", 1)
    assert "a launch is refused: This job has run to its end" in of_launch()[0]
    assert " is kept in " in of_launch(overwrite_output_dir=True)[0]
    deletes = {"overwrite_output_dir": True, "delete_previous_run": True}
    assert " is deleted " in of_launch(**deletes)[0]
    assert of_launch(resume_from_checkpoint=True)[0].startswith("a launch does nothing")


def test_missing_data_is_refused_as_in_a_run(make_job: Any, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"missing\.json"):
        show(make_job(dataset=str(tmp_path / "missing.json")))


def test_planning_imports_no_ray() -> None:
    code = "import sys, raytrain_adv.driver.plan; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tokenizer_that_llamacpp_cannot_name_is_refused_before_training(tmp_path: Path) -> None:
    """Training ran to its end, and no GGUF file was written."""
    model = write_checkpoint(
        "llama", tmp_path / "model", vocab_size=512, hidden_size=64, intermediate_size=64
    )

    def plan(vocab: dict[str, int], **keys: Any) -> RunPlan:
        start: dict[str, Any] = {"vocab": vocab, "unk_token": "a", **keys}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split |= {"use_regex": True}
        tokenizer = {"version": "1.0", "model": start, "added_tokens": [], "pre_tokenizer": split}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        loaded = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "a", "eos_token": "b"}
        (model / "tokenizer_config.json").write_text(json.dumps(loaded))
        qat = {"enable_qat": True, "qat_target": "llamacpp-q8_0", "pure_bf16": True}
        job = job_for(model, tmp_path / "job", stage="pt", max_steps=4, **qat)
        return resolve(job, world_size=1, data=DATA)

    with pytest.raises(JobError, match="name of this tokenizer is not known") as error:
        plan({"a": 0, "b": 1}, type="WordLevel")
    assert error.value.found == "WordLevel" and "vllm-w4a16" in error.value.fix
    with pytest.raises(JobError, match="no room for a token") as error:
        plan({"a": 0, "b": 512}, type="BPE", merges=[])
    assert error.value.found == "'b' has id 512, and the model 512 embeddings"
    assert plan({"a": 0, "b": 511}, type="BPE", merges=[]).seq_len

"""The quantized folder loads without this package and computes what training computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.config import JobConfig, load
from raytrain_adv.driver.commands import export
from raytrain_adv.errors import TrainingError
from raytrain_adv.export import model_folder
from raytrain_adv.export.convert import Piece, describe, write_converted
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.verify import load_folder, read_scheme
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.transforms.applied import Transforms
from tests.conftest import MakeJob
from tests.noted import note_done
from tests.tiny_models import job_for, write_checkpoint
from tests.workers import run_workers

CPU = torch.device("cpu")
TOKENS = torch.arange(24)
Case = tuple[str, dict[str, Any]]

INT4 = {"qat_weight_dtype": "int4", "qat_activation_dtype": "int8"}
FLOAT8: dict[str, Any] = {"qat_weight_dtype": "float8_e4m3fn", "qat_group_size": None}
CASES: dict[str, Case] = {
    "int8 x int8 g32": (
        "llama",
        {"qat_activation_dtype": "int8", "qat_group_size": 32, "qat_quantize_embedding": True},
    ),
    "int4 x int8": ("llama", INT4),
    "int4 x int8, tied": ("llama-tied", {**INT4, "qat_quantize_embedding": True}),
    "int4 x int8, tied, head and embedding left": ("llama-tied", INT4),
    "int8": ("qwen2", {}),
    "int4, float32": ("llama", {"qat_weight_dtype": "int4", "pure_bf16": False}),
    "int4 x int8 per channel": ("qwen3", {**INT4, "qat_group_size": None}),
    "int3": ("gemma2", {"qat_weight_dtype": "int3"}),
    "int2, layers left": ("phi3", {"qat_weight_dtype": "int2", "qat_exclude": "o_proj"}),
    "experts left": ("mixtral", {**INT4, "qat_exclude": "experts"}),
    "a shared expert": ("qwen2_moe", {**INT4, "qat_exclude": "experts"}),
    "float8": ("llama-tied", FLOAT8),
    "float8, float32": ("llama", {**FLOAT8, "pure_bf16": False}),
}
LOAD = """
import sys
sys.modules["raytrain_adv"] = None
import json, torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    expected, attention = torch.load(folder + ".expected")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(24).unsqueeze(0)).logits.float()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    found[folder] = {
        "difference": float((logits - expected.float()).abs().max()),
        "wrong": {kind: sorted(map(str, names)) for kind, names in info.items() if names},
        "quantized": sum(hasattr(p, "qdata") for p in model.parameters()),
        "head": type(head.data).__name__,
        "embedding": type(embedding.data).__name__,
        "tied": head is embedding,
        "dtype": str(model.dtype),
    }
print("FOUND " + json.dumps(found))
"""


def qat_job(kind: str, place: Path, **keys: Any) -> JobConfig:
    source = write_checkpoint(kind, place / "source", intermediate_size=64)
    with_zeros(source)
    standard = {"enable_qat": True, "pure_bf16": True, "qat_group_size": 8}
    return job_for(source, place / "job", **{**standard, **keys})


def with_zeros(folder: Path) -> None:
    """Make a row of a linear's weight zero."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight") or "o_proj" in name)
    tensors[name][3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def trained(job: JobConfig) -> Any:
    model = build(job)
    plans = Transforms(job).prepare(model)
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, 3)
    return model.eval()


def fresh(*folders: Path) -> dict[str, dict[str, Any]]:
    """Load folders in a process that cannot import this package."""
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, ran.stderr
    found: dict[str, dict[str, Any]] = json.loads(lines[0].removeprefix("FOUND "))
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Quantize each case's checkpoint into several files, and load all of them elsewhere."""
    folders = {}
    for number, (case, (kind, keys)) in enumerate(CASES.items()):
        place = tmp_path_factory.mktemp(f"case{number}")
        job = qat_job(kind, place, **keys)
        folders[case] = place / "quantized"
        folders[case].mkdir()
        dtype = torch.bfloat16 if job.train.pure_bf16 else torch.float32
        source = Path(job.model.model_name_or_path)
        write_converted(source, folders[case], job, dtype, CPU, 12_000)
        model = trained(job)
        with torch.no_grad():
            logits = model(input_ids=TOKENS.unsqueeze(0)).logits
        # transformers 5.17 would load Gemma 2 with another attention than it trains with.
        attention = model.config._attn_implementation
        torch.save((logits, attention), f"{folders[case]}.expected")
    found = fresh(*folders.values())
    return {case: {**found[str(f)], "folder": f} for case, f in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_without_this_package_and_computes_the_same_bits(
    case: str, loaded: dict[str, dict[str, Any]]
) -> None:
    assert loaded[case]["wrong"] == {}
    assert loaded[case]["quantized"] > 0
    assert loaded[case]["difference"] == 0.0
    assert loaded[case]["dtype"] == (
        "torch.float32" if case.endswith("float32") else "torch.bfloat16"
    )


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("mixtral", INT4),
        ("qwen3_moe", {"qat_weight_dtype": "int2", "qat_group_size": None}),
        ("gpt_oss", {"qat_weight_dtype": "int8", "qat_group_size": 8}),
        ("gpt_oss", FLOAT8),
        ("llama4_text", {**INT4, "qat_group_size": 8}),
    ],
)
def test_stacked_experts_load_and_compute_the_same_bits(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    job = qat_job(kind, tmp_path, **keys)
    (tmp_path / "quantized").mkdir()
    source = Path(job.model.model_name_or_path)
    write_converted(source, tmp_path / "quantized", job, torch.bfloat16, CPU, 12_000)
    model = trained(job)
    again = load_folder(tmp_path / "quantized", False, model.config._attn_implementation).eval()
    stacks = [p for p in again.parameters() if p.ndim == 3]
    assert len(stacks) == 4 and all(hasattr(p, "qdata") for p in stacks)
    ids = TOKENS.unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_tied_embedding_is_quantized_and_its_head_is_not(
    loaded: dict[str, dict[str, Any]],
) -> None:
    case = loaded["int4 x int8, tied"]
    assert (case["embedding"], case["head"]) == ("IntxUnpackedToInt8Tensor", "Tensor")
    assert loaded["int4 x int8, tied, head and embedding left"]["tied"]


def test_each_of_several_files_carries_the_whole_description(
    loaded: dict[str, dict[str, Any]],
) -> None:
    files = sorted(loaded["int4 x int8"]["folder"].glob("model-*.safetensors"))
    assert len(files) > 2
    described = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            described.append(opened.metadata())
    assert all(one == described[0] for one in described)
    names = json.loads(described[0]["tensor_names"])
    assert "model.layers.1.mlp.down_proj.weight" in names and "lm_head.weight" in names


def test_names_that_torchao_cannot_read_are_not_described() -> None:
    pieces = [Piece(name, (2,), torch.Tensor) for name in ("image_newline", "model.bias")]
    described, size = describe(pieces, {}, {}, lambda _: torch.float32)
    assert json.loads(described["tensor_names"]) == ["model.bias"] and size == 16


def test_the_config_names_what_was_left_alone(loaded: dict[str, dict[str, Any]]) -> None:
    config = json.loads((loaded["int2, layers left"]["folder"] / "config.json").read_text())
    chosen = config["quantization_config"]["quant_type"]["default"]["_data"]["fqn_to_config"]
    alone = {fqn for fqn, kind in chosen.items() if kind is None}
    assert alone == {"lm_head", *(f"model.layers.{n}.self_attn.o_proj" for n in (0, 1))}


def test_linears_that_transformers_splits_while_it_loads_are_quantized_by_their_own_names(
    tmp_path: Path,
) -> None:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import Chunk, WeightConverter

    split = WeightConverter(
        source_patterns=["mlp.gate_up.weight"],
        target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[Chunk(dim=0)],
    )
    job = qat_job("qwen2", tmp_path, **INT4, qat_exclude="up_proj")
    source, out = Path(job.model.model_name_or_path), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    for n in (0, 1):
        parts = [tensors.pop(f"model.layers.{n}.mlp.{p}_proj.weight") for p in ("gate", "up")]
        tensors[f"model.layers.{n}.mlp.gate_up.weight"] = torch.cat(parts)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    before = get_checkpoint_conversion_mapping("qwen2")
    register_checkpoint_conversion_mapping("qwen2", [split], overwrite=True)
    try:
        out.mkdir()
        write_converted(source, out, job, torch.bfloat16, CPU)
        with torch.no_grad():
            wanted = trained(job)(input_ids=TOKENS.unsqueeze(0)).logits
    finally:
        register_checkpoint_conversion_mapping("qwen2", before or [], overwrite=True)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=TOKENS.unsqueeze(0)).logits
    assert torch.equal(found, wanted)


def test_float8_products_leave_out_linears_of_sizes_they_cannot_take(tmp_path: Path) -> None:
    source = write_checkpoint("llama", tmp_path / "m", intermediate_size=56)
    keys = {**FLOAT8, "qat_activation_dtype": "float8_e4m3fn", "qat_quantize_embedding": False}
    job = job_for(source, tmp_path / "job", enable_qat=True, bf16=True, **keys)
    plan = Transforms(job).plan(build(job))["qat"]
    assert "model.layers.0.self_attn.q_proj" in plan.changes
    assert "divisible by 16" in plan.skipped["model.layers.0.mlp.down_proj"]


def corrupted(*args: Any, **named: Any) -> None:
    """Write as ever, then double a scale."""
    write_converted(*args, **named)
    file = args[1] / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj._weight_scale"][0] *= 2
    save_file(tensors, file, metadata=metadata)


def test_a_quantized_model_that_computes_something_else_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = qat_job("llama", tmp_path, **INT4), tmp_path / "run" / "model"
    monkeypatch.setattr(model_folder, "write_converted", corrupted)
    with pytest.raises(TrainingError, match="does not compute what was trained") as error:
        export_model(trained(job), job, out, input_ids=TOKENS)
    assert "logits differ by" in error.value.found and "bit for bit" in error.value.found
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_rotations_of_oft_are_trained_on_the_rounded_base_and_exported_next_to_it(
    tmp_path: Path,
) -> None:
    oft = {"finetuning_type": "oft", "oft_block_size": 8, "bf16": True, "pure_bf16": False}
    job = qat_job("llama", tmp_path, **INT4, **oft)
    model = trained(job)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.1)
    exported = export_model(model, job, tmp_path / "model", input_ids=TOKENS)
    assert exported.figures()["quantized_logit_difference"] == 0.0
    kept = json.loads((tmp_path / "model" / "adapter_config.json").read_text("utf-8"))
    assert (kept["peft_type"], kept["oft_block_size"]) == ("OFT", 8)


def test_after_lora_the_base_is_quantized_and_the_adapter_next_to_it(tmp_path: Path) -> None:
    lora = {"finetuning_type": "lora", "lora_rank": 4, "bf16": True, "pure_bf16": False}
    job = qat_job("llama", tmp_path, **INT4, **lora, qat_exclude="up_proj")
    model = trained(job)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    exported = export_model(model, job, tmp_path / "model", input_ids=TOKENS)
    assert exported.figures()["quantized_logit_difference"] == 0.0
    again = AutoModelForCausalLM.from_pretrained(exported.figures()["quantized_dir"])
    layer = again.model.layers[0].mlp
    assert hasattr(layer.down_proj.base_layer.weight, "qdata")
    assert not hasattr(layer.up_proj.base_layer.weight, "qdata")
    kept = model.get_parameter("model.layers.0.mlp.down_proj.lora_B.default.weight")
    # transformers 5.17 loads it in float32.
    assert torch.equal(layer.down_proj.lora_B.default.weight.bfloat16(), kept.bfloat16())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for f in folder.glob("*.safetensors") for name, t in load_file(f).items()}


def same_folder(a: Path, b: Path) -> bool:
    x, y = tensors_of(a), tensors_of(b)
    same = x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    configs = [json.loads((p / "config.json").read_text()) for p in (a, b)]
    return same and configs[0] == configs[1]


def note(job_path: Path) -> JobConfig:
    """Write run.json, as the driver does."""
    job = load(job_path)
    note_done(job)
    return job


def test_a_sharded_run_exports_what_it_trained_and_so_does_the_command_from_its_checkpoint(
    job_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = {"enable_qat": True, "qat_activation_dtype": "int8", "bf16": True, "val_size": 8}
    saved = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    run = tmp_path / "out"
    full = job_file("full.yaml", **example, **saved)
    base = {"model_name_or_path": str(run / "model"), "train_from_scratch": False}
    other = {"finetuning_type": "lora", "output_dir": str(tmp_path / "lora"), "max_steps": 2}
    lora = job_file("lora.yaml", **{**example, **base, **other, **saved, "save_steps": 2})
    for figures in run_workers(2, full, lora):
        assert figures["quantized_logit_difference"] == 0.0

    note(full)
    assert main(["export", str(run), "--output", str(tmp_path / "again")]) == 0
    assert "logits differ by 0 from" in capsys.readouterr().out
    for name in ("model", "model-quantized"):
        assert same_folder(run / name, tmp_path / "again" / name)
    assert main(["export", str(run), "--checkpoint", "step_3"]) == 0
    assert not same_folder(run / "model", run / "exported-step_3" / "model")
    assert main(["export", str(run), "--checkpoint", "step_4"]) == 2
    assert "there are step_3, step_6" in capsys.readouterr().err
    asked = ["qat_weight_dtype=int4", "qat_group_size=8", "--output", str(tmp_path / "int4")]
    assert main(["export", str(run), *asked]) == 0
    # The keys of its own form are not for another target.
    formats = ["--output", str(tmp_path / "formats"), "--format", "vllm-w8a8-int8,vllm-fp8"]
    assert main(["export", str(run), *formats]) == 0
    assert read_scheme(tmp_path / "formats" / "vllm-fp8" / "model-quantized") is not None

    note(lora)
    assert main(["export", str(tmp_path / "lora"), "--output", str(tmp_path / "lora2")]) == 0
    names = ("adapter_model.safetensors", "model.safetensors")
    for name in names:
        ours = load_file(tmp_path / "lora2" / "model-quantized" / name)
        runs = load_file(tmp_path / "lora" / "model-quantized" / name)
        assert ours.keys() == runs.keys() and all(torch.equal(ours[k], runs[k]) for k in ours)


@pytest.mark.parametrize("word", ["false", "no", "No", "off", "OFF", "'false'"])
def test_qat_is_left_out_of_an_export_in_any_spelling_of_no(
    job_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    keys = {"enable_qat": True, "qat_weight_dtype": "int4", "qat_group_size": 8}
    (tmp_path / "out").mkdir()
    note(job_file(**keys))
    assert main(["export", str(tmp_path / "out"), f"enable_qat={word}"]) == 2
    assert "the run has no complete checkpoint" in capsys.readouterr().err


def test_any_model_folder_is_quantized_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = qat_job("qwen2", tmp_path, **INT4)
    source, out = job.model.model_name_or_path, tmp_path / "ptq"
    keys = ["enable_qat=true", "qat_group_size=8", *(f"{k}={v}" for k, v in INT4.items())]
    capsys.readouterr()
    assert main(["export", source, "--output", str(out), *keys]) == 0
    said = capsys.readouterr()
    assert "KiB" in said.out and said.err == ""
    assert "logits differ by 0 from the source's with fake quantization " in said.out
    with torch.no_grad():
        wanted = trained(job)(input_ids=TOKENS.unsqueeze(0)).logits
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=TOKENS.unsqueeze(0)).logits
    assert torch.equal(wanted, found)
    assert main(["export", source, "--output", str(out), *keys]) == 2
    assert "exists already" in capsys.readouterr().err


def test_ptq_that_computes_something_else_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_checkpoint("llama", tmp_path / "m"))
    keys = ["--output", str(tmp_path / "ptq"), "enable_qat=true", "qat_group_size=8"]

    monkeypatch.setattr(export, "write_converted", corrupted)
    assert main(["export", source, *keys]) == 3
    assert "does not compute what its source does" in capsys.readouterr().err
    assert not (tmp_path / "ptq").exists()


def test_ptq_reports_why_it_was_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_checkpoint("llama", tmp_path / "m"))
    to = ["--output", str(tmp_path / "float8"), "enable_qat=true", "qat_weight_dtype=float8_e4m3fn"]
    assert main(["export", source, *to, "qat_activation_dtype=float8_e4m3fn"]) == 0
    assert "not compared: float8 products need a GPU" in capsys.readouterr().out
    free = SimpleNamespace(available=1)
    monkeypatch.setattr(export.psutil, "virtual_memory", lambda: free)
    to = ["--output", str(tmp_path / "int8"), "enable_qat=true", "qat_group_size=8"]
    assert main(["export", source, *to]) == 0
    assert "GiB of memory, and 0.0 are free" in capsys.readouterr().out


def test_the_command_reports_what_it_cannot_do(
    tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_checkpoint("llama", tmp_path / "m"))
    job = make_job()
    run = job.output.output_dir
    note_done(job)
    (Path(run) / "checkpoints" / "old").mkdir(parents=True)
    out = ["--output", str(tmp_path / "new")]
    cases = {
        "Missing argument 'RUN|MODEL": [],
        "neither a run's output_dir nor a model folder": [str(tmp_path / "none"), *out],
        "name one of the runs in it": [str(Path(run).parent), *out],
        "it lies in the run": [f"{run}/checkpoints/old", *out],
        "enable_qat: true is missing": [model, *out],
        "--output is missing": [model, "enable_qat=true"],
        "is not a key of this command": [model, *out, "enable_qat=true", "learning_rate=1"],
        "affects only how a model is trained": [run, "fake_quant_after_n_steps=5"],
        "a model folder has no checkpoints": [model, "--checkpoint", "step_1", "enable_qat=true"],
        "the run has no complete checkpoint": [run],
        "does not divide": [model, *out, "enable_qat=true", "qat_group_size=24"],
        "No such option '--quiet'": [model, "--quiet"],
    }
    for said, arguments in cases.items():
        assert main(["export", *arguments]) == 2, said
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

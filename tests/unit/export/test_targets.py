"""What qat_target exports is what training rounds to, and compressed-tensors reads it so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.config import JobConfig
from raytrain_adv.driver.commands.export import prepared_model
from raytrain_adv.driver.commands.use.load import _of_gguf
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.export import layout
from raytrain_adv.export.convert import write_converted
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.reference import read_reference
from raytrain_adv.export.verify import (
    Comparison,
    compare_converted,
    converted_logits,
    load_folder,
    read_scheme,
)
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.experts.find import stacked
from raytrain_adv.ops.fake_quant import compressed_tensors, gguf_file
from raytrain_adv.ops.fake_quant.compressed_tensors import read_back
from raytrain_adv.ops.fake_quant.experts import FakeQuantizedExperts, _rounded
from raytrain_adv.ops.fake_quant.targets import COMPRESSED, TARGETS
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.qat import Qat
from tests.tiny_models import KINDS, job_for, write_checkpoint

CPU = torch.device("cpu")
WIDE = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 96}
IN_BLOCKS = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 128, "vocab_size": 96}
IN_BLOCKS |= {"num_attention_heads": 2, "num_key_value_heads": 2}
TOKENS = torch.arange(24).unsqueeze(0)
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    "w4a16 g32": ("qwen3", {"qat_target": "vllm-w4a16"}),
    "w4a16 g64, tied": ("llama-tied", {"qat_target": "vllm-w4a16", "qat_group_size": 64}),
    "w4a16 per channel, part": (
        "llama",
        {"qat_target": "vllm-w4a16", "qat_group_size": None, "qat_exclude": "down_proj"},
    ),
    "w8a8": ("qwen2", {"qat_target": "vllm-w8a8-int8"}),
    "float8 weights": ("llama", {"qat_target": "vllm-fp8", "qat_activation_dtype": "none"}),
    "float8 weights, biases": ("qwen2", {"qat_target": "vllm-fp8", "qat_activation_dtype": "none"}),
    "float8 blocks": (
        "llama",
        {"qat_target": "vllm-fp8-block", "qat_activation_dtype": "none"},
    ),
    "float8 blocks, inputs too": ("llama", {"qat_target": "vllm-fp8-block"}),
    "nvfp4": ("llama", {"qat_target": "vllm-nvfp4a16"}),
    "mxfp4": ("gemma2", {"qat_target": "vllm-mxfp4a16"}),
}


def target_job(kind: str, place: Path, **keys: Any) -> JobConfig:
    sizes = IN_BLOCKS if keys.get("qat_target") == "vllm-fp8-block" else WIDE
    if "moe_intermediate_size" in KINDS[kind]:
        sizes = {**sizes, "moe_intermediate_size": 128, "norm_topk_prob": True}
    source = write_checkpoint(kind, place / "source", **sizes)
    return job_for(source, place / "job", **{"enable_qat": True, "pure_bf16": True, **keys})


def prepared(job: JobConfig) -> Any:
    model = build(job)
    Transforms(job).prepare(model)
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    return model


def write(job: JobConfig, folder: Path) -> Path:
    folder.mkdir()
    write_converted(Path(job.model.model_name_or_path), folder, job, torch.bfloat16, CPU, 12_000)
    return folder


def written_and_compared(job: JobConfig, model: Any, out: Path) -> tuple[Path, Comparison]:
    wanted = converted_logits(model, job, TOKENS, torch.bfloat16)
    folder = write(job, out)
    how = model.config._attn_implementation
    return folder, compare_converted(folder, job, TOKENS, wanted, how)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_it_and_computes_what_was_trained(case: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    job = target_job(CASES[case][0], tmp_path, **CASES[case][1])
    _, found = written_and_compared(job, prepared(job), tmp_path / "out")
    assert found.difference is not None
    rounds_inputs = case in ("w8a8", "float8 blocks, inputs too")
    assert (found.difference == 0) != rounds_inputs
    assert ("KL" in found.how) == rounds_inputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fault", ["scale", "zero point", "transposed", "value"])
def test_a_planted_fault_stops_the_export(
    case: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = compressed_tensors.stored

    def wrong(name: str, weight: torch.Tensor, scheme: Any) -> dict[str, torch.Tensor]:
        tensors = stored(name, weight, scheme)
        if weight.is_meta or "layers.1.self_attn.k_proj" not in name:
            return tensors
        values, scale = next(k for k in tensors if "scale" not in k), f"{name}_scale"
        if fault == "scale":
            rolled = torch.roll(tensors[scale].view(torch.uint8), 1, 0)
            tensors[scale] = rolled.view(tensors[scale].dtype)
        elif fault == "zero point":
            tensors[values] = (tensors[values].view(torch.uint8) ^ 0x88).view(tensors[values].dtype)
        elif fault == "transposed":
            return {**tensors, **stored(name, weight.flip(0), scheme)}
        else:
            tensors[values].view(torch.uint8)[3, 1] ^= 1
        return tensors

    monkeypatch.setattr(compressed_tensors, "stored", wrong)
    job = target_job(CASES[case][0], tmp_path, **CASES[case][1])
    with pytest.raises(TrainingError) as error:
        write(job, tmp_path / "out")
    assert "layers.1.self_attn.k_proj.weight was not written" in error.value.what
    assert "in training" in error.value.found


@pytest.mark.parametrize(
    ("target", "width", "named"),
    [
        ("vllm-w4a16", 96, "set qat_group_size: 32 or null (one scale per channel), or leave"),
        ("executorch-8da4w", 192, "set qat_group_size: 32 or 64, or leave"),
        ("llamacpp-q8_0", 80, "leave layers out with qat_exclude"),
    ],
)
def test_group_sizes_that_the_engine_takes_are_named(
    target: str, width: int, named: str, tmp_path: Path
) -> None:
    """8 and 16 were named too, and null for engines without a scale per channel."""
    sizes = {**WIDE, "intermediate_size": width}
    source = write_checkpoint("llama", tmp_path / "source", **sizes)
    size = 32 if width == 80 else 128
    job = job_for(
        source,
        tmp_path / "job",
        enable_qat=True,
        pure_bf16=True,
        qat_target=target,
        qat_group_size=size,
    )
    with pytest.raises(JobError, match="does not divide") as error:
        Transforms(job).plan(build(job))
    assert error.value.fix.startswith(named)


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    folder = write(target_job("llama", tmp_path, qat_target="vllm-w4a16"), tmp_path / "out")
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    stem = "model.layers.0.mlp.up_proj.weight"
    assert tensors[f"{stem}_packed"].nbytes * 2 == 128 * 128
    assert tensors[f"{stem}_scale"].shape == (128, 4)
    assert tensors[f"{stem}_scale"].dtype == torch.bfloat16


def test_what_is_left_out_is_named_and_the_tied_head_stays_tied(tmp_path: Path) -> None:
    job = target_job("llama-tied", tmp_path, qat_target="vllm-w4a16", qat_exclude="down_proj")
    folder = write(job, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    names = {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert set(config["quantization_config"]["ignore"]) == {*names, "lm_head"}


def with_adapter(case: str, place: Path) -> tuple[JobConfig, Any]:
    """Return a job that rounds the base alone, and its model with an adapter that is not zero."""
    lora = {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8}
    lora |= {"bf16": True, "pure_bf16": False}
    job = target_job(CASES[case][0], place, **CASES[case][1], **lora)
    model, _ = prepared_model(job)
    load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, Transforms(job).plan(build(job)), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return job, model


@pytest.mark.parametrize("case", [c for c in CASES if "inputs too" not in c])
def test_an_adapter_next_to_its_rounded_base_is_compared_with_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    job, model = with_adapter(case, tmp_path)
    tokens = torch.arange(24)
    found = export_model(model, job, tmp_path / "model", input_ids=tokens).figures()
    assert (found["quantized_logit_difference"] == 0) == (case != "w8a8")
    folder = Path(found["quantized_dir"])
    assert read_reference(folder)["tokens"].tolist() == tokens.tolist()
    # vLLM takes the adapter's file for the model's if this does not name the model's.
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(folder / "model.safetensors").keys()


def test_verify_asks_transformers_of_a_rounded_base_with_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    job, model = with_adapter("w4a16 g32", tmp_path)
    export_model(model, job, tmp_path / "model", input_ids=torch.arange(24))
    assert main(["verify", str(tmp_path / "model-quantized"), "--engine", "transformers"]) == 0


NONE = {"qat_activation_dtype": "none"}
MIXTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "w4a16": ("mixtral", {"qat_target": "vllm-w4a16"}, "bit for bit"),
    "w4a16 per channel": (
        "deepseek_v3",
        {"qat_target": "vllm-w4a16", "qat_group_size": None},
        "bit for bit",
    ),
    "float8": ("qwen3_moe", {"qat_target": "vllm-fp8"}, "KL"),
    "float8 blocks": ("mixtral", {"qat_target": "vllm-fp8-block"}, "unpacks no experts"),
    "w8a8": ("qwen3_moe", {"qat_target": "vllm-w8a8-int8"}, "unpacks no experts"),
    "nvfp4": ("qwen3_moe", {"qat_target": "vllm-nvfp4a16"}, "unpacks no experts"),
    "mxfp4": ("mixtral", {"qat_target": "vllm-mxfp4a16"}, "unpacks no experts"),
    "w4a16, a layer's left out": (
        "mixtral",
        {"qat_target": "vllm-w4a16", "qat_exclude": "model.layers.1.mlp.experts"},
        "loads no plain experts",
    ),
}
"""Name -> family, keys, and how the export was compared with training."""


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_are_written_one_by_one_as_engines_take_them(case: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    kind, keys, compared = MIXTURES[case]
    job = target_job(kind, tmp_path, **keys)
    model = prepared(job)
    folder, found = written_and_compared(job, model, tmp_path / "out")
    assert compared in found.how and (found.difference is None) == ("experts" in compared)
    if found.difference is None:  # NVFP4 would load without an error, with other values
        with pytest.raises(JobError, match="transformers cannot load"):
            load_folder(folder, False, None)
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    ignored = [one.removeprefix("re:") for one in config["ignore"]]
    scheme = job.transform(Qat).layer_config(job.transform(Qat).activation_dtype)
    rounded = {fqn: m for fqn, m in model.named_modules() if isinstance(m, FakeQuantizedExperts)}
    assert rounded and len(rounded) == len(stacked(model)) - ("left out" in case)
    for fqn, experts in rounded.items():
        prefix = fqn.replace("mlp", "block_sparse_moe") if kind == "mixtral" else fqn
        names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        gate_up, down = experts.gate_up_proj, experts.down_proj
        for number in range(len(down)):
            matrices = (*gate_up[number].chunk(2), down[number])
            for name, matrix in zip(names, matrices, strict=True):
                stem = f"{prefix}.{number}.{name}"
                held = {k: v for k, v in tensors.items() if k.startswith(f"{stem}.")}
                size = scheme.group_size or matrix.shape[1]
                trained, _ = _rounded(matrix.detach(), scheme.weight_form, size)
                stored = read_back(f"{stem}.weight", held, scheme, torch.bfloat16)
                assert torch.equal(stored, trained.bfloat16()), stem
                assert not any(re.fullmatch(one, stem) for one in ignored)
    left_out = [n for n in tensors if re.search(r"\.experts\.\d+\.\w+\.weight$", n)]
    for name in left_out:
        if f"{name}_scale" not in tensors:
            assert any(re.fullmatch(one, name.removesuffix(".weight")) for one in ignored)


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        ("mixtral", {"qat_target": "executorch-8da4w"}, "XNNPACK"),
        ("mixtral", {"qat_target": "vllm-fp8", **NONE}, "inputs that are not rounded"),
        ("gpt_oss", {"qat_target": "vllm-w4a16"}, "checkpoints of gpt_oss keep all experts in one"),
        ("llama4_text", {"qat_target": "vllm-fp8"}, "checkpoints of llama4_text"),
    ],
)
def test_experts_that_an_engine_does_not_take_are_refused(
    kind: str, keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    job = target_job(kind, tmp_path, **keys)
    with pytest.raises(JobError, match="does not round this model's experts") as error:
        Transforms(job).plan(build(job))
    assert why in error.value.found


def test_experts_of_widths_that_marlin_lacks_are_left_out(tmp_path: Path) -> None:
    source = write_checkpoint("mixtral", tmp_path / "source", **{**WIDE, "hidden_size": 64})
    job = job_for(source, tmp_path / "job", enable_qat=True, qat_target="vllm-w4a16")
    plan = Transforms(job).plan(build(job))["qat"]
    assert "Marlin" in plan.skipped["model.layers.0.mlp.experts"]


def test_experts_that_are_stored_as_one_tensor_are_refused(tmp_path: Path) -> None:
    """As transformers' own state has them, whose names no engine knows."""
    job = target_job("mixtral", tmp_path, qat_target="vllm-w4a16")
    source = Path(job.model.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    save_file({k: v.clone() for k, v in model.state_dict().items()}, source / "model.safetensors")
    with pytest.raises(JobError, match="one by one"):
        write(job, tmp_path / "out")


@pytest.mark.parametrize("target", ["vllm-w4a16", "vllm-fp8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_experts_that_are_left_out_are_named_and_exported(
    kind: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"shared_expert_intermediate_size": 32} if kind == "qwen2_moe" else {}
    source = write_checkpoint(kind, tmp_path / "source", **WIDE, **shared)
    keys = ["qat_exclude=experts", "qat_activation_dtype=none"]
    command = ["export", str(source), *keys, "--output", str(tmp_path), "--format", target]
    assert main(command) == 0
    is_loaded = kind == "gpt_oss" or (target == "vllm-fp8" and kind != "llama4_text")
    expected = "bit for bit" if is_loaded else "transformers 5.23 loads no plain experts"
    assert expected in capsys.readouterr().out
    config = json.loads((tmp_path / target / "config.json").read_text())
    ignored = [n.removeprefix("re:") for n in config["quantization_config"]["ignore"]]
    tensors = load_file(tmp_path / target / "model.safetensors")
    stems = {n.rpartition(".")[0] for n in tensors if "scale" in n}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if tensor.ndim > 1 and name.rpartition(".")[0] not in stems and "embed" not in name:
            assert any(re.fullmatch(one, stem) for one in ignored), name
    assert stems and not any(re.fullmatch(one, stem) for one in ignored for stem in stems)


def test_linears_that_engines_fuse_are_rounded_together(tmp_path: Path) -> None:
    job = target_job("llama", tmp_path, qat_target="vllm-w4a16", qat_exclude="k_proj")
    with pytest.raises(JobError, match="left out") as error:
        Transforms(job).plan(build(job))
    assert "q_proj" in error.value.what


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_sets_its_keys_and_refuses_others(name: str, tmp_path: Path) -> None:
    def qat(**keys: Any) -> Qat:
        keys = {"enable_qat": True, "qat_target": name, "bf16": True, **keys}
        return job_for(tmp_path, tmp_path, **keys).transform(Qat)

    found = qat()
    for key, values in TARGETS[name].keys().items():
        assert getattr(found, key) == values[0]
    for key, value in {"qat_group_size": 8, "qat_weight_dtype": "int2"}.items():
        with pytest.raises(JobError) as error:
            qat(**{key: value})
        assert f"{name} takes {key}: " in str(error.value)


@pytest.mark.parametrize("keys", [{}, *({"qat_target": name} for name in TARGETS)])
def test_the_plan_states_who_multiplies_the_form(keys: dict[str, Any], tmp_path: Path) -> None:
    job = target_job("llama", tmp_path, **keys)
    notes = "\n".join(Transforms(job).plan(build(job))["qat"].notes)
    near = "nearest that is fast: qat_target: llamacpp-q8_0"
    assert (TARGETS[keys["qat_target"]].engine if keys else near) in notes


def test_the_scheme_of_a_folder_is_read_from_it(tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        if target.layout == COMPRESSED:
            job = target_job("llama", tmp_path / name, qat_target=name)
            scheme = read_scheme(write(job, tmp_path / name / "out"))
            assert scheme is not None
            assert bool(scheme["input_activations"]) == (target.activation_dtypes[0] != "none")


@pytest.mark.parametrize("target", ["llamacpp-q8_0", "llamacpp-q4_0"])
@pytest.mark.parametrize("fault", ["", "scale", "value", "transposed"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_ggufs_blocks_hold_what_training_rounds_to(
    kind: str, target: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="it is part of the extra dev")
    job = gguf_job(kind, tmp_path, target)
    blocks = gguf_file._blocks

    def wrong(weight: torch.Tensor, form: str) -> Any:
        found = blocks(weight.flip(0) if fault == "transposed" else weight, form)
        if fault in ("scale", "value"):
            found[..., 5, 1 if fault == "scale" else 7] ^= 1
        return found

    monkeypatch.setattr(gguf_file, "_blocks", wrong)
    if fault:
        with pytest.raises(TrainingError, match=r"model\.gguf is not what was trained"):
            write(job, tmp_path / "out")
    else:
        assert (write(job, tmp_path / "out") / "model.gguf").is_file()


def gguf_job(kind: str, place: Path, target: str) -> JobConfig:
    job = target_job(kind, place, qat_target=target)
    words = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    split = {"type": "ByteLevel", "add_prefix_space": False}
    text = json.dumps({"model": words, "added_tokens": [], "pre_tokenizer": split})
    (Path(job.model.model_name_or_path) / "tokenizer.json").write_text(text)
    return job


def test_the_commands_read_a_mixtures_gguf_as_it_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="it is part of the extra dev")
    job = gguf_job("qwen3_moe", tmp_path, "llamacpp-q8_0")
    model = prepared(job)
    wanted = converted_logits(model, job, TOKENS, torch.float32).logits
    found = _of_gguf(write(job, tmp_path / "out"))(input_ids=TOKENS).logits
    torch.testing.assert_close(found, wanted.float(), rtol=0.05, atol=0.05)


def test_gguf_with_an_expert_too_few_is_refused() -> None:
    expert = gguf_file.Tensor("model.layers.0.mlp.experts.0.up_proj.weight", torch.ones(2, 32), "")
    with pytest.raises(JobError, match="other numbers of experts"):
        list(gguf_file._joined([expert], {"num_experts": 2}))


@pytest.mark.parametrize("place", ["model.layers.1.mlp.experts", "model.layers.1.experts"])
def test_experts_of_a_layer_that_are_left_out_are_named_without_those_of_others(place: str) -> None:
    class Experts(torch.nn.Module):
        num_experts: int

    model = torch.nn.Module()
    for layer in ("0", "1", "11"):
        experts = Experts()
        experts.num_experts, experts.up_proj = 2, torch.nn.Parameter(torch.ones(2, 4, 4))
        parent, _, name = place.replace(".1.", f".{layer}.").rpartition(".")
        for end in range(len(parent.split("."))):
            fqn = ".".join(parent.split(".")[: end + 1])
            if fqn not in dict(model.named_modules()):
                model.set_submodule(fqn, torch.nn.Module(), strict=False)
        model.get_submodule(parent).add_module(name, experts)
    rounded = dict.fromkeys(f"{fqn}.up_proj" for fqn in stacked(model) if ".1." not in fqn)
    (ignored,) = layout._of_mixtures(model, rounded)  # type: ignore[arg-type]
    for fqn in stacked(model):
        found = re.fullmatch(ignored.removeprefix("re:"), f"{fqn}.1.up_proj")
        assert bool(found) == (fqn == place)


@pytest.mark.parametrize("key", ["norm_topk_prob", "mlp_only_layers"])
def test_a_mixture_that_llamacpp_computes_otherwise_is_refused(key: str, tmp_path: Path) -> None:
    job = target_job("qwen3_moe", tmp_path, qat_target="llamacpp-q8_0")
    file = Path(job.model.model_name_or_path) / "config.json"
    other = {"norm_topk_prob": False, "mlp_only_layers": [0]}[key]
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: other}))
    with pytest.raises(JobError, match="llamacpp does not write this model") as error:
        Transforms(job).plan(build(job))
    assert key in error.value.found


def test_float8_of_a_model_in_float32_is_refused_with_keys_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint("llama", tmp_path / "source", **WIDE)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(source)
    to = ["export", str(source), "--output", str(tmp_path), "--format", "vllm-fp8"]
    assert main(to) == 2
    assert "qat_activation_dtype=none, or give a bfloat16 copy" in capsys.readouterr().err
    assert main([*to, "qat_activation_dtype=none"]) == 0


def test_one_command_writes_several_formats(tmp_path: Path, capsys: Any) -> None:
    source = str(write_checkpoint("llama", tmp_path / "source", **{**WIDE, "hidden_size": 64}))
    out = tmp_path / "out"
    to = ["export", source, "--output", str(out), "--format"]
    assert main([*to, "vllm-w4a16,llama"]) == 2 and "there is no format llama" in (
        capsys.readouterr().err
    )
    assert main([*to, "vllm-w4a16, executorch-8da4w"]) == 0
    printed = capsys.readouterr()
    assert "it/s" not in printed.err  # progress bars of compressed-tensors
    assert "model.pte is not written" in printed.out and "--python FILE" in printed.out
    assert read_scheme(out / "vllm-w4a16") is not None
    config = json.loads((out / "executorch-8da4w" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert main([*to, "vllm-nvfp4a16,vllm-fp8-block"]) == 2  # widths of 64 are no blocks of 128
    assert "would not round any linear" in capsys.readouterr().err
    assert not (out / "vllm-nvfp4a16").exists()
    assert main([*to, "vllm-nvfp4a16,vllm-w4a16"]) == 2
    assert not (out / "vllm-nvfp4a16").exists()

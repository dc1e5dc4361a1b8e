"""Predictions and measured peaks on one H200 (torch.cuda.max_memory_allocated, torch 2.11)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_adv.checkpoint.save import training_state
from raytrain_adv.checkpoint.staging import HostMemory, stage, tensors_of
from raytrain_adv.config import JobConfig
from raytrain_adv.estimate.memory import (
    PARTS,
    ROOM,
    HostNeed,
    MemoryPrediction,
    predict,
    settled,
)
from raytrain_adv.estimate.sizes import HostCopies
from raytrain_adv.model import weights
from raytrain_adv.model.build import build
from raytrain_adv.report.html import MEMORY_PARTS
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.optim import build_optimizer
from tests.tiny_models import job_for, write_checkpoint

RESULTS = Path(__file__).parents[3] / "jobs/benchmarks/results"
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
LLAMA_135M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
PURE = {"pure_bf16": True, "torch_compile": True}
MASTER = {"bf16": True, "torch_compile": True}
LORA = {**MASTER, "finetuning_type": "lora", "lora_rank": 16, "train_from_scratch": False}

FP8 = {"fp8": True, "fp8_allow_cpu": True}
INT4 = {"enable_qat": True, "qat_weight_dtype": "int4", "qat_group_size": 32}
INT4 |= {"qat_activation_dtype": "int8", "qat_quantize_embedding": False}
CHUNKED = {"loss_kernel": "chunked"}


def job_on(folder: Path, config: dict[str, Any], **keys: Any) -> JobConfig:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"")
    values = {"train_from_scratch": True, "per_device_train_batch_size": 1, "loss_kernel": "torch"}
    values |= keys
    return job_for(model, folder, **values)


def prediction(
    folder: Path, config: dict[str, Any], world_size: int = 1, seq_len: int = 8192, **keys: Any
) -> MemoryPrediction:
    job = job_on(folder, config, **keys)
    model = build(job)
    Transforms(job).prepare(model)
    return predict(model, job, world_size, seq_len, job.train.per_device_train_batch_size)


# tests/gpu/test_memory_prediction.py measures these again.
@pytest.mark.parametrize(
    ("measured", "config", "keys"),
    [
        (83.14, LLAMA_8B, {**PURE, "gradient_checkpointing": "none"}),
        (60.29, LLAMA_8B, {**PURE, "gradient_checkpointing": "full"}),
        (72.13, LLAMA_8B, {**PURE, "gradient_checkpointing": "selective"}),
        (100.58, LLAMA_8B, {"pure_bf16": True, "gradient_checkpointing": "none"}),
        (76.58, LLAMA_8B, {"pure_bf16": True, "gradient_checkpointing": "selective"}),
        (20.86, LLAMA_1B, {"bf16": True, "gradient_checkpointing": "full"}),
        (53.62, LLAMA_8B, {**LORA, "gradient_checkpointing": "none"}),
        (49.10, LLAMA_8B, {**PURE, "optim": "adamw_torch_8bit"}),
        (78.64, LLAMA_8B, {**PURE, **FP8, "gradient_checkpointing": "none"}),
        (76.20, LLAMA_8B, {**PURE, **FP8, **INT4, **CHUNKED, "gradient_checkpointing": "none"}),
        (52.82, LLAMA_8B, {**LORA, **FP8, **CHUNKED, "gradient_checkpointing": "none"}),
    ],
)
def test_prediction_is_within_five_percent_of_the_peak_on_an_h200(
    tmp_path: Path, measured: float, config: dict[str, Any], keys: dict[str, Any]
) -> None:
    assert prediction(tmp_path, config, **keys).total == pytest.approx(measured, rel=0.05)


EXPERTS: list[tuple[str, str, dict[str, Any]]] = [
    ("experts_qwen3", "full", PURE),
    ("experts_qwen3", "qat int4", {**PURE, **INT4, "qat_activation_dtype": "none"}),
    ("experts_qwen3", "lora_whole_graph", LORA),
    ("experts_gpt_oss", "full", PURE),
    ("experts_gpt_oss", "lora_whole_graph", LORA),
    ("experts_qwen3", "qlora_whole_graph", {**LORA, "quantization_bit": 4}),
    ("experts_gpt_oss", "qlora_whole_graph", {**LORA, "quantization_bit": 4}),
]


@pytest.mark.parametrize(("file", "row", "keys"), EXPERTS)
def test_prediction_of_a_mixture_is_within_five_percent_of_qlora_six(
    tmp_path: Path, file: str, row: str, keys: dict[str, Any]
) -> None:
    """Measured on an H200 by jobs/benchmarks/experts.py, which records no CUDA graphs."""
    found = json.loads((RESULTS / f"{file}.json").read_text())
    mode = "full" if file == "experts_gpt_oss" else "none"
    keys = {**keys, **CHUNKED, "cuda_graph": False, "gradient_checkpointing": mode}
    predicted = prediction(tmp_path, found["shape"], seq_len=found["tokens"], **keys).total
    assert predicted == pytest.approx(
        found["rows"][row]["peak_gib"], rel=0.06 if "qlora" in row else 0.05
    )


@pytest.mark.parametrize(
    ("measured", "keys"),
    [
        (3.655, MASTER),  # copies in bf16 are kept, and gradients between steps
        (2.047, {**PURE, "cuda_graph": False}),
    ],
)
def test_the_memory_of_a_small_models_cuda_graph_is_predicted(
    tmp_path: Path, measured: float, keys: dict[str, Any]
) -> None:
    """Measured on an H200: jobs/benchmarks/results/small_models.json."""
    keys = {**keys, "gradient_checkpointing": "none", "loss_kernel": "auto"}
    found = prediction(tmp_path, LLAMA_135M, seq_len=2048, **keys).total
    assert found == pytest.approx(measured, rel=0.05)


def test_the_total_is_the_largest_moment_and_not_the_sum(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_1B, **PURE)
    assert found.total == max(phase.total for phase in found.phases)
    parts = [found.parameters, found.gradients, found.optimizer, found.activations, found.logits]
    assert found.total < sum(parts)


def test_shards_divide_by_the_shard_size_and_not_by_the_workers(tmp_path: Path) -> None:
    alone = prediction(tmp_path, LLAMA_1B, **MASTER)
    hybrid = prediction(
        tmp_path, LLAMA_1B, world_size=8, ray_num_workers=8, fsdp_shard_size=4, **MASTER
    )
    assert hybrid.parameters == pytest.approx(alone.parameters / 4)
    assert hybrid.optimizer == pytest.approx(alone.optimizer / 4)


def test_workers_that_share_sequences_have_a_part_of_the_activations(tmp_path: Path) -> None:
    keys = {"world_size": 4, "ray_num_workers": 4, "gradient_checkpointing": "full", **MASTER}
    own = prediction(tmp_path, LLAMA_1B, seq_len=8192, **keys)
    shared = prediction(tmp_path, LLAMA_1B, seq_len=32768, sequence_parallel_size=4, **keys)
    assert shared.activations == pytest.approx(own.activations)
    assert shared.logits == pytest.approx(own.logits)


def test_offloaded_states_are_in_host_memory(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_1B, fsdp_cpu_offload=True, **MASTER)
    assert found.parameters == found.gradients == found.optimizer == 0.0
    assert found.host == pytest.approx(16 * 1.2358e9 / 2**30, rel=0.01)


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": True},
        {"pure_bf16": True},
        {"bf16": True, "finetuning_type": "lora", "lora_rank": 8},
        {"bf16": True, "save_only_model": True},
        {"bf16": True, "optim": "adamw_torch_8bit"},
    ],
)
def test_copies_for_checkpoints_are_as_large_as_those_that_are_made(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    job = job_for(write_checkpoint("llama", tmp_path / "model", **sizes), tmp_path, **keys)
    model = build(job)
    Transforms(job).prepare(model)
    predicted = HostCopies.of(model, job, 1)
    weights.materialize(model, torch.device("cpu"))
    weights.init_from_scratch(model, job, torch.device("cpu"))
    optimizer = build_optimizer(model, job)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step: a minute
        optimizer.step()
    state = training_state(model, None if job.output.save_only_model else optimizer)
    total = sum(copy.nbytes for _, copy in tensors_of(stage(state, HostMemory(print)))) / 2**30
    kept = sum(tensor.nbytes for _, tensor in tensors_of(state)) / 2**30
    assert predicted.kept == pytest.approx(kept, rel=0.01)
    assert predicted.kept + predicted.new == pytest.approx(total, rel=0.01)


def test_copies_for_checkpoints_are_kept_of_what_is_on_a_gpu(tmp_path: Path) -> None:
    """Parameters and two states in float32: 12 bytes each."""
    whole = 12 * 1.2358e9 / 2**30
    alone = prediction(tmp_path, LLAMA_1B, **MASTER).copies
    assert alone.kept == pytest.approx(whole, rel=0.01) and alone.new == 0.0
    offloaded = prediction(tmp_path, LLAMA_1B, fsdp_cpu_offload=True, **MASTER).copies
    assert offloaded == HostCopies(0.0, alone.kept)
    none = prediction(tmp_path, LLAMA_1B, save_strategy="no", **MASTER).copies
    assert none == HostCopies(0.0, 0.0)


def test_each_copy_of_the_model_has_its_own_copies_for_checkpoints(tmp_path: Path) -> None:
    alone = prediction(tmp_path, LLAMA_1B, **MASTER).copies
    for keys in ({}, {"fsdp_shard_size": 4}):
        found = prediction(tmp_path, LLAMA_1B, world_size=8, ray_num_workers=8, **keys, **MASTER)
        assert found.copies.kept == pytest.approx(alone.kept / (4 if keys else 8), rel=0.01)


def test_every_part_that_can_be_the_largest_is_explained(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_1B, **PURE)
    assert set(found.explanations) == set(PARTS) == set(MEMORY_PARTS)
    assert all(getattr(found, part) >= getattr(p, part) for p in found.phases for part in PARTS)


def test_one_worker_in_its_own_dtype_gathers_nothing(tmp_path: Path) -> None:
    assert prediction(tmp_path, LLAMA_8B, **PURE).explanations["gathered"].startswith("nothing")
    assert prediction(tmp_path, LLAMA_8B, **MASTER).gathered > 0


def test_frozen_weights_have_no_gradients_and_no_optimizer_states(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_8B, **LORA)
    assert found.parameters == pytest.approx(8.03e9 * 2 / 2**30, rel=0.02)
    assert found.gradients + found.optimizer < 1.0


def test_accumulated_gradients_exist_during_forward(tmp_path: Path) -> None:
    once = prediction(tmp_path, LLAMA_1B, **PURE)
    twice = prediction(tmp_path, LLAMA_1B, gradient_accumulation_steps=2, **PURE)
    assert once.phases[0].gradients == 0.0
    assert twice.phases[0].gradients == twice.gradients


def test_eager_attention_grows_with_the_square_of_the_length(tmp_path: Path) -> None:
    keys = {"pure_bf16": True, "flash_attn": "disabled", "gradient_checkpointing": "none"}
    short = prediction(tmp_path, LLAMA_1B, seq_len=2048, **keys).activations
    long = prediction(tmp_path, LLAMA_1B, seq_len=8192, **keys).activations
    assert long > 12 * short


def test_evaluation_counts_only_with_held_out_rows(tmp_path: Path) -> None:
    names = [p.name for p in prediction(tmp_path, LLAMA_1B, **PURE).phases]
    held = prediction(tmp_path, LLAMA_1B, val_size=10, per_device_eval_batch_size=64, **PURE)
    assert "evaluation" not in names
    assert held.peak == "evaluation"


def test_layers_of_an_evaluation_batch_count_if_it_is_larger_than_a_training_batch(
    tmp_path: Path,
) -> None:
    keys = {**LORA, "gradient_checkpointing": "full", "per_device_train_batch_size": 1}
    held = prediction(tmp_path, LLAMA_8B, seq_len=32768, val_size=8, **keys)
    totals = {phase.name: phase.total for phase in held.phases}
    inner = 2 * 8 * 32768 * 3 * 14336 / 2**30  # gate, up and their product, in bf16
    assert totals["evaluation, layers"] > inner + held.parameters
    assert totals["evaluation, layers"] > totals["backward, first layer"]


def test_the_prediction_is_json(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_1B, **PURE)
    assert json.loads(json.dumps(found.as_dict()))["total"] == found.total


def test_the_chunked_loss_takes_a_chunk_and_the_gradients_of_head_and_input(tmp_path: Path) -> None:
    """8,192 tokens of the 8B shape: 1,664 x 128,256 logits, 64 MiB and 1,002 MiB, all bf16."""
    keys = {**PURE, "gradient_checkpointing": "full"}
    full = prediction(tmp_path, LLAMA_8B, loss_kernel="torch", **keys)
    chunked = prediction(tmp_path, LLAMA_8B, loss_kernel="chunked", **keys)
    assert full.logits == pytest.approx(3.91, abs=0.01)
    assert chunked.logits == pytest.approx((407 + 64 + 1002) / 1024, abs=0.01)
    assert chunked.explanations["logits"].startswith("chunked: never of all 8,192 tokens")


def test_a_chunk_stays_as_large_as_it_is_on_longer_sequences(tmp_path: Path) -> None:
    """131,072 tokens: the gradient of the input is 1 GiB, the head's is accumulated in float32."""
    keys = {**PURE, "gradient_checkpointing": "full", "loss_kernel": "chunked"}
    found = prediction(tmp_path, LLAMA_8B, seq_len=131072, **keys)
    assert found.logits == pytest.approx(0.428 + 1.0 + 0.979 * 3, abs=0.01)


def test_a_frozen_head_has_no_gradient_in_the_chunked_loss(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_8B, loss_kernel="chunked", **LORA)
    assert found.logits == pytest.approx((407 + 64) / 1024, abs=0.01)


def test_muon_keeps_one_state_of_matrices_and_two_of_the_rest(tmp_path: Path) -> None:
    job = job_for(write_checkpoint("llama", tmp_path / "model"), tmp_path, optim="muon")
    model = build(job)
    predicted = predict(model, job, 1, 16, 1)
    weights.materialize(model, torch.device("cpu"))
    weights.load_pretrained(model, job, torch.device("cpu"))
    optimizer = build_optimizer(model, job)
    model(input_ids=torch.arange(16)[None]).logits.sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert predicted.optimizer * 2**30 == pytest.approx(sum(t.nbytes for t in states))
    assert predicted.explanations["optimizer"].startswith("one state of matrices")


@pytest.mark.parametrize("workers", [1, 2])
def test_asfts_reference_is_a_second_copy_of_the_parameters(tmp_path: Path, workers: int) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    keys = {"use_asft_loss": True, "asft_alpha": 0.1}
    job, plain = job_for(folder, tmp_path / "a", **keys), job_for(folder, tmp_path / "b")
    model = build(job)
    twice, once = predict(model, job, workers, 16, 1), predict(build(plain), plain, workers, 16, 1)
    assert twice.parameters == pytest.approx(2 * once.parameters)
    logits = 16 * 90 * 4 / 2**30
    first = {p.name: p for p in once.phases}["loss"].logits
    assert {p.name: p for p in twice.phases}["loss"].logits == pytest.approx(first + logits)
    assert "ASFT's reference" in twice.explanations["parameters"]


@pytest.mark.parametrize(
    ("gib", "keys", "keeps"),
    [
        (140, {}, True),
        (85, {}, False),
        (None, {}, False),
        (140, {"fsdp_reshard_after_forward": True}, False),
        (10, {"fsdp_reshard_after_forward": False}, True),
        (140, {"use_cpu": True, "torch_compile": False}, False),
    ],
)
def test_layers_stay_gathered_where_a_gpu_has_room(
    tmp_path: Path, gib: float | None, keys: dict[str, Any], keeps: bool
) -> None:
    none = {"gradient_checkpointing": "none", "ray_num_workers": 2}
    job = job_on(tmp_path, LLAMA_8B, **{**PURE, **none, **keys})
    model = build(job)
    decided = settled(model, job, 2, 8192, 1, gib)
    assert (decided.parallel.fsdp_reshard_after_forward is False) == keeps
    found = predict(model, decided, 2, 8192, 1)
    assert ("to backward" in found.explanations["gathered"]) == keeps
    if gib is not None and not keys:
        assert found.total <= gib * (1 - ROOM)


def test_a_tied_embedding_may_be_the_largest_unit(tmp_path: Path) -> None:
    found = prediction(tmp_path, LLAMA_1B, world_size=2, **PURE)
    nccl = prediction(tmp_path, LLAMA_1B, world_size=2, fsdp_collectives="nccl", **PURE)
    assert found.gathered - nccl.gathered == pytest.approx(3 * 128256 * 2048 * 2 / 2**30, rel=0.01)


def test_copies_need_buffers_of_the_largest_unit(tmp_path: Path) -> None:
    """As measured on two H200s (jobs/benchmarks/results/fsdp_collectives.json)."""
    none = {"gradient_checkpointing": "none", "loss_kernel": "chunked"}
    found = prediction(tmp_path, LLAMA_8B, world_size=2, **none, **PURE)
    nccl = prediction(tmp_path, LLAMA_8B, world_size=2, fsdp_collectives="nccl", **none, **PURE)
    assert found.gathered - nccl.gathered == pytest.approx(3 * 128256 * 4096 * 2 / 2**30, rel=0.01)
    assert found.total == pytest.approx(62.2, rel=0.05)
    assert nccl.total == pytest.approx(61.6, rel=0.05)


LONG = {**PURE, "gradient_checkpointing": "full", "loss_kernel": "chunked"}


def test_tiles_take_an_mlps_inner_activations_out_of_the_peak(tmp_path: Path) -> None:
    whole = prediction(tmp_path, LLAMA_8B, seq_len=131_072, **LONG)
    tiled = prediction(tmp_path, LLAMA_8B, seq_len=131_072, tiled_mlp=True, **LONG)
    # Gate, up, their product and its gradients of all tokens, less those of a tile.
    assert 10 < whole.total - tiled.total < 25
    assert "16,384 tokens at a time" in tiled.explanations["activations"]
    short = prediction(tmp_path, LLAMA_8B, seq_len=8192, tiled_mlp=True, **LONG)
    same = prediction(tmp_path, LLAMA_8B, seq_len=8192, **LONG)
    assert short.total == same.total


@pytest.mark.parametrize(
    ("measured", "tokens", "keys"),
    [
        (105.5, 131_072, {}),
        (
            75.6,
            131_072,
            {
                "gradient_checkpointing": "attention",
                "tiled_mlp": True,
                "activation_offloading": True,
            },
        ),
        (
            114.4,
            524_288,
            {"tiled_mlp": True, "activation_offloading": 27, "optim": "adamw_torch_8bit"},
        ),
    ],
)
def test_the_peak_of_long_sequences_is_predicted_within_five_percent(
    tmp_path: Path, measured: float, tokens: int, keys: dict[str, Any]
) -> None:
    """Measured on an H200: jobs/benchmarks/longest_sequence.py."""
    found = prediction(tmp_path, LLAMA_8B, seq_len=tokens, **{**LONG, **keys})
    assert found.total == pytest.approx(measured, rel=0.05)


def test_what_is_moved_is_on_the_host_and_not_on_the_gpu(tmp_path: Path) -> None:
    keys = {**LONG, "tiled_mlp": True}
    here = prediction(tmp_path, LLAMA_8B, seq_len=131_072, **keys)
    moved = prediction(tmp_path, LLAMA_8B, seq_len=131_072, activation_offloading=24, **keys)
    assert moved.host_activations == 24  # GiB: 131,072 tokens x 4096 x 2 bytes of each layer
    loss = [next(p for p in m.phases if p.name == "loss").activations for m in (here, moved)]
    assert loss[0] - loss[1] == pytest.approx(24)
    need = HostNeed.of(moved, 1)
    assert need.per_worker == pytest.approx(24 + moved.copies.kept + moved.copies.new)
    assert "24.0 activations" in need.sentence()
    results = prediction(
        tmp_path,
        LLAMA_8B,
        seq_len=131_072,
        activation_offloading=24,
        **{**keys, "gradient_checkpointing": "attention"},
    )
    assert results.host_activations == 48

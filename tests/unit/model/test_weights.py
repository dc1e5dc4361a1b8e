"""Loading and initializing: exactly what transformers does, but shard by shard."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.weight_files import INDEX, CheckpointFiles, tensor_files
from raytrain_adv.model.weights import init_from_scratch, load_pretrained, materialize
from tests.ranks import run_ranks
from tests.tiny_models import KINDS, job_for, write_checkpoint

CPU = torch.device("cpu")


def loaded(job: JobConfig) -> tuple[PreTrainedModel, CheckpointFiles | None]:
    model = build(job)
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    if job.model.train_from_scratch:
        init_from_scratch(model, job, CPU)
        return model, None
    return model, load_pretrained(model, job, CPU)


def whole_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = {plain_name(name): gather(p).clone() for name, p in model.named_parameters()}
    return state | {plain_name(name): b.clone() for name, b in model.named_buffers()}


def reference_state(
    folder: Path, computes_in: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = AutoModelForCausalLM.from_pretrained(folder, dtype=computes_in)
    return dict(model.named_parameters()) | dict(same.named_buffers())


def differing(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert state.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if state[name].dtype != value.dtype or not torch.equal(state[name], value)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_parameters_and_buffers_equal_from_pretrained(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path / "model")
    model, _ = loaded(job_for(folder, tmp_path))
    assert differing(whole_state(model), reference_state(folder)) == []
    assert all(p.device == CPU for p in model.parameters())


def differences_on_ranks(jobs: dict[str, JobConfig]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        model, files = loaded(job)
        assert files is not None
        state, folder = whole_state(model), Path(job.model.model_name_or_path)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        found[name] = {
            "differ": differing(state, reference_state(folder, torch.bfloat16)),
            "tied": tied == bool(model.config.tie_word_embeddings),
            "sharded": all(type(p).__name__ == "DTensor" for p in model.parameters()),
            "read": files.bytes_read,
            "held": sum(2 * p.to_local().numel() for p in model.parameters()),
        }
    return found


@pytest.mark.parametrize(("count", "shard_size"), [(2, None), (4, None), (4, 2)])
def test_shards_equal_from_pretrained(count: int, shard_size: int | None, tmp_path: Path) -> None:
    kinds = ("llama", "llama-tied", "qwen3", "gemma2", "mixtral", "qwen3_moe")
    keys = {
        "bf16": True,
        "fsdp_shard_size": shard_size,
        "ray_num_workers": count,
        "gradient_checkpointing": "full",
    }
    jobs = {
        kind: job_for(write_checkpoint(kind, tmp_path / kind), tmp_path / f"job-{kind}", **keys)
        for kind in kinds
    }
    for rank, found in enumerate(run_ranks(differences_on_ranks, count, tmp_path, jobs)):
        for kind in kinds:
            of = found[kind]
            assert (of["differ"], of["tied"], of["sharded"]) == ([], True, True), (rank, kind)
            if kind in ("llama", "llama-tied", "qwen3", "gemma2"):
                # A rank reads its own shards, in the file's bfloat16, and not a byte more.
                assert of["read"] == of["held"], (rank, kind)


def test_fused_experts_are_read_by_rank_0_alone_one_layer_at_a_time(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "mixtral", num_hidden_layers=4)
    job = job_for(folder, tmp_path, bf16=True)
    first, second = run_ranks(peak_of_rank, 2, tmp_path, job)
    assert second["read"] == second["held_outside_experts"]
    # 3 experts x (gate and up 2x56x32) x 2 bytes is the largest group; twice for the stacked copy.
    assert first["peak_pieces"] <= 2 * 3 * 2 * 56 * 32 * 2
    assert first["experts_in_all"] > 4 * first["peak_pieces"] / 2


def peak_of_rank(job: JobConfig) -> dict[str, int]:
    from raytrain_adv.model import weights

    peak = 0
    inner = weights.convert_group

    def watched(
        group: Any, files: CheckpointFiles, plain: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        nonlocal peak
        before = files.bytes_read
        values = inner(group, files, plain)
        made = sum(v.numel() * v.element_size() for v in values.values())
        peak = max(peak, files.bytes_read - before + made)
        return values

    weights.convert_group = watched
    model, files = loaded(job)
    weights.convert_group = inner
    assert files is not None
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n}
    others = sum(2 * p.to_local().numel() for n, p in model.named_parameters() if n not in experts)
    return {
        "peak_pieces": peak,
        "read": files.bytes_read,
        "held_outside_experts": others,
        "experts_in_all": sum(2 * p.numel() for p in experts.values()),
    }


def scratch_state(job: JobConfig) -> dict[str, torch.Tensor]:
    return whole_state(loaded(job)[0])


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "mixtral", "gemma"])
def test_random_weights_do_not_depend_on_the_number_of_ranks(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path / "model")
    job = job_for(folder, tmp_path, train_from_scratch=True, bf16=True, seed=7)
    alone = scratch_state(job)
    counts = (2, 4) if kind == "llama-tied" else (2,)
    for count in counts:
        for state in run_ranks(scratch_state, count, tmp_path, job):
            assert differing(state, alone) == []


def test_random_weights_have_the_architectures_own_distribution(tmp_path: Path) -> None:
    folder = write_checkpoint("gpt2", tmp_path / "model", n_embd=128, vocab_size=512)
    job = job_for(folder, tmp_path, train_from_scratch=True, seed=3)
    state = scratch_state(job)
    expected = AutoModelForCausalLM.from_config(build(job).config).state_dict()
    for name, value in state.items():
        torch.testing.assert_close(value.std(), expected[name].std(), rtol=0.1, atol=1e-6)
        torch.testing.assert_close(value.mean(), expected[name].mean(), rtol=0.0, atol=2e-3)
    # GPT-2 scales the weights that write to the residual stream from the block above them.
    assert (
        state["transformer.h.0.attn.c_proj.weight"].std()
        < 0.6 * state["transformer.h.0.attn.c_attn.weight"].std()
    )


def test_another_seed_gives_other_weights_and_leaves_the_global_generator_alone(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    states = []
    for seed in (1, 2):
        torch.manual_seed(5)
        states.append(scratch_state(job_for(folder, tmp_path, train_from_scratch=True, seed=seed)))
        assert torch.initial_seed() == 5
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[0]["model.layers.1.mlp.up_proj.weight"])


def test_rotary_tables_stay_float32_when_parameters_are_bfloat16(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    model, _ = loaded(job_for(folder, tmp_path, pure_bf16=True))
    expected = reference_state(folder)["model.rotary_emb.inv_freq"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.get_buffer("model.rotary_emb.inv_freq"), expected)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "1 missing: model.layers.1.mlp.up_proj.weight",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        *(
            (
                lambda t, d=dtype: t.update({"model.norm.weight": torch.ones(32).to(d)}),
                "1 stored as integers: model.norm.weight",
            )
            for dtype in (torch.int32, torch.uint8, torch.int64)
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "1 wrongly shaped: model.norm.weight is [31], the model has [32]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(change: Any, words: str, tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    rewrite(folder, change)
    with pytest.raises(JobError) as caught:
        loaded(job_for(folder, tmp_path))
    assert words in str(caught.value)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "model")
    rewrite(folder, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(JobError, match=r"cannot be converted|do not fit"):
        loaded(job_for(folder, tmp_path))


def load_or_message(job: JobConfig) -> str:
    try:
        loaded(job)
    except JobError as error:
        return str(error)
    return ""


def test_a_conversion_that_fails_on_rank_0_ends_every_rank_with_the_reason(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "model")
    rewrite(folder, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w1.weight"))
    first, second = run_ranks(load_or_message, 2, tmp_path, job_for(folder, tmp_path, bf16=True))
    assert first == second != ""


def test_a_tied_checkpoint_may_hold_the_head_too_if_it_is_the_same(tmp_path: Path) -> None:
    folder = write_checkpoint("llama-tied", tmp_path / "model")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = loaded(job_for(folder, tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_config_over_two_different_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama-tied", tmp_path / "model")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(JobError, match=r"ties lm_head.weight to model.embed_tokens.weight"):
        loaded(job_for(folder, tmp_path))


def test_shards_with_an_index_load_as_one_file_does(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    expected = reference_state(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert differing(whole_state(loaded(job_for(folder, tmp_path))[0]), expected) == []


def test_an_index_that_names_a_missing_file_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(JobError, match="lacks files that its index names"):
        loaded(job_for(folder, tmp_path))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(JobError, match="cannot be read"):
        loaded(job_for(folder, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": {}}}',
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "' + "a" * 300 + '"}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
    ],
)
def test_an_index_that_is_none_or_names_files_elsewhere_is_refused(text, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(JobError, match="cannot be read"):
        tensor_files(tmp_path)

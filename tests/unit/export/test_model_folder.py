"""What is exported loads elsewhere, is what was trained, and appears whole or not at all."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raytrain_adv.config import JobConfig
from raytrain_adv.errors import StorageError
from raytrain_adv.export.folder import NewFolder, save_tensors
from raytrain_adv.export.model_folder import export_model, save_tokenizer
from raytrain_adv.export.verify import load_folder
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import init_from_scratch, load_pretrained, materialize
from tests.ranks import run_ranks
from tests.tiny_models import KINDS, job_for, write_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)


def loaded(job: JobConfig) -> PreTrainedModel:
    model = build(job)
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_tensors(a: Path, b: Path) -> bool:
    x, y = tensors_of(a), tensors_of(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_a_file_is_written_alike_every_time(tmp_path: Path) -> None:
    """safetensors alone puts the metadata in a random order."""
    tensors = {"b": torch.arange(6.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    metadata = {name: json.dumps({"of": f"ä\n{name}"}) for name in "edcba"}
    file, written = tmp_path / "model.safetensors", set()
    for _ in range(5):
        save_tensors(tensors, file, metadata)
        written.add(file.read_bytes())
    assert len(written) == 1
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {**metadata, "format": "pt"}
        assert all(torch.equal(opened.get_tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_export_holds_the_checkpoints_own_tensors(kind: str, tmp_path: Path) -> None:
    folder, out = write_checkpoint(kind, tmp_path / "model"), tmp_path / "out"
    export_model(
        loaded(job_for(folder, tmp_path / "job", pure_bf16=True)),
        job_for(folder, tmp_path / "job", pure_bf16=True),
        out,
    )
    assert same_tensors(folder, out)


def export_on_ranks(jobs: dict[str, JobConfig], out: Path) -> dict[str, torch.Tensor]:
    logits = {}
    for kind, job in jobs.items():
        model = loaded(job).eval()
        with torch.no_grad():
            logits[kind] = model(input_ids=TOKENS).logits
        export_model(model, job, out / kind, max_file_bytes=30_000)
    return logits


def largest_difference(folder: Path, wanted: torch.Tensor, attention: str | None = None) -> float:
    """Load an exported folder as a user would, and compare its logits with the trained model's."""
    model = load_folder(folder, False, attention).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return float((logits.float() - wanted.float()).abs().max())


def test_a_sharded_wrapped_compiled_model_exports_to_a_folder_with_the_same_logits(
    tmp_path: Path,
) -> None:
    kinds = ("llama", "llama-tied", "gemma2", "mixtral", "qwen3_moe")
    keys = {"bf16": True, "gradient_checkpointing": "full", "torch_compile": False}
    jobs = {
        k: job_for(write_checkpoint(k, tmp_path / k), tmp_path / f"job-{k}", **keys) for k in kinds
    }
    logits, _ = run_ranks(export_on_ranks, 2, tmp_path, jobs, tmp_path / "out")
    used = {kind: "eager" if kind == "gemma2" else "sdpa" for kind in kinds}
    for kind in kinds:
        folder = tmp_path / "out" / kind
        assert largest_difference(folder, logits[kind], used[kind]) == 0.0, kind
        assert same_tensors(folder, tmp_path / kind), kind
        sizes = [f.stat().st_size for f in folder.glob("model-*-of-*.safetensors")]
        assert len(sizes) > 1 and max(sizes) < 33_000, kind
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors_of(folder).keys(), kind


def test_every_file_may_be_read_by_whom_the_users_files_may_be_read(tmp_path: Path) -> None:
    job = job_for(write_checkpoint("llama", tmp_path / "model"), tmp_path / "job")
    export_model(loaded(job), job, tmp_path / "out")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_float32_runs_export_float32_and_bf16_runs_bfloat16(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    for keys, dtype in (({}, "float32"), ({"bf16": True}, "bfloat16")):
        job = job_for(folder, tmp_path / dtype, **keys)
        export_model(loaded(job), job, tmp_path / dtype / "model")
        assert (
            json.loads((tmp_path / dtype / "model" / "config.json").read_text())["dtype"] == dtype
        )
        kinds = {t.dtype for t in tensors_of(tmp_path / dtype / "model").values()}
        assert kinds == {getattr(torch, dtype)}


def test_a_compiled_model_exports_under_plain_names(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    job = job_for(
        folder, tmp_path / "job", pure_bf16=True, torch_compile=True, gradient_checkpointing="full"
    )
    export_model(loaded(job), job, tmp_path / "out")
    assert same_tensors(folder, tmp_path / "out")


def test_the_exported_config_is_the_originals_with_its_cache_on(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", use_cache=True)
    job = job_for(folder, tmp_path / "job", bf16=True)
    export_model(loaded(job), job, tmp_path / "out")
    before, after = (
        json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "out")
    )
    assert after == before


def test_generation_settings_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    # transformers refuses to save a temperature without sampling, but such files are on the Hub.
    text = '{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 2]}'
    (folder / "generation_config.json").write_text(text)
    job = job_for(folder, tmp_path / "job", bf16=True)
    export_model(loaded(job), job, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_a_model_from_scratch_exports_and_generates(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    job = job_for(folder, tmp_path / "job", train_from_scratch=True, bf16=True)
    model = build(job)
    materialize(model, CPU)
    init_from_scratch(model, job, CPU)
    export_model(model, job, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16)), name
    assert again.generate(TOKENS[:1], max_new_tokens=2, do_sample=False).shape == (1, 14)


def a_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template="{{ messages[0]['content'] }}"
    )


def test_the_tokenizer_and_its_chat_template_are_in_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    job = job_for(folder, tmp_path / "job", bf16=True)
    export_model(loaded(job), job, tmp_path / "out", a_tokenizer())
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_an_older_export_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder, out = write_checkpoint("llama", tmp_path / "model"), tmp_path / "run" / "model"
    out.mkdir(parents=True)
    (out / "stale.txt").write_text("from an earlier run")
    job = job_for(folder, tmp_path / "job", bf16=True)
    export_model(loaded(job), job, out)
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert not (out / "stale.txt").exists()


def export_with_files_limited(job: JobConfig, out: Path) -> str:
    model = loaded(job)
    # The kernel refuses to let a file of this process grow beyond this: what a full disk looks like
    # to the writer.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        export_model(model, job, out)
    except StorageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def test_a_failed_write_is_told_to_every_rank_and_leaves_the_old_export(tmp_path: Path) -> None:
    folder, out = write_checkpoint("llama", tmp_path / "model"), tmp_path / "run" / "model"
    out.mkdir(parents=True)
    (out / "kept.txt").write_text("an earlier export")
    job = job_for(folder, tmp_path / "job", bf16=True)
    for message in run_ranks(export_with_files_limited, 2, tmp_path, job, out):
        assert "model could not be written" in message
        assert "GiB free" in message
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert (out / "kept.txt").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), Exception("os error 28"), TypeError("x")],
)
def test_whatever_a_writer_raises_ends_the_export_and_leaves_no_partial_folder(
    tmp_path: Path, error: Exception
) -> None:
    """Tokenizers raise a plain Exception; other ranks would wait for this one in a broadcast."""

    def fail() -> None:
        raise error

    new = NewFolder(tmp_path / "model", torch.device("cpu"))
    new.run(fail)
    with pytest.raises(StorageError, match=type(error).__name__):
        new.publish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_hold_the_model_does_not_verify(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    job = job_for(folder, tmp_path / "job", bf16=True)
    model = loaded(job).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
        next(model.parameters()).add_(1.0)
    export_model(model, job, tmp_path / "out")
    assert largest_difference(tmp_path / "out", logits) > 0.01


def test_a_folder_is_compared_in_memory_as_pytorch_allocates_it(tmp_path: Path) -> None:
    """Elsewhere a CPU's product with a matrix of one row differs in the last bit (Qwen3.5-MoE)."""
    folder = write_checkpoint("llama", tmp_path / "model")

    def elsewhere(model: torch.nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if p.data_ptr() % 64]

    assert elsewhere(AutoModelForCausalLM.from_pretrained(folder)), "where it lies in the file"
    assert not elsewhere(load_folder(folder, False, None))


@pytest.mark.parametrize(("held", "wanted"), [(None, 3), (2, [2, 3]), ([2, 3], [2, 3]), (3, 3)])
def test_generation_ends_at_the_token_that_training_ended_answers_with(held, wanted, tmp_path):
    """A template's own end was the tokenizer's alone, and transformers' generate() went on."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": held, "old": 1}))
    words = {"<unk>": 0, "a": 1, "</s>": 2, "<|im_end|>": 3}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    save_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>"), tmp_path
    )
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"eos_token_id": wanted, "old": 1}

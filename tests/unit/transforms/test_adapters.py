"""PiSSA, OFT and merged adapters: what is exported loads in PEFT and computes what was trained."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytrain_adv import hardware
from raytrain_adv.checkpoint.save import model_state
from raytrain_adv.dtensor import gather, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.export.merge import merged_tensors
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model import parallel
from raytrain_adv.model.adapter import load_adapter, merge_adapters
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize, saved_tensors
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from tests.families import tiny_model
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)
PISSA = {"pissa_init": True, "lora_rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "oft": {"finetuning_type": "oft"},
    "oft by rank": {"finetuning_type": "oft", "oft_rank": 4, "oft_block_size": 0},
    "pissa": PISSA,
    "pissa, converted": {**PISSA, "pissa_convert": True},
    "exact pissa, converted": {
        **PISSA,
        "pissa_iter": -1,
        "pissa_convert": True,
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def job_of(base: Path, place: Path, **keys: Any) -> Any:
    return job_for(base, place, **{"finetuning_type": "lora", "bf16": False, **keys})


def prepared(job):
    """Return the model as a worker has it before its first step."""
    model, transforms = build(job), Transforms(job)
    plans = transforms.prepare(model, hardware.detect(CPU))
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    merge_adapters(model, job)
    transforms.initialize(model, plans, 3)
    transforms.after_step(model)
    return model


def move(model) -> None:
    """Change what is trained, alike on any number of ranks."""
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(fqn))
                parameter.mul_(1.25).add_(0.02)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def reloaded(folder: Path) -> Any:
    """Load an adapter on the base that it names."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
def test_an_exported_adapter_computes_in_peft_what_was_trained(kind, llama, tmp_path):
    job = job_of(llama, tmp_path, **KINDS[kind])
    model = prepared(job)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-6)
    move(model)
    export_model(model, job, tmp_path / "model")
    assert (tmp_path / "model-base").exists() == (kind == "pissa")
    trained = logits(model)
    assert not torch.allclose(trained, logits(plain), atol=1e-2)
    torch.testing.assert_close(logits(reloaded(tmp_path / "model")), trained, rtol=0, atol=3e-6)
    whole = merged_tensors(model)
    plain.load_state_dict({name: whole(name) for name in plain.state_dict()})
    torch.testing.assert_close(logits(plain), trained, rtol=0, atol=3e-6)


def test_pissa_starts_as_pefts(llama, tmp_path):
    model = prepared(job_of(llama, tmp_path, **PISSA, pissa_iter=-1))
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    how = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    theirs = get_peft_model(plain, LoraConfig(**how, init_lora_weights="pissa")).base_model.model
    for name, parameter in theirs.named_parameters():
        ours = model.get_parameter(name)
        # The sign of a pair of vectors is free.
        assert torch.allclose(ours.abs(), parameter.abs(), atol=1e-5), name


def test_oft_counts_and_rotates_as_peft_does(llama, tmp_path):
    job = job_of(llama, tmp_path, finetuning_type="oft", oft_block_size=24, oft_target="down_proj")
    model, transforms = build(job), Transforms(job)
    plan = transforms.prepare(model, hardware.detect(CPU))["lora"]
    with pytest.warns(UserWarning, match="Adjusted"):
        theirs = get_peft_model(
            build(job), OFTConfig(oft_block_size=24, target_modules=["down_proj"])
        )
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert plan.notes[0].startswith(f"{count:,} trainable parameters")
    assert "blocks that OFT rotates: 2 of 28 for 56 inputs" in plan.notes
    assert "OFT covers 15.7% of the weights" in plan.notes[-1]
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


def on_ranks(jobs) -> list[dict[str, torch.Tensor]]:
    found = []
    for job in jobs:
        model = prepared(job)
        move(model)
        state = {plain_name(n): gather(p).clone() for n, p in saved_tensors(model).items()}
        found.append({name: tensor for name, tensor in state.items() if "start" not in name})
    return found


@pytest.mark.slow
def test_ranks_start_and_merge_as_one_process_does(llama, tmp_path):
    first = job_of(llama, tmp_path / "1", lora_rank=4)
    model = prepared(first)
    move(model)
    export_model(model, first, tmp_path / "first")
    jobs = [
        job_of(llama, tmp_path / "2", **PISSA),
        job_of(llama, tmp_path / "3", finetuning_type="oft"),
        job_of(
            llama, tmp_path / "4", adapter_name_or_path=str(tmp_path / "first"),
            create_new_adapter=True,
        ),
    ]  # fmt: skip
    alone = on_ranks(jobs)
    spread, _ = run_ranks(on_ranks, 2, tmp_path, jobs)
    for one, two in zip(alone, spread, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_a_checkpoint_has_what_pissa_took_out_of_the_base(llama, tmp_path):
    model = prepared(job_of(llama, tmp_path, **PISSA))
    kept = [name for name in model_state(model) if "lora_start_" in name]
    assert len(kept) == 2 * sum(n.endswith("lora_A.default.weight") for n in model_state(model))


def test_all_but_the_last_of_several_adapters_are_merged(llama, tmp_path):
    folders = []
    for n, more in enumerate(({"use_dora": True}, {"finetuning_type": "oft"}, {})):
        job = job_of(
            llama, tmp_path / str(n), **({} if "oft" in str(more) else {"lora_rank": 4}), **more
        )
        model = prepared(job)
        move(model)
        export_model(model, job, tmp_path / f"adapter-{n}")
        folders.append(str(tmp_path / f"adapter-{n}"))
    theirs: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for folder in folders[:2]:
        theirs = PeftModel.from_pretrained(theirs, folder).merge_and_unload()
    job = job_of(llama, tmp_path / "new", lora_rank=4, adapter_name_or_path=folders)
    lora = job.transform(Lora)
    assert lora.merged == folders[:2] and lora.continued == folders[2]
    model = prepared(job)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    export_model(model, job, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model-base", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)


@pytest.fixture
def changing(llama, tmp_path):
    """Return a copy of the model, and what trains its weights further in place."""
    base = Path(copytree(llama, tmp_path / "base"))

    def change(folder: Path = base) -> None:
        weights = {name: w + 0.01 for name, w in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return base, change


@pytest.mark.parametrize("new", [False, True], ids=["continued", "merged"])
def test_an_adapter_is_refused_on_weights_that_changed_since(changing, tmp_path, new):
    """A job continued or merged it on the model that had come in the place of its own."""
    base, change = changing
    first = job_of(base, tmp_path / "1")
    model = prepared(first)
    move(model)
    export_model(model, first, tmp_path / "adapter")
    keys = {"adapter_name_or_path": str(tmp_path / "adapter"), "create_new_adapter": new}
    second = job_of(base, tmp_path / "2", **keys)
    export_model(prepared(second), second, tmp_path / "again")  # as long as it is the same
    moved = base.rename(tmp_path / "moved")
    prepared(job_of(moved, tmp_path / "2", **keys))
    change(moved)
    with pytest.raises(JobError, match="was trained on other weights than") as refused:
        prepared(job_of(moved, tmp_path / "2", **keys))
    assert f"The adapter {tmp_path / 'adapter'} " in str(refused.value)
    assert str(moved) in str(refused.value)


def test_an_adapter_on_a_base_of_its_own_is_compared_with_that(changing, tmp_path):
    base, change = changing
    first = job_of(base, tmp_path / "1", **PISSA)
    export_model(prepared(first), first, tmp_path / "model")
    keys = {"adapter_name_or_path": str(tmp_path / "model"), "lora_rank": 4}
    second = job_of(tmp_path / "model-base", tmp_path / "2", **keys)
    change()
    prepared(second)
    change(tmp_path / "model-base")
    with pytest.raises(JobError, match="was trained on other weights than"):
        prepared(second)


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.1}, {"use_dora": True}, {}])
def test_linears_that_peft_takes_for_stacked_experts_reload_and_are_continued(keys, tmp_path):
    """PEFT names them by their weights, beside which it allows neither dropout nor DoRA."""
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "base")
    job = job_of(tmp_path / "base", tmp_path, **keys)
    model = prepared(job)
    move(model)
    export_model(model, job, tmp_path / "model")
    peft = reloaded(tmp_path / "model")
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-5)
    adapter = str(tmp_path / "model")
    again = prepared(job_of(tmp_path / "base", tmp_path, adapter_name_or_path=adapter, **keys))
    load_adapter(again, tmp_path / "model")
    torch.testing.assert_close(logits(again), logits(peft), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "oft", "lora_rank": 4}, "lora_rank and finetuning_type"),
        ({"oft_target": "q_proj"}, "oft_target and finetuning_type"),
        ({"finetuning_type": "oft", "oft_rank": 2, "oft_block_size": 2}, "follows from the other"),
        ({"finetuning_type": "oft", "oft_block_size": 0}, "follows from the other"),
        ({"pissa_init": True, "adapter_name_or_path": "a"}, "pissa_init and adapter_name_or_path"),
        ({"create_new_adapter": True}, "no adapter to merge"),
        ({"pissa_init": True, "quantization_bit": 4}, "pissa_init"),
        ({"adapter_name_or_path": "a,b", "quantization_bit": 4}, "all but the last adapter"),
        ({"pissa_init": True, "enable_qat": True}, "pissa_init and enable_qat"),
    ],
)
def test_keys_that_exclude_each_other_are_named(keys, words, tmp_path):
    with pytest.raises(JobError, match=words):
        job_of(tmp_path / "none", tmp_path, **keys)


def test_an_adapter_of_another_model_is_not_merged(llama, tmp_path):
    other = write_checkpoint("qwen2", tmp_path / "other", num_hidden_layers=3)
    job = job_of(other, tmp_path / "1", lora_rank=4)
    export_model(prepared(job), job, tmp_path / "adapter")
    keys = {"adapter_name_or_path": str(tmp_path / "adapter"), "create_new_adapter": True}
    with pytest.raises(JobError, match="was trained on other weights than"):
        prepared(job_of(llama, tmp_path / "2", **keys))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})  # as PEFT's: of no known model
    with pytest.raises(JobError, match="cannot be merged into this model"):
        prepared(job_of(llama, tmp_path / "2", **keys))

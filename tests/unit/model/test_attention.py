"""Attention is what was asked for, also in packed batches; what is not there is refused."""

import json
from pathlib import Path

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.config import load
from raytrain_adv.data.batches.collate import bounds
from raytrain_adv.driver.commands import kernels
from raytrain_adv.errors import JobError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.model import attention
from raytrain_adv.model.attention import HUB_ATTENTION, attention_of_parts, is_flash
from raytrain_adv.model.build import build
from raytrain_adv.transforms.hub_kernels import own_lock
from raytrain_adv.worker.install import fetch
from tests.multimodal_families import tiny_multimodal
from tests.tiny_models import job_for, write_checkpoint
from tests.workers import losses, run_workers

CPU = hardware.detect("cpu")
KERNEL = """
import torch
import torch.nn.functional as F

CALLS = []


def _heads_first(q, k, v):
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    return (x.transpose(1, 2) for x in (q, k, v))


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    CALLS.append("whole")
    out = F.scaled_dot_product_attention(
        *_heads_first(q, k, v), is_causal=causal, scale=softmax_scale, dropout_p=dropout_p
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False,
):
    CALLS.append("bounds")
    out = torch.zeros_like(q)
    for start, stop in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:]):
        assert stop - start <= max_seqlen_q
        if stop > start:
            one = (x[None, start:stop] for x in (q, k, v))
            out[start:stop] = flash_attn_func(
                *one, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal
            )[0]
    return out
"""


def write_kernel(root: Path, source: str = KERNEL) -> Path:
    """Write a kernel's folder as the Hub has it, in torch alone."""
    folder = root / "build" / "torch-cpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    metadata = {
        "id": f"_attention_{abs(hash(str(root)))}",
        "name": "attention",
        "version": 1,
        "license": "MIT",
        "backend": {"type": "cpu"},
        "python-depends": [],
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return root


def test_packed_conversations_do_not_see_each_other_in_flash_attention(job_file, keys, tmp_path):
    """Two packed sequences a batch: losses are those of sdpa with its mask."""
    config = Path(keys["model_name_or_path"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.0}))
    hub = f"hub:{write_kernel(tmp_path / 'kernel')}"
    packed = {"neat_packing": True, "cutoff_len": 64, "val_size": 8}
    jobs = {
        "sdpa": job_file("a.yaml", output_dir=str(tmp_path / "sdpa"), **packed),
        "flash": job_file("b.yaml", output_dir=str(tmp_path / "flash"), flash_attn=hub, **packed),
        "mixed": job_file(
            "c.yaml", output_dir=str(tmp_path / "mixed"), packing=True, cutoff_len=64
        ),
    }
    run_workers(1, *jobs.values())
    expected, found, mixed = (list(losses(tmp_path / n).values()) for n in jobs)
    assert found == pytest.approx(expected, rel=1e-5)
    assert mixed != pytest.approx(expected, rel=1e-3)


def test_bounds_are_where_conversations_begin_and_the_end_filled_up():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    found = bounds(positions)
    assert found.dtype == torch.int32 and len(found) == 64
    assert found[:5].tolist() == [0, 3, 5, 6, 10] and set(found[5:].tolist()) == {10}


def test_a_kernel_from_a_folder_is_used_by_every_layer(tmp_path):
    source = write_kernel(tmp_path / "kernel")
    checkpoint = write_checkpoint("llama", tmp_path / "m")
    model = build(job_for(checkpoint, tmp_path, flash_attn=f"hub:{source}"))
    assert model.config._attn_implementation == HUB_ATTENTION and is_flash(model)
    model.to_empty(device="cpu")(input_ids=torch.arange(8)[None])
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[HUB_ATTENTION].kernel().CALLS == ["whole", "whole"]


def refused(tmp_path, asked, kind="llama"):
    job = job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path, flash_attn=asked)
    with pytest.raises(JobError) as error:
        build(job)
    return error.value


def test_the_result_of_eager_attention_is_not_promised_to_be_kept(tmp_path):
    keys = {"gradient_checkpointing": "attention", "flash_attn": "disabled"}
    checkpoint = write_checkpoint("llama", tmp_path / "m")
    with pytest.raises(JobError, match="attention would keep nothing") as error:
        build(job_for(checkpoint, tmp_path, **keys))
    assert "gradient_checkpointing: full" in error.value.fix


def test_a_folder_without_a_kernel_is_refused(tmp_path):
    error = refused(tmp_path, f"hub:{tmp_path / 'nothing'}")
    assert "cannot be loaded" in error.what and "give a folder" in error.fix
    assert "there is no kernel folder" in error.found


def test_the_kernel_is_pinned_next_to_the_run_and_no_other_file_is_loaded(tmp_path):
    """Driver and workers load the copy in output_dir; a file that was changed there is named."""
    source = write_kernel(tmp_path / "kernel")
    job = job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path, flash_attn=f"hub:{source}")
    fetch(job, CPU, print)
    (locked,) = locks.read(own_lock(job)).kernels
    assert (locked.use, locked.asked) == ("attention", str(source))
    assert attention.attention_name(job, build(job)) == f"hub:{source}, {locked.at}"
    (own_lock(job).parent / locked.folder / "__init__.py").write_text(KERNEL + "# changed")
    with pytest.raises(JobError) as error:
        build(job)
    assert "cannot be loaded" in error.value.what and "__init__.py: sha256" in error.value.found


def test_another_use_of_kernels_stays_in_the_lock_file(tmp_path):
    source = write_kernel(tmp_path / "kernel")
    model = write_checkpoint("llama", tmp_path / "m")
    keys = {"use_kernels": True, "kernel_name": "jobs/kernels/llama_layers"}
    job = job_for(model, tmp_path, flash_attn=f"hub:{source}", **keys)
    for _ in range(2):
        fetch(job, CPU, print)
        assert [k.use for k in locks.read(own_lock(job)).kernels] == ["layers", "attention"]
    fetch(job_for(model, tmp_path, **keys), CPU, print)
    assert [k.use for k in locks.read(own_lock(job)).kernels] == ["layers"]


def test_a_kernel_that_is_not_in_the_jobs_lock_file_is_refused(tmp_path, capsys):
    model = write_checkpoint("llama", tmp_path / "m")
    one, other = (f"hub:{write_kernel(tmp_path / name)}" for name in ("one", "other"))
    file = tmp_path / "locked" / "kernels.lock.json"
    kernels.lock(job_for(model, tmp_path, flash_attn=one), file, None, None)
    kernels.fetch(file)
    kernels.verify(file)
    fetch(job_for(model, tmp_path, flash_attn=one, kernels_lock=str(file)), CPU, print)
    with pytest.raises(JobError, match="is not in the lock file of the job"):
        fetch(job_for(model, tmp_path, flash_attn=other, kernels_lock=str(file)), CPU, print)


def test_a_bare_name_is_a_version_that_is_known(tmp_path):
    model = write_checkpoint("llama", tmp_path / "m")
    job = job_for(model, tmp_path, flash_attn="hub:kernels-community/flash-attn2")
    wanted = attention.kernel_asked(job)
    assert wanted.source == "kernels-community/flash-attn2" and wanted.version is not None
    assert attention.kernel_asked(job_for(model, tmp_path)) is None


def test_a_kernel_that_is_no_flash_attention_is_refused(tmp_path):
    source = write_kernel(tmp_path / "kernel", "def relu(x): return x.relu()")
    error = refused(tmp_path, f"hub:{source}")
    assert error.found.startswith("it lacks flash_attn_func and flash_attn_varlen_func")


def test_a_model_with_sinks_is_refused(tmp_path):
    """transformers hands them over beside the mask; the kernel has no place for them."""
    source = write_kernel(tmp_path / "kernel")
    model = write_checkpoint("llama", tmp_path / "m")
    hub = attention.HubAttention(job_for(model, tmp_path, flash_attn=f"hub:{source}"))
    q = torch.randn(1, 2, 4, 8)
    assert hub(torch.nn.Identity(), q, q, q, None)[0].shape == (1, 4, 2, 8)
    with pytest.raises(JobError, match="sinks"):
        hub(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(2))


def test_a_run_does_not_go_on_with_another_kernel_than_the_jobs_lock_file_has(tmp_path):
    model, kernel = write_checkpoint("llama", tmp_path / "m"), write_kernel(tmp_path / "kernel")
    file = tmp_path / "locked" / "kernels.lock.json"
    job = job_for(model, tmp_path, flash_attn=f"hub:{kernel}", kernels_lock=str(file))
    for changed in ("", "# mended\n"):
        (kernel / "build" / "torch-cpu" / "__init__.py").write_text(KERNEL + changed)
        kernels.lock(job, file, None, None)
        if not changed:
            fetch(job, CPU, print)
    with pytest.raises(JobError, match="the run began with"):
        fetch(job, CPU, print)


def test_a_name_of_the_hub_is_one_in_every_folder(tmp_path, monkeypatch):
    (tmp_path / "own" / "attn").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    job = job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path, flash_attn="hub:own/attn")
    assert not attention.kernel_asked(job).is_local


def test_the_hub_offline_reports_that_a_folder_is_needed(tmp_path, monkeypatch):
    """Only a process with a GPU loads from the Hub; here the loading itself is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = write_checkpoint("llama", tmp_path / "m")
    asked = "hub:kernels-community/flash-attn2@0123456789abcdef"
    with pytest.raises(JobError) as error:
        attention.HubAttention(job_for(model, tmp_path, flash_attn=asked)).kernel()
    assert "kernels-community/flash-attn2" in error.value.what and "hub:/path" in error.value.fix


def test_an_architecture_without_flash_attention_is_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    error = refused(tmp_path, f"hub:{write_kernel(tmp_path / 'kernel')}")
    assert "LlamaForCausalLM has no flash attention" in error.found


@pytest.mark.parametrize(
    ("capability", "installed", "keys", "used"),
    [
        ((9, 0), {"fa2", "fa3"}, {}, "flash_attention_3"),
        ((9, 0), {"fa2"}, {}, None),
        ((9, 0), {"fa2"}, {"neat_packing": True}, "flash_attention_2"),
        ((9, 0), {"fa2", "fa4"}, {"cutoff_len": 8192}, "fa4"),
        ((9, 0), {"fa2", "fa4"}, {"cutoff_len": 2048}, None),
        ((9, 0), {"fa2", "fa4"}, {"cutoff_len": 2048, "neat_packing": True}, "fa4"),
        ((8, 0), {"fa2", "fa3", "fa4"}, {}, "flash_attention_2"),
        ((10, 0), {"fa3"}, {}, None),
        ((7, 5), {"fa2"}, {}, None),
    ],
)
def test_auto_takes_what_is_fastest(tmp_path, monkeypatch, capability, installed, keys, used):
    """The GPU and the packages are values here: this machine has neither."""
    job = job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path, bf16=True, **keys)
    config = build(job).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "has_package", lambda name: name in installed)
    assert attention.attention(job, config) == used


@pytest.mark.parametrize(
    ("capability", "shape"),
    [
        ((12, 0), {}),
        ((9, 0), {"head_dim": 256}),
        ((9, 0), {"attention_dropout": 0.1}),
    ],
)
def test_auto_leaves_flash_attention_4_where_it_would_be_refused(
    tmp_path, monkeypatch, capability, shape
):
    model = write_checkpoint("llama", tmp_path / "m", **shape)
    job = job_for(model, tmp_path, bf16=True, neat_packing=True)
    config = build(job).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "has_package", lambda name: name == "fa4")
    assert attention.attention(job, config) is None


@pytest.mark.parametrize("asked", ["hub:", "hub:flash", "hub:a/b@", "kernels-community/x"])
def test_what_names_no_kernel_is_refused_with_the_job(job_file, asked):
    with pytest.raises(JobError, match="flash_attn"):
        load(job_file(flash_attn=asked))


def test_parts_that_attend_otherwise_are_told_apart():
    """A tower without sdpa made an exported model be compared in eager, whose sums differ."""
    found = attention_of_parts(tiny_multimodal("got_ocr2"))
    assert found == {"": "eager", "text_config": "sdpa", "vision_config": "eager"}

"""A flash attention from a folder on a GPU: PyTorch's own FlashAttention-2 as such a kernel."""

import json
from pathlib import Path

import pytest
import torch

from raytrain_adv.errors import JobError
from raytrain_adv.model.build import build
from raytrain_adv.worker.trials.attention import try_attention
from tests.kernel_folders import write_kernel
from tests.tiny_models import job_for, write_checkpoint
from tests.workers import losses, run_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a GPU with FlashAttention-2 (compute capability 8.0)",
    ),
]
KERNEL = """
import torch


def _flash(q, k, v, starts, longest, scale, causal, window, dropout_p):
    left, right = window
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, dropout_p, causal, False, scale=scale,
        window_size_left=left, window_size_right=right,
    )
    return out


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    longest = q.shape[1]
    return _flash(q, k, v, None, longest, softmax_scale, causal, window_size, dropout_p)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1),
):
    return _flash(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, dropout_p
    )
"""
FOLLOW = "tokens see those that follow"
SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


def write_flash(folder, source=KERNEL):
    write_kernel(folder, "", "torch-cuda", name="attention")
    (folder / "build" / "torch-cuda" / "__init__.py").write_text(source)
    return folder


def tried(tmp_path, source, dtype=torch.bfloat16):
    kernel = write_flash(tmp_path / "kernel", source)
    folder = write_checkpoint("mistral", tmp_path / "m", **SIZES, sliding_window=48)
    job = job_for(folder, tmp_path, flash_attn=f"hub:{kernel}", bf16=True)
    return try_attention(job, build(job), torch.device("cuda"), dtype)


def test_flash_attention_is_within_rounding_of_the_definition(tmp_path):
    found = tried(tmp_path, KERNEL)
    assert found.startswith("tested on cuda in bfloat16, 1 form: values off by")
    print(found)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("left, right = window", "left, right, causal = window[0], -1, False"), FOLLOW),
        (("window_size_left=left", "window_size_left=-1"), "the sliding window is left out"),
        (("return out", "return out / 2 + out.detach() / 2"), "the gradient of queries off by 0.5"),
    ],
)
def test_a_wrong_one_is_refused(tmp_path, change, what):
    with pytest.raises(JobError, match="does not compute the attention") as error:
        tried(tmp_path, KERNEL.replace(*change))
    assert what in error.value.found


def test_float32_which_it_cannot_do_is_refused_in_words(tmp_path):
    with pytest.raises(JobError, match="fails when MistralAttention calls it"):
        tried(tmp_path, KERNEL, torch.float32)


def test_packed_conversations_train_as_with_sdpa_and_its_mask(job_file, keys, tmp_path):
    config = Path(keys["model_name_or_path"]) / "config.json"
    sizes = {**SIZES, "attention_dropout": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    hub = f"hub:{write_flash(tmp_path / 'kernel')}"
    packed = {"neat_packing": True, "cutoff_len": 64, "val_size": 8}
    packed |= {"pure_bf16": True, "learning_rate": 1e-4}
    jobs = {
        "sdpa": job_file("a.yaml", output_dir=str(tmp_path / "sdpa"), **packed),
        "flash": job_file("b.yaml", output_dir=str(tmp_path / "flash"), flash_attn=hub, **packed),
        "compiled": job_file(
            "c.yaml",
            output_dir=str(tmp_path / "compiled"),
            flash_attn=hub,
            torch_compile=True,
            **packed,
        ),
    }
    run_workers(1, *jobs.values())
    expected, *others = (list(losses(tmp_path / name).values()) for name in jobs)
    for found in others:
        assert found == pytest.approx(expected, rel=2e-3)

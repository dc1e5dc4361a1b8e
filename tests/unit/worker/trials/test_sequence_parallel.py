"""Workers that share sequences compute what one computes alone, or the job is refused."""

from pathlib import Path

import pytest
import torch.distributed as dist

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.sequence_parallel import refuse_unsplittable
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.trials.packing import check_packing
from raytrain_adv.worker.trials.sequence_parallel import split_sequences
from tests.families import tiny_model
from tests.ranks import run_ranks
from tests.tiny_models import job_for

SHARE = {"sequence_parallel_size": 2, "ray_num_workers": 2, "use_cpu": True}
SPLIT = ("llama", "gemma2", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "cohere2")
"""Among them caps, sliding windows, sinks, experts and keys of other widths than values."""
WHOLE = ("mamba2", "qwen3_next", "falcon_h1", "jamba", "falcon", "deepseek_v32", "recurrent_gemma")


def verdicts(folder: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for kind in kinds:
        for packs in (False, True):
            own = folder / f"{kind}{packs}{dist.get_rank()}"
            job = job_for("none", own, neat_packing=packs, **SHARE)
            run, model = local_run(job), tiny_model(kind)
            try:
                refuse_unsplittable(job, model)
                way = check_packing(job, model, run) if kind in SPLIT else "positions"
                found[f"{kind} {packs}"] = str(split_sequences(job, model, run, way))
            except (JobError, TrainingError) as error:
                found[f"{kind} {packs}"] = type(error).__name__
    return found


def test_attention_of_every_kind_is_shared_and_what_mixes_tokens_elsewhere_is_refused(tmp_path):
    found = run_ranks(verdicts, 2, tmp_path, tmp_path, SPLIT + WHOLE)[0]
    for kind in SPLIT:
        for packs in (False, True):
            assert found[f"{kind} {packs}"] == "2 workers of a host share each sequence", kind
    for kind in WHOLE:
        assert found[f"{kind} False"].endswith("Error"), kind


def fail_alone(folder: Path) -> None:
    """Fail on rank 1 in the third pass, the first that the workers share."""
    job = job_for("none", folder / str(dist.get_rank()), **SHARE)
    model, passes = tiny_model("llama"), iter("12")

    def fail(*_):
        if dist.get_rank() == 1 and next(passes, None) is None:
            raise ValueError("a bad day")

    model.model.layers[0].register_forward_pre_hook(fail)
    split_sequences(job, model, local_run(job), "positions")


def test_a_trial_that_fails_on_one_rank_ends_all_with_its_reason(tmp_path):
    with pytest.raises(AssertionError) as failed:
        run_ranks(fail_alone, 2, tmp_path, tmp_path)
    first, second = str(failed.value).split("\nrank 1:\n")
    reason = "rank 1: ValueError: a bad day"
    assert reason in first and "sequence_parallel_size: 2 would change" in first
    assert reason in second


@pytest.mark.parametrize(
    ("kind", "keys", "reason", "fix"),
    [
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3}, "its 9", "one of 1, 3, 9"),
        ("bloom", {}, "position_ids", "sequence_parallel_size: 1"),
        ("lfm2", {}, "convolve", "sequence_parallel_size: 1"),
        ("llama4_text", {}, "attn_temperature_tuning", "sequence_parallel_size: 1"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits", "size: 1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: dynamic",
            "sequence_parallel_size: 1",
        ),
    ],
)
def test_a_model_that_cannot_share_sequences_is_refused_by_what_it_has(
    kind, keys, reason, fix, tmp_path
):
    job = job_for("none", tmp_path, **SHARE)
    with pytest.raises(JobError) as refused:
        refuse_unsplittable(job, tiny_model(kind, **keys))
    assert reason in refused.value.found and fix in refused.value.fix

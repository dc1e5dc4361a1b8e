"""Whether a run's passes are recorded as CUDA graphs: where launches cost more than arithmetic."""

from torch import nn

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.tiled_mlp import TiledMlp
from raytrain_adv.transforms.transform import Transform

MOST_TFLOP = 60.0
"""Arithmetic of a pass above which launches do not matter: about 0.1 s on an H100."""


def why_no_graph(model: nn.Module, job: JobConfig, world_size: int, tokens: int) -> str:
    """Return why a run on GPUs does not record its passes, of `tokens` with padding; empty if it
    does. The model may be on any device, sharded or not.
    """
    wanted = job.parallel.cuda_graph
    own = [t.feature or t.name for t in Transforms(job) if _prepares_batches(t)]
    tflop = training_flops_per_token(model, tokens) * tokens / 1e12
    reasons = {
        "cuda_graph: false": wanted is False,
        "use_cpu: true": job.parallel.use_cpu,
        f"{world_size} workers exchange weights and gradients within a pass": world_size > 1,
        "fsdp_cpu_offload: true": job.parallel.fsdp_cpu_offload,
        "activation_offloading copies within a pass": bool(job.parallel.activation_offloading),
        "tiled_mlp computes tile by tile": job.transform(TiledMlp).enabled,
        f"{', '.join(own)} prepares each batch on the host": bool(own),
        f"a pass has {tflop:,.0f} TFLOP, and launches cost little": (
            wanted is None and tflop > MOST_TFLOP
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _prepares_batches(transform: Transform) -> bool:
    return type(transform).begin_batch is not Transform.begin_batch

"""Choose what moves FSDP2's shards and gradients, and try it before the model uses it."""

import socket
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import SHARDED
from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import Run
from raytrain_adv.text import first_line

KEY = "fsdp_collectives: nccl"


def choose(job: JobConfig, run: Run, mesh: DeviceMesh | None) -> tuple[bool, str | None]:
    """Return whether bytes move by copies between GPUs, as fsdp_collectives has it, and what moves
    them, printed too: none on one worker or a CPU. All ranks call this. Raises TrainingError for
    copies where they are not possible, or give other numbers than NCCL.
    """
    wanted = job.parallel.fsdp_collectives
    if run.device.type != "cuda" and wanted == "copies":
        raise _refusal("workers compute on the CPU")
    if mesh is None or mesh.size() == 1 or run.device.type != "cuda":
        return False, None
    group = mesh.get_group(SHARDED)
    ranks = dist.get_world_size(group)
    if wanted == "nccl" or ranks == 1:
        return False, f"NCCL ({'each worker has the whole model' if ranks == 1 else KEY})"
    reason = _agreed(run, _why_not(job, run, group)) or _agreed(run, _failure(job, run, group))
    if reason and wanted == "copies":
        raise _refusal(reason)
    found = f"copies between {ranks} GPUs of a host, NCCL's numbers to the bit"
    found = f"NCCL ({reason})" if reason else found
    run.say(f"collectives: {found}", event="collectives")
    return not reason, found


def _why_not(job: JobConfig, run: Run, group: dist.ProcessGroup) -> str:
    """Return why peers cannot be read, or nothing."""
    from raytrain_adv.ops.peer_copies import readable

    if job.parallel.fsdp_cpu_offload:
        return "fsdp_cpu_offload: true"
    places = run.gather((host(), run.device.index))
    others = [places[rank] for rank in dist.get_process_group_ranks(group)]
    if len({host for host, _ in others}) > 1:
        return "workers of several hosts share a copy of the model"
    if len(set(others)) < len(others):
        return "workers share a GPU"
    if not readable(run.device, [index for _, index in others]):
        return "the GPUs cannot read each other's memory"
    return ""


def host() -> str:
    """Return what differs between hosts, and between containers that may have one name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + socket.gethostname()
    return socket.gethostname()


def _failure(job: JobConfig, run: Run, group: dist.ProcessGroup) -> str:
    from raytrain_adv.ops.peer_copies import check

    try:
        check(group, run.device, job.parallel.ddp_timeout)
    except (RuntimeError, ValueError) as error:
        return first_line(error)
    return ""


def _agreed(run: Run, reason: str) -> str:
    """Return the first rank's reason that has one."""
    return next(filter(None, run.gather(reason)), "")


def _refusal(reason: str) -> TrainingError:
    return TrainingError(
        "fsdp_collectives: copies is not possible here",
        reason,
        "set fsdp_collectives: auto, which uses NCCL where copies are not possible",
    )

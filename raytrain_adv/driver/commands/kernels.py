"""`raytrain-adv kernels lock | fetch | verify`: kernels for clusters that do not reach the Hub."""

from dataclasses import replace
from pathlib import Path

from raytrain_adv import hardware
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.problems import command_error
from raytrain_adv.errors import JobError
from raytrain_adv.kernels import fetch as kernel_files
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels.fetch import Place
from raytrain_adv.kernels.lock import Locked, Use
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.kernels.variants import Target, numbers
from raytrain_adv.model.attention import kernel_asked
from raytrain_adv.text import plural
from raytrain_adv.transforms.hub_kernels import DEFAULT, HubKernels


def lock(job: JobConfig, file: Path, torch: str | None, cuda: str | None) -> None:
    """Pin the job's kernels in a lock file: commit, build and the sha256 of each file. `torch` and
    `cuda` (or `cpu`) are the workers' versions; None for this machine's. Raises JobError.
    """
    keys = job.transform(HubKernels)
    layers = (keys.wanted or (DEFAULT,)) if keys.enabled else ()
    of_attention = kernel_asked(job)
    wanted: list[tuple[Wanted, Use]] = [(one, "layers") for one in layers]
    wanted += [(of_attention, "attention")] if of_attention is not None else []
    if not wanted:
        raise JobError(
            "the job uses no kernels",
            f"{job.source}: use_kernels is false, and flash_attn names none",
            "set use_kernels: true, or flash_attn: hub:owner/kernel",
        )
    place = Place(target_of(job, torch, cuda), trust=tuple(keys.kernels_trust))
    locked = [
        kernel_files.find(one, place).locked.model_copy(update={"use": use}) for one, use in wanted
    ]
    locks.write(locked, file)
    for one in locked:
        print(_line(one))
    print(f"locked for {place.target} in {file}")
    print(f"download the files: raytrain-adv kernels fetch {file}; use them: kernels_lock: {file}")


def target_of(job: JobConfig, torch: str | None, cuda: str | None) -> Target:
    """Return the target of builds: this machine, except for the given versions."""
    target = Target.of(hardware.detect("cpu" if job.parallel.use_cpu else None))
    for flag, version in (("--torch", torch), ("--cuda", cuda)):
        if version not in (None, "cpu") and numbers(version) == (0, 0):
            text = f"{version!r} is not a version"
            raise command_error(text, "write two numbers, as 2.11", flag)
    if torch is not None:
        target = replace(target, torch=numbers(torch))
    if cuda is not None:
        target = replace(target, cuda=None if cuda == "cpu" else numbers(cuda))
    return target


def fetch(file: Path) -> None:
    """Download the locked files next to the lock file; sound files stay. Raises JobError."""
    found = locks.read(file)
    for locked in found.kernels:
        is_local = locked.commit is None
        wanted = Wanted(locked.source, is_local=is_local, revision=locked.commit)
        kernel_files.bring(wanted, locked, file)
        print(_line(locked))
    print(f"{plural(len(found.kernels), 'kernel')} next to {file}")


def verify(file: Path) -> None:
    """Compare the files next to a lock file with it. Raises JobError naming those that differ."""
    found = locks.read(file)
    for locked in found.kernels:
        if locked.folder is None:
            what = f"the files of {locked.source} are not next to {file}"
            fix = f"raytrain-adv kernels fetch {file}"
            raise JobError(what, "they were locked and never fetched", fix)
        locks.require_same(locked, file.parent / locked.folder, file)
        print(_line(locked))
    print(f"as locked in {file}: {plural(len(found.kernels), 'kernel')}")


def _line(locked: Locked) -> str:
    at = locked.commit or f"sha256 {locked.digest[:12]}"
    return f"{locked.asked}  {at}  {locked.variant}  {plural(len(locked.files), 'file')}"

"""`raytrain-adv submit`: upload a folder to a running cluster, run its job, and follow the log."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.job_submission import JobStatus, JobSubmissionClient

from raytrain_adv import __version__
from raytrain_adv.config import JobConfig, load
from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.errors import EXIT_DONE, EXIT_TRAINING_FAILED, ClusterError, JobError
from raytrain_adv.redaction import is_secret_name, redact, secrets_in
from raytrain_adv.text import first_line, listed
from raytrain_adv.transforms.applied import Transforms

DEFAULT_ENV = "jobs/runtime_env.yaml"
EXCLUDES = (
    *(".git", ".venv", ".env", "__pycache__", "*.egg-info", "/saves/", "/data/", "checkpoints/"),
    *("wandb/", "mlruns/", "*.safetensors", "*.distcp", "*.bin", "*.pt", "*.pth", "*.gguf"),
    *("*.arrow", "*.parquet"),
)
"""What is not uploaded, unless a file configures it."""
ENV_VARS = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
LARGEST_MIB = 500
"""Ray accepts 512 MiB, packed (ray 2.60)."""
EXIT_STOPPED = 130
RETRY_S = 2.0
MAX_RETRIES = 30


def submit(path: str, overrides: list[str], address: str | None, env_file: str | None) -> int:
    """Upload the folder, run the job, follow its log, and return its exit code.

    Ctrl-C stops the job, with a checkpoint; a second one leaves it running.

    Raises:
        JobError: if the job could not run there as written, or shows a secret.
        ClusterError: if the cluster does not accept it.
    """
    job = load(path, overrides)
    folder = Path.cwd()
    env = runtime_env(env_file, folder)
    refuse_secrets(env, overrides)
    files = uploaded_files(folder, env["excludes"])
    refuse_what_stays_behind(job, path, folder, files)
    size_mib = sum(file.stat().st_size for file in files) / 2**20
    if size_mib > LARGEST_MIB:
        raise _too_large(size_mib, files, folder)
    client = dashboard.connect(address)
    for noisy in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    command = ["python", "-m", "raytrain_adv.launch", path, *overrides]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.run_name) + time.strftime("-%Y%m%d-%H%M%S")
    print(f"{len(files)} files of {folder} are uploaded, {size_mib:.1f} MiB", flush=True)
    try:
        client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=name,
            runtime_env=env,
            metadata=metadata(job, path),
        )
    except (RuntimeError, ValueError, ConnectionError) as error:
        raise ClusterError(
            "The cluster did not accept the job", first_line(error), "see its log"
        ) from error
    print(f"submitted as {name}; Ctrl-C stops it, with a checkpoint\n", flush=True)
    return asyncio.run(follow(client, name))


def metadata(job: JobConfig, path: str) -> dict[str, str]:
    """Return what the dashboard's list of jobs shows of this one."""
    features = [transform.name for transform in Transforms(job)]
    return {
        "raytrain_adv": __version__,
        "run": job.run_name,
        "job_file": path,
        "model": job.model.model_name_or_path,
        "output_dir": job.output.output_dir,
        "features": ", ".join(features) or "none",
    }


def runtime_env(file: str | None, folder: Path) -> dict[str, Any]:
    """Return the runtime environment of a file, or of jobs/runtime_env.yaml, or the default one;
    its working directory is the folder.

    Raises:
        JobError: if the file is not a runtime environment.
    """
    found = Path(file) if file is not None else folder / DEFAULT_ENV
    content: Any = {"excludes": list(EXCLUDES), "env_vars": dict(ENV_VARS)}
    if file is not None or found.exists():
        try:
            content = yaml.safe_load(found.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise JobError(
                "The runtime environment cannot be read", f"{found}: {error}", f"see {DEFAULT_ENV}"
            ) from None
    if not isinstance(content, dict) or not isinstance(content.get("excludes", []), list):
        raise JobError(
            "The runtime environment is not a mapping with a list of excludes",
            str(found),
            f"see {DEFAULT_ENV}",
        )
    return {"excludes": [], **content, "working_dir": str(folder)}


def refuse_secrets(env: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise if what Ray shows in clear (the runtime environment, the command line) has a secret.

    Raises:
        JobError: naming the keys, never the values.
    """
    found = [f"{place}: {kind.name}" for place, kind in secrets_in("runtime_env", env)]
    for override in overrides:
        key, _, text = override.partition("=")
        value = yaml.safe_load(text) if text.lstrip().startswith(("{", "[")) else text
        if any(is_secret_name(part) for part in key.split(".")) or redact({key: value}) != {
            key: value
        }:
            found.append(f"the command line: {key}")
    if found:
        raise JobError(
            "A secret would be shown in clear by the cluster's dashboard and API",
            "\n".join(found),
            "put it into the environment of the nodes (a Kubernetes Secret, `hf auth login` on "
            "shared storage); see cluster/README.md",
        )


def uploaded_files(folder: Path, excludes: list[str]) -> list[Path]:
    """Return the files that Ray will pack, by its own rule; .gitignore applies too."""
    files: list[Path] = []

    def take(path: Path) -> None:
        if path.is_file():
            files.append(path)

    excluded = _get_excludes(folder, excludes)
    _dir_travel(folder, [excluded], take, True, logging.getLogger(__name__))
    return files


def refuse_what_stays_behind(
    job: JobConfig, path: str, folder: Path, files: Sequence[Path]
) -> None:
    """Raise if the job needs a file that is not uploaded, or writes where its output is lost.

    Raises:
        JobError: naming each.
    """
    if not Path(job.output.output_dir).is_absolute():
        raise JobError(
            "output_dir would lie in Ray's copy of this folder, which Ray deletes",
            f"output_dir: {job.output.output_dir}",
            "give an absolute path on storage that all nodes share: output_dir=/shared/runs/NAME",
        )
    there = {file.resolve() for file in files}
    needed = {"the job file": path, **dict(_paths(job.flat()))}
    missing = []
    for key, name in needed.items():
        local = Path(name)
        if local.is_absolute() and key != "the job file":
            continue  # storage that the cluster has too
        parts = local.rglob("*") if local.is_dir() else [local]
        behind = [part for part in parts if part.is_file() and part.resolve() not in there]
        behind = [part for part in behind if "__pycache__" not in part.parts]
        if behind:
            missing.append(f"{key}: {listed([str(part) for part in behind], 1)}")
    if missing:
        raise JobError(
            "Some files the job needs would not be uploaded",
            "\n".join(missing),
            f"they are outside {folder}, or {DEFAULT_ENV} or .gitignore excludes them; put them on "
            "storage that all nodes share and use absolute paths",
        )


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a job that names a file or folder here, with its key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str):
        for part in value.split(","):
            text = part.strip().removeprefix("hub:")  # flash_attn: hub:/path
            is_name = text not in ("", ".") and len(text) < 256 and "\0" not in text
            if is_name and Path(text).exists():
                yield key, text


def _too_large(size_mib: float, files: Sequence[Path], folder: Path) -> JobError:
    largest = sorted(files, key=lambda file: file.stat().st_size, reverse=True)[:5]
    shown = [
        f"{file.relative_to(folder)}: {file.stat().st_size / 2**20:.0f} MiB" for file in largest
    ]
    return JobError(
        f"The folder is too large to upload: {size_mib:.0f} MiB, Ray accepts {LARGEST_MIB}",
        "\n".join(shown),
        f"name them under excludes in {DEFAULT_ENV}",
    )


async def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the job's log as it is written, until it ends; return its exit code."""
    loop = asyncio.get_running_loop()
    interrupts: list[float] = []
    detached = asyncio.Event()

    def interrupt() -> None:
        interrupts.append(time.monotonic())
        if len(interrupts) > 1:
            detached.set()
            return
        print("\nstopping the job; Ctrl-C again leaves it running", flush=True)
        loop.run_in_executor(None, client.stop_job, name)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        tail = asyncio.ensure_future(_tail(client, name))
        left = asyncio.ensure_future(detached.wait())
        await asyncio.wait([tail, left], return_when=asyncio.FIRST_COMPLETED)
        if not tail.done():
            tail.cancel()
            print(f"\nleft; its log: ray job logs --follow {name}", flush=True)
            return EXIT_STOPPED
        left.cancel()
        tail.result()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return _ended(client, name)


async def _tail(client: JobSubmissionClient, name: str) -> None:
    """Print the log; where the connection breaks (a port that is forwarded does), continue after
    what was printed.
    """
    printed = failures = 0
    while failures < MAX_RETRIES:
        seen, before = 0, printed
        try:
            async for text in client.tail_job_logs(name):
                fresh = text[max(printed - seen, 0) :] if seen < printed else text
                seen += len(text)
                print(fresh, end="", flush=True)
                printed = max(printed, seen)
            if client.get_job_status(name).is_terminal():
                return
        except (aiohttp.ClientError, RuntimeError, ConnectionError, OSError) as error:
            print(f"\nthe log's connection broke ({error}); trying again", flush=True)
        failures = 0 if printed > before else failures + 1
        await asyncio.sleep(RETRY_S)
    raise ClusterError(
        "The job's log can no longer be followed",
        f"no answer {MAX_RETRIES} times in a row",
        f"the job still runs: ray job logs --follow {name}",
    )


def _ended(client: JobSubmissionClient, name: str) -> int:
    info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return EXIT_DONE
    if info.status == JobStatus.STOPPED:
        print("\nthe job was stopped", flush=True)
        return EXIT_STOPPED
    code = info.driver_exit_code
    print(f"\nthe job failed{f' (exit code {code})' if code else ''}", flush=True)
    if code is None:
        print(info.message, flush=True)
    return int(code or EXIT_TRAINING_FAILED)

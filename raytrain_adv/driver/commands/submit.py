"""`raytrain-adv submit`: upload a folder to a running cluster, run its job, and follow the log."""

import asyncio
import logging
import re
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.job_submission import JobStatus, JobSubmissionClient

from raytrain_adv import __version__
from raytrain_adv.config import JobConfig, load
from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_TRAINING_FAILED,
    ClusterError,
    JobError,
)
from raytrain_adv.redaction import is_secret_name, redact, secrets_in
from raytrain_adv.text import first_line, listed, plural
from raytrain_adv.transforms.applied import Transforms

DEFAULT_ENV = "jobs/runtime_env.yaml"
EXCLUDES = (
    *(".git", ".venv", ".env", "__pycache__", "*.egg-info", "/saves/", "/data/", "checkpoints/"),
    *("wandb/", "mlruns/", "*.safetensors", "*.distcp", "*.bin", "*.pt", "*.pth", "*.gguf"),
    *("*.arrow", "*.parquet"),
)
"""What is not uploaded, unless a file configures it."""
ENV_VARS = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
LARGEST_MIB = 500  # Ray accepts 512 MiB, packed (ray 2.60)
NOISY = (
    "dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk",
    "_private.runtime_env.packaging",
)  # fmt: skip
RETRY_S = 2.0
MAX_RETRIES = 30


def submit(path: str, overrides: list[str], address: str | None, env_file: str | None) -> int:
    """Upload the folder, run the job, follow its log, and return its exit code. Ctrl-C stops the
    job, with a checkpoint; a second one leaves it running. Raises JobError and ClusterError.
    """
    job = load(path, overrides)
    folder = Path.cwd()
    env = runtime_env(env_file, folder)
    refuse_secrets(env, overrides)
    files = uploaded_files(folder, env["excludes"])
    refuse_what_stays_behind(job, path, folder, files)
    size_mib = _size_mib(files, folder)
    client = dashboard.connect(address)
    for noisy in NOISY:  # each has a level of its own, INFO (ray 2.60)
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.run_name) + time.strftime("-%Y%m%d-%H%M%S")
    print(f"uploads {plural(len(files), 'file')} of {folder}, {size_mib:.1f} MiB", flush=True)
    request = {
        "entrypoint": shlex.join(["python", "-m", "raytrain_adv.launch", path, *overrides]),
        "submission_id": name,
        "runtime_env": env,
        "metadata": {
            "raytrain_adv": __version__,
            "job_name": job.run_name,  # the column Name of Ray's dashboard
            "job_file": path,
            "model": job.model.model_name_or_path,
            "output_dir": job.output.output_dir,
            "features": ", ".join(one.name for one in Transforms(job)) or "none",
        },
    }
    return follow(client, name, request)


def runtime_env(file: str | None, folder: Path) -> dict[str, Any]:
    """Return the runtime environment of a file, of DEFAULT_ENV or the default. Raises JobError."""
    found = Path(file or folder / DEFAULT_ENV)
    content: Any = {"excludes": list(EXCLUDES), "env_vars": dict(ENV_VARS)}
    try:
        if file is not None or found.exists():
            content = yaml.safe_load(found.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("excludes", []), list):
            raise ValueError("it is not a mapping with a list of excludes")
    except (OSError, yaml.YAMLError, ValueError) as error:
        what = "The runtime environment cannot be read"
        raise JobError(what, f"{found}: {error}", f"see {DEFAULT_ENV}") from None
    return {"excludes": [], **content, "working_dir": str(folder)}


def refuse_secrets(env: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise JobError if what Ray shows in clear has a secret, naming the keys, not the values."""
    found = [f"{place}: {kind.name}" for place, kind in secrets_in("runtime_env", env)]
    for key, _, text in (override.partition("=") for override in overrides):
        value = yaml.safe_load(text) if text.lstrip().startswith(("{", "[")) else text
        is_named = any(is_secret_name(part) for part in key.split("."))
        if is_named or redact({key: value}) != {key: value}:
            found.append(f"the command line: {key}")
    if found:
        what = "A secret would be shown in clear by the cluster's dashboard and API"
        fix = "put it into the environment of the nodes (a Kubernetes Secret, `hf auth login` on "
        raise JobError(what, "\n".join(found), f"{fix}shared storage); see cluster/README.md")


def uploaded_files(folder: Path, excludes: list[str]) -> list[Path]:
    """Return the files that Ray will pack, by its own rule; .gitignore applies too."""
    files: list[Path] = []
    excluded = _get_excludes(folder, excludes)
    _dir_travel(folder, [excluded], files.append, True, logging.getLogger(__name__))
    return [path for path in files if path.is_file()]


def refuse_what_stays_behind(
    job: JobConfig, path: str, folder: Path, files: Sequence[Path]
) -> None:
    """Raise JobError if the job needs a file that is not uploaded, or its output would be lost."""
    if not Path(job.output.output_dir).is_absolute():
        raise JobError(
            "output_dir would lie in Ray's copy of this folder, which Ray deletes",
            f"output_dir: {job.output.output_dir}",
            "give an absolute path on storage that all nodes share: output_dir=/shared/runs/NAME",
        )
    there = {file.resolve() for file in files}
    missing = []
    for key, name in {"the job file": path, **dict(_paths(job.flat()))}.items():
        local = Path(name)
        if local.is_absolute() and key != "the job file":
            continue  # storage that the cluster has too
        parts = [p for p in (local.rglob("*") if local.is_dir() else [local]) if p.is_file()]
        behind = [p for p in parts if p.resolve() not in there and "__pycache__" not in p.parts]
        if behind:
            missing.append(f"{key}: {listed([str(part) for part in behind], 1)}")
    if missing:
        fix = (
            f"they are outside {folder}, or {DEFAULT_ENV} or .gitignore excludes them; put them on "
            "storage that all nodes share and use absolute paths"
        )
        what = "Some files the job needs would not be uploaded"
        raise JobError(what, "\n".join(missing), fix)


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a job that names a file or folder here, with its key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str):
        texts = (part.strip().removeprefix("hub:") for part in value.split(","))
        names = (text for text in texts if text not in ("", ".") and "\0" not in text)
        yield from ((key, name) for name in names if len(name) < 256 and Path(name).exists())


def _size_mib(files: Sequence[Path], folder: Path) -> float:
    sizes = {str(file.relative_to(folder)): file.stat().st_size / 2**20 for file in files}
    total = sum(sizes.values())
    if total > LARGEST_MIB:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise JobError(
            f"The folder is too large to upload: {total:.0f} MiB, Ray accepts {LARGEST_MIB}",
            "\n".join(f"{name}: {sizes[name]:.0f} MiB" for name in largest),
            f"name them under excludes in {DEFAULT_ENV}",
        )
    return total


def follow(client: JobSubmissionClient, name: str, request: Mapping[str, Any]) -> int:
    """Submit the job and print its log as it is written, until it ends; return its exit code.
    Raises ClusterError if the cluster does not accept the job, stop it, or show how it ended.
    """
    log = _Log(client, name)
    # Ctrl-C counts also where SIGINT is ignored, as in a process that a script starts with &.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            with _answers("The cluster did not accept the job", "see its log"):
                client.submit_job(**request)
            print(f"submitted as {name}; Ctrl-C stops it, with a checkpoint\n", flush=True)
            asyncio.run(log.tail())
        except KeyboardInterrupt:
            print("\nstopping the job; Ctrl-C again leaves it running", flush=True)
            with _answers("The job could not be stopped", f"stop it: ray job stop {name}"):
                client.stop_job(name)
            asyncio.run(log.tail())
    except KeyboardInterrupt:
        print(f"\nleft; its log: ray job logs --follow {name}", flush=True)
        return EXIT_STOPPED
    finally:
        signal.signal(signal.SIGINT, before)
    with _answers("It is not known how the job ended", f"see: ray job status {name}"):
        info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return EXIT_DONE
    if info.status == JobStatus.STOPPED or info.driver_exit_code == EXIT_STOPPED:
        print("\nthe job was stopped", flush=True)
        return EXIT_STOPPED
    code = info.driver_exit_code
    print(f"\nthe job failed (exit code {code})" if code else f"\nthe job failed\n{info.message}")
    return int(code or EXIT_TRAINING_FAILED)


@contextmanager
def _answers(what: str, fix: str) -> Iterator[None]:
    """Raise a ClusterError if the dashboard refuses a request or does not answer."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(what, first_line(error), fix) from error


class _Log:
    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self.client, self.name = client, name
        self.printed = 0  # characters of the log

    async def tail(self) -> None:
        """Print what is new until the job ends, also if the connection breaks."""
        failures = 0
        while failures < MAX_RETRIES:
            seen, before = 0, self.printed
            try:
                async for text in self.client.tail_job_logs(self.name):
                    print(text[max(self.printed - seen, 0) :], end="", flush=True)
                    seen += len(text)
                    self.printed = max(self.printed, seen)
                if self.client.get_job_status(self.name).is_terminal():
                    return
            except (aiohttp.ClientError, RuntimeError, OSError) as error:
                print(f"\nthe log's connection broke ({error}); trying again", flush=True)
            failures = 0 if self.printed > before else failures + 1
            await asyncio.sleep(RETRY_S)
        raise ClusterError(
            "The job's log can no longer be followed",
            f"no answer {MAX_RETRIES} times in a row",
            f"the job still runs: ray job logs --follow {self.name}",
        )

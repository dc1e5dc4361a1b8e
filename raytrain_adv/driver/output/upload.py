"""push_to_hub: check the token before training, upload the exported folders after it."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError, UploadError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.report import card
from raytrain_adv.report.parts import Upload
from raytrain_adv.report.record import RunReport
from raytrain_adv.storage.retry import retry
from raytrain_adv.text import first_line
from raytrain_adv.transforms.lora import Lora

TOKEN = "HF_TOKEN"
KEY = "push_to_hub"
WAITS_S = (2.0, 10.0, 30.0)
"""Seconds before each further attempt."""
FROM_THERE = (
    "start the job again with resume_from_checkpoint: true, which uploads and trains nothing"
)
ADAPTER = "adapter_config.json"
Say = Callable[[str], None]


def destinations(job: JobConfig, owner: str) -> dict[str, str]:
    """Return the repository of each folder of output_dir that the job exports, by its name."""
    name = job.hub.hub_model_id or job.run_name
    name = name if "/" in name else f"{owner}/{name}"
    kinds = [transform.converts for transform in job.transforms if transform.enabled]
    kinds += ["base"] * job.transform(Lora).changes_base  # the adapter is of no use without it
    return {"model": name, **{f"model-{kind}": f"{name}-{kind}" for kind in kinds if kind}}


def remarks(job: JobConfig) -> Iterator[str]:
    """Yield what goes where, for a plan; asks nothing of the Hub."""
    if not job.hub.push_to_hub:
        return
    if not os.environ.get(TOKEN):
        yield f"push_to_hub: a launch is refused: {TOKEN} is not set in this environment"
    who = "private" if job.hub.hub_private_repo else "public"
    branch = f", branch {job.hub.hub_revision}" if job.hub.hub_revision else ""
    for folder, repository in destinations(job, f"(owner of {TOKEN})").items():
        goes = f"{Path(job.output.output_dir) / folder} -> {_endpoint()}/{repository}"
        yield f"push_to_hub, at the {job.hub.hub_strategy}: {goes} ({who}{branch})"


def check(job: JobConfig, waits_s: Sequence[float] = WAITS_S) -> None:
    """Ask the Hub whose token it is, before anything is trained. Raises JobError if there is no
    token, or the Hub does not take it.
    """
    if not job.hub.push_to_hub:
        return
    what = "the Hugging Face Hub does not take the token"
    try:
        retry(lambda: _owner(_api()), what, lambda _: None, waits_s, _may_be_temporary)
    except JobError:
        raise
    except Exception as error:  # of the network, or the Hub's answer
        fix = f"set {TOKEN} to a token that may write, make {_endpoint()} reachable, or "
        raise JobError(what, _reason(error), f"{fix}set push_to_hub: false") from error


def upload(
    job: JobConfig, report: RunReport, say: Say, waits_s: Sequence[float] = WAITS_S
) -> RunReport:
    """Upload the finished run's folders; return the report with what became of each. Nothing is
    raised: the run is done, and stays so.
    """
    if not job.hub.push_to_hub or report.model_dir is None:
        return report
    done = {one.folder: one for one in report.uploads if one.url}
    uploads = []
    folders = [Path(one) for one in (report.model_dir, report.converted[1]) if one]
    folders += [folders[0].with_name("model-base")] * job.transform(Lora).changes_base
    for folder in folders:
        if str(folder) in done:
            uploads.append(done[str(folder)])
            continue
        uploads.append(_uploaded(job, folder, say, waits_s))
        one = uploads[-1]
        say(f"uploaded {folder} to {one.url}" if one.url else failure(one))
    kept = [note for note in report.notes if not note.startswith(KEY)]
    words = (f"{KEY}: {one.folder} is at {one.url}" for one in uploads if one.url)
    failed = (f"{KEY}: {failure(one)}" for one in uploads if one.error)
    notes = (*kept, *words, *failed)
    return report.model_copy(update={"uploads": tuple(uploads), "notes": notes})


def failure(one: Upload) -> str:
    """Return the message of an upload that failed, with what to do."""
    found = f"{one.folder} was not uploaded to {one.repository}: {one.error}"
    return f"{found}\n  fix: {FROM_THERE}; or hf upload {one.repository} {one.folder}"


def refuse_incomplete(report: RunReport) -> None:
    """Raise UploadError if an upload has failed: the run is done, and its exit code tells it."""
    if failed := [one for one in report.uploads if one.error]:
        raise UploadError(
            "The run is done, and its model could not be uploaded",
            "\n".join(f"{one.folder} to {one.repository}: {one.error}" for one in failed),
            f"{FROM_THERE}; or hf upload {failed[0].repository} {failed[0].folder}",
        )


def _uploaded(job: JobConfig, folder: Path, say: Say, waits_s: Sequence[float]) -> Upload:
    repository = job.hub.hub_model_id or job.run_name

    def push() -> str:
        nonlocal repository
        api = _api()
        repository = destinations(job, _owner(api))[folder.name]
        return _push(api, job, folder, repository)

    what, url, reason = f"{folder} was not uploaded", "", ""
    try:
        url = retry(push, what, say, waits_s, _may_be_temporary, _reason)
    except Exception as error:  # noqa: BLE001 # the files stay, and the report has it
        reason = _reason(error)
    return Upload(folder=str(folder), repository=repository, url=url, error=reason)


def _push(api: Any, job: JobConfig, folder: Path, repository: str) -> str:
    """Create the repository and commit the folder's files; return the commit's address."""
    from huggingface_hub import CommitOperationAdd

    hub = job.hub
    api.create_repo(repository, private=hub.hub_private_repo, exist_ok=True)
    if hub.hub_private_repo and not api.repo_info(repository).private:
        raise JobError(
            f"{repository} is a public repository",
            "it was there before, and hub_private_repo is true",
            "set hub_private_repo: false, or name another one by hub_model_id",
        )
    if hub.hub_revision is not None:
        api.create_branch(repository, branch=hub.hub_revision, exist_ok=True)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    changed = {ADAPTER: _adapter(folder, repository), card.FILE_NAME: _card(folder, repository)}
    operations = [
        CommitOperationAdd(str(file.relative_to(folder)), changed.get(file.name) or str(file))
        for file in files
    ]
    commit = api.create_commit(
        repository,
        operations,
        commit_message=f"{job.run_name}, trained by raytrain_adv",
        revision=hub.hub_revision,
    )
    return str(commit.commit_url)


def _adapter(folder: Path, repository: str) -> bytes | None:
    """Return adapter_config.json without paths of this machine: a base in the same folder is the
    repository's, one beside it has its own, another local one is named as its folder.
    """
    if not (folder / ADAPTER).is_file():
        return None
    config = json.loads((folder / ADAPTER).read_text())
    base = Path(config["base_model_name_or_path"])
    if base.is_absolute():
        is_beside = base == folder.resolve().with_name("model-base")
        config["base_model_name_or_path"] = (
            repository
            if (folder / "config.json").is_file()
            else f"{repository}-base"
            if is_beside
            else base.name
        )
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _card(folder: Path, repository: str) -> bytes | None:
    """Return the card with the repository's name where it names the folder."""
    file = folder / card.FILE_NAME
    if not file.is_file():
        return None
    return file.read_text().replace(f'"{folder.name}"', f'"{repository}"').encode()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _api() -> Any:
    """Return the Hub's client. Raises JobError without a token."""
    from huggingface_hub import HfApi

    token = os.environ.get(TOKEN)
    if not token:
        fix = f"export {TOKEN}=... (a token that may write), or set push_to_hub: false"
        raise JobError(
            "push_to_hub needs a token of the Hugging Face Hub", f"{TOKEN} is not set", fix
        )
    return HfApi(endpoint=_endpoint(), token=token)


def _owner(api: Any) -> str:
    """Return whose token it is. Raises JobError for one that only reads, and the Hub's errors."""
    who = api.whoami()
    role = who.get("auth", {}).get("accessToken", {}).get("role", "")
    if role == "read":
        raise JobError(
            f"{TOKEN} may only read", f"it is {who['name']}'s", "create a token with the role write"
        )
    return str(who["name"])


def _reason(error: BaseException) -> str:
    kind = "" if isinstance(error, JobError) else f"{type(error).__name__}: "
    return hide_environment(f"{kind}{first_line(error)}")


def _may_be_temporary(error: BaseException) -> bool:
    """Whether another attempt may succeed: no answer, or one that asks for patience."""
    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code == 429 or response.status_code >= 500)
    return not isinstance(error, JobError | ValueError)

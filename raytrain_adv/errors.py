"""Errors for users: what happened, what was found, what to do. All of them can be pickled.

And library messages that have nothing to do with the job, which are hidden.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Control characters but tabs and new lines: a file from elsewhere could send them to a terminal.
UNPRINTED = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
EXIT_DONE = 0
EXIT_JOB_FILE = 2
EXIT_TRAINING_FAILED = 3
EXIT_CLUSTER_REFUSED = 4
EXIT_NOT_MENDED = 5
EXIT_NOT_UPLOADED = 6
EXIT_STOPPED = 130  # as shells have it for Ctrl-C
STOPPED = "\nStopped. Set resume_from_checkpoint: true to continue from the last checkpoint.\n"
"""What a command prints that Ctrl-C has ended."""


class RaytrainAdvError(Exception):
    """An error that is shown to the user as text, without a traceback.

    `what` happened is one sentence; what was `found` and how to `fix` it may have several lines.
    Positional arguments only: keyword-only arguments do not survive pickling between Ray processes.
    """

    exit_code = EXIT_TRAINING_FAILED
    retry_can_help = False
    """Whether Ray should restart the workers from the last checkpoint after this error."""

    rank: int | None = None
    """The worker on which it happened, if on one."""

    def __init__(self, what: str, found: str = "", fix: str = "") -> None:
        super().__init__(what, found, fix)
        self.what = what
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("found", self.found), ("fix", self.fix)):
            for i, line in enumerate(text.splitlines()):
                prefix = f"{label}:".ljust(7) if i == 0 else " " * 7
                lines.append(f"  {prefix}{line}")
        text = "\n".join(lines).translate(UNPRINTED)
        # Half a surrogate pair, which JSON may hold, can be written to no terminal or file.
        return text.encode("utf-8", "replace").decode()


class JobError(RaytrainAdvError):
    """The job file, or a file or folder that it names, cannot be used as it is."""

    exit_code = EXIT_JOB_FILE


class TrainingError(RaytrainAdvError):
    """Training started and cannot continue; the same step would fail again in the same way."""


class Stopped(TrainingError):
    """The run was stopped on request, between two steps."""

    exit_code = EXIT_STOPPED


class Terminated(TrainingError):
    """A worker received SIGTERM, and all workers ended between two steps, with a checkpoint."""


class Hung(TrainingError):
    """No step finished within step_timeout; a restart may help."""

    retry_can_help = True


class HeadLost(TrainingError):
    """Ray's head node, and with it all of Ray, can no longer be reached."""


class StorageError(RaytrainAdvError):
    """Writing or reading a checkpoint, model or report failed."""


class UploadError(RaytrainAdvError):
    """The run is done, and its model could not be uploaded."""

    exit_code = EXIT_NOT_UPLOADED


class ClusterError(RaytrainAdvError):
    """The cluster cannot run this job: not enough workers, GPUs, or the wrong ones."""

    exit_code = EXIT_CLUSTER_REFUSED


NOISE: dict[str, str | tuple[str, ...]] = {
    # torchao 0.18 tries its compiled kernels for each CUDA version and Python, and warns about
    # those for other machines. Remove when torchao logs this at level debug.
    "torchao": "Failed to load ",
    # torchao 0.18 registers two enums as pytree constants, which torch 2.13 does by itself.
    "torch.utils._pytree": "<enum '",
    # bitsandbytes 0.50 asks the Hub for a kernel as it is imported, on CPUs with AVX512_BF16, and
    # proposes `pip install kernels`, also where that is installed, and trust_remote_code.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "kernels.hf_hub": "Skipping publisher trust check for 'kernels-community/quant",  # the same one
    # ray 2.60 prints 20 lines of dashboard.log where its dashboard does not start, mostly because
    # another process of Ray has ended, whose own words our error quotes.
    "ray._private.services": (
        "Failed to start the dashboard ",
        "Error should be written to 'dashboard.log'",
        "Couldn't read dashboard.log",
        "\nThe last 20 lines of ",
    ),
}
"""Logger -> the beginnings of hidden messages; its other messages are shown."""


class _Without(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOISE[record.name])


def quieten() -> None:
    """Drop NOISE in this process. Call it before torch is imported. Idempotent."""
    for name in NOISE:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without())


@contextmanager
def no_panics(what: str) -> Iterator[None]:
    """Turn a crash of a library in Rust, which is no Exception, into an error that names `what`.
    Raises JobError when it crashes.
    """
    try:
        yield
    except BaseException as error:  # a PanicException is no Exception, and cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise JobError(
            f"The tokenizers library crashed on {what}",
            str(error)[:300],
            "check tokenizer.json: it may be damaged, or made for another version",
        ) from None


def stop_error() -> Stopped:
    """Return the error to show after a signal, which Ray Train turns into an exit."""
    return Stopped(
        "The run was stopped",
        "by Ctrl-C, or by SIGTERM as ray job stop sends it",
        "run again with resume_from_checkpoint: true to continue from the last checkpoint",
    )

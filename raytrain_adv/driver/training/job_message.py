"""The status message of a submitted job, which Ray's dashboard and `ray job list` show: step, loss
and time left. Ray itself leaves it empty until a job has failed.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
from ray.job_submission import JobStatus

REFRESH_S = 5.0
TIMEOUT_S = 5


def submission_id() -> str | None:
    """Return the job's id if `ray job submit` or `raytrain-adv submit` started this process."""
    config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    found = config.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    return None if found is None else str(found)


class JobMessage:
    """Writes the message of this process's job, at most once in REFRESH_S; does nothing without
    one. `say` gets the reason if the cluster does not take it; nothing is written afterward.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._job, self._say = submission_id(), say
        self._written_at = -REFRESH_S
        self._written = ""

    def tell(self, message: str) -> None:
        """Write the message if it is new and due."""
        now = time.monotonic()
        if self._job is None or message == self._written or not ray.is_initialized():
            return
        if now - self._written_at < REFRESH_S:
            return
        self._written_at, self._written = now, message
        try:
            asyncio.run(_put(self._job, message))
        except (RuntimeError, OSError, ray.exceptions.RayError) as error:
            self._say(f"The job's status message cannot be written: {error}")
            self._job = None


async def _put(job: str, message: str) -> None:
    """Replace the message of a running job. Ray has no public way (ray 2.60)."""
    client = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)
    if await client.get_status(job, TIMEOUT_S) == JobStatus.RUNNING:
        await client.put_status(job, JobStatus.RUNNING, message, timeout=TIMEOUT_S)

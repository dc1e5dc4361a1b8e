"""What is refused before Ray starts."""

from contextlib import ExitStack

import pytest

from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.training.prepare import Progress, prepare_run
from raytrain_adv.errors import JobError


def test_a_checkpoint_that_is_not_there_is_refused_before_ray_starts(
    make_job, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(connect, "connect", started.append)
    job = make_job(resume_from_checkpoint=str(tmp_path / "gone"))
    with ExitStack() as watched, pytest.raises(JobError, match="does not name a complete"):
        prepare_run(job, started.append, print, Progress(), watched, started.append)
    assert started == []

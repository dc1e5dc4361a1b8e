"""What is refused before Ray starts, and what is imported while it does."""

import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.training import start
from raytrain_adv.driver.training.start import HEAVY, Progress, start_ray
from raytrain_adv.errors import JobError


def test_a_checkpoint_that_is_not_there_is_refused_before_ray_starts(
    make_job, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(connect, "connect", started.append)
    job = make_job(resume_from_checkpoint=str(tmp_path / "gone"))
    with ExitStack() as watched, pytest.raises(JobError, match="does not name a complete"):
        start_ray(job, started.append, Progress(time.time()), watched, started.append)
    assert started == []


@pytest.mark.parametrize(
    ("imported", "absent"), [(["raytrain_adv.driver.training.run"], "torch"), (HEAVY, "ray")]
)
def test_what_is_imported_before_ray_starts_is_light_and_the_rest_is_not_of_ray(imported, absent):
    """Two threads that import parts of one package may see a module half made."""
    code = f"import sys, {', '.join(imported)}; assert {absent!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_fails_to_import_meanwhile_is_raised_as_it_failed_the_first_time(
    make_job, tmp_path, monkeypatch
):
    """PyTorch that is imported half fails the second time about docstrings that are there."""
    code = "import builtins\nbuiltins.tries = getattr(builtins, 'tries', 0) + 1\n"
    (tmp_path / "half.py").write_text(code + "raise OSError(f'no libcudart.so, try {tries}')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "HEAVY", ("half",))
    monkeypatch.setattr(start, "head_address", lambda: "127.0.0.1:1")
    monkeypatch.setattr(connect, "connect", lambda job: True)
    monkeypatch.setattr(connect, "describe_dashboard", lambda: "none")
    with ExitStack() as watched, pytest.raises(OSError, match="try 1"):
        start_ray(make_job(), print, Progress(time.time()), watched, print)


def test_a_refusal_waits_for_the_thread_that_imports(make_job, tmp_path, monkeypatch):
    """Python crashed at times when it ended before."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(1); is_whole = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "HEAVY", ("slow",))

    def refuse(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(connect, "connect", refuse)
    with ExitStack() as watched, pytest.raises(KeyboardInterrupt):
        start_ray(make_job(), print, Progress(time.time()), watched, print)
    assert sys.modules["slow"].is_whole


def test_every_second_has_one_phase(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(start.time, "time", lambda: now)
    progress = Progress(now)
    for phase, seconds in (("imports", 5.0), ("Ray", 2.0), ("imports", 1.0)):
        now += seconds
        progress.end(phase)
    assert progress.timeline == {"imports": 6.0, "Ray": 2.0}

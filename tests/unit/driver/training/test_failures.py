"""What the user is told of processes that have gone."""

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError

from raytrain_adv.driver.sweep.sweep import name_low_memory
from raytrain_adv.driver.training import failures
from raytrain_adv.errors import TrainingError
from raytrain_adv.report.record import describe_failure

KILLED = OutOfMemoryError(
    "2 worker(s) were killed due to the node running low on memory. Memory on the node "
    "(IP: 10.0.0.7, ID: f5ef) was 22.47GB used / 23.54GB limit (0.954706)\n"
    "OOM kill reason: Memory usage 24019050496B exceeded threshold\n"
    "Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n"
    "18045\t13.06\tpython another.py\n17092\t3.53\tpython -m tests\n18788\t0.43\tpython\n"
    "19228\t0.42\tray::ImplicitFunc.train\n"
    "Refer to the documentation on how to address the out of memory issue\n"
)


def test_a_controller_that_the_memory_monitor_killed_has_died():
    """Ray's error is no RayActorError: the run ended with a traceback instead of starting again."""
    assert isinstance(KILLED, failures.DIED) and isinstance(ActorDiedError(), failures.DIED)
    told = failures.translate(KILLED)
    assert told.what.startswith("Ray Train's controller died: its node ran low on memory")
    assert "10.0.0.7" in told.found and "22.47GB used / 23.54GB limit" in told.found
    assert "18045\t13.06\tpython another.py" in told.found and "Refer to" not in told.found
    assert "resume_from_checkpoint: true" in told.fix


def test_a_worker_that_the_memory_monitor_killed_is_named_before_those_that_lost_it():
    lost = RuntimeError("Connection closed by peer")
    told = failures.translate(WorkerGroupError("", {0: lost, 1: KILLED}))
    assert told.what.startswith("Worker 1 died: its node ran low on memory")
    assert "22.47GB used" in told.found and "workers [0] failed with it" in told.found
    assert told.rank == 1


def test_an_error_of_a_worker_keeps_its_rank_for_the_report():
    own = TrainingError("The loss is NaN", "step 3", "lower learning_rate")
    told = failures.translate(WorkerGroupError("", {0: RuntimeError("peer"), 2: own}))
    assert told is own and describe_failure(told).rank == 2


def test_a_sweep_whose_trial_the_memory_monitor_killed_ends_with_what_to_do():
    with pytest.raises(TrainingError, match="a node ran low on memory") as told, name_low_memory():
        raise RuntimeError(f"Caught unexpected exception: {KILLED}") from KILLED
    assert len(told.value.found.splitlines()) == 4 and "max_concurrent_trials" in told.value.fix
    with pytest.raises(RuntimeError, match="another"), name_low_memory():
        raise RuntimeError("another")

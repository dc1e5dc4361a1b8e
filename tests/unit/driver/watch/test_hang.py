"""Which worker blocks a run: one that does not answer, or one that waits for no other."""

import threading
import time
from pathlib import Path

import torch.distributed as dist

from raytrain_adv.driver.watch.hang import find_hung
from raytrain_adv.run import heartbeat
from raytrain_adv.run.heartbeat import Heartbeat, Pulse
from tests.ranks import run_ranks

MOST_S = 300.0  # after which a test that waits in vain fails


def pulse(stalled_s: float, waits: bool) -> Pulse:
    return Pulse(step=3, stalled_s=stalled_s, place="worker/steps.py:1 step", waits=waits)


def test_a_run_that_progresses_has_no_hung_worker():
    assert find_hung({0: pulse(9.0, True), 1: pulse(1.0, False)}, {}, timeout_s=10) == {}
    assert find_hung({0: pulse(1.0, True)}, {1: 9.0}, timeout_s=10) == {}


def test_a_process_that_does_not_answer_is_named_before_those_that_wait_for_it():
    found = find_hung({0: pulse(11.0, False)}, {1: 9.0}, timeout_s=10)
    assert list(found) == [1] and "does not answer" in found[1]
    assert list(find_hung({}, {1: 11.0}, timeout_s=10)) == [1]  # in evaluation: nobody else stalls


def test_the_worker_that_waits_for_no_other_is_the_cause():
    found = find_hung({0: pulse(11.0, True), 1: pulse(11.0, False)}, {}, timeout_s=10)
    assert list(found) == [1] and "3 steps done" in found[1] and "steps.py:1" in found[1]


def test_all_are_named_if_all_wait_for_each_other():
    assert list(find_hung({0: pulse(11.0, True), 1: pulse(12.0, True)}, {}, timeout_s=10)) == [0, 1]


def test_time_counts_from_the_first_step_on_and_not_while_paused(monkeypatch):
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    beat = Heartbeat()
    now += 2.0
    assert beat.pulse().stalled_s == 0.0
    with beat.paused():  # an evaluation before the first step
        pass
    assert beat.pulse().stalled_s == 0.0
    beat.step_done()
    now += 2.0
    assert beat.pulse().stalled_s == 2.0
    with beat.paused():
        now += 3.0
        assert beat.pulse().stalled_s == 0.0
    now += 1.0
    assert beat.pulse().stalled_s == 1.0
    beat.stop()
    now += 2.0
    assert beat.pulse().stalled_s == 0.0 and beat.step == 1


def one_is_late(told: Path) -> tuple[bool, str]:
    """Sleep on rank 1 until rank 0 waits; return this rank's state as another thread sees it."""
    beat, seen = Heartbeat(), [Pulse(0, 0.0, "", False)]
    end, is_late = time.monotonic() + MOST_S, dist.get_rank() == 1

    def is_there() -> bool:
        return "one_is_late" in seen[-1].place if is_late else seen[-1].waits

    def look() -> None:
        while not is_there() and time.monotonic() < end:
            time.sleep(0.1)
            seen.append(beat.pulse())
        if not is_late:
            told.touch()

    looking = threading.Thread(target=look)
    looking.start()
    while is_late and (looking.is_alive() or not told.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    dist.barrier()
    looking.join()
    return any(one.waits for one in seen), seen[-1].place


def test_a_wait_for_others_is_distinguished_from_own_work(tmp_path):
    (waits, _), (sleeps, place) = run_ranks(one_is_late, 2, tmp_path, tmp_path / "told")
    assert waits and not sleeps
    assert "watch/test_hang.py" in place and "one_is_late" in place

import psutil
import torch

from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.run.trackers import Trackers
from raytrain_adv.storage.metrics_file import MetricsFile
from raytrain_adv.storage.storage import Storage


def test_a_run_that_is_closed_holds_no_file(tmp_path):
    """Each start in one process left metrics.jsonl open: the soak suite found it."""
    before = psutil.Process().num_fds()
    for _ in range(3):
        storage = Storage.at(str(tmp_path))
        run = Run(torch.device("cpu"), storage, "a_001", SilentReporter())
        run.say("early")
        run.open_metrics(MetricsFile(tmp_path / "metrics.jsonl", None), Trackers())
        run.close()
        run.close()
    assert psutil.Process().num_fds() == before

"""Processes of a Ray that its driver started: what they import, and what they do without."""

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.train.v2._internal.callbacks import state_manager
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api.config import ScalingConfig

import raytrain_adv
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.connect import _fewer, _num_waiting
from raytrain_adv.driver.cluster.own import OwnNodePolicy, plain_versions
from raytrain_adv.imports import RARELY, USUALLY, end_imports, few_collections
from raytrain_adv.probe_script import num_cores

ASKED = """
import os, sys, traceback
import torch.cuda
from raytrain_adv import probe_script
probe_script.num_cores = lambda: int(sys.argv[1])
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties",
             "current_device", "is_bf16_supported", "_lazy_init", "init"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *given, name=name: sys.exit(f"asked {name}"))
import gc
from raytrain_adv.driver.cluster import preload
loaded = [name for name in preload.MODULES if name != "torch" and name in sys.modules]
print(len(loaded), *gc.get_threshold())
"""


def test_a_process_that_waits_imports_without_asking_cuda_and_only_where_cores_are_idle():
    """CUDA would see all devices, not those that the process is given later."""
    found = [
        subprocess.run(
            [sys.executable, "-c", ASKED, cores], capture_output=True, text=True, check=True
        ).stdout.split()
        for cores in ("2", "16")
    ]
    rarely = [str(number) for number in RARELY]
    assert found == [["0", *rarely], ["4", *rarely]]


LAUNCHED = """
import sys
from raytrain_adv.config import load
from raytrain_adv.driver.cluster.connect import _settings
print(*_settings({"address": sys.argv[1]}, load(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("shadowed", "address", "preloads"),
    [(None, "local", True), (None, "10.0.0.1:6379", False), ("raytrain_adv", "local", False),
     ("transformers", "local", False)],
)  # fmt: skip
def test_a_process_that_waits_imports_nothing_of_which_the_driver_has_another(
    tmp_path, job_file, shadowed, address, preloads
):
    """A clone that is not installed trained with the installed package."""
    here = Path(raytrain_adv.__file__).parents[1]
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    if shadowed == "raytrain_adv":
        (tmp_path / shadowed).symlink_to(here / shadowed)
    elif shadowed:
        (tmp_path / f"{shadowed}.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(here)}
    command = [sys.executable, str(script), address, str(job_file())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("RAY_preload_python_modules" in done.stdout) == preloads


def test_processes_that_nobody_takes_import_nothing(monkeypatch, make_job):
    """Each process of a sweep's and an elastic job's Ray imported PyTorch; few need it."""
    monkeypatch.setattr(connect, "_is_shadowed", lambda package: False)
    elastic = make_job(ray_num_workers=[1, 2], max_failures=-1, save_strategy="steps")
    swept = make_job(sweep={"weight_decay": [0.0, 0.1], "metric": "train_loss"})
    one, local = make_job(), {"address": "local"}
    for job, options, preloads in [
        (one, local, True),
        (one, {**local, "runtime_env": {"env_vars": {"A": "1"}}}, False),
        (elastic, local, False),
        (swept, local, False),
        (None, local, False),
    ]:
        assert ("RAY_preload_python_modules" in connect._settings(options, job)) == preloads


@pytest.mark.parametrize(
    ("workers", "gpus", "number"),
    [(1, 8, 5), ("auto", 0, 6), ("auto", 8, 12), ([2, 4], 8, 8), (None, 8, 4)],
)
def test_as_many_processes_wait_as_a_job_uses(monkeypatch, make_job, workers, gpus, number):
    """Each holds 0.3 GiB to the end of the run, used or not; a host of 16 cores had 16."""
    devices = [Path(f"/dev/nvidia{gpu}") for gpu in range(gpus)]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: devices)
    keys = {"ray_num_workers": workers, "max_failures": -1, "save_strategy": "steps"}
    job = make_job(**keys) if workers else None
    assert _num_waiting(job) == number
    assert _fewer("--num_prestart_python_workers=192", 5) == "--num_prestart_python_workers=5"
    for kept in ("--num_prestart_python_workers=2", "--node_name=192", "raylet"):
        assert _fewer(kept, 5) == kept


def test_a_container_with_a_quota_has_its_cores_not_its_hosts(monkeypatch, tmp_path):
    """On 64 cores of which it had 2, waiting processes imported PyTorch before the first worker."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert num_cores(tmp_path) == 64
    old = tmp_path / "cpu"
    old.mkdir()
    for quota, cores in [("-1", 64), ("150000", 1), ("50000", 1), ("400000", 4)]:
        (old / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (old / "cpu.cfs_period_us").write_text("100000\n")
        assert num_cores(tmp_path) == cores
    for quota, cores in [("max", 4), ("200000", 2), ("9900000", 64)]:
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert num_cores(tmp_path) == cores


def test_workers_get_no_environment_and_nobody_is_asked_for_nodes(monkeypatch):
    for module, name in [
        (worker_group, "get_env_vars_to_propagate"),
        (state_manager, "_get_framework_version"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    assert worker_group.get_env_vars_to_propagate()
    policy = OwnNodePolicy(ScalingConfig(num_workers=3))
    policy.after_controller_start(SimpleNamespace(run_id="run"))
    assert worker_group.get_env_vars_to_propagate() == {}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    policy._cancel_resource_request()


def test_the_dashboard_is_told_versions_without_pytorch():
    framework = SimpleNamespace(module_names=lambda: ["torch"])
    assert b"torch_version" in pickle.dumps(torch.__version__)
    versions = plain_versions(framework)
    assert versions["torch"] == torch.__version__
    assert b"torch_version" not in pickle.dumps(versions)


def test_garbage_is_looked_for_again_after_imports():
    try:
        with few_collections():
            assert gc.get_threshold() == RARELY
        assert gc.get_threshold() == USUALLY
        gc.set_threshold(*RARELY)
        end_imports()
        assert gc.get_threshold() == USUALLY and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


FORKED = """
import os, signal
from ray._private import services
from raytrain_adv.driver.cluster.connect import _in_own_process_group
before = signal.getsignal(signal.SIGINT)
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
try:
    with _in_own_process_group(4):
        services.ConsolePopen(["true"], preexec_fn=int)
except KeyboardInterrupt:
    print("stopped", signal.getsignal(signal.SIGINT) is before)
"""


def test_ctrl_c_while_ray_forks_stops_the_driver():
    """Python dropped it in a hook, where logging kept its lock; the thread that imports hung."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=True
    )
    assert done.stdout == "stopped True\n", done.stderr

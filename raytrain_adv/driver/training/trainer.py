"""Ray Train's workers: start them, watch them, start them again."""

import os
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

from raytrain_adv.checkpoint.folders import AGAIN
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster.connect import is_own
from raytrain_adv.driver.cluster.elastic import BatchPreservingPolicy
from raytrain_adv.driver.cluster.network import NodeNetwork
from raytrain_adv.driver.cluster.nodes import Placement, release_workers, wait_for_room
from raytrain_adv.driver.cluster.own import OwnNodePolicy
from raytrain_adv.driver.output.output_dir import Output
from raytrain_adv.driver.output.replaced import RUN_FILE
from raytrain_adv.driver.training import failures
from raytrain_adv.driver.training.console import Console
from raytrain_adv.driver.training.worker_entry import ray_worker
from raytrain_adv.driver.watch import stop
from raytrain_adv.driver.watch.hang import HangWatch
from raytrain_adv.driver.watch.nodes import HeadWatch, NodeWatch, usable_nodes
from raytrain_adv.errors import Terminated
from raytrain_adv.text import ascii_name


class Trainer(TorchTrainer):  # type: ignore[misc] # ray is Any to mypy
    """Ray's trainer with four changes (ray 2.60).

    - No actor for ray.data's datasets, for which workers would wait 2 s and more without having
      any. Remove when Ray starts it only for datasets.
    - SIGINT stays with the driver: Ray's own handler ends the workers without a checkpoint
      (data_parallel_trainer.py).
    - HangWatch runs before the callbacks that handle the errors it sets.
    - On a Ray of its own the controller has no environment variables, as OwnNodePolicy says, and
      no actor waits for its death to remove its placement group, which `_fit` does.
    """

    policy: FixedScalingPolicy | BatchPreservingPolicy  # decides the number of workers

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = self.policy
        if not isinstance(self.policy, OwnNodePolicy):
            return super()._initialize_and_run_controller(**arguments)
        controller = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        is_own = isinstance(self.policy, OwnNodePolicy)
        left_out = (DatasetsCallback, *([PlacementGroupCleanerCallback] if is_own else []))
        kept = [one for one in callbacks if not isinstance(one, left_out)]
        return sorted(kept, key=lambda one: not isinstance(one, HangWatch))

    def _register_sigint_handler(self, controller: Any) -> None:
        """Register none."""


def train(
    job: JobConfig, place: Output, placement: Placement, console: Console, head: HeadWatch
) -> dict[str, Any]:
    """Run the workers to the end; return rank 0's figures. Nodes are watched meanwhile, and the
    first signal stops the run at a checkpoint. Raises RaytrainAdvError.
    """
    watch = NodeWatch(placement, usable_nodes(placement), console.say)
    with stop.handle_signals(place.folder, console.say), watch.watching():
        return _fit(job, place, placement, console, head)


def _fit(
    job: JobConfig, place: Output, placement: Placement, console: Console, head: HeadWatch
) -> dict[str, Any]:
    attempt, resume = place.attempt, place.resume
    deaths_left = job.ray.max_failures if job.ray.max_failures >= 0 else 10**6
    saves = job.output.save_strategy != "no" and not job.output.save_only_model

    def is_stopped() -> bool:
        return (place.folder / stop.STOP_FILE).exists()

    while True:
        try:
            result = _trainer(job, place, placement, attempt, resume).fit()
            return dict(result.return_value)
        except TrainingFailedError as error:
            shown = failures.translate(error)
            if not isinstance(shown, Terminated) or is_stopped() or not saves:
                raise shown from error
            why = f"{shown.what}: {shown.found}"  # not a failure: max_failures does not count it
        except failures.DIED as error:
            # The controller has died: Ray restarts workers, but not their controller.
            head.wait()
            if deaths_left == 0:
                raise failures.translate(error) from error
            deaths_left -= 1
            why = failures.translate(error).what
            release_workers()
        console.say(f"{why}; starting again from the last checkpoint")
        wait_for_room(placement, console.say, is_stopped=is_stopped)
        attempt, resume = f"{attempt}{AGAIN}", resume or True
        failures.write_restart_reason(place.storage.folder(attempt), why)


def _trainer(
    job: JobConfig, place: Output, placement: Placement, attempt: str, resume: bool | str
) -> Trainer:
    shares_gpu = 0 < placement.bundle.get("GPU", 0.0) < 1
    backend = "cpu:gloo,cuda:nccl" if placement.use_gpu and not shares_gpu else "gloo"
    callbacks = [
        stop.CatchSigterm(),
        failures.RecordRestartReason(place.storage_path, attempt),
        failures.StopWhenRetryCannotHelp(),
        stop.StopOnRequest(place.folder),
    ]
    if job.ray.step_timeout is not None:
        callbacks.append(HangWatch(job.ray.step_timeout))
    trainer = Trainer(
        ray_worker,
        train_loop_config={
            "job": job,
            "run": ascii_name(job.run_name),
            "storage_path": place.storage_path,
            "attempt": attempt,
            "resume": resume,
            "use_gpu": placement.use_gpu,
            "versions": placement.versions,
            "folder": os.getcwd(),
            "marker": str(place.folder.absolute() / RUN_FILE),
        },
        torch_config=NodeNetwork(backend=backend, timeout_s=job.parallel.ddp_timeout),
        scaling_config=scaling(job, placement),
        run_config=RunConfig(
            name=attempt,
            storage_path=place.storage_path,
            failure_config=FailureConfig(max_failures=job.ray.max_failures),
            callbacks=callbacks,
        ),
    )
    config, strategy = scaling(job, placement), job.ray.placement_strategy
    if placement.numbers:
        trainer.policy = BatchPreservingPolicy(config, placement, strategy)
    else:
        trainer.policy = OwnNodePolicy(config) if is_own() else FixedScalingPolicy(config)
    return trainer


def scaling(job: JobConfig, placement: Placement) -> ScalingConfig:
    """Return the request to Ray Train: the number of workers, their resources, and their nodes."""
    most = placement.num_workers
    return ScalingConfig(
        num_workers=(placement.fewest, most) if placement.numbers else most,
        use_gpu=placement.use_gpu,
        resources_per_worker=placement.bundle,
        placement_strategy=job.ray.placement_strategy,
        label_selector=placement.label_selector,
    )

"""Workers on a Ray that their driver started: one node, which has the driver's environment."""

from typing import Any

from ray.train.v2._internal.callbacks import state_manager
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import worker_group

versions = state_manager._get_framework_version


class OwnNodePolicy(FixedScalingPolicy):  # type: ignore[misc] # ray is Any to mypy
    """Ray Train's policy of a fixed number of workers, without what it does for clusters. Runs in
    Ray Train's controller.

    No actor requests nodes. Workers get no environment variables, which they inherit from the node:
    a process with some of its own starts twice, and none that waits is taken (ray 2.60,
    setup_worker.py). The actor that the dashboard asks does not import PyTorch to read its version,
    which is of a class of its own. Each is 2 s of CPU.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no actor."""
        worker_group.get_env_vars_to_propagate = dict
        state_manager._get_framework_version = plain_versions

    def _maybe_send_resource_request(self) -> None:
        """Send none."""


def plain_versions(framework: Any) -> dict[str, str]:
    """Return Ray's versions of packages as str, and no class of these packages."""
    return {name: str(version) for name, version in versions(framework).items()}

"""Waiting for room on the cluster, for as long as the user wants to wait."""

from __future__ import annotations

import time
from collections.abc import Callable

from raytrain_adv.driver.cluster.connect import free, scalable_nodes
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.errors import Stopped


def wait_for_room(
    placement: Placement,
    say: Callable[[str], None],
    poll_s: float = 2.0,
    every_s: float = 30.0,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until the resources are free, saying what is missing; other jobs may hold them, or nodes
    be starting.

    Raises:
        Stopped: once `given_up` says so.
    """
    last = 0.0
    while True:
        now = free(placement)
        missing = {
            name: placement.fewest * amount - now.get(name, 0.0)
            for name, amount in placement.bundle.items()
            if placement.fewest * amount - now.get(name, 0.0) > 1e-6
        }
        if not missing:
            return
        if given_up():
            again = "run again with resume_from_checkpoint: true"
            raise Stopped("The run was stopped", "as it waited for room for its workers", again)
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            lacking = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
            say(
                f"waiting for {lacking}: held by other jobs, or on nodes still to start "
                "(Ctrl-C gives up)"
            )
        if scalable_nodes():
            return  # asking for the workers is what makes the autoscaler start nodes
        time.sleep(poll_s)

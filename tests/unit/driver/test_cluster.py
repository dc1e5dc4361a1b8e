"""What a cluster can hold, as values: no Ray is started."""

import time

import pytest

from raytrain_adv.driver.cluster import Node, require_answer, still_to_start
from raytrain_adv.errors import ClusterError
from tests.workers import free_port

CPU2 = {"CPU": 2.0}


def test_nodes_that_run_are_not_counted_again_among_those_an_autoscaler_may_start():
    """A job for twice the largest cluster would wait for ever."""
    kinds = [Node("autoscaled big", CPU2, 3, "big"), Node("autoscaled one", CPU2, 1, "one")]
    alive = [Node("10.0.0.1", CPU2), Node("10.0.0.2", CPU2, group="one")]
    assert still_to_start(kinds, alive) == kinds[:1]
    alive += [Node("10.0.0.3", CPU2, group="big")]
    assert [kind.count for kind in still_to_start(kinds, alive)] == [2]


def test_a_cluster_that_does_not_answer_is_said_at_once():
    """Ray itself would try for minutes."""
    start = time.monotonic()
    for address in (
        f"127.0.0.1:{free_port()}",
        f"ray://127.0.0.1:{free_port()}",
        "127.0.0.1:99999",
    ):
        with pytest.raises(ClusterError, match="does not answer"):
            require_answer(address)
    assert time.monotonic() - start < 5
    require_answer("local")
    require_answer("auto")

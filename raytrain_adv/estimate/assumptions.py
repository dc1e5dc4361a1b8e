"""What a plan for many workers assumes of their cluster; `--assume NAME=VALUE` changes it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from raytrain_adv.config.problems import Problem
from raytrain_adv.text import nearest


@dataclass(frozen=True)
class Assumptions:
    """A cluster in numbers; GB are 10^9 bytes. None of them was measured here."""

    gpus_per_node: float = 8  # GPUs of a node, as in a DGX or HGX H100
    nvlink_gb_s: float = 360
    """Into one GPU from the others of its node: 450 GB/s a direction by NVIDIA's H100 datasheet,
    80 % of it."""
    network_gb_s: float = 320  # into one node: eight ports of 400 Gb/s, 80 % of it
    network_hop_us: float = 14  # between nodes in a ring: NCCL's table, network, ring, Simple
    nvlink_hop_us: float = 3.4  # from GPU to GPU in a ring: the same table, NVLink
    storage_gb_s: float = 10  # out of and into the shared storage, all nodes together
    storage_node_gb_s: float = 3  # the same for one node: a port of 25 Gb/s
    host_copy_gb_s: float = 5  # from one GPU into pageable host memory
    open_files: float = 65536  # files that a process on the head may have open (ulimit -n)


def assumptions(pairs: Iterable[str]) -> tuple[Assumptions, list[Problem]]:
    """Return the assumptions with these NAME=VALUE pairs applied, and what is wrong with them."""
    names = [field.name for field in fields(Assumptions)]
    values: dict[str, float] = {}
    problems = []
    for pair in pairs:
        name, _, text = pair.partition("=")
        value = _positive(text)
        if name not in names:
            similar = nearest(name, names)
            fix = f"write {similar}" if similar else f"there are {', '.join(names)}"
            problems.append(Problem(f"--assume {name[:40]!r}: there is no such assumption", fix))
        elif value is None:
            what = f"--assume {name}={text[:40]!r}: it takes a number above 0"
            problems.append(Problem(what, f"write --assume {name}=NUMBER"))
        else:
            values[name] = value
    if not (per_node := values.get("gpus_per_node", 1.0)).is_integer():
        what = f"--assume gpus_per_node={per_node:g}: it takes a whole number"
        problems.append(Problem(what, "write --assume gpus_per_node=8"))
    return Assumptions(**values), problems


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None

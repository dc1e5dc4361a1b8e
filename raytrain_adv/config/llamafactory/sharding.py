"""Map the files that configure DeepSpeed and Accelerate's FSDP to this package's keys for FSDP2."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain_adv.config.llamafactory.keys import FSDP_TUNING
from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.yaml_source import read_value

Pairs = Iterator[tuple[str, Any]]

SHARDING = ("deepspeed", "fsdp", "fsdp_config")
"""Keys whose values are such files, or mappings."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "full_shard": {"fsdp_reshard_after_forward": True},
    "shard_grad_op": {"fsdp_reshard_after_forward": False},
    "no_shard": {"fsdp_shard_size": 1},
}
"""FSDP1's names of what is sharded, in the order of their numbers -> keys here."""
ZERO = ("no_shard", "shard_grad_op", "shard_grad_op", "full_shard")
"""The same by DeepSpeed's stages."""


class Refused(Exception):
    """Text and fix of a Problem with a value."""


def map_sharding(key: str, value: Any) -> dict[str, Any] | Problem:
    """Return the keys that stand for the value of `deepspeed`, `fsdp` or `fsdp_config`."""
    readers = {"deepspeed": _deepspeed, "fsdp": _fsdp, "fsdp_config": _fsdp_config}
    try:
        return dict(readers[key](value if key == "fsdp" else _contents(value)))
    except Refused as refused:
        return Problem(*refused.args)


def _contents(value: Any) -> Mapping[str, Any]:
    """Return a mapping that is written out, or in the file that the value names."""
    if isinstance(value, str):
        path = Path(value).expanduser()
        try:
            value = read_value(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            fix = "give the file's path, seen from the folder you start in, or delete the line"
            raise Refused(f"{show(value)} cannot be read: {error}", fix) from error
    if not isinstance(value, Mapping):
        raise Refused(f"{show(value)} is neither a mapping nor a file of one", "give one of them")
    return value


def _inner(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the entries below a name; none if there is nothing."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise Refused(f"{name}: {show(value)} is not a mapping", f"write entries below {name}")
    return value


def _deepspeed(config: Mapping[str, Any]) -> Pairs:
    zero = _inner(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage < len(ZERO):
        raise Refused(f"ZeRO stage {show(stage)}", "give a stage from 0 to 3")
    yield from STRATEGIES[ZERO[stage]].items()
    devices = [_inner(zero, f"offload_{part}").get("device") for part in ("optimizer", "param")]
    if "nvme" in devices:
        fix = "set device: cpu; model and optimizer are then in host memory"
        raise Refused("offload to NVMe is not in this version", fix)
    if "cpu" in devices:
        yield "fsdp_cpu_offload", True
    for name in ("bf16", "fp16"):
        if _inner(config, name).get("enabled") is True:
            yield "bf16", True
    parallel = _inner(config, "tensor_parallel").get("autotp_size", 1)
    if parallel != 1:
        fix = "delete tensor_parallel: FSDP2 shards over ray_num_workers"
        raise Refused(f"autotp_size: {show(parallel)}: tensor parallelism is not here", fix)
    for name, key in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_clipping", "max_grad_norm"),
    ):
        if config.get(name, "auto") != "auto":
            yield key, config[name]
    for name in ("optimizer", "scheduler"):
        if name in config:
            key = "optim" if name == "optimizer" else "lr_scheduler_type"
            raise Refused(f"it has its own {name}", f"delete {name} there, and write {key} here")


def _fsdp(value: Any) -> Pairs:
    words = value if isinstance(value, list) else str(value).lower().split()
    for word in map(str, words):
        if word == "offload":
            yield "fsdp_cpu_offload", True
        elif word not in ("auto_wrap", "true"):
            yield from _strategy(word)


def _strategy(name: str) -> Pairs:
    if name.startswith("hybrid_shard"):
        fix = "delete it, and set fsdp_shard_size to the GPUs of a node"
        raise Refused(f"{name}: the size of a group is not in it", fix)
    if name not in STRATEGIES:
        fix = f"give one of {', '.join(STRATEGIES)}, with or without offload"
        raise Refused(f"{show(name)} is not a sharding strategy", fix)
    yield from STRATEGIES[name].items()


def _fsdp_config(config: Mapping[str, Any]) -> Pairs:
    """Read the Trainer's mapping, or Accelerate's file, which has it inside."""
    if "distributed_type" in config:
        if config["distributed_type"] != "FSDP":
            kind = show(config["distributed_type"])
            fix = "delete it: ray_num_workers processes train, and FSDP2 shards over them"
            if config["distributed_type"] == "DEEPSPEED":
                fix = "name the JSON file of DeepSpeed instead: deepspeed: FILE"
            raise Refused(f"distributed_type: {kind}", fix)
        if config.get("mixed_precision", "no") != "no":
            yield ("fp8" if config["mixed_precision"] == "fp8" else "bf16"), True
        if config.get("num_processes"):
            yield "ray_num_workers", config["num_processes"]
        config = _inner(config, "fsdp_config")
    numbers = dict(enumerate((*STRATEGIES, "hybrid_shard", "hybrid_shard_zero2"), 1))
    for name, value in config.items():
        key = str(name).removeprefix("fsdp_")
        if key == "offload_params" and value:
            yield "fsdp_cpu_offload", True
        elif key == "activation_checkpointing" and value:
            yield "gradient_checkpointing", "full"
        elif key == "reshard_after_forward" and isinstance(value, bool):
            yield "fsdp_reshard_after_forward", value
        elif key in ("sharding_strategy", "reshard_after_forward"):
            kind = (isinstance(value, int) and numbers.get(value)) or value
            yield from _strategy(str(kind).lower())
        elif value and key not in FSDP_TUNING:
            raise Refused(f"it has {show(name)}, which is not known", "delete that entry")

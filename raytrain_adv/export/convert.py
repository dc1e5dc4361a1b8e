"""A new model folder in the layout that the job exports, converted one tensor at a time."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import Region
from raytrain_adv.errors import TrainingError
from raytrain_adv.export.folder import MAX_FILE_BYTES, TensorFiles, save_tensors, write_json
from raytrain_adv.export.layout import (
    Axes,
    Configs,
    is_gguf,
    is_untied,
    one_by_one,
    stacked_axes,
    tensor_configs,
    write_config,
)
from raytrain_adv.model.adapter import PREFIX
from raytrain_adv.model.build import build, build_whole, head_fqn, keeps_float32
from raytrain_adv.model.conversion import Group, Route
from raytrain_adv.model.vocabulary import new_rows
from raytrain_adv.model.weight_files import CheckpointFiles
from raytrain_adv.model.weights import convert_group, match
from raytrain_adv.ops.fake_quant import compressed_tensors, gguf_file
from raytrain_adv.ops.fake_quant.compressed_tensors import Scheme
from raytrain_adv.ops.fake_quant.torchao_config import tensor_of
from raytrain_adv.transforms.modules import in_adapter, names_to_store
from raytrain_adv.transforms.transform import DEFECT

COPIED = (
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "*.model",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What goes with a model's weights into a folder that is made of another."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

Read = Callable[..., torch.Tensor]


class Piece(NamedTuple):
    """A tensor of the new folder, not yet read."""

    name: str
    """The model's own name if it is converted (torchao finds it by that), else the source's."""
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    is_listed: bool = True
    """Whether the files' metadata names it; see `describe`."""


def write_converted(
    source: Path,
    folder: Path,
    job: JobConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_file_bytes: int = MAX_FILE_BYTES,
    require: Callable[[int], object] = lambda size: None,
    adapter: Path | None = None,
) -> None:
    """Write the model of `source` into the folder `folder`, in the layout that the job exports.

    The folder loads with AutoModelForCausalLM.from_pretrained and torchao or compressed-tensors.
    Host memory holds one file's tensors and the one that is being converted.

    Weights are rounded to `dtype`, then converted on `device`. `require` is called with the bytes
    that will be written, before they are. Modules that `adapter`, a folder, has in full take the
    place of the source's. Raises JobError when the files of `source` are not what the architecture
    needs; TrainingError when what was written is not what training rounds weights to.
    """
    plain, built = build_whole(job), build(job)
    by_name, axes = tensor_configs(built, job), stacked_axes(built)
    keeps, name_to_store = keeps_float32(plain), names_to_store(plain)

    def stored(name: str) -> torch.dtype:
        return torch.float32 if keeps(name) and name not in configs else dtype

    with CheckpointFiles(source, new_rows(job)) as files:
        found = match(plain, files)
        configs = one_by_one(by_name, axes, found.groups)
        pieces = list(_pieces(plain, files, found, configs, trained_in_full(adapter)))
        if lacking := configs.keys() - {piece.name for piece in pieces}:
            raise TrainingError(f"{source} is not converted whole", f"no {min(lacking)}", DEFECT)
        if is_gguf(job):
            require(sum(math.prod(piece.shape) * dtype.itemsize for piece in pieces))
            _write_gguf(source, folder, pieces, configs, dtype)
            return
        metadata, size = describe(pieces, configs, axes, stored)
        require(size)
        written = TensorFiles(folder, max_file_bytes, metadata)
        for piece in pieces:
            exact = stored(piece.name)
            value = _value(piece.read(), piece.name, configs, axes, exact, device)
            for name, tensor in _flat(piece.name, value)[0].items():
                stored_as = name_to_store(name) if piece.name in configs else name
                written.add(stored_as or name, tensor.cpu())
        written.close()
        check_stored(folder, pieces, configs, dtype, device, name_to_store)
    copy_others(source, folder)
    write_config(source, folder, plain, job, by_name, dtype)


def _write_gguf(
    source: Path, folder: Path, pieces: list[Piece], configs: Configs, dtype: torch.dtype
) -> None:
    """Write one GGUF file, read it back, and compare its values with training's."""

    def tensors() -> Iterator[gguf_file.Tensor]:
        for piece in pieces:
            form = configs[piece.name].weight_form if piece.name in configs else ""
            yield gguf_file.Tensor(piece.name, piece.read().to(dtype), form)

    gguf_file.write(source, folder, tensors())
    for wrong in gguf_file.differences(source, folder, tensors()):
        raise TrainingError(f"{gguf_file.FILE} is not what was trained", wrong, DEFECT)
    copy_others(source, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")


def _pieces(
    plain: PreTrainedModel,
    files: CheckpointFiles,
    found: Route,
    configs: Configs,
    others: Mapping[str, Read],
) -> Iterator[Piece]:
    """Yield the new folder's tensors, in the old one's layout except for what is converted. What
    `others` read takes the place of the files'.
    """
    for name, read_other in others.items():
        if name in found.direct:
            shape = tuple(plain.get_parameter(name).shape)
            files.replace(found.direct[name], shape, read_other)
    named, tied = dict(plain.named_parameters()), dict[int, str]()
    if is_untied(plain, configs):  # the weight, and the bias that BERT-like models tie with it
        head = head_fqn(plain)
        parts = plain.get_submodule(head).named_parameters()
        tied = {id(p): f"{head}.{name}" for name, p in parts}
    for target, source in found.direct.items():
        shape, read = files.shapes[source], partial(files.read, source)
        yield Piece(target if target in configs else source, shape, read)
        if (own := tied.get(id(named.get(target)), target)) != target:
            yield Piece(own, shape, read)
    for group in found.groups:
        if (configs.keys() | others.keys()).isdisjoint(group.targets):
            for name, _ in group.sources:
                yield Piece(name, files.shapes[name], partial(files.read, name), is_listed=False)
        else:
            for target in group.targets:
                shape = tuple(plain.get_parameter(target).shape)
                converted = partial(_converted, group, target, files, plain)
                yield Piece(target, shape, others.get(target, converted))


def trained_in_full(adapter: Path | None) -> dict[str, Read]:
    """Return what reads each tensor of the modules that an adapter's folder has in full, by name in
    the plain model.
    """
    if adapter is None:
        return {}
    file = adapter / ADAPTER_WEIGHTS
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if not in_adapter(name)]  # noqa: SIM118 - no mapping

    def read(name: str, region: Region | None = None) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor if region is None else tensor[region]

    return {name.removeprefix(PREFIX): partial(read, name) for name in names}


def _converted(
    group: Group, target: str, files: CheckpointFiles, plain: PreTrainedModel
) -> torch.Tensor:
    return convert_group(group, files, plain)[target]


def describe(
    pieces: list[Piece], configs: Configs, axes: Axes, stored: Callable[[str], torch.dtype]
) -> tuple[dict[str, str], int]:
    """Return the metadata of each of the folder's files, and the bytes of all tensors. `stored`
    returns the dtype of a tensor by its name.

    Readers need it to join converted tensors: file by file (vLLM), or merged (transformers, where
    the last `tensor_names` wins). So each file lists all tensors, plain ones too, but no experts
    that transformers fuses: reading takes time in the square of the names. torchao 0.18 reads no
    name without a dot, as Llava-Next's image_newline.
    """
    metadata: dict[str, str] = {}
    size = 0
    for piece in pieces:
        dtype = stored(piece.name)
        empty = torch.empty(piece.shape, dtype=dtype, device="meta")
        tensors, described = _flat(
            piece.name, _value(empty, piece.name, configs, axes, dtype, empty.device)
        )
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        if piece.is_listed and piece.name in described and "." in piece.name:
            metadata[piece.name] = described[piece.name]
    metadata["tensor_names"] = json.dumps(list(metadata))
    is_compressed = any(isinstance(config, Scheme) for config in configs.values())
    return {} if is_compressed else metadata, size


def _flat(name: str, value: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a tensor as the plain ones it consists of, and how to join them."""
    if isinstance(value, dict):
        return value, {}
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    flat: tuple[dict[str, torch.Tensor], dict[str, str]] = flatten_tensor_state_dict({name: value})
    return flat


def _value(
    tensor: torch.Tensor,
    name: str,
    configs: Configs,
    axes: Axes,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Return a tensor as it is stored: converted if it has a config, integers as is."""
    if isinstance(configs.get(name), Scheme):
        return compressed_tensors.stored(name, tensor.to(device=device, dtype=dtype), configs[name])
    if name in configs:
        return tensor_of(tensor.to(device=device, dtype=dtype), configs[name], axes.get(name, -1))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_stored(
    folder: Path,
    pieces: list[Piece],
    configs: Configs,
    dtype: torch.dtype,
    device: torch.device,
    name_to_store: Callable[[str], str],
) -> None:
    """Read what was written in compressed-tensors' layout, and compare each value with the one that
    training rounds the same weight to. torchao's tensors are compared when the folder is loaded.
    Raises TrainingError naming the first linear that differs, and a value.
    """
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    for piece in pieces:
        scheme = configs.get(piece.name)
        if not isinstance(scheme, Scheme):
            continue
        found, stem = {}, name_to_store(piece.name) or piece.name
        for name in (n for n in places if n.startswith(stem)):
            with safe_open(places[name], framework="pt", device=str(device)) as opened:
                found[piece.name + name.removeprefix(stem)] = opened.get_tensor(name)
        weight = piece.read().to(device=device, dtype=dtype)
        wrong, example = compressed_tensors.difference(piece.name, weight, found, scheme)
        if wrong:
            raise TrainingError(
                f"{piece.name} was not written as it was trained",
                f"{wrong:,} of {weight.numel():,} values differ: {example}",
                DEFECT,
            )


def copy_others(source: Path, folder: Path, patterns: Iterable[str] = COPIED) -> None:
    """Copy what goes with a model's weights, such as its tokenizer."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def add_adapter(adapter: Path, folder: Path, final: Path) -> None:
    """Put a LoRA run's adapter into its converted base's folder.

    transformers loads both from a folder that has both, and the adapter in the model's dtype, in
    which it was trained. vLLM takes all safetensors files for the model's unless an index names
    those.

    Args:
        adapter: the adapter's folder.
        folder: where the converted base was written.
        final: the name that `folder` will have.
    """
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as opened:
        # Modules trained in full are the base's already.
        names = [name for name in opened.keys() if in_adapter(name)]  # noqa: SIM118 - no mapping
        save_tensors({n: opened.get_tensor(n) for n in names}, folder / ADAPTER_WEIGHTS)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    config |= {"base_model_name_or_path": str(final.absolute()), "revision": None}
    config["modules_to_save"] = None
    write_json(config, folder / ADAPTER_CONFIG)
    if (model := folder / "model.safetensors").is_file():
        with safe_open(model, framework="pt") as opened:
            weight_map = dict.fromkeys(sorted(opened.keys()), model.name)
        index = {"metadata": {}, "weight_map": weight_map}
        write_json(index, folder / f"{model.name}.index.json")
    copy_others(adapter, folder)

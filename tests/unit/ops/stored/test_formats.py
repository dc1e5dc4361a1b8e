"""Rounded weights are read as the values that the libraries of their formats compute."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from raytrain_adv.errors import JobError
from raytrain_adv.model.weight_files import CheckpointFiles
from raytrain_adv.ops.stored import decode, formats
from tests import stored_models
from tests.tiny_models import write_checkpoint

COMPRESSED = Path(__file__).with_name("compressed_tensors.safetensors")
"""What compressed-tensors 0.20.1 makes of 16 x 64 numbers, with what its decompress returns; the
metadata has the scheme of each."""


def cases() -> dict[str, str]:
    with safe_open(COMPRESSED, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("case", sorted(cases()))
def test_values_are_those_of_compressed_tensors(case: str) -> None:
    held = {
        name.replace(f"{case}.", "x_proj."): tensor
        for name, tensor in load_file(COMPRESSED).items()
        if name.startswith(f"{case}.")
    }
    expected = held.pop("x_proj.values")
    groups = {"group_0": {"weights": json.loads(cases()[case])}}
    about = {"format": case[:-2], "config_groups": groups, "quant_method": "compressed-tensors"}
    config = {"quantization_config": about}
    formats.refuse_unknown("model", config)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}

    def read(name, region):
        return held[name][region] if region else held[name]

    found = formats.find(config, shapes, read)
    assert formats.logical(found, shapes) == {"x_proj.weight": (16, 64)}
    values = found["x_proj.weight"].read(read, shapes, None)
    torch.testing.assert_close(
        values.to(expected.dtype), expected, rtol=2**-7 * (expected.dtype == torch.bfloat16), atol=0
    )
    part = found["x_proj.weight"].read(read, shapes, (slice(3, 11), slice(0, 64)))
    assert torch.equal(part, values[3:11])


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor whole, and check that its rows are the same read by themselves."""
    found = {}
    with CheckpointFiles(folder) as files:
        for name, shape in files.shapes.items():
            found[name] = files.read(name)
            for first, last in ((0, 5), (3, 7), (5, shape[0]), (shape[0], shape[0])):
                rows = (slice(first, last), *(slice(0, n) for n in shape[1:]))
                assert torch.equal(files.read(name, rows), found[name][first:last]), (name, rows)
    return found


def test_a_group_in_blocks_leaves_the_scales_of_other_groups_alone(tmp_path: Path) -> None:
    """Rows' scales were spread over blocks of rows if another group of the checkpoint has such."""
    weights = {f"{name}_proj.weight": torch.randn(40, 56) for name in ("blocks", "wide", "rows")}
    grids = {"blocks": (24, 16), "wide": (8, 56), "rows": (1, 56)}
    held, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for (name, weight), (down, across) in zip(weights.items(), grids.values(), strict=True):
        held[name] = weight.to(torch.float8_e4m3fn)
        scale = torch.rand(-(-40 // down), -(-56 // across)) + 0.5
        held[f"{name}_scale"] = scale
        whole = scale.repeat_interleave(down, 0).repeat_interleave(across, 1)[:40, :56]
        wanted[name] = held[name].float() * whole
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    in_blocks, wide = ({"strategy": "block", "block_structure": b} for b in ([24, 16], "8x56"))
    groups = {"a": {"weights": in_blocks}, "b": {"weights": {"strategy": "channel"}}}
    groups["c"] = {"weights": wide}
    about = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    config = {"quantization_config": {**about, "config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, values in values_of(tmp_path).items():
        assert torch.equal(values, wanted[name]), name


@pytest.mark.parametrize("block", [8, None])
def test_float8_is_what_transformers_dequantizes(block: int | None, tmp_path: Path) -> None:
    size = [block, block] if block else None
    about = {"quant_method": "fp8", "weight_block_size": size}
    folder = write_checkpoint("llama", tmp_path / "model")
    stored_models.rewrite(folder, about, stored_models.float8(block))
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=size)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16
    )
    ours, theirs = values_of(folder), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].bfloat16(), theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "how",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ],
)
def test_values_are_those_of_bitsandbytes(how: dict, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192}
    folder = write_checkpoint("llama", tmp_path / "model", **sizes)
    rounded = stored_models.bitsandbytes(folder, **how)
    model = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32, device_map="cpu")
    ours, theirs = values_of(rounded), model.dequantize().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():  # bitsandbytes dequantizes to bfloat16
        torch.testing.assert_close(value.bfloat16(), theirs[name].bfloat16(), rtol=2**-7, atol=0)


def test_mxfp4_is_what_transformers_dequantizes() -> None:
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 10, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(decode.mxfp4(blocks, scales), expected)


@pytest.mark.parametrize(("bits", "is_sorted"), [(4, False), (4, True), (8, False), (2, True)])
def test_gptq_weights_by_the_formats_definition(bits: int, is_sorted: bool, tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", intermediate_size=64)
    about = {"quant_method": "gptq", "bits": bits}
    stored_models.rewrite(folder, about, stored_models.gptq(bits, is_sorted))
    held, values = load_file(folder / "model.safetensors"), values_of(folder)
    per_int, mask = 32 // bits, 2**bits - 1
    stem = "model.layers.1.self_attn.k_proj"
    q, zeros, scales, groups = (
        held[f"{stem}.{kind}"].tolist() for kind in ("qweight", "qzeros", "scales", "g_idx")
    )
    weight = values[f"{stem}.weight"]
    for row, column in ((0, 0), (9, 31), (15, 17)):
        integer = (q[column // per_int][row] >> bits * (column % per_int)) & mask
        zero = (zeros[groups[column]][row // per_int] >> bits * (row % per_int)) & mask
        assert weight[row, column] == (integer - zero - 1) * scales[groups[column]][row]


def test_awq_weights_by_the_formats_definition(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    stored_models.rewrite(folder, {"quant_method": "awq", "bits": 4}, stored_models.awq)
    held, values = load_file(folder / "model.safetensors"), values_of(folder)
    stem = "model.layers.1.self_attn.k_proj"
    q, zeros, scales = (held[f"{stem}.{kind}"].tolist() for kind in ("qweight", "qzeros", "scales"))
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    for row, column in ((0, 0), (9, 31), (15, 17), (12, 8)):
        shift = 4 * place[row % 8]
        integer, zero = (
            (t >> shift) & 15 for t in (q[column][row // 8], zeros[column // 8][row // 8])
        )
        assert values[f"{stem}.weight"][row, column] == (integer - zero) * scales[column // 8][row]


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "gptq", "bits": 3}, "bits: 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}, "mxfp6"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 3}}},
            },
            "num_bits: 3",
        ),
    ],
)
def test_a_form_that_would_be_misread_is_refused_by_name(about: dict, named: str) -> None:
    with pytest.raises(JobError, match="cannot be read") as refused:
        formats.refuse_unknown("model", {"text_config": {"quantization_config": about}})
    assert named in refused.value.found


@pytest.mark.parametrize("books", [1, 2])
def test_aqlm_sums_vectors_of_codebooks(books: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(books, 256, 2, 8)
    codes = torch.randint(-128, 128, (4, 3, books), dtype=torch.int8)
    scales = torch.rand(4, 1, 1, 1)
    held = {"x.codes": codes, "x.codebooks": vectors, "x.scales": scales}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}

    def read(name, region):
        return held[name][region] if region else held[name]

    (found,) = formats.find(
        {"quantization_config": {"quant_method": "aqlm"}}, shapes, read
    ).values()
    values = found.read(read, shapes, None)
    for row, column in ((0, 0), (3, 17), (7, 23)):
        group, across = row // 2, column // 8
        parts = [
            vectors[b, int(codes[group, across, b]) % 256, row % 2, column % 8]
            for b in range(books)
        ]
        assert float(values[row, column]) == pytest.approx(float(sum(parts) * scales[group]))
    part = found.read(read, shapes, (slice(3, 6), slice(0, 24)))
    assert torch.equal(part, values[3:6])

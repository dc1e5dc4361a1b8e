"""Write a folder's `model.pte`: a program that decodes, of the form that ExecuTorch's runners load.

It has one method, `forward(input_ids [1, tokens], cache_position [tokens])`, which returns logits
[1, tokens, vocabulary]. Keys and values of LENGTH tokens are part of the program's state.
"""

import json
import sys
from pathlib import Path
from typing import Any

FILE = "model.pte"
LENGTH = 2048
"""Most tokens that a program can hold, prompt and answer together."""


def main(folder: str) -> None:
    """Write the program, under another name until it is whole."""
    config = json.loads((Path(folder) / "config.json").read_text())
    length = min(LENGTH, int(config.get("max_position_embeddings", LENGTH)))
    partial = Path(folder) / f"{FILE}.partial"
    partial.write_bytes(lower(folder, length))
    partial.rename(Path(folder) / FILE)


def lower(folder: str, length: int) -> bytes:
    """Return a program for as many as `length` tokens; weights that no linear has are float32."""
    import torch
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    int8 = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
    with torch.no_grad():
        program, facts = exported(folder, length)
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[int8, XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=facts,
    )
    return bytes(edge.to_executorch().buffer)


def exported(folder: str, length: int) -> tuple[Any, dict[str, Any]]:
    """Return the model with its cache as torch.export's program, and what runners ask it for."""
    import torch
    from torchao.utils import unwrap_tensor_subclass
    from transformers import AutoModelForCausalLM
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    # ExecuTorch 1.5 has no grouped product of experts.
    how = {"attn_implementation": "sdpa", "experts_implementation": "batched_mm"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)
    model = model.to(torch.float32).requires_grad_(False).eval()
    unwrap_tensor_subclass(model)
    config = model.config.get_text_config()
    config.use_cache = model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=length)
    tokens = torch.export.Dim("tokens", min=1, max=length - 1)
    program = module.export(
        input_ids=torch.zeros(1, 3, dtype=torch.long),
        cache_position=torch.arange(3),
        dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
    )
    ends = model.generation_config.eos_token_id
    facts = {
        "get_max_seq_len": length,
        "get_max_context_len": length,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": ends if isinstance(ends, list) else [-1 if ends is None else ends],
    }
    return program, facts


if __name__ == "__main__":
    main(sys.argv[1])

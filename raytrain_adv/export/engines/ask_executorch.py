"""Print ExecuTorch's log-probabilities of a folder's compared tokens, computed by XNNPACK."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: str) -> None:
    """Print FOUND and, for each position but the first, log-probabilities by token id."""
    import torch

    known = np.load(f"{folder}/trained_logprobs.npz")
    ids = torch.from_numpy(known["tokens"]).long().unsqueeze(0)
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "model.pte"
        program.write_bytes(lowered(folder, ids))
        print(f"{program.stat().st_size / 1e6:.1f} MB")
        from executorch.runtime import Runtime

        forward = Runtime.get().load_program(str(program)).load_method("forward")
        logits = forward.execute([ids.contiguous()])[0][0, :-1].float()
    values, tokens = logits.log_softmax(-1).topk(known["ids"].shape[1])
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    print("FOUND " + json.dumps([dict(zip(*pair, strict=True)) for pair in pairs]))


def lowered(folder: str, ids: Any) -> bytes:
    """Return the program that computes logits of as many tokens as `ids`, [1, tokens], has."""
    import torch
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torchao.utils import unwrap_tensor_subclass
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa"
    )
    model = Logits(loaded.to(torch.float32).requires_grad_(False)).eval()
    unwrap_tensor_subclass(model)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), strict=False)
    int8 = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[int8, XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return bytes(edge.to_executorch().buffer)


if __name__ == "__main__":
    main(sys.argv[1])

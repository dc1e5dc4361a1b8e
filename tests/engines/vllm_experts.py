"""Load a mixture that export wrote into vLLM, and compare its experts with the files, byte by byte.

    build/engines/vllm/bin/python tests/engines/vllm_experts.py FOLDER

vLLM multiplies rounded experts on GPUs, and on CPUs with AMX. Its own loader runs without them:
kernels are not chosen, and weights are left as they were loaded.
"""

import importlib
import os
import pkgutil
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from safetensors.torch import load_file

SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors"
PARTS = {"gate_proj": "w13", "w1": "w13", "up_proj": "w13", "w3": "w13"}
PARTS |= {"down_proj": "w2", "w2": "w2"}
NAME = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.(weight\w*)$")
HELD = re.compile(r"layers\.(\d+)\..*experts\..*?(w13|w2)_(weight\w*)$")


def leave_kernels_out() -> None:
    """Let vLLM 0.32 load what this machine has no kernels for."""
    for package in (f"{SCHEMES}.compressed_tensors_moe", f"{SCHEMES}.schemes"):
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            try:
                module = importlib.import_module(f"{package}.{found.name}")
            except ImportError:  # of AMD's libraries
                continue
            for name, value in list(vars(module).items()):
                if re.fullmatch(r"select_\w+_backend", name):
                    setattr(module, name, lambda *_, **__: (None, MagicMock()))
                elif re.fullmatch(r"init_\w+_kernel|is_global_sf_\w+", name):
                    setattr(module, name, MagicMock())
                elif isinstance(value, type) and "process_weights_after_loading" in vars(value):
                    value.process_weights_after_loading = lambda *_: None  # type: ignore[attr-defined]
    config: Any = importlib.import_module(f"{SCHEMES}.compressed_tensors").CompressedTensorsConfig
    config._check_scheme_supported = classmethod(lambda *_, **__: True)
    loader: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    loader.process_weights_after_loading = lambda *_, **__: None
    torch.accelerator.empty_cache = lambda: None


def load(folder: str) -> dict[str, torch.Tensor]:
    """Return vLLM's parameters of experts, by name."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    given = EngineArgs(model=folder, max_model_len=16, max_num_seqs=1, skip_tokenizer_init=True)
    config = given.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/meet", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        named = get_model(vllm_config=config).named_parameters()
        return {name: p.detach() for name, p in named if HELD.search(name)}


def main(folder: str) -> int:
    """Return 1 if a tensor is not held as the files have it."""
    leave_kernels_out()
    files: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            if found := NAME.search(name):
                layer, expert, part, kind = found.groups()
                files.setdefault((layer, PARTS[part], kind, expert), []).append(tensor)
    held, wrong = 0, 0
    for name, parameter in load(folder).items():
        layer, matrix, kind = HELD.search(name).groups()  # type: ignore[union-attr]
        for expert, own in enumerate(parameter):
            parts = files.get((layer, matrix, kind, str(expert)), [])
            if kind == "weight_shape":  # vLLM keeps that of one part
                parts = parts[-1:]
            stored = torch.cat([part.reshape(-1) for part in parts]).to(own.dtype)
            same = torch.equal(stored.view(torch.uint8), own.reshape(-1).view(torch.uint8))
            held, wrong = held + 1, wrong + (not same)
            if not same:
                print(f"{name}, expert {expert}: differs")
    print(f"{folder}: {held} tensors of experts in vLLM, {wrong} other than the files'")
    return 1 if wrong or not held else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

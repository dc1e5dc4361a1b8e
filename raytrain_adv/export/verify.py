"""Load exported folders as a user would, and compare them with the trained model."""

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import plain_name
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.export.folder import folder_gib
from raytrain_adv.export.layout import why_not_exact
from raytrain_adv.export.reference import write_reference
from raytrain_adv.export.routing import Routing, Trained, compute_routed
from raytrain_adv.model.build import keeps_float32
from raytrain_adv.model.packing import first_position
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.model.towers import model_class
from raytrain_adv.ops.fake_quant.compressed_tensors import PACKED, read_scheme
from raytrain_adv.ops.fake_quant.experts import compute_experts
from raytrain_adv.ops.fake_quant.targets import stored_as, unpacking
from raytrain_adv.ops.fake_quant.torchao_config import DEPRECATION
from raytrain_adv.text import GIB
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.modules import in_adapter
from raytrain_adv.transforms.transform import DEFECT

MOST_TOKENS = 256
"""Tokens that are compared; logits of 256 tokens and 128,256 words take 131 MB in float32."""
TOLERANCE = 0.05
"""Allowed difference of logits, as a share of the largest, where bits need not agree."""
MOST_KL = 0.2
"""Allowed divergence, in nats per token, from a model that rounds activations otherwise: in int8
SmolLM2-135M has 0.04 to 0.07, as much as int8 itself changes it. Weights are compared before.
"""
MOST_KL_OF_WEIGHTS = 0.05
"""The same where weights alone are rounded: engines differ by 0.001 to 0.014 in SmolLM2-135M."""
ALIGNED = 64
"""Bytes to whose multiples PyTorch aligns the memory of tensors on a CPU."""
EXPERT = re.compile(r"\.feed_forward\.experts\.|\.experts\.\d+\.\w+\.weight$")
"""In the names of experts that transformers does not load plain beside compressed linears; those
that it stacks it loads beside linears in float8."""
ROUNDED_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight_scale$")
Attention = str | dict[str, str] | None
"""What computes attention, of all parts or by part: see attention_of_parts; none is the default."""


@dataclass(frozen=True)
class Comparison:
    """How far a converted folder's logits are from those of the model that was trained for it."""

    difference: float | None
    """The largest absolute difference; none if the folder was not loaded."""
    how: str
    """What was compared, where, and what was allowed; or why it was not."""


def compared_tokens(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the first [1, tokens] of `input_ids` [tokens] that fit the model and MOST_TOKENS."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", MOST_TOKENS)
    limit -= first_position(model)
    return input_ids[: min(limit, MOST_TOKENS)].long().unsqueeze(0)


def load_folder(folder: Path, trust_remote_code: bool, attention: Attention) -> Any:
    """Load an exported folder into host memory as a user would; adapters in their files' dtype.
    `attention` is that of a model's parts; see attention_of_parts. Raises TrainingError when
    weights are missing from the folder, or left over.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, info = read_folder(folder, config, trust_remote_code, attention)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise TrainingError(
            f"the model that was written to {folder} does not load",
            "\n".join(f"{kind}: {', '.join(names[:4])}" for kind, names in wrong.items()),
            DEFECT,
        )
    for name, parameter in model.named_parameters():
        if in_adapter(name):  # transformers 5.17 makes adapters float32, whatever their files hold
            parameter.data = parameter.data.to(model.dtype)
        if type(parameter.data) is torch.Tensor and parameter.data_ptr() % ALIGNED:
            # As PyTorch allocates: sums of a CPU's products depend on where in a file they lie.
            parameter.data = parameter.data.clone()
    return compute_experts(model)


def read_folder(
    folder: Path,
    config: PretrainedConfig,
    trust_remote_code: bool,
    attention: Attention,
) -> tuple[Any, dict[str, Any]]:
    """Load a model of any origin into host memory; return it, and what was missing or left over.
    Raises JobError for experts that transformers would read wrong.
    """
    scheme = read_scheme(folder)
    if scheme is not None and (why := _why_experts_are_lost(scheme, folder)):
        fix = "serve it by the engine that it is for, or name the model that was not rounded"
        raise JobError(f"transformers cannot load {folder}", why, fix)
    config.update(unpacking(folder))
    auto: Any = model_class(config)
    with warnings.catch_warnings(), no_progress_bars():
        warnings.filterwarnings("ignore", message=DEPRECATION)
        found: tuple[Any, dict[str, Any]] = auto.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # a pickled file could run code
            attn_implementation=attention,
        )
    return found


def converted_logits(
    model: PreTrainedModel, job: JobConfig, ids: torch.Tensor, dtype: torch.dtype | None = None
) -> Trained:
    """Return trained_logits with every feature on: what the converted model computes."""
    Transforms(job).switch(model, True)
    return trained_logits(model, job, ids, dtype)


@torch.no_grad()
def trained_logits(
    model: PreTrainedModel, job: JobConfig, ids: torch.Tensor, dtype: torch.dtype | None = None
) -> Trained:
    """Return the trained model's logits, and how it routed tokens to experts; a collective.

    Neither compiled nor with kernels' forward passes, which round unlike the plain folder.
    `ids` are [batch, tokens], long, on the model's device; `dtype` is the job's if none.
    """
    model.train(False)
    dtype = dtype or compute_dtype(job)
    named = dict(model.named_parameters())
    eager = torch.compiler.set_stance("force_eager")
    with eager, plain_forwards(model, job), Routing(model) as routing:
        if any(not isinstance(p, DTensor) and p.dtype != dtype for p in named.values()):
            # Not sharded, so that FSDP2 does not cast them to the dtype they are exported in.
            keeps = keeps_float32(model)
            cast = {
                name: p if keeps(plain_name(name)) else p.to(dtype) for name, p in named.items()
            }
            output = functional_call(model, cast, (), {"input_ids": ids, "use_cache": False})
        else:
            output = model(input_ids=ids, use_cache=False)
    model.train()
    return Trained(output.logits.cpu(), routing)


@contextmanager
def plain_forwards(model: PreTrainedModel, job: JobConfig) -> Iterator[None]:
    """Replace kernels' forward passes by those of the modules' classes for a while."""
    kept: dict[Any, Any] = {}
    if any(t.stage == "kernel" for t in Transforms(job)):
        kept = {m: m.__dict__.pop("forward") for m in model.modules() if "forward" in vars(m)}
    try:
        yield
    finally:
        for module, forward in kept.items():
            module.forward = forward


@torch.no_grad()
def compare_converted(
    folder: Path,
    job: JobConfig,
    input_ids: torch.Tensor,
    trained: Trained,
    attention: Attention,
) -> Comparison:
    """Compare a converted folder's logits with those of converted_logits.

    `input_ids` are [batch, tokens], long, on the device that trained. Raises TrainingError when
    they differ by more than is allowed, naming both.
    """
    trained_on = input_ids.device
    device = roomy_device(trained_on, folder)
    scheme = read_scheme(folder)
    write_reference(folder, input_ids[:1], trained.logits[:1])
    if (folder / "model.gguf").is_file():
        how = "stored integers and scales are training's; not loaded: transformers cannot"
        return Comparison(None, how)
    if scheme is not None and (reason := _why_not_loaded(scheme, folder)):
        return Comparison(None, f"stored values are training's; not loaded, as {reason}")
    model = load_folder(folder, job.model.trust_remote_code, attention).to(device)
    with no_progress_bars():
        routed = compute_routed(model.eval(), input_ids.to(device), trained, TOLERANCE, False)
    reason = why_not_exact(job, trained_on, device)
    found, wanted = routed.held if reason else routed.logits, trained.logits.float()
    apart = (found - wanted).abs()
    difference, largest = float(apart.max()), float(wanted.abs().max())
    allowed = TOLERANCE * largest if reason else 0.0
    how = f"{input_ids.numel()} tokens on {device}, " + (
        f"at most {allowed:.3g}: {reason}" if reason else "bit for bit"
    )
    if reason and routed.num_rerouted:
        how += f"; as routed in training, from which rounding moves {routed.num_rerouted} tokens"
    is_equal = difference <= allowed  # not where it is not a number
    if scheme is not None and scheme["input_activations"]:
        apart_nats = divergence(wanted, found)
        is_equal = apart_nats <= MOST_KL
        how = f"{input_ids.numel()} tokens on {device}; KL {apart_nats:.2g}, at most {MOST_KL}: "
        rounds = "rounds activations in its own order"
        if unpacking(folder):
            rounds = "leaves activations as they are beside an adapter"
        how += f"transformers {rounds}; stored values are training's"
    if routed.fault or not is_equal:
        kind = Transforms(job).converts
        place = int(apart.nan_to_num(nan=float("inf")).argmax())
        values = (f"{logits.flatten()[place]:.6g}" for logits in (wanted, found))
        raise TrainingError(
            f"the {kind} model does not compute what was trained",
            routed.fault
            or f"logits differ by {difference:.4g} ({how}): {next(values)} in training with every "
            f"feature on, {next(values)} from the {kind} files",
            f"{DEFECT}; the trained model itself is exported, and is not {kind}",
        )
    return Comparison(difference, how)


def _why_not_loaded(scheme: dict[str, Any], folder: Path) -> str:
    """Return why transformers does not load a folder of compressed-tensors; empty if it does."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return "compressed-tensors is not installed"
    return _why_experts_are_lost(scheme, folder)


def _why_experts_are_lost(scheme: dict[str, Any], folder: Path) -> str:
    """Return why transformers does not read a mixture's experts, or reads others; empty if it reads
    them.
    """
    weights = scheme["weights"]
    is_float8 = weights["type"] == "float" and weights["num_bits"] == 8
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= {*opened.keys()}
    rounded = any(map(ROUNDED_EXPERT.search, names))
    plain = [name for name in names if EXPERT.search(name) and f"{name}_scale" not in names]
    # Remove both when transformers loads them; of Llama 4 it then expects linears.
    if plain and (rounded or not is_float8 or ".feed_forward." in plain[0]):
        return "transformers 5.23 loads no plain experts beside what is rounded"
    is_unpacked = weights["strategy"] != "block" if is_float8 else scheme["format"] == PACKED
    if rounded and not is_unpacked:
        return f"transformers 5.23 unpacks no experts that are {scheme['format']}"
    return ""


def most_divergence(folder: Path) -> float:
    """Return the divergence that an engine may have from the model that was trained."""
    scheme, config = read_scheme(folder), json.loads((folder / "config.json").read_text())
    rounds_inputs = scheme["input_activations"] if scheme else stored_as(config)[0]
    return MOST_KL if rounds_inputs else MOST_KL_OF_WEIGHTS


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep libraries' progress bars out of the output for a while: compressed-tensors 0.20 draws
    four for each model that it loads, and has no switch for them.
    """
    shown: Any = tqdm.__init__

    def hidden(bar: Any, *args: Any, **keys: Any) -> None:
        shown(bar, *args, **{**keys, "disable": True})

    tqdm.__init__ = hidden  # its modules hold the class itself
    try:
        yield
    finally:
        tqdm.__init__ = shown


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return KL(wanted, found) in nats per token, of float32 logits [..., vocabulary]."""
    log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def roomy_device(device: torch.device, folder: Path) -> torch.device:
    """Return the device if the folder's model fits into its free memory, otherwise the CPU."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()
    needed = (1.3 * folder_gib(folder) + 2.0) * GIB
    return device if torch.cuda.mem_get_info(device)[0] > needed else torch.device("cpu")

"""Which attention a job's model computes with: the requested one, or the best available."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.kernels import fetch as kernel_files
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels.fetch import NoBuild
from raytrain_adv.kernels.source import Wanted, of_name
from raytrain_adv.kernels.swap import load_module
from raytrain_adv.model.files import check_flash_package, has_package
from raytrain_adv.transforms.hub_kernels import HubKernels, own_lock

ATTENTION = {
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
LOWEST_CAPABILITY = {"fa4": (9, 0), "fa3": (9, 0), "fa2": (8, 0)}
"""Package of flash attention -> the GPUs it is for; FlashAttention-3 is for Hopper alone."""
LONG = 8192
"""Tokens of a sequence from which FlashAttention-4 is faster than PyTorch's attention on Hopper,
which is cuDNN's there (jobs/benchmarks/attention_kernels.py)."""
HUB = "hub:"
AUTO = "set flash_attn: auto"
NEEDED = ("flash_attn_func", "flash_attn_varlen_func")
SPLIT = "_of_split_sequences"
"""What transformers' name of an attention ends in that attends over several workers."""
HUB_ATTENTION, FA4_ATTENTION = "hub_attention", "fa4"
"""Our names of a hub:<repo> kernel and of FlashAttention-4: for one with flash in it transformers
would load its own."""


def attention(job: JobConfig, config: PretrainedConfig) -> str | None:
    """Return transformers' name of the attention to use; none leaves the choice to transformers.
    Raises JobError when the requested attention is not available, or would compute something else.
    """
    asked = job.model.flash_attn
    check_flash_package(asked)
    # PyTorch's fused attention has no cap on the scores; transformers before 5.23 uses it all the
    # same for Gemma 2, and drops the cap. Remove when the lowest transformers allowed refuses.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and asked == "sdpa":
        found = "its config caps attention scores (attn_logit_softcapping), which sdpa cannot"
        raise _unsupported(job, found)
    if asked.startswith(HUB):
        return _register(HUB_ATTENTION, _hub_attention(job))
    chosen = _best_package(job, config) if asked == "auto" else asked
    if chosen == "fa4":
        return _register(FA4_ATTENTION, FlashAttention(job))
    return ATTENTION[chosen] if chosen is not None else "eager" if capped else None


def is_flash(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes packed conversations by their bounds, without a mask."""
    name = str(model.config.get_text_config()._attn_implementation).removesuffix(SPLIT)
    return name in (HUB_ATTENTION, FA4_ATTENTION) or name.startswith("flash_attention_")


def attention_of_parts(model: PreTrainedModel) -> dict[str, str]:
    """Return what computes attention by the name of the part's config, empty for the whole model:
    text may use a different one than a tower does. transformers takes it as `attn_implementation`.
    """
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    held = {"": config, **{n: c for n, c in parts.items() if isinstance(c, PretrainedConfig)}}
    used = {name: c._attn_implementation for name, c in held.items() if c._attn_implementation}
    return {name: str(one).removesuffix(SPLIT) for name, one in used.items()}


def attention_name(job: JobConfig, model: PreTrainedModel) -> str:
    """Return what computes attention: transformers' name, or the kernel with its pinned version."""
    name = str(model.config.get_text_config()._attn_implementation)
    wanted = kernel_asked(job)
    if name != HUB_ATTENTION or wanted is None:
        return name
    given = job.transform(HubKernels).kernels_lock
    files = [own_lock(job), *([Path(given).expanduser()] if given is not None else [])]
    found = [locks.read(file).of(wanted) for file in files if file.is_file()]
    locked = next((one for one in found if one is not None), None)
    if locked is None and wanted.is_local:
        place = job.transform(HubKernels).place(job, hardware.detect("cpu"))
        locked = kernel_files.find(wanted, replace(place, target=None)).locked
    return job.model.flash_attn + (f", {locked.at}" if locked is not None else "")


def kernel_asked(job: JobConfig) -> Wanted | None:
    """Return the kernel that flash_attn names, by default in a known version, or None."""
    if not job.model.flash_attn.startswith(HUB):
        return None
    name = job.model.flash_attn.removeprefix(HUB)
    if name.startswith(("/", ".", "~")):  # another is the Hub's, whatever folder it is read in
        return Wanted(name, is_local=True)
    wanted = replace(of_name(name), is_local=False)
    if wanted.version is not None or wanted.revision is not None:
        return wanted
    from transformers.integrations import hub_kernels

    # The version that transformers was tested with; 1 if it names none.
    known = getattr(hub_kernels, "FLASH_ATTN_KERNEL_VERSIONS", {})
    return replace(wanted, version=int(known.get(wanted.source, 1)))


def fetch(job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
    """Put the kernel's files into output_dir, pinned by kernels.lock.json there. Raises JobError
    when it cannot be fetched, or differs from kernels_lock.
    """
    wanted, file = kernel_asked(job), own_lock(job)
    if wanted is not None or file.is_file():
        place = job.transform(HubKernels).place(job, facts)
        every = () if wanted is None else (wanted,)
        kernel_files.fetch(every, place, file, say, use="attention")


def refuse_unsupported(job: JobConfig, model: PreTrainedModel) -> None:
    """Refuse a kernel of hub:<repo> for an architecture without flash attention, and to keep the
    result of an attention that is not an operator. Raises JobError naming the architecture.
    """
    name = model.config.get_text_config()._attn_implementation
    if name == "eager" and job.parallel.gradient_checkpointing == "attention":
        raise JobError(
            "gradient_checkpointing: attention would keep nothing, as full does",
            f"attention of {type(model).__name__} is eager here: several products, no operator",
            "set gradient_checkpointing: full, or flash_attn: sdpa if the model supports it",
        )
    if name not in (HUB_ATTENTION, FA4_ATTENTION):
        return
    sinks = [name for name, _ in model.named_parameters() if name.endswith(".sinks")]
    if sinks:
        found = f"its attention has sinks ({sinks[0]}), which the kernel would leave out"
        raise _unsupported(job, found)
    if not model._supports_flash_attn:
        raise _unsupported(job, f"{type(model).__name__} has no flash attention")


def _unsupported(job: JobConfig, found: str) -> JobError:
    name, asked = job.model.model_name_or_path, job.model.flash_attn
    return JobError(f"{name} does not support flash_attn: {asked}", found, AUTO)


def _best_package(job: JobConfig, config: PretrainedConfig) -> str | None:
    """Return the flash attention that is installed and fits GPU, precision and architecture."""
    half = job.train.computes_in_bf16
    if not half or job.parallel.use_cpu or not torch.cuda.is_available():
        return None
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    kind: Any = auto._model_mapping.get(type(config), None)
    if kind is None or not getattr(kind, "_supports_flash_attn", False):
        return None
    if getattr(kind, "_compatible_flash_implementations", None):  # with sinks: no other computes it
        return None
    for name, lowest in LOWEST_CAPABILITY.items():
        capability = torch.cuda.get_device_capability()
        fits = capability >= lowest and (name != "fa3" or capability[0] == lowest[0])
        fits = fits and (name != "fa4" or (capability[0] <= 10 and _fits_fa4(config)))
        if fits and has_package(name) and _gains(job, name, is_hopper=capability[0] == 9):
            return name
    return None


def _fits_fa4(config: PretrainedConfig) -> bool:
    """Whether FlashAttention-4 has a model's attention: no dropout, heads of at most 128 features.

    Source: flash_attn.cute.interface of flash-attn-4 4.0.0b36, which refuses others on some GPUs.
    """
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size <= 128 and not getattr(text, "attention_dropout", 0.0)


def _gains(job: JobConfig, name: str, is_hopper: bool) -> bool:
    """Whether a flash attention is faster than PyTorch's, which takes no bounds of packed rows."""
    if not is_hopper or job.data.neat_packing:
        return True
    return name == "fa3" or (name == "fa4" and job.data.cutoff_len >= LONG)


def _register(name: str, function: "FlashAttention") -> str:
    """Make a flash attention known to transformers under this name; return it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    known.register(name, function)
    masks.register(name, masks["flash_attention_2"])
    return name


def _hub_attention(job: JobConfig) -> "HubAttention":
    """Return the kernel of hub:<repo>, which can be had.

    Without a GPU, as on a driver that plans, only a folder's build for that machine is loaded.
    """
    hub = HubAttention(job)
    if torch.cuda.is_available():
        hub.kernel()
    elif hub.wanted.is_local:
        with contextlib.suppress(NoBuild):  # the GPUs that it is for are elsewhere
            hub.kernel()
    else:
        place = job.transform(HubKernels).place(job, hardware.detect("cpu"))
        if place.given is not None and not (place.own and place.own.is_file()):
            kernel_files.require_in(hub.wanted, place.given)
    return hub


class FlashAttention:
    """Flash attention in transformers' calling convention: FlashAttention-4, unless a subclass has
    another kernel.

    transformers drops the bounds of packed conversations in batches of several sequences, and calls
    FlashAttention-4 in a way that splits compiled layers.
    """

    def __init__(self, job: JobConfig) -> None:
        self.job = job

    def kernel(self) -> ModuleType:
        """Return what has flash_attn_func and flash_attn_varlen_func."""
        from raytrain_adv.ops import flash_attention_4

        return flash_attention_4

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return attention's output [sequences, time, heads, features], causal.

        Query, key and value are [sequences, heads, time, features]; there is no attention_mask:
        padding lies on the right and is a separate conversation. `cu_seq_lens_q` (int32) has the
        bounds of conversations in the sequences laid end to end; none of them is longer than
        `max_length_q`.
        """
        if others.get("s_aux") is not None:
            raise JobError(
                f"flash_attn: {self.job.model.flash_attn} cannot compute this model's attention",
                f"{type(module).__name__} has sinks, which the kernel would leave out",
                AUTO,
            )
        kernel: Any = self.kernel()
        window = None if sliding_window is None else (sliding_window - 1, 0)
        chosen: dict[str, Any] = {
            "dropout_p": dropout or None,
            "window_size": window,
            "softcap": softcap,
        }
        options = {name: value for name, value in chosen.items() if value is not None}
        options |= {"softmax_scale": scaling, "causal": True}
        features = value.shape[-1]  # fewer than the queries' in multi-head latent attention
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - features))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if cu_seq_lens_q is None:
            output = kernel.flash_attn_func(q, k, v, **options)
        else:
            bounds = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_q}
            lengths = {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_q}
            flat = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
            output = kernel.flash_attn_varlen_func(*flat, **bounds, **lengths, **options)
        whole: torch.Tensor = output[0] if isinstance(output, tuple) else output
        whole = whole.reshape(q.shape[0], q.shape[1], *whole.shape[-2:])
        return whole[..., :features], None


class HubAttention(FlashAttention):
    """Flash attention by a kernel of the Hub or of a folder.

    transformers' own loading knows no folders and no lock files, and takes one minor version of
    `kernels`.
    """

    def __init__(self, job: JobConfig) -> None:
        super().__init__(job)
        wanted = kernel_asked(job)
        if wanted is None:
            raise ValueError(f"flash_attn: {job.model.flash_attn} names no kernel")
        self.wanted = wanted
        self._loaded: ModuleType | None = None

    def kernel(self) -> ModuleType:
        """Return the kernel, loaded once. Raises JobError when it cannot be fetched, is not the
        locked one, or is not flash attention; NoBuild when it is for other machines than this one.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> ModuleType:
        asked = f"flash_attn: {self.job.model.flash_attn}"
        if importlib.util.find_spec("kernels") is None:
            raise JobError(
                f"{asked} needs the package kernels",
                "it is not installed here",
                "pip install kernels on the driver and the workers, or set flash_attn: auto",
            )
        facts = hardware.detect(None if torch.cuda.is_available() else "cpu")
        place = self.job.transform(HubKernels).place(self.job, facts)
        try:
            build = kernel_files.find(self.wanted, place)
            if place.own is not None and place.own.is_file():
                locks.require_same(build.locked, build.folder, place.own)
            kernel = load_module(build.folder)
        except NoBuild:
            raise
        except JobError as error:
            raise JobError(
                f"{asked} cannot be loaded",
                f"{error.what}\n{error.found}",
                f"{error.fix};\nor give a folder that holds the kernel: {HUB}/path; or set "
                "flash_attn: auto",
            ) from error
        missing = [name for name in NEEDED if not hasattr(kernel, name)]
        if missing:
            raise JobError(
                f"{asked} is not flash attention",
                f"it lacks {' and '.join(missing)}: {build.folder}",
                "name a kernel such as kernels-community/flash-attn2, or set flash_attn: auto;\na "
                f"resumed run keeps its copy: after a repair delete {own_lock(self.job)}",
            )
        return kernel

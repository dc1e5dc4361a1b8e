"""The job keys of no transform, with LLaMA-Factory's names and defaults if it has them."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.section import Names, PathText, Section, Text, expand
from raytrain_adv.config.templates import Template
from raytrain_adv.text import split_names

LARGEST = 2**31 - 1
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Ends = Annotated[list[Count], Field(min_length=2, max_length=2)]
Files = Annotated[Names, AfterValidator(expand)]
Steps = Annotated[float, Field(gt=0, le=LARGEST)]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow"]


class ModelConfig(Section):
    """The model to train."""

    model_name_or_path: PathText
    """Folder of a Hugging Face causal language model, or its name on the Hub."""
    model_revision: Text = "main"
    """Branch, tag or commit of a Hub model."""
    cache_dir: PathText | None = None
    """Folder for files downloaded from the Hub; null means the Hub client's own cache."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    train_from_scratch: bool = False
    """Initialize random weights from the model's config instead of loading a checkpoint."""
    flash_attn: (
        Literal["auto", "disabled", "sdpa", "fa2", "fa3", "fa4"]
        | Annotated[str, Field(pattern=r"^hub:([\w.-]+/[\w.-]+(@[\w.-]+)?|[/.~].*)$")]
    ) = "auto"
    """Attention: sdpa is PyTorch's, disabled the eager form, fa2, fa3 and fa4 the flash-attn
    packages, hub:owner/kernel@version a kernel from the Hub, hub:/path one from a folder; auto
    takes an installed package where it is faster than PyTorch's on the GPU, else sdpa."""

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Explain how to name an attention kernel."""
        if key == "flash_attn" and str(value).startswith("hub:"):
            return (
                "hub: is followed by owner/kernel, owner/kernel@version, or the path of a folder "
                "that begins with /, ./ or ~"
            )
        return ""


class DataConfig(Section):
    """The training data, and how rows become tokens."""

    dataset: Files | None = None
    """Names in dataset_info.json, paths to JSON, JSONL or Parquet files, or Hub names; comma
    separated or a list."""
    eval_dataset: Files | None = None
    """Datasets for evaluation, in the same form as dataset; excludes val_size."""
    dataset_dir: PathText = "data"
    """Folder of dataset_info.json and the files it names."""
    template: Template | None = None
    """Chat template; null uses the tokenizer's own."""
    enable_thinking: bool | None = True
    """For templates of reasoning models: true trains empty thoughts of answers without any; false
    leaves thoughts out; null keeps them, and computes no loss on empty ones."""
    split_special_tokens: bool = False
    """Read control tokens in the text of messages, as <|im_end|> in a user's, as the letters that
    they are; false reads them as control tokens, and counts the rows."""
    default_system: str | None = None
    """System message for conversations that have none."""
    cutoff_len: Count = 2048
    """Longest sequence in tokens; longer ones are cut, and counted in the report."""
    train_on_prompt: bool = False
    """Compute the loss on the prompt's tokens too."""
    mask_history: bool = False
    """Compute the loss on the last turn of each conversation only."""
    packing: bool = False
    """Put several conversations into one sequence of cutoff_len tokens."""
    neat_packing: bool = False
    """Packing in which conversations do not attend to each other; implies packing."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = (
        "concat"
    )
    """How several datasets are mixed: concat takes all rows of each, interleave_under draws rows
    until one dataset has no more, interleave_over until each was read once, repeating shorter ones,
    interleave_once until all were read."""
    interleave_probs: str | list[Annotated[float, Field(gt=0.0)]] | None = None
    """Shares by which datasets are drawn, as 0.7,0.3; null takes a row of each in turn."""
    max_samples: Count | None = None
    """Use at most this many rows of each dataset."""
    max_unusable_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Largest share of a dataset's rows that may be left out because they cannot be trained on;
    more stop the job, as its columns or template are probably wrong."""
    val_size: Annotated[float, Field(ge=0.0, le=LARGEST)] = 0.0
    """Rows held out for evaluation: a number of rows, or a share when below 1."""
    preprocessing_num_workers: Count | None = None
    """Processes that tokenize; null means one per CPU core, up to 16."""
    overwrite_cache: bool = False
    """Tokenize again even if the cache has this dataset, tokenizer and template."""
    tokenized_path: PathText | None = None
    """Folder for tokenized data; null means the user's cache folder."""
    disable_shuffling: bool = False
    """Read rows in file order instead of a seeded random order."""

    @property
    def shares(self) -> list[float] | None:
        """interleave_probs as numbers."""
        given = self.interleave_probs
        return [float(x) for x in given.split(",")] if isinstance(given, str) else given

    @property
    def holds_rows_out(self) -> bool:
        """Whether there are rows to evaluate."""
        return self.eval_dataset is not None or self.val_size > 0

    def contradictions(self) -> Iterable[Problem]:
        """Find data keys that contradict each other."""
        if self.dataset is None:
            text = "missing: there is nothing to train on"
            yield Problem(text, "name a dataset, or the path of one", "dataset")
        for key, names in (("dataset", self.dataset), ("eval_dataset", self.eval_dataset)):
            if isinstance(names, str) and not names.replace(",", "").strip():
                yield Problem(f"{names!r} names no dataset", "name one, or its path", key)
        if self.eval_dataset is not None and self.val_size > 0:
            text = "rows for evaluation come from one of the two"
            yield Problem(text, "keep one of them", "eval_dataset and val_size")
        yield from self._mixing()
        if self.val_size > 1 and self.val_size % 1:
            text = f"{self.val_size} is neither a share below 1 nor a whole number of rows"
            yield Problem(text, "give a share below 1, or a whole number of rows", "val_size")
        if self.mask_history and self.train_on_prompt:
            text = "one computes the loss on part of the answers, the other on the prompts too"
            yield Problem(text, "set one of them to false", "mask_history and train_on_prompt")
        if self.neat_packing and not self.packing and "packing" in self.model_fields_set:
            text = "neat_packing is a way of packing"
            yield Problem(text, "set packing: true, or delete it", "neat_packing and packing")

    def _mixing(self) -> Iterable[Problem]:
        key = "interleave_probs"
        try:
            shares = self.shares
        except ValueError:
            text = f"{self.interleave_probs!r} is not a list of numbers"
            yield Problem(text, "write 0.7,0.3", key)
            return
        if shares is not None and self.mix_strategy == "concat":
            fix = "set mix_strategy: interleave_under, or delete it"
            yield Problem("datasets are not interleaved", fix, f"{key} and mix_strategy")
        for name in ("dataset", "eval_dataset"):
            count = len(split_names(getattr(self, name)))
            if shares is not None and count > 1 and len(shares) != count:
                text = f"{len(shares)} shares for {count} datasets"
                yield Problem(text, "give one for each", f"{key} and {name}")


WHOLE_SEQUENCES = {
    "compute_accuracy": "an exact answer may lie on several workers",
    "neftune_noise_alpha": "noise is drawn for whole conversations",
    "use_asft_loss": "the model before training would see a part of each sequence",
    "use_distill_loss": "the teacher would see a part of each sequence",
}
"""Keys that need all tokens of a sequence on each worker -> why."""


class ParallelConfig(Section):
    """How the model is sharded, compiled and recomputed."""

    feature: ClassVar[str] = "FSDP"
    tried_with: ClassVar[dict[str, Any]] = {"ray_num_workers": 2}

    gradient_checkpointing: bool | Literal["none", "full", "attention", "selective"] | None = None
    """Recompute activations in backward: full (also true), attention (its result is kept, which
    long sequences take longest to compute again), selective (attention and matmuls are kept), none
    (also false). Unset means full."""
    disable_gradient_checkpointing: bool = False
    """LLaMA-Factory's switch: true keeps all activations, as gradient_checkpointing: none does."""
    activation_offloading: bool | Count = False
    """Have what full or attention checkpointing keeps in page-locked host memory between forward
    and backward: a number that of so many first layers, true that of all but the last."""
    torch_compile: bool = False
    """Compile each transformer layer and the loss."""
    cuda_graph: bool | None = None
    """Record forward and backward passes as CUDA graphs on one worker, which small models need to
    keep a GPU busy. Unset means passes of up to 60 TFLOP, where it is possible."""
    sequence_parallel_size: Count = 1
    """Workers that share each sequence: every one computes a part of its tokens, and attends to the
    whole with a part of the heads. It divides ray_num_workers and the attention heads; a step has
    that much fewer sequences."""
    fsdp_shard_size: Count | None = None
    """Workers that share one copy of the model; null means all, fewer than all is HSDP."""
    fsdp_reshard_after_forward: bool | None = None
    """Free each layer's gathered parameters after its forward, and gather them again in backward.
    false keeps them: less to move, more memory. Unset keeps them where the predicted peak then
    leaves 15 % of the GPU's memory free."""
    fsdp_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which workers sum gradients; bfloat16 moves half the bytes, and rounds each sum."""
    fsdp_collectives: Literal["auto", "nccl", "copies"] = "auto"
    """What moves shards and gradients. nccl: its kernels, which take multiprocessors from the
    layers. copies: copy engines, between the GPUs of one host; sums are in float32, exchanged in
    bf16. auto: copies where all workers of an fsdp_shard_size share a host whose GPUs read each
    other's memory, else nccl."""
    fsdp_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory."""
    ddp_timeout: Count = 1800
    """Seconds after which a collective that does not complete is an error."""
    use_cpu: bool = False
    """Train on CPU even if the cluster has GPUs."""

    def contradictions(self) -> Iterable[Problem]:
        """Find keys of the parallel layout that contradict each other."""
        recomputes = self.gradient_checkpointing not in (None, False, "none")
        off = self.disable_gradient_checkpointing
        kept = "none" if off else self.gradient_checkpointing
        keys = f"activation_offloading and {'disable_' if off else ''}gradient_checkpointing"
        if off and recomputes:
            keys = "disable_gradient_checkpointing and gradient_checkpointing"
            yield Problem("one turns recomputation off, the other on", "keep one of them", keys)
        elif self.activation_offloading and kept in (False, "none", "selective"):
            text = "layers' inputs and attention's results are moved, and more than those is kept"
            fix = (
                "disable_gradient_checkpointing: false"
                if off
                else "gradient_checkpointing: full or attention"
            )
            yield Problem(text, f"set {fix}", keys)
        elif self.activation_offloading and kept == "attention" and not self.torch_compile:
            text = "only compiled layers release attention's results"
            yield Problem(text, "set torch_compile: true, or gradient_checkpointing: full", keys)
        for key in ("use_cpu", "fsdp_cpu_offload"):
            if self.fsdp_collectives == "copies" and getattr(self, key):
                text, fix = "copies are between GPUs", "set fsdp_collectives: auto"
                yield Problem(text, fix, f"fsdp_collectives and {key}")

    def conflicts(self, job: Any) -> Iterable[Problem]:
        """Find what needs a whole sequence on a worker."""
        if self.sequence_parallel_size == 1:
            return
        for section in job.sections():
            for key in WHOLE_SEQUENCES.keys() & type(section).model_fields.keys():
                if section.is_changed(key):
                    both = f"sequence_parallel_size and {key}"
                    yield Problem(WHOLE_SEQUENCES[key], "keep one of them", both)


class OutputConfig(Section):
    """The files of a run: which, where and how often."""

    output_dir: PathText
    """Folder of the run: model, report, metrics; on storage that all nodes of the job share."""
    overwrite_output_dir: bool = False
    """Start a new run in the folder of an earlier one, which is kept in output_dir/previous. An
    unfinished run of the same job continues instead, unless resume_from_checkpoint is false."""
    delete_previous_run: bool = False
    """With overwrite_output_dir: delete the earlier run, with its checkpoints, instead of keeping
    it, once preflight and plan have accepted the new one."""
    logging_steps: Count = 10
    """Steps between two lines of metrics."""
    save_steps: Steps = 500
    """Steps between two checkpoints, or a share of all steps when below 1."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When a checkpoint is written: never, every save_steps, or after each epoch."""
    save_total_limit: Count | None = None
    """Keep only this many checkpoints, the newest ones."""
    save_only_model: bool = False
    """Write no optimizer states into checkpoints; such a run cannot be resumed."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When the held-out rows are evaluated; they are in any case at the end of the run."""
    eval_steps: Steps | None = None
    """Steps between evaluations, or a share of all when below 1; null means logging_steps."""
    eval_on_start: bool = False
    """Evaluate the held-out rows before the first step too."""
    eval_on_each_dataset: bool = False
    """Report the loss of each dataset of eval_dataset, besides that of all rows together."""
    compute_accuracy: bool = False
    """Report the share of label tokens that the model predicts, and the share of answers that
    greedy decoding gives exactly, too."""
    load_best_model_at_end: bool = False
    """Export the model of the best evaluation, that of eval_on_start left out, instead of the last
    step's; each that is the best so far writes a checkpoint, which save_total_limit keeps."""
    metric_for_best_model: Literal["loss", "eval_loss", "accuracy", "eval_accuracy"] = "loss"
    """What the best evaluation has least of (loss) or most of (accuracy)."""
    early_stopping_steps: Count | None = None
    """Evaluations without a better one after which the run ends."""
    resume_from_checkpoint: bool | PathText | None = None
    """true continues from the newest complete checkpoint of this run; a path from that one."""
    report_to: Tracker | list[Tracker] = "none"
    """Trackers in addition to the report: tensorboard, wandb, mlflow; none, or a list."""
    run_name: Text | None = None
    """Name of the run in trackers; null means the output folder's name."""
    plot_loss: bool = True
    """Draw the plots in report.html."""
    compare_with: PathText | None = None
    """output_dir of a finished run to compare with in the report."""
    export_model: bool = True
    """Write the trained model into output_dir; false leaves it in the checkpoints."""
    num_sample_answers: Annotated[int, Field(ge=0, le=1000)] = 1
    """Prompts that the trained model answers at the end, in 120 s at most, on the console and in
    the report; held-out ones if there are any."""

    def contradictions(self) -> Iterable[Problem]:
        """Find output keys that contradict each other."""
        for key, value in (("save_steps", self.save_steps), ("eval_steps", self.eval_steps)):
            if value is not None and value > 1 and value % 1:
                text = f"{value} is neither a share below 1 nor a whole number of steps"
                yield Problem(text, "give a share below 1, or a whole number of steps", key)
        if self.delete_previous_run and not self.overwrite_output_dir:
            text = "nothing is replaced without overwrite_output_dir"
            yield Problem(text, "set overwrite_output_dir: true too", "delete_previous_run")
        if self.resume_from_checkpoint is True and self.save_only_model:
            text = "checkpoints without optimizer states cannot be resumed"
            keys = "resume_from_checkpoint and save_only_model"
            yield Problem(text, "set one of them to false", keys)
        if self.metric_for_best_model.endswith("accuracy") and not self.compute_accuracy:
            keys = "metric_for_best_model and compute_accuracy"
            yield Problem("the accuracy is not computed", "set compute_accuracy: true", keys)
        if self.load_best_model_at_end and self.save_strategy == "no":
            text = "the best model is read from its checkpoint, and none is written"
            keys = "load_best_model_at_end and save_strategy"
            yield Problem(text, "set save_strategy: steps or epoch", keys)
        trackers = self.report_to if isinstance(self.report_to, list) else []
        if "none" in trackers and len(trackers) > 1:
            text = "none is listed together with trackers"
            yield Problem(text, "remove none from the list", "report_to")
        if len(set(trackers)) < len(trackers):
            yield Problem("a tracker is listed twice", "list it once", "report_to")


class RayConfig(Section):
    """How Ray runs the job."""

    ray_num_workers: Count | Literal["auto"] | Ends = 1
    """Workers (ranks); auto takes every GPU of the cluster, or two CPU workers if there is none;
    [2, 8] continues with fewer if workers are lost and grows again, with the batch of 8."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """What each worker reserves, as {"GPU": 1, "CPU": 8}; null means one GPU if the cluster has
    any, else one CPU."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers are placed on nodes."""
    ray_storage_path: PathText | None = None
    """Folder that all nodes share, or URI (s3://, gs://), for checkpoints; null: output_dir."""
    ray_run_name: Text | None = None
    """Name of the run in Ray and in the storage path; null means the output folder's name."""
    ray_init_kwargs: dict[str, Any] | None = None
    """Arguments of ray.init, as {"address": "auto"}."""
    max_failures: Annotated[int, Field(ge=-1, le=LARGEST)] = 0
    """Times that lost workers are restarted from the last checkpoint; -1 means without limit."""
    step_timeout: Annotated[float, Field(ge=1.0, le=LARGEST)] | None = None
    """Seconds without an optimizer step after which all workers are terminated, those that hang are
    named, and a failure is counted toward max_failures; null leaves this to ddp_timeout. The time
    starts after the first step of each start, and excludes evaluation, saving and the work after
    the last step, in which only a worker whose process does not respond is terminated."""
    force: bool = False
    """Start even if the predicted GPU or host memory exceeds that of the GPUs or nodes."""

    @property
    def ends(self) -> tuple[int, int] | None:
        """The fewest and the most workers, if their number may change during the run."""
        workers = self.ray_num_workers
        return (workers[0], workers[1]) if isinstance(workers, list) else None

    def contradictions(self) -> Iterable[Problem]:
        """Find requests that Ray could never fulfill, or that no worker could use."""
        yield from self._elastic()
        key = "resources_per_worker"
        resources = self.resources_per_worker or {}
        for name in resources:
            right = name.rstrip("s").upper()
            if right in ("GPU", "CPU") and name != right:
                yield Problem(f"{name} is not a resource of Ray", f"write {right}", key)
        gpus = resources.get("GPU", 0.0)
        if gpus > 1:
            text = f"{gpus:g} GPUs for each worker: a worker is one process and drives one GPU"
            yield Problem(text, "set GPU: 1 and raise ray_num_workers", key)
        elif 0 < gpus < 1 and self.ray_num_workers != 1:
            text = f"{gpus:g} GPUs for each of several workers: each needs its own GPU"
            yield Problem(text, "set GPU: 1", "resources_per_worker and ray_num_workers")
        try:
            json.dumps(self.ray_init_kwargs, allow_nan=False)
        except ValueError:
            text = "it contains a number that is infinite or NaN"
            yield Problem(text, "give a number, or put text in quotes", "ray_init_kwargs")

    def _elastic(self) -> Iterable[Problem]:
        if self.ends is None:
            return
        fewest, most = self.ends
        if fewest >= most:
            text = f"[{fewest}, {most}] is not [the fewest, the most] workers"
            fix = f"write [{most}, {fewest}]" if fewest > most else f"write {most}"
            yield Problem(text, fix, "ray_num_workers")
        if self.max_failures == 0:
            text = "with max_failures: 0 the first lost worker ends the run"
            fix = "set max_failures to how often workers may be lost, or -1 for any number"
            yield Problem(text, fix, "ray_num_workers and max_failures")

"""The keys of LLaMA-Factory's SFT parser (0.9.6, transformers 5) that no section or transform owns.

Source: LLaMA-Factory's hparams/*.py and transformers' Seq2SeqTrainingArguments; defaults as there.
"""

from typing import Any, TypeAlias

import yaml

Accepted: TypeAlias = tuple[tuple[Any, ...], str, str]
"""Values that mean what this package does anyway; why; what to do about another value."""
Refused: TypeAlias = tuple[Any, str, str]
"""The default, which asks for nothing; why another value cannot be honored; what to do."""

DELETE = "delete it"


def _accept(values: tuple[Any, ...], why: str, keys: str, fix: str = DELETE) -> dict[str, Accepted]:
    return {key: (values, why, fix) for key in keys.split()}


def _note(why: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), why)


def refuse(why: str, fix: str, defaults: str) -> dict[str, Refused]:
    """Return an entry for each key of `defaults`, which is `key: default, ...` as YAML."""
    values: dict[str, Any] = yaml.safe_load("{" + defaults + "}")
    return {key: (default, why, fix) for key, default in values.items()}


SAME: dict[str, Accepted] = {
    **_accept((True,), "a job always trains", "do_train"),
    **_accept((True, False), "held-out rows are always evaluated at the end", "do_eval"),
    **_accept((True,), "only fast tokenizers are used", "use_fast_tokenizer"),
    **_accept((True,), "models are always loaded shard by shard", "low_cpu_mem_usage"),
    **_accept(
        (True,),
        "the loss is always divided by the label tokens of all workers",
        "average_tokens_across_devices",
    ),
    **_accept((True,), "no loss is ever taken on padding", "ignore_pad_token_for_loss"),
    **_accept((True,), "models are always saved as safetensors", "save_safetensors"),
    **_accept(
        ("steps",),
        "metrics are logged every logging_steps",
        "logging_strategy",
        "set logging_steps",
    ),
    **_accept(("inductor",), "torch_compile compiles with inductor", "torch_compile_backend"),
    **_accept(("default",), "torch_compile compiles in the default mode", "torch_compile_mode"),
    **_accept(("auto", "torchao"), "FP8 is torchao's", "fp8_backend"),
    **_accept(
        ("concat",),
        "datasets are concatenated",
        "mix_strategy",
        "use max_samples to weigh datasets",
    ),
    **_accept(
        ("random",),
        "rows are read in a seeded random order",
        "train_sampling_strategy",
        "packing avoids padding",
    ),
    **_accept(
        (
            "full_shard",
            "full_shard auto_wrap",
            ["full_shard"],
            ["full_shard", "auto_wrap"],
            "",
            [],
            True,
        ),
        "FSDP2 always shards, layer by layer",
        "fsdp",
        "delete it; set fsdp_shard_size, fsdp_reshard_after_forward and fsdp_cpu_offload",
    ),
    **_accept(
        ("no", "all", "non_padding", True, False),
        "tokens are always counted",
        "include_num_input_tokens_seen include_tokens_per_second "
        "include_effective_tokens_per_second",
    ),
}
"""Keys whose listed values mean exactly what this package does."""

LISTED: dict[str, str] = {
    **_note(
        "batches are read ahead from a memory-mapped file",
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns",
    ),
    **_note(
        "tokenizing has no such setting, and its result does not depend on it",
        "preprocessing_batch_size",
    ),
    **_note("each node finds or makes the tokenized data itself", "data_shared_file_system"),
    **_note(
        "FSDP2 is used, not DDP",
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
    ),
    **_note("every decoder layer is sharded by itself", "fsdp_transformer_layer_cls_to_wrap"),
    **_note(
        "recomputation is never reentrant, with the same gradients",
        "use_reentrant_gc gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    ),
    **_note(
        "the console adapts to the terminal",
        "disable_tqdm log_level log_level_replica log_on_each_node print_param_status",
    ),
    **_note("a NaN or infinite loss is never hidden", "logging_nan_inf_filter"),
    **_note(
        "evaluation computes the loss only, batch by batch",
        "prediction_loss_only eval_accumulation_steps eval_do_concat_batches "
        "eval_use_gather_object batch_eval_metrics",
    ),
    **_note("memory is always measured", "skip_memory_metrics"),
    **_note("training never keeps a key-value cache", "use_cache use_kv_cache"),
}
"""Keys of any value that tune machinery which is not here; what is trained is the same. Shown to
the user."""

_LATER = "is not in this version"
_OTHER = f"this method {_LATER}"
_PLAIN_OPTIM = "delete it; optim takes adamw_torch_fused, adamw_torch and adamw_torch_8bit"
_TOKEN = "remove it from the file and put HF_TOKEN into the environment of the nodes"
_VOCABULARY = "add the tokens to the tokenizer and model once, and train that folder"

REFUSED: dict[str, Refused] = {
    **refuse(
        "FSDP2 shards the model, not DeepSpeed",
        "delete it; ZeRO-2 is fsdp_reshard_after_forward: false, offload fsdp_cpu_offload: true",
        "deepspeed: null",
    ),
    **refuse(
        "FSDP2 has its own keys here",
        "delete it; set fsdp_shard_size, fsdp_reshard_after_forward and fsdp_cpu_offload",
        "fsdp_config: null, accelerator_config: null, parallelism_config: null",
    ),
    **refuse(
        "float16 training is not supported",
        "delete it, and set bf16: true",
        "fp16: false, fp16_full_eval: false",
    ),
    **refuse(
        "evaluation computes as training does",
        "delete it; bf16 holds for both",
        "bf16_full_eval: false",
    ),
    **refuse("PyTorch's own setting is kept", DELETE, "tf32: null"),
    **refuse(
        "it is written disable_gradient_checkpointing or gradient_checkpointing here",
        "use that key",
        "activation_checkpointing: null",
    ),
    # Secrets and uploads.
    **refuse(
        "a token in a job file ends up in logs",
        _TOKEN,
        "hf_hub_token: null, hub_token: null",
    ),
    **refuse(
        "this hub is not read",
        "give a local folder in model_name_or_path",
        "ms_hub_token: null, om_hub_token: null",
    ),
    **refuse(
        "nothing is uploaded",
        "delete it; upload the model folder with `hf upload`",
        "push_to_hub: false, hub_model_id: null, hub_private_repo: null, hub_strategy: "
        "every_save, hub_always_push: false, hub_revision: null",
    ),
    # Adapters and other ways to train.
    **refuse(
        f"starting from an adapter {_LATER}",
        "merge it into the model first, or go on from a checkpoint with resume_from_checkpoint",
        "adapter_name_or_path: null, adapter_folder: null, create_new_adapter: false",
    ),
    **refuse(
        f"training further modules whole beside adapters {_LATER}",
        "delete it; lora_target takes a list of linear modules, finetuning_type: full trains all",
        "additional_target: null",
    ),
    **refuse(
        f"LoRA+ {_LATER}",
        "delete it; all adapters train with learning_rate",
        "loraplus_lr_ratio: null, loraplus_lr_embedding: 1.0e-6",
    ),
    **refuse(
        f"starting adapters from the weights' singular vectors {_LATER}",
        "delete it; adapters start as in LoRA, or in DoRA with use_dora: true",
        "pissa_init: false, pissa_iter: 16, pissa_convert: false",
    ),
    **refuse(
        _OTHER,
        "delete it; finetuning_type takes lora and full",
        "freeze_trainable_layers: 2, freeze_trainable_modules: all, freeze_extra_modules: null, "
        "use_llama_pro: false, module_dropout: 0.0, oft_rank: 0, oft_block_size: 32, "
        "oft_target: all, freeze_language_model: false",
    ),
    **refuse(
        f"changing the architecture {_LATER}",
        "delete it; layers and attention are those of the model's config",
        "mixture_of_depths: null, shift_attn: false",
    ),
    **refuse(
        f"this optimizer {_LATER}",
        _PLAIN_OPTIM,
        "use_galore: false, galore_target: all, galore_rank: 16, galore_update_interval: 200, "
        "galore_scale: 2.0, galore_proj_type: std, galore_layerwise: false, use_apollo: false, "
        "apollo_target: all, apollo_rank: 16, apollo_update_interval: 200, apollo_scale: 32.0, "
        "apollo_proj: random, apollo_proj_type: std, apollo_scale_type: channel, "
        "apollo_layerwise: false, apollo_scale_front: false, use_badam: false, badam_mode: "
        "layer, badam_start_block: null, badam_switch_mode: ascending, badam_switch_interval: "
        "50, badam_update_ratio: 0.05, badam_mask_mode: adjacent, badam_verbose: 0, "
        "use_adam_mini: false, use_muon: false, optim_args: null, optim_target_modules: null",
    ),
    **refuse(
        f"this loss {_LATER}",
        "delete it; the loss is cross-entropy",
        "use_dft_loss: false, use_asft_loss: false, asft_alpha: 0.1, use_eaft_loss: false, "
        "eaft_alpha: 1.0, label_smoothing_factor: 0.0, moe_aux_loss_coef: null",
    ),
    **refuse(
        f"noise on the embeddings {_LATER}",
        "delete it; weight_decay and lora_dropout act against overfitting",
        "neftune_noise_alpha: null",
    ),
    **refuse(
        f"this backend {_LATER}",
        "delete it; jobs run on PyTorch with FSDP2",
        "use_unsloth: false, use_kt: false, kt_config: null, "
        "kt_cpu_activation: null, kt_weight_path: null, kt_non_expert_weight_path: null, "
        "kt_expert_checkpoint_path: null, kt_use_lora_experts: null, kt_lora_expert_num: null, "
        "kt_lora_expert_intermediate_size: null, use_mca: false, use_megatron_bridge: false, "
        "use_hyper_parallel: false, hyper_parallel_args: null, hyper_parallel_cp_size: 1, "
        "use_v1_kernels: false, ddp_backend: null",
    ),
    **refuse(
        f"recomputation in Unsloth's way {_LATER}",
        "delete it; set gradient_checkpointing: full or selective",
        "use_unsloth_gc: false",
    ),
    **refuse(
        "FSDP2 places the quantized model: each worker has its shards",
        "delete it",
        "quantization_device_map: null",
    ),
    **refuse(
        "Liger's layers are named in use_liger_kernel itself",
        "write use_liger_kernel: {rms_norm: true, swiglu: true}",
        "liger_kernel_config: null",
    ),
    # Model, tokenizer and data.
    **refuse(
        f"changing the vocabulary {_LATER}",
        _VOCABULARY,
        "resize_vocab: false, add_tokens: null, add_special_tokens: null, "
        "new_special_tokens_config: null, init_special_tokens: noise_init",
    ),
    **refuse(
        "special tokens in the data are read as such",
        DELETE,
        "split_special_tokens: false",
    ),
    **refuse(
        "the model is trained as its config says",
        "delete it, or edit config.json of the model",
        "rope_scaling: null, upcast_layernorm: false, upcast_lmhead_output: false",
    ),
    **refuse(
        "images, video and audio are not read",
        "delete it, and train on text datasets",
        "media_dir: null, image_max_pixels: 589824, image_min_pixels: 1024, "
        "image_do_pan_and_scan: false, crop_to_patches: false, video_max_pixels: 65536, "
        "video_min_pixels: 256, video_fps: 2.0, video_maxlen: 128, use_audio_in_video: false, "
        "audio_sampling_rate: 16000, freeze_vision_tower: true, "
        "freeze_multi_modal_projector: true",
    ),
    **refuse(
        "datasets are tokenized once and memory-mapped, never streamed",
        "delete it; max_samples limits the rows",
        "streaming: false, buffer_size: 16384, interleave_probs: null",
    ),
    **refuse(
        "the tokenizer's chat template decides this",
        "delete it, or change the tokenizer's chat template",
        "tool_format: null, enable_thinking: true, preserve_thinking: false",
    ),
    **refuse(
        "lengths are not sorted into batches",
        "use packing: true",
        "group_by_length: false, length_column_name: length, sortish_sampler: false",
    ),
    **refuse(
        "the last batch of an epoch is always used",
        DELETE,
        "dataloader_drop_last: false",
    ),
    **refuse(
        "seed holds for the data too",
        "delete it and set seed",
        "data_seed: null",
    ),
    # Evaluation, prediction, inference.
    **refuse(
        "evaluation gives loss and perplexity, and num_sample_answers sample answers",
        "delete it; generate from the finished model folder",
        "do_predict: false, predict_with_generate: false, generation_max_length: null, "
        "generation_num_beams: null, generation_config: null, eval_num_beams: null, do_sample: "
        "true, temperature: 0.95, top_p: 0.7, top_k: 50, num_beams: 1, max_length: 1024, "
        "max_new_tokens: 1024, repetition_penalty: 1.0, length_penalty: 1.0, "
        "skip_special_tokens: true, compute_accuracy: false, include_for_metrics: null, "
        "label_names: null, eval_on_each_dataset: false",
    ),
    **refuse(
        "evaluation runs every eval_steps and at the end",
        "delete it and set eval_strategy and eval_steps",
        "eval_delay: 0, eval_on_start: false",
    ),
    **refuse(
        f"choosing or stopping by a metric {_LATER}",
        "delete it; the last step's model is saved, and metrics.jsonl has every evaluation",
        "load_best_model_at_end: false, metric_for_best_model: null, greater_is_better: null, "
        "early_stopping_steps: null",
    ),
    # Running.
    **refuse(
        "metrics are logged every logging_steps",
        "set logging_steps",
        "logging_first_step: false",
    ),
    **refuse(
        "checkpoints go to storage that all nodes share",
        "delete it; set ray_storage_path",
        "save_on_each_node: false, enable_jit_checkpoint: false, ray_storage_filesystem: null",
    ),
    **refuse(
        "a resumed run always goes on exactly where it was",
        "delete it; another output_dir starts anew",
        "ignore_data_skip: false, restore_callback_states_from_checkpoint: false",
    ),
    **refuse(
        "Ray connects the workers",
        "delete it",
        "master_addr: null, master_port: null, local_rank: -1",
    ),
    **refuse(
        "the batch size is the one in the file",
        "set per_device_train_batch_size",
        "auto_find_batch_size: false, torch_empty_cache_steps: null",
    ),
    **refuse(
        f"this {_LATER}",
        "delete it",
        "full_determinism: false, debug: ''",
    ),
    **refuse(
        f"the profiler {_LATER}",
        "delete it; the report has the seconds of each phase",
        "enable_torch_profiler: false, profiler_output_dir: null, profiler_wait_steps: 1, "
        "profiler_warmup_steps: 1, profiler_active_steps: 1, profiler_repeat: 1, "
        "profiler_record_shapes: true, profiler_profile_memory: true, profiler_with_stack: "
        "true, profile_modules: null",
    ),
    **refuse(
        "this tracker is not supported",
        "delete it; report_to takes tensorboard, wandb and mlflow",
        "use_swanlab: false, swanlab_project: llamafactory, swanlab_workspace: null, "
        "swanlab_run_name: null, swanlab_mode: cloud, swanlab_api_key: null, swanlab_logdir: "
        "null, swanlab_lark_webhook_url: null, swanlab_lark_secret: null, trackio_space_id: "
        "null, trackio_bucket_id: null, trackio_static_space_id: null",
    ),
    **refuse(
        "trackers are set up by their own environment variables",
        "delete it, or set WANDB_PROJECT",
        "project: huggingface",
    ),
}
"""Keys whose default alone is accepted, as it asks for nothing."""

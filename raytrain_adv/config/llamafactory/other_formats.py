"""Keys of files that are not read here: LLaMA-Factory's v1 files, its other backends, stages and
commands, and other trainers. Each has its reason and its remedy, so that none is answered with a
wrong guess.

Source: LLaMA-Factory's v1/config/*.py, hparams/megatron_bridge_args.py and evaluation_args.py.
"""

from raytrain_adv.config.llamafactory.keys import Refused, refuse

WRITTEN_AS: dict[str, str] = {
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "train_dataset": "dataset",
    "datasets": "dataset",
    "chat_template": "template",
    "sequence_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "sample_packing": "packing",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "gradient_clipping": "max_grad_norm",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "target_modules": "lora_target",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "dist_timeout": "ddp_timeout",
    "mp_shard_size": "fsdp_shard_size",
    "attn_implementation": "flash_attn",
    "num_workers": "ray_num_workers",
    "enable_fp8": "fp8",
    "use_fp8": "fp8",
    "float8": "fp8",
    "fp8_training": "fp8",
    "use_qat": "enable_qat",
    "qat": "enable_qat",
    "use_cce": "loss_kernel",
    "cce": "loss_kernel",
    "cut_cross_entropy": "loss_kernel",
    "use_cut_cross_entropy": "loss_kernel",
    "use_hub_kernels": "use_kernels",
    "load_in_4bit": "quantization_bit",
    "load_in_8bit": "quantization_bit",
    "qlora": "quantization_bit",
}
"""What other files call a key -> its name here. Values may be written differently too, so the user
changes them."""

_V1 = "a key of LLaMA-Factory's v1 files, which are not read"
_RECIPE = "delete it; use LLaMA-Factory or TRL for this stage"
_MEGATRON = "Megatron is not in this version"

ELSEWHERE: dict[str, Refused] = {
    **refuse(_V1, "delete it; models are always text models", "model_class: llm"),
    **refuse(_V1, "delete it; the tokenizer's chat template is used", "custom_chat_template: null"),
    **refuse(
        _V1,
        "write finetuning_type, lora_rank, lora_alpha, lora_dropout and lora_target in its place",
        "peft_config: null",
    ),
    **refuse(
        _V1,
        "write fsdp_shard_size, fsdp_reshard_after_forward and fsdp_cpu_offload in its place",
        "dist_config: null, mp_replicate_size: 1",
    ),
    **refuse(
        _V1,
        "delete it; models are built without memory and loaded shard by shard",
        "init_config: null",
    ),
    **refuse(
        _V1,
        "write optim, weight_decay, adam_beta1, adam_beta2 and adam_epsilon in its place",
        "optim_config: null",
    ),
    **refuse(
        _V1,
        "write lr_scheduler_type, lr_scheduler_kwargs and warmup_ratio in its place",
        "lr_scheduler_config: null",
    ),
    **refuse(
        _V1,
        "delete it; torch_compile: true fuses what PyTorch can",
        "kernel_config: null",
    ),
    **refuse(
        _V1,
        "delete it; fit the model with LoRA, gradient checkpointing and more workers",
        "quant_config: null",
    ),
    **refuse(
        _V1,
        "delete it; packing and neat_packing fill sequences",
        "batching_strategy: normal, batching_workers: null",
    ),
    **refuse(
        _V1,
        "set per_device_train_batch_size and gradient_accumulation_steps: times the workers they "
        "make it",
        "global_batch_size: null, dp_size: null",
    ),
    **refuse(
        "splitting a sequence over workers is not in this version",
        "delete it; gradient_checkpointing: full fits longer sequences",
        "cp_size: 1, cp_mode: ulysses",
    ),
    **refuse(_V1, "set save_strategy: epoch", "save_epochs: null"),
    **refuse(
        _V1,
        "delete it; the finished model is a Hugging Face folder in any case",
        "save_ckpt_as_hf: false",
    ),
    **refuse(_V1, "delete it; set num_sample_answers", "sample_backend: hf"),
    **refuse(
        _MEGATRON,
        "delete it; FSDP2 shards the model over ray_num_workers",
        "tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1, "
        "expert_model_parallel_size: 1, context_parallel_size: 1, "
        "virtual_pipeline_model_parallel_size: null, sequence_parallel: false, "
        "account_for_embedding_in_pipeline_split: null, account_for_loss_in_pipeline_split: null, "
        "use_distributed_optimizer: true, overlap_param_gather: true, overlap_grad_reduce: true, "
        "moe_token_dispatcher_type: null, megatron_pretrained_checkpoint: null, "
        "extra_config: null, export_hf_on_finish: false",
    ),
    **refuse(
        _MEGATRON,
        "delete it; set gradient_checkpointing: full or selective",
        "recompute_granularity: null, recompute_method: null, recompute_num_layers: null",
    ),
    **refuse(
        _MEGATRON,
        "delete it; torch_compile: true fuses what PyTorch can",
        "bias_activation_fusion: null, apply_rope_fusion: null, masked_softmax_fusion: null, "
        "cross_entropy_loss_fusion: null, moe_grouped_gemm: null",
    ),
    **refuse(
        _MEGATRON,
        "delete it; the loss is divided by the label tokens of all workers",
        "calculate_per_token_loss: null",
    ),
    **refuse(_MEGATRON, "delete it; set packing or neat_packing", "use_packed_sequences: false"),
    **refuse(_MEGATRON, "delete it; set bf16 or pure_bf16", "mixed_precision: bf16_mixed"),
    **refuse(
        "a job trains; it runs no benchmark",
        "delete it; evaluate the finished model folder with lm-evaluation-harness",
        "task: null, task_dir: null, lang: null, n_shot: null, save_dir: null, download_mode: null",
    ),
    **refuse(
        "a job trains; it does not serve",
        "delete it",
        "infer_backend: huggingface, infer_dtype: auto, offload_folder: offload, vllm_maxlen: "
        "4096, vllm_gpu_util: 0.7, vllm_enforce_eager: false, vllm_max_lora_rank: 32, "
        "vllm_config: null, sglang_maxlen: 4096, sglang_mem_fraction: 0.7, sglang_tp_size: -1, "
        "sglang_config: null, sglang_lora_backend: triton",
    ),
    **refuse(
        "the finished model folder is written to output_dir/model",
        "delete it",
        "export_dir: null, export_size: 5, export_device: cpu, export_quantization_bit: null, "
        "export_quantization_dataset: null, export_quantization_nsamples: 128, "
        "export_quantization_maxlen: 1024, export_legacy_format: false, export_hub_model_id: "
        "null",
    ),
    **refuse(
        "it belongs to another training stage",
        _RECIPE,
        "pref_beta: 0.1, pref_ftx: 0.0, pref_bco_weight: 0.0, pref_loss: sigmoid, "
        "dpo_label_smoothing: 0.0, kto_chosen_weight: 1.0, kto_rejected_weight: 1.0, "
        "simpo_gamma: 0.5, ppo_buffer_size: 1, ppo_epochs: 4, ppo_score_norm: false, "
        "ppo_target: 6.0, ppo_whiten_rewards: false, ref_model: null, ref_model_adapters: null, "
        "ref_model_quantization_bit: null, reward_model: null, reward_model_adapters: null, "
        "reward_model_quantization_bit: null, reward_model_type: lora, ld_alpha: null",
    ),
}
"""Keys whose default alone is accepted, as it asks for nothing."""

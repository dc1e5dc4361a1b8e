"""The names of the chat templates, here so that the job file loads without the data's code."""

from typing import Literal

Template = Literal[  # those of data/tokens/chat_templates/families.yaml
    "chatml", "chatml_de", "cpm4", "falcon_h1", "yi", "smollm", "smollm2", "intern_s1",
    "intern2", "opencoder", "dbrx", "sailor", "ernie", "ernie_nothink", "qwen3_nothink",
    "qwen3_omni_nothink", "qwen3_vl_nothink", "qwen3", "qwen3_vl", "qwen3_omni", "keye_vl",
    "qwen", "qwen2_vl", "qwen2_omni", "qwen2_audio", "mimo", "mimo_vl", "mimo_v2",
    "qwen3_5_nothink", "qwen3_5", "qwen3_6", "lfm2", "lfm2_vl", "llama3", "mllama", "llama4",
    "openchat-3.6", "llama2", "llama2_zh", "mistral", "ministral", "ministral3", "pixtral",
    "mistral_small", "breeze", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4n",
    "phi", "phi_small", "phi4", "phi4_mini", "glm4", "glm4v", "glmz1", "glm4_moe", "glm4_5v",
    "glm4_7", "aeva", "chatglm3", "deepseek", "deepseek3", "deepseekr1", "deepseekcoder",
    "gpt_oss", "granite3", "granite4", "minimax1", "minimax2", "seed_coder", "seed_oss",
    "moonlight", "kimi_vl", "hunyuan", "hy_dense_7b", "hunyuan_small", "hy_dense_1_8b", "hy3",
    "youtu", "bailing", "bailing_v2", "cohere", "exaone", "falcon", "index", "olmo", "openchat",
    "solar", "starchat", "telechat2", "vicuna", "xuanyuan", "yuan", "zephyr", "alpaca",
    "default", "fewshot", "empty",
]  # fmt: skip

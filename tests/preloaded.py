"""What ranks are forked with: all that a first run imports, and makes once for its process. A
process that does this itself needs two seconds more, and tests start hundreds.
"""

import pytest  # noqa: F401 # the tests' modules, which ranks import, do
import torch  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.optimization  # noqa: F401 # with PEFT, bitsandbytes and Inductor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import raytrain_adv.export.model_folder
import raytrain_adv.transforms.fp8
import raytrain_adv.transforms.quantized_base
import raytrain_adv.worker.train  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # of all models: hundreds of regular expressions

"""What a process imports while it has no work: Ray imports this module in each that it starts on a
node of its driver's own. The driver makes its plan meanwhile.

No module here may ask CUDA for its devices: the process is given its own later, and CUDA would go
on seeing all of them.
"""

import gc
from importlib import import_module

from raytrain_adv.imports import RARELY
from raytrain_adv.probe_script import num_cores

MODULES = (
    "torch",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # transformers imports it
    "ray.train.torch",
    "transformers",
)
FEWEST_CORES = 8
"""With fewer, processes that need none of this, as Ray Train has two, would be in the way."""

gc.set_threshold(*RARELY)  # the worker ends that, once it has all
if num_cores() >= FEWEST_CORES:
    for name in MODULES:
        import_module(name)

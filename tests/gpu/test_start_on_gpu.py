"""A process that imports before it has work: its GPUs are those that it is given later."""

import subprocess
import sys

PRELOADED = """
import os
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
from raytrain_adv import probe_script
probe_script.num_cores = lambda: 16
from raytrain_adv.driver.cluster import preload
import torch
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
opened = {os.readlink(link) for link in links if os.path.exists(link)}
assert not [name for name in opened if "nvidia" in name], opened
assert not torch.cuda.is_initialized()
os.environ["CUDA_VISIBLE_DEVICES"] = ""
assert torch.cuda.device_count() == 0
"""


def test_what_a_process_imports_while_it_waits_leaves_the_gpus_alone():
    subprocess.run([sys.executable, "-c", PRELOADED], check=True)

"""Code that torch.compile made, kept between runs: where it is, and what a run found there."""

import os

from torch._dynamo.utils import counters, cumulative_time_spent_ns
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from raytrain_adv.config.job import JobConfig
from raytrain_adv.run.run import Run
from raytrain_adv.storage.user_cache import folder_of_code

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILING = ("entire_frame_compile", "entire_backward_compile")


def keep_compiled(job: JobConfig, run: Run) -> None:
    """Have Inductor keep GPU code in the user's cache folder; its own is in /tmp, where a container
    loses it. A folder that the variable names is taken. Raises JobError if others can write there.

    Code for CPUs stays in /tmp: a kill tears a library that g++ writes, and each later run would
    fail on it (torch 2.13, codecache.py). GPU code is written whole or not at all.
    """
    own = default_cache_dir()
    if not job.parallel.torch_compile or os.environ.get(VARIABLE, own) != own:
        return
    if run.device.type == "cpu":
        return
    try:
        folder = folder_of_code("compiled", "Compiled code", VARIABLE)
    except OSError as error:
        run.say(f"compiled code is kept in {own}, which may not outlast this machine: {error}")
        return
    os.environ[VARIABLE] = str(folder)


def found_compiled(job: JobConfig, run: Run) -> str | None:
    """Return how many graphs of all workers came from earlier runs, and the longest compiling, in
    words; None if nothing was compiled. Every rank calls this.
    """
    if not job.parallel.torch_compile:
        return None
    counted = counters["inductor"]
    hits = counted["fxgraph_cache_hit"]
    made = counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"]
    seconds = sum(cumulative_time_spent_ns[name] for name in COMPILING) / 1e9
    each = run.gather((hits, hits + made, seconds))
    found, graphs = sum(one[0] for one in each), sum(one[1] for one in each)
    if graphs == 0:
        return None
    longest = max(one[2] for one in each)
    return f"{found} of {graphs} graphs from earlier runs, {longest:.1f} s; kept in {cache_dir()}"

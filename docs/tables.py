"""The measured tables of the documentation, made from jobs/benchmarks/results/*.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SEVERAL = {
    "fp8_two_gpus": "two H100s of one host",
    "fsdp_collectives": "two H200s of one host",
    "llama3_8b_two_gpus": "two H200s of one host",
    "qat_targets": "two H200s of one host",
}
"""Files of results whose runs took more than one card."""
RESULTS = Path(__file__).parent.parent / "jobs" / "benchmarks" / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    marks = ["---"] + ["--:"] * (len(header) - 1)
    lines = [list(header), marks, *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> Any:
    """Return one file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _commands(data: Any) -> list[str]:
    found = data.get("command") or data.get("commands") or _first(data, "command")
    if isinstance(found, dict):
        return [f"{name}: {command}" for name, command in found.items()]
    return [found] if isinstance(found, str) else list(found)


def _first(data: Any, key: str) -> Any:
    for part in data.values():
        if isinstance(part, dict) and key in part:
            return part[key]
    return []


def _cards(data: Any) -> list[str]:
    """Return every device that a file names, as `H200`."""
    names: set[str] = set()

    def look(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("device"), str):
                names.add(part["device"].removeprefix("NVIDIA ").removesuffix(" 80GB HBM3"))
            for value in part.values():
                look(value)
        elif isinstance(part, list):
            for value in part:
                look(value)

    look(data)
    if names:
        return [f"one {name}" if name.startswith("H") else f"a {name}" for name in sorted(names)]
    return [f"{data['cores']} CPU cores" if "cores" in data else "computed"]


def fp8_8b() -> str:
    """One H200: bf16, FP8 and the HF Trainer, with and without activation checkpointing."""
    data = read("llama3_8b_fp8")
    runs = data["runs"]
    newest = read("fp8_rowwise")["figures"]  # bf16 and FP8 one after the other, after runs'
    for name in ("bf16", "fp8"):
        rate, peak = newest[name]["tokens_per_second"], newest[name]["peak_gib"]
        runs[name] = {"tokens_per_second_per_worker": rate, "peak_memory_gib": peak}
    rows = []
    for title, name, base, mode in (
        ("bf16", "bf16", "bf16", "none"),
        ("FP8 tensorwise", "fp8", "bf16", "none"),
        ("bf16", "bf16_full", "bf16_full", "full"),
        ("FP8 tensorwise", "fp8_full", "bf16_full", "full"),
    ):
        rate = runs[name]["tokens_per_second_per_worker"]
        ratio = rate / runs[base]["tokens_per_second_per_worker"]
        peak = f"{runs[name]['peak_memory_gib']:.1f}"
        rows.append((title, mode, f"{rate:,.0f}", peak, "1" if name == base else f"{ratio:.2f}"))
    other = data["beside_the_hf_trainer"]
    hf, here = other["hf_trainer_bf16"], other["fp8"]["tokens_per_second"]
    title = f"HF Trainer, bf16, `torch_compile` (separate run; FP8 reached {here:,.0f} in it)"
    rate = f"{hf['tokens_per_second']:,.0f}"
    rows.append((title, "none", rate, f"{hf['peak_memory_gib']:.1f}", ""))
    return table(("", "activation checkpointing", "tokens/s", "peak GiB", "relative to bf16"), rows)


STEPS: dict[str, dict[str, str]] = {
    "fp8_recipes": {
        "bf16": "bf16",
        "fp8 tensorwise": "`tensorwise`",
        "fp8 rowwise": "`rowwise` with torchao's casts",
        "fp8 rowwise_with_gw_hp": "`rowwise_with_gw_hp`",
    },
    "fp8_rowwise": {"bf16": "bf16", "fp8": "`tensorwise`", "fp8 rowwise": "`rowwise`"},
    "fp8_pairs": {
        "bf16": "bf16",
        "qat int4": "QAT, int4 weights",
        "fp8, qat int4": "FP8 and QAT, int4 weights",
        "fp8, qat int8": "FP8 and QAT, int8 weights",
        "lora": "LoRA, bf16",
        "fp8, lora": "LoRA, FP8",
    },
    "lora_fp8_base": {
        "bf16": "bf16",
        "fp8 linears": "`fp8: true`",
        "fp8 base": "`quantization_type: fp8`",
        "fp8 base, dequantized": "the same, `quantization_products: dequantized`",
        "nf4 base": "`quantization_bit: 4`",
    },
    "qlora": {"lora": "bf16 base", "qlora nf4": "nf4 base"},
    "layer_kernels": {
        "eager": "eager",
        "eager, liger": "eager, Liger",
        "compiled": "`torch_compile`",
    },
    "layer_kernels_h100": {
        "eager": "eager",
        "eager, liger": "eager, Liger",
        "compiled": "`torch_compile`",
        "compiled, liger": "`torch_compile`, Liger",
    },
    "hub_kernel_layers": {
        "eager": "eager",
        "eager, llama_layers": "eager, `jobs/kernels/llama_layers`",
    },
}
"""File of whole steps -> its variants and what they are called; speeds are relative to the first.
"""


def steps(name: str) -> str:
    """Return milliseconds, memory and speed of each variant of a file of whole steps."""
    figures, titles = read(name)["figures"], STEPS[name]
    base, title_of_base = next(iter(titles.items()))
    rows = [
        (
            title,
            f"{1000 * figures[variant]['seconds']:.0f}",
            f"{figures[variant]['peak_gib']:.1f}",
            f"{figures[base]['seconds'] / figures[variant]['seconds']:.2f}",
        )
        for variant, title in titles.items()
    ]
    return table(("", "ms/step", "peak GiB", f"speed relative to {title_of_base}"), rows)


def fsdp_collectives() -> str:
    """Two H200s of one host: what FSDP2 costs, by NCCL, by copies, and with layers kept."""
    found = read("fsdp_collectives")
    titles = {
        "bf16, nccl": "bf16, NCCL",
        "bf16": "bf16, copies",
        "fp8, nccl": "FP8 tensorwise, NCCL",
        "fp8": "FP8 tensorwise, copies",
        "fp8 all-gather": "FP8 tensorwise, copies, weights gathered in FP8",
        "fp8, whole": "FP8 tensorwise, copies, layers kept",
    }
    rows = []
    for name, title in titles.items():
        one = found["one_gpu"][name[:4].strip(" ,")]["tokens_per_second_per_gpu"]
        run = found["two_gpus"][name]
        rate = run["tokens_per_second_per_gpu"]
        rows.append((title, f"{rate:,}", f"{run['peak_gib']:.1f}", f"{rate / one:.1%}"))
    return table(("", "tokens/s per GPU", "peak GiB", "of one GPU"), rows)


def loss_kernels() -> str:
    """One H200: head and loss, alone and in the whole step."""
    whole = read("loss_kernels")["figures"]["step, bf16"]
    earlier = read("loss_kernels")["chunks of 1,024 tokens"]["figures"]["head and loss"]
    alone = earlier | read("loss_chunks")["figures"]["head and loss"]
    rows = [
        (
            f"`{name}`",
            f"{1000 * alone[name]['seconds']:.1f}",
            f"{alone[name]['peak_over_hidden_gib']:.2f}",
            f"{1000 * whole[name]['seconds']:.0f}",
            f"{whole[name]['peak_gib']:.1f}",
        )
        for name in ("torch", "chunked", "cut_cross_entropy", "liger")
    ]
    header = ("", "head and loss, ms", "GiB over hidden states", "step, ms", "step's peak GiB")
    return table(header, rows)


def _losses(run: dict[str, Any]) -> dict[str, float]:
    return {variant["name"]: variant["loss"] for variant in run["variants"]}


def qat_quality() -> str:
    """One H200: what QAT recovers of PTQ's loss, by configuration."""
    titles = {
        "int8 x int8 g32": "int8 weights and activations, groups of 32",
        "int4 g32": "int4, groups of 32",
        "int4 per channel": "int4 per channel",
        "int3 per channel": "int3 per channel",
    }
    rows = []
    for name, title in titles.items():
        run = read("qat_quality_98m")["runs"][name]
        loss = _losses(run)
        twin, ptq, qat = loss["bf16 twin"], loss["PTQ of the twin"], loss["QAT"]
        cost, share = f"+{100 * (qat / twin - 1):.2f}%", f"{100 * run['recovered']:.0f}%"
        rows.append((title, f"{twin:.4f}", f"{ptq:.4f}", f"{qat:.4f}", cost, share))
    header = ("", "bf16 twin", "PTQ of the twin", "QAT", "QAT relative to bf16", "recovered")
    return table(header, rows)


def qat_delay() -> str:
    """One H100: the step at which fake quantization begins, at two learning rates."""
    data = read("qat_delay")
    runs = [*data["runs"].values(), *data["longer"]["runs"].values()]
    found: dict[int, dict[float, tuple[str, str]]] = {}
    for run in runs:
        if run.get("max_steps", 800) != 800:
            continue
        share = f"{100 * run['recovered_of_the_twins_loss']:.0f}%"
        pair = (f"{_losses(run)['QAT']:.4f}", share)
        found.setdefault(run["fake_quant_after_n_steps"], {})[run["learning_rate"]] = pair
    rates, none = (2e-4, 5e-4), ("", "")
    rows = [
        (step, *(c for rate in rates for c in at.get(rate, none))) for step, at in found.items()
    ]
    rows.sort(key=lambda row: row[0])
    twins = [data["twins"][str(rate)] for rate in rates]
    last = [c for twin in twins for c in (f"{twin['bf16 twin']:.4f}", "")]
    ptq = [c for twin in twins for c in (f"{twin['PTQ of the twin']:.4f}", "")]
    return table(
        ("`fake_quant_after_n_steps`", "loss, lr 2e-4", "recovered", "loss, lr 5e-4", "recovered"),
        [*rows, ("bf16 twin", *last), ("PTQ of the twin", *ptq)],
    )


def _timed(runs: dict[str, Any], cases: Iterable[tuple[str, str, str]], mode: str) -> list[Any]:
    rows = []
    for title, name, base in cases:
        seconds, peak = runs[name]["step_seconds"], runs[name]["peak_memory_gib"]
        times = seconds / runs[base]["step_seconds"]
        more = peak / runs[base]["peak_memory_gib"]
        ratios = ("1", "1") if name == base else (f"{times:.2f}", f"{more:.2f}")
        rows.append((title, mode, f"{seconds:.3f}", f"{peak:.1f}", *ratios))
    return rows


TIMED = ("", "activation checkpointing", "s/step", "peak GiB", "time to bf16", "memory to bf16")


def _of_seeds(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    losses, exact = ([row[name] for row in rows] for name in ("loss", "exact_calls"))
    mean = sum(losses) / len(losses)
    apart = max(abs(loss - mean) for loss in losses)
    return f"{mean:.3f} ± {apart:.3f}", f"{100 * sum(exact) / len(exact):.0f}%"


def qat_targets() -> str:
    """Held-out loss and exact calls by target and method: three seeds' mean, the farthest of it."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read("qat_targets")["rows"]:
        if not row["delay"]:
            found.setdefault((row["target"], row["method"]), []).append(row)
    cells = {key: ", ".join(_of_seeds(rows)) for key, rows in found.items()}
    targets = [target for target in dict.fromkeys(target for target, _ in found) if target]
    methods = ("round-to-nearest", "GPTQ", "QAT", "QAT, distilled")
    return table(
        ("target", "bf16", *methods),
        [(t, cells["", "bf16"], *(cells[t, method] for method in methods)) for t in targets],
    )


def qat_target_delays() -> str:
    """The same for the step at which fake quantization begins."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in read("qat_targets")["rows"]:
        if (row["target"], row["method"]) == ("vllm-w4a16, groups of 64", "QAT"):
            found.setdefault(row["delay"], []).append(row)
    rows = [(step, *_of_seeds(found[step])) for step in sorted(found)]
    return table(("`fake_quant_after_n_steps`, of 300", "loss", "exact calls"), rows)


def qat_8b() -> str:
    """One H200: time and memory of QAT."""
    runs = read("llama3_8b_qat")["runs"]
    plain = [
        ("bf16", "bf16", "bf16"),
        ("QAT, int4 weights", "qat_int4", "bf16"),
        ("QAT, int8 weights", "qat_int8", "bf16"),
    ]
    full = [("bf16", "bf16_ac", "bf16_ac"), ("QAT, int4 weights", "qat_int4_ac", "bf16_ac")]
    return table(TIMED, [*_timed(runs, plain, "none"), *_timed(runs, full, "full")])


def qat_8b_checkpointing() -> str:
    """One H100: QAT with full activation checkpointing, embeddings rounded or not."""
    cases = [
        ("bf16", "bf16_ac", "bf16_ac"),
        ("QAT, int8 weights", "qat_int8_ac", "bf16_ac"),
        ("QAT, int8 weights and embeddings", "qat_int8_embedding_ac", "bf16_ac"),
        ("QAT, int4 weights and embeddings", "qat_int4_embedding_ac", "bf16_ac"),
    ]
    runs = read("llama3_8b_qat_checkpointing")["h100"]["runs"]
    return table(TIMED, _timed(runs, cases, "full"))


def chaos() -> str:
    """What was killed, when, how often, and what it cost."""
    data = read("chaos")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in data["runs"]:
        moment = "a step" if run["at"].startswith("step ") else run["at"]
        groups.setdefault((run["killed"], moment), []).append(run)
    rows = [
        (
            killed,
            moment,
            len(runs),
            max(run["lost"] for run in runs),
            max(len(run["exit_codes"]) for run in runs),
            "; ".join(problem for run in runs for problem in run["problems"]) or "none",
        )
        for (killed, moment), runs in sorted(groups.items())
    ]
    header = ("killed", "at", "runs", "most steps lost", "most launches", "differences")
    jobs = ", ".join(f"{n} {job}" for job, n in Counter(r["job"] for r in data["runs"]).items())
    commands = " and ".join(f"`{one}`" for one in data["commands"])
    return f"{table(header, rows)}\n\n{commands}: jobs {jobs}. {data['note']}"


def soak() -> str:
    """What a process holds after the first and the last simulated hour of a soak."""
    data = read("soak")
    units = {"resident_mib": "resident memory, MiB", "checkpoint_files": "files of checkpoints"}
    first, last = data["measured"][0], data["measured"][-1]
    rows = [
        (units.get(name, name), first[name], last[name], f"{change:+g}")
        for name, change in data["growth"].items()
    ]
    heads = ("", "after the first hour", "at the end", f"slope, in {data['hours']} hours")
    done = f"{data['steps']:,} steps in {data['minutes']:.0f} minutes"
    return f"{table(heads, rows)}\n\n`{data['command']}`: {done}"


def serve() -> str:
    """What engines computed of trained models, on a CPU."""
    data = read("serve_cpu")
    baseline = {row["engine"]: row for row in data["rows"] if row["target"] == "bf16"}
    rows = []
    for row in data["rows"]:
        same, plain = row["agreement"], baseline.get(row["engine"])
        ratio = row["tokens_per_cpu_s"] / plain["tokens_per_cpu_s"] if plain else None
        top1 = f"{same['top1']:.1%} of {same['num_tokens']}"
        speed = f"{row['tokens_per_cpu_s']:.1f}", "" if ratio is None else f"{ratio:.2f}"
        size = f"{1024 * row['gib']:.0f}"
        rows.append(
            (row["target"], row["version"], row["steps"], top1, f"{same['kl']:.2g}", *speed, size)
        )
    header = ("trained for", "engine", "steps", "same token", "KL, nats", "tokens per CPU second")
    return table((*header, "relative to bf16", "MiB"), rows)


def experts() -> str:
    """One H200: full training, LoRA and QAT of mixtures of experts, and the HF Trainer."""
    rows = []
    for name, model in (("experts_qwen3", "Qwen3-30B-A3B"), ("experts_gpt_oss", "gpt-oss-20b")):
        found = read(name)["rows"]
        for title, run, base in (
            ("full", "full", "HF Trainer, full"),
            ("LoRA", "lora", "HF Trainer, PEFT's lora"),
            ("QLoRA, nf4", "qlora", "HF Trainer, PEFT's lora"),
            ("QAT, int4 weights", "qat int4", "HF Trainer, full"),
        ):
            row, other = found[run], found[base]
            figures = f"{row['tokens_s']:,.0f}", f"{row['mfu_bf16']:.1%}", f"{row['peak_gib']:.1f}"
            theirs = f"{other['tokens_s']:,.0f}", f"{other['peak_gib']:.1f}"
            ratio = f"{row['tokens_s'] / other['tokens_s']:.2f}"
            rows.append((f"{model}, {title}", *figures, *theirs, ratio))
    header = ("", "tokens/s", "MFU", "peak GiB", "HF Trainer, tokens/s", "its peak GiB", "ratio")
    return table(header, rows)


def grouped_products() -> str:
    """One H200: products of one layer's experts in bf16 and in FP8, forward and backward."""
    rows = []
    for row in read("grouped_products")["rows"]:
        case = f"{row['model']}, {row['matrix']}, {row['routing']} routing"
        ways = ("bf16", "FP8", "FP8 without casts")
        gains = (f"{row['bf16'] / row[way]:.2f}" for way in ways[1:])
        rows.append((case, *(f"{row[way]:.2f}" for way in ways), *gains))
    times = ("bf16, ms", "FP8, ms", "FP8 without casts, ms")
    return table(("", *times, "speed of FP8", "without casts"), rows)


def float8_experts() -> str:
    """One H200: training steps of Mixtral's layers, experts in bf16 and in FP8."""
    found = read("experts_mixtral")["rows"]
    named = {
        "bf16": "full",
        "FP8, experts in bf16": "fp8, experts in bf16",
        "FP8, experts too": "fp8",
    }
    rows = []
    for title, name in named.items():
        row = found[name]
        speed = f"{1e3 * row['step_s']:.1f}", f"{row['tokens_s']:,.0f}", f"{row['mfu_bf16']:.1%}"
        gained = f"{found['full']['step_s'] / row['step_s']:.2f}"
        memory = f"{row['peak_gib']:.1f}", f"{row['predicted_gib']:.1f}"
        rows.append((title, *speed, *memory, gained))
    header = ("", "step, ms", "tokens/s", "MFU", "peak GiB", "predicted", "relative to bf16")
    return table(header, rows)


def exported_products() -> str:
    """One H200: the linears of an 8B layer multiplied from exported bytes."""
    times: dict[tuple[str, int], float] = Counter()
    sizes: dict[str, int] = Counter()
    errors: dict[str, float] = {}
    for row in read("exported_products")["rows"]:
        form, tokens = row["form"], row["tokens"]
        times[form, tokens] += row["us"]
        errors[form] = max(errors.get(form, 0.0), row["error"])
        sizes[form] += row["bytes"]
    counts = list(dict.fromkeys(tokens for _, tokens in times))
    rows = [
        (
            form,
            f"{sizes[form] / len(counts) / 2**20:.0f}",
            *(f"{times['bf16', n] / times[form, n]:.2f}" for n in counts),
            f"{errors[form]:.1g}",
        )
        for form in sizes
    ]
    speeds = (f"at {n:,} token{'s' * (n > 1)}" for n in counts)
    return table(("", "MiB", *speeds, "relative error"), rows)


def all_quick() -> str:
    """The ratios of all.py --quick, by GPU."""
    ratios = read("all_quick")["ratios"]
    names = list(dict.fromkeys(name for found in ratios.values() for name in found))
    rows = [
        (name, *(f"{found[name]:.2f}" if name in found else "" for found in ratios.values()))
        for name in names
    ]
    return table(("", *ratios), rows)


def all_results() -> str:
    """Every file of results with its card, date and commands."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        data = read(path.stem)
        note = f"\n{data['note']}\n" if isinstance(data.get("note"), str) else ""
        commands = "\n".join(_commands(data))
        cards = SEVERAL.get(path.stem) or "; ".join(_cards(data))
        title = f"### {path.stem}\n\n{cards[0].upper()}{cards[1:]}, {data['date']}.\n{note}"
        parts.append(f"{title}\n```\n{commands}\n```")
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {name: partial(steps, name) for name in STEPS} | {
    make.__name__: make
    for make in (
        fp8_8b,
        fsdp_collectives,
        loss_kernels,
        qat_quality,
        qat_delay,
        qat_targets,
        qat_target_delays,
        qat_8b,
        qat_8b_checkpointing,
        chaos,
        soak,
        serve,
        experts,
        grouped_products,
        float8_experts,
        exported_products,
        all_quick,
        all_results,
    )
}

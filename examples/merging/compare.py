"""Compare `twa-scale average` with mergekit: values, time and peak memory of the same average, one after the other.

    pip install mergekit
    python examples/merging/compare.py

Four models of random weights in bfloat16, each with some candidates that differ by a little noise: a dense Llama;
Mixtral, whose files hold each expert's matrices; GraniteMoe, whose files stack the experts of a layer in one tensor;
and adapters of LoRA on the Llama. mergekit applies adapters to the model before it merges, so it writes whole models.
twa-scale averages the products of the adapters (`--space product`), and the comparison adds them to the model.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

SHAPE = {"vocab_size": 8192, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SHAPE, num_hidden_layers=12, intermediate_size=4096),
    "Mixtral": MixtralConfig(**SHAPE, num_hidden_layers=4, intermediate_size=2048, num_local_experts=8),
    "GraniteMoe": GraniteMoeConfig(**SHAPE, num_hidden_layers=4, intermediate_size=2048, num_local_experts=8),
}
_POLL = 0.01  # seconds between two looks at the memory of a process


class Cost(NamedTuple):
    """What a program has needed."""

    seconds: float
    peak: int
    """Peak resident memory in bytes, with the pages of mapped files."""
    own: int
    """Peak of the memory that is not a mapped file, in bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each program, of which the best counts")
    parser.add_argument("--cases", default="Llama,Mixtral,GraniteMoe,LoRA")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    print("| model | candidates | twa-scale | mergekit | ratio of time, of memory (own) | values |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            compare(case, Path(scratch), options.candidates, options.repeat)


def compare(case: str, scratch: Path, count: int, repeat: int) -> None:
    """Write the candidates of a case, average them with both programs by turns, and print one line."""
    write = write_adapters if case == "LoRA" else write_models
    config = CONFIGS["Llama" if case == "LoRA" else case]
    names, nbytes = write(config, scratch, count)
    own_out, mergekit_out = scratch / "ours", scratch / "theirs"
    merge = {"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16"}
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    (scratch / "merge.yaml").write_text(yaml.safe_dump({"models": models, **merge}))
    own_costs, mergekit_costs = [], []
    for _ in range(repeat):
        for path in (own_out, mergekit_out, scratch / "cache"):
            shutil.rmtree(path, ignore_errors=True)
        own_costs.append(
            measured(
                [
                    *(sys.executable, "-m", "twa_scale", "average", str(scratch / "step-*"), "--out", str(own_out)),
                    *(("--space", "product") if case == "LoRA" else ()),
                ]
            )
        )
        mergekit_costs.append(
            measured(
                [
                    *(
                        str(Path(sys.executable).parent / "mergekit-yaml"),
                        str(scratch / "merge.yaml"),
                        str(mergekit_out),
                    ),
                    *("--no-copy-tokenizer", "--quiet"),
                    *("--lora-merge-cache", str(scratch / "cache"), "--lora-merge-dtype", "float32"),
                ]
            )
        )
    best, others_best = best_of(own_costs), best_of(mergekit_costs)
    equal = same_products if case == "LoRA" else same_models
    time_ratio, peak_ratio, own_ratio = (b / a for a, b in zip(best, others_best, strict=True))
    ratios = f"{time_ratio:.1f}, {peak_ratio:.1f} ({own_ratio:.1f})"
    cells = [case, f"{count}, {nbytes / 1e9:.2f} GB each", shown(best), shown(others_best), ratios]
    print(f"| {' | '.join(cells)} | {equal(scratch, own_out, mergekit_out)} |", flush=True)


def best_of(costs: Sequence[Cost]) -> Cost:
    """Return the least of each part: other programs on the machine make them larger."""
    return Cost(*map(min, zip(*costs, strict=True)))


def shown(cost: Cost) -> str:
    return f"{cost.seconds:.1f} s, {cost.peak / 1e9:.2f} GB ({cost.own / 1e9:.2f} GB own)"


def write_models(config: PreTrainedConfig, scratch: Path, count: int) -> tuple[list[str], int]:
    """Write whole models, and return their paths and the bytes of the weights of one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    paths = [scratch / f"step-{i}" for i in range(count)]
    for path in paths:
        disturb(model, 1e-3)
        model.save_pretrained(path)
    return list(map(str, paths)), sum(path.stat().st_size for path in paths[0].glob("*.safetensors"))


def write_adapters(config: PreTrainedConfig, scratch: Path, count: int) -> tuple[list[str], int]:
    """Write a model and adapters of LoRA, and return the names that mergekit has for both together."""
    (base,), _ = write_models(config, scratch / "base", 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none"))
    adapted.peft_config["default"].base_model_name_or_path = base
    names = []
    for i in range(count):
        disturb(adapted, 1e-2)
        adapted.save_pretrained(scratch / f"step-{i}")
        names.append(f"{base}+{scratch / f'step-{i}'}")
    return names, (scratch / "step-0" / "adapter_model.safetensors").stat().st_size


def disturb(model: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)


def measured(command: Sequence[str]) -> Cost:
    """Run a program to its end, and look at its memory meanwhile.

    The peak that `wait4` gives would count the memory that this process has when it starts the other one.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = own_bytes = 0
        while process.poll() is None:
            resident = memory_of(process.pid)
            peak, own_bytes = max(peak, resident.get("VmHWM", 0)), max(own_bytes, resident.get("RssAnon", 0))
            time.sleep(_POLL)
        seconds = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: {output.read().decode(errors='replace')}")
    return Cost(seconds, peak, own_bytes)


def memory_of(pid: int) -> dict[str, int]:
    """Return what Linux says of the memory of a process, in bytes; nothing if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in sizes}


def same_models(scratch: Path, own_out: Path, mergekit_out: Path) -> str:
    """Compare what transformers loads: mergekit writes Mixtral with stacked experts, twa-scale as it is stored."""
    return equality(loaded(own_out), loaded(mergekit_out))


def same_products(scratch: Path, own_out: Path, mergekit_out: Path) -> str:
    """Compare the model with the averaged adapter, added in float32, with the model that mergekit has written."""
    base = AutoModelForCausalLM.from_pretrained(scratch / "base" / "step-0", dtype=torch.float32)
    merged: PreTrainedModel = PeftModel.from_pretrained(base, own_out).merge_and_unload()
    return equality(merged.bfloat16().state_dict(), loaded(mergekit_out))


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    state_dict: dict[str, torch.Tensor] = model.state_dict()
    return state_dict


def equality(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    pairs = [(value, second[name]) for name, value in first.items()]
    total = sum(a.numel() for a, _ in pairs)
    equal = sum(int((a == b).sum()) for a, b in pairs)
    if equal == total:
        return "all are equal"
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return f"{equal / total:.4%} are equal, the largest difference is {largest:.1e}"


if __name__ == "__main__":
    main()

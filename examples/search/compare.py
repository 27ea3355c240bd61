"""Measure how many averages are tried per minute by twa_scale.search and by merges that mergekit writes.

    pip install mergekit
    python examples/search/compare.py

The candidates are Llamas of 13 million random parameters, and the score is the loss of one batch of tokens. Both ways
try averages of the last candidates on the same CPU, in one process: mergekit writes each, transformers loads it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

import twa_scale

CANDIDATES = 8


def write_candidates(directory: Path) -> list[Path]:
    """Write models that differ by a little noise."""
    torch.manual_seed(0)
    shape = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4))
    paths = [directory / f"step-{i}" for i in range(CANDIDATES)]
    for path in paths:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        model.save_pretrained(path)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {CANDIDATES} candidates")
    return paths


def score(model: LlamaForCausalLM) -> float:
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        return -float(model(input_ids=tokens, labels=tokens).loss)


def search(paths: list[Path], budget: int) -> tuple[list[float], float]:
    """Return scores of the means of the last candidates, and the seconds that each average took."""
    model = LlamaForCausalLM.from_pretrained(paths[0])
    began = time.perf_counter()
    twa = twa_scale.attach(model, [str(path) for path in paths])
    print(f"attach: {time.perf_counter() - began:.2f} s, once")
    began = time.perf_counter()
    result = twa_scale.search(twa, lambda: score(model), "sweep", higher_is_better=True, budget=budget)
    seconds = time.perf_counter() - began
    return [evaluation.score for evaluation in result.evaluations], seconds / len(result.evaluations)


def merge(paths: list[Path], count: int, directory: Path) -> tuple[list[float], float]:
    """Return scores of the means of the last one, two and so on, and the seconds that each took."""
    scores = []
    began = time.perf_counter()
    for last in range(1, count + 1):
        models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths[-last:]]
        config = MergeConfiguration.model_validate({"models": models, "merge_method": "linear", "dtype": "float32"})
        out = directory / f"merged-{last}"
        run_merge(config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
        scores.append(score(LlamaForCausalLM.from_pretrained(out)))
    return scores, (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=int, default=40, help="averages that twa_scale tries")
    parser.add_argument("--merges", type=int, default=4, help="merges that mergekit writes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_candidates(Path(scratch))
        merged, slow = merge(paths, options.merges, Path(scratch))
        searched, fast = search(paths, options.budget)
    for value in merged:
        assert min(abs(value - other) for other in searched) < 1e-3, "the two have tried different averages"
    print(f"twa_scale.search: {60 / fast:.0f} averages per minute")
    print(f"mergekit: {60 / slow:.0f} averages per minute; ratio {slow / fast:.1f}")


if __name__ == "__main__":
    main()

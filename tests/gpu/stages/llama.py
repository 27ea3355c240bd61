"""Tokens per second for a Llama of 1 and 7 billion parameters: training the average, and training with AdamW."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

import twa_scale
from tests.gpu.stages.setup import Row, Setup, gigabytes, milliseconds
from tests.gpu.stages.synthetic import synthetic
from twa_scale.base.process_memory import free_memory
from twa_scale.store import store_bytes

N, STEPS, CONTEXT = 16, 3, 2048
ONE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
BESIDE = 5
"""Bytes for each element in addition to the store: bfloat16 weights, and activations of one sequence."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def one_billion(setup: Setup) -> Iterator[Row]:
    """Float32 weights under autocast, as both kinds of training have them."""
    sizes = TINY if setup.tiny else ONE
    for store in ("packed4", "dense16"):
        yield from _measured(setup, "1 B", sizes, torch.float32, 2, {"store": store})
    yield _ordinary(setup, "1 B", sizes, torch.float32, 2)


def seven_billion(setup: Setup) -> Iterator[Row]:
    """Weights are bfloat16. The store is in host memory if the GPU has too little memory."""
    sizes = TINY if setup.tiny else SEVEN
    elements = sum(p.numel() for p in build(sizes, torch.bfloat16, torch.device("meta")).parameters())
    store = store_bytes("packed4", N, [elements])
    free = torch.cuda.mem_get_info(setup.device)[0] if setup.cuda else free_memory()
    location = "auto" if store + BESIDE * elements < free else "cpu"
    if location == "cpu" and store > 0.9 * free_memory():
        yield Row("Llama 7 B", f"skipped: a store of {gigabytes(store)} fits neither the GPU nor host memory")
        return
    settings = {"store": "packed4", "store_device": location}
    yield from _measured(setup, "7 B", sizes, torch.bfloat16, 1, settings)
    yield _ordinary(setup, "7 B", sizes, torch.bfloat16, 1)


def build(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = 32000 if sizes is not TINY else 256
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, use_cache=False, **sizes)
    with device:
        model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model


def _measured(
    setup: Setup, name: str, sizes: dict[str, int], dtype: torch.dtype, batch: int, settings: dict[str, Any]
) -> Iterator[Row]:
    label = f"Llama {name}, average of {N}, {', '.join(f'{key}: {value}' for key, value in settings.items())}"
    model = build(sizes, dtype, setup.device)
    with synthetic(model, N) as candidates:
        twa = twa_scale.attach(model, candidates, {"coding": "center", **settings})

    def step() -> None:
        twa.step()
        twa.zero_grad()

    try:
        work, tokens = working(setup, model, dtype, batch, step)
        seconds = setup.seconds(work, STEPS)
        twa.cost(1)  # without the memory of the first steps
        work()
        parts = twa.cost(1)
        detail = ", ".join(f"{part} {milliseconds(parts[part]['seconds'])}" for part in ("project", "combine"))
        measured = f"{tokens / seconds:,.0f} tokens/s, {milliseconds(seconds)} a step, {detail}, {_peak(setup)}"
        yield Row(label, measured)
    except torch.OutOfMemoryError:
        yield Row(label, "does not fit on this GPU")
    finally:
        twa.close()
        _free(setup)


def _ordinary(setup: Setup, name: str, sizes: dict[str, int], dtype: torch.dtype, batch: int) -> Row:
    label = f"Llama {name}, AdamW(fused=True)"
    try:
        model = build(sizes, dtype, setup.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        work, tokens = working(setup, model, dtype, batch, step)
        seconds = setup.seconds(work, STEPS)
        return Row(label, f"{tokens / seconds:,.0f} tokens/s, {milliseconds(seconds)} a step, {_peak(setup)}")
    except torch.OutOfMemoryError:
        return Row(label, "does not fit on this GPU")
    finally:
        _free(setup)


def working(
    setup: Setup, model: nn.Module, dtype: torch.dtype, batch: int, step: Callable[[], None]
) -> tuple[Callable[[], None], int]:
    """Return forward, backward and step on one batch, and its number of tokens."""
    length = setup.size(CONTEXT, 16)
    tokens = torch.randint(256, (batch, length), device=setup.device)
    mixed = dtype == torch.float32
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats(setup.device)

    def work() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16) if mixed else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        step()

    return work, batch * length


def _peak(setup: Setup) -> str:
    return f"peak {gigabytes(torch.cuda.max_memory_allocated(setup.device))}" if setup.cuda else "no peak"


def _free(setup: Setup) -> None:
    gc.collect()
    if setup.cuda:
        torch.cuda.empty_cache()

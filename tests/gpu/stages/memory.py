"""Peak memory of a run on the device and the host, compared with `plan`."""

from collections.abc import Iterator

import torch
from safetensors.torch import save_file

from tests.gpu.stages.setup import Row, Setup, gigabytes
from twa_scale.base.process_memory import peak_resident
from twa_scale.config import RunConfig, validated
from twa_scale.run import run as train
from twa_scale.run.tasks.byte_gpt import ByteGPT
from twa_scale.run.tasks.causal_lm import ByteGPTSizes
from twa_scale.tools.planning import make_plan

N, WITHIN = 4, 0.1
LIBRARIES = "python and libraries"


def run(setup: Setup) -> Iterator[Row]:
    sizes = ByteGPTSizes(n_layer=setup.size(12, 2), n_head=setup.size(16, 2), d_model=setup.size(1024, 32))
    write_candidates(setup, sizes)
    for store_device in ("auto", "cpu"):
        config = settings(setup, sizes, store_device)
        plan = make_plan(config, 1)
        libraries = plan.memory[LIBRARIES]
        if setup.cuda:
            torch.cuda.reset_peak_memory_stats(setup.device)
        train(config)
        device = torch.cuda.max_memory_allocated(setup.device) if setup.cuda else 0
        planned = plan.peak - libraries if setup.cuda else 0
        host, planned_host = peak_resident(), sum(plan.host.values()) + (libraries if setup.cuda else plan.peak)
        measured = f"device {gigabytes(device)}, host {gigabytes(host)}"
        expected = f"device {gigabytes(planned)}, host {gigabytes(planned_host)} (without what CUDA takes there)"
        ok = abs(device / planned - 1) <= WITHIN if setup.cuda else None
        yield Row(f"peak memory, store_device: {store_device}", measured, expected, ok)


def write_candidates(setup: Setup, sizes: ByteGPTSizes) -> None:
    torch.manual_seed(0)
    with setup.device:
        base = ByteGPT(256, sizes.n_layer, sizes.n_head, sizes.d_model).state_dict()
    for i in range(N):
        folder = setup.scratch / "candidates" / f"step-{i}"
        folder.mkdir(parents=True)
        values = {name: (value + 2e-3 * torch.randn_like(value)).cpu() for name, value in base.items()}
        save_file(values, folder / "model.safetensors")


def settings(setup: Setup, sizes: ByteGPTSizes, store_device: str) -> RunConfig:
    fields = {
        "candidates": str(setup.scratch / "candidates" / "step-*"),
        "output": str(setup.scratch / f"run-{store_device}"),
        "task": {"name": "causal_lm", "model": {"byte_gpt": sizes.model_dump()}, "text": "stdlib", "context": 256},
        "device": setup.device.type,
        "store": "packed4",
        "store_device": store_device,
        "groups": "block",
        "steps": 2,
        "batch_size": setup.size(32, 2),
        "evaluate_batches": 1,
        "compare": False,
    }
    return validated(RunConfig, fields, "the memory stage")

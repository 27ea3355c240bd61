"""The engine in docs/add-an-engine.md works as described there."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import twa_scale
from tests import models
from tests.pool import Pool
from tests.ranks import cases, test_script_features
from tests.unit.test_snapshots import assert_same
from twa_scale import EngineError
from twa_scale.engines import Engine
from twa_scale.output.snapshots import Snapshots

PAGE = Path(__file__).parents[2] / "docs/add-an-engine.md"


def shown() -> Any:
    """Return the class in the first Python block of the page."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), namespace)
    return next(value for value in namespace.values() if isinstance(value, type) and Engine in value.__mro__[1:])


def train(out: Path) -> Any:
    model = models.build(seed=99)
    engine = shown()(model)
    twa = twa_scale.attach(engine, models.candidates(), test_script_features.RUN.config)
    for step in range(test_script_features.RUN.steps):
        cases.one_step(model, twa, step)
    Snapshots(out, every_n_steps=1).save(engine, 1)
    return cases.gathered(model), twa.coefficients, twa.store_bytes


@pytest.mark.parametrize("size", [1, 3])
def test_training_matches_the_reference(ranks: Pool, tmp_path: Path, size: int) -> None:
    expected = test_script_features.expected("nothing", size, ()).weights[-1]
    results = ranks(train, size, out=tmp_path)
    for weights, a, _ in results:
        assert torch.equal(a, results[0][1])
        for name, value in expected.items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
    trained = sum(p.numel() for p in models.build().parameters() if p.requires_grad)
    assert sum(stored for *_, stored in results) == 4 * (models.NUM_CANDIDATES + 1) * trained
    saved = load_file(tmp_path / "step-00000001/model.safetensors")
    assert_same({name: saved[name] for name in expected}, results[0][0])


def refuse() -> None:
    twa_scale.attach(shown()(models.build()), models.candidates(), replica_group=dist.group.WORLD)


def test_replica_group_argument_is_refused(ranks: Pool) -> None:
    assert "SplitBasis" in str(ranks.error(refuse, 2))


@pytest.mark.parametrize("method", sorted(Engine.__abstractmethods__))
def test_missing_method_is_refused_at_construction(method: str) -> None:
    complete: Any = shown()
    lacking = type("Lacking", (Engine,), {k: v for k, v in vars(complete).items() if k not in (method, "__dict__")})
    with pytest.raises(EngineError, match=rf"Lacking does not implement {method}\(\)"):
        lacking(models.build())


@pytest.mark.parametrize("attribute", sorted(Engine.__annotations__.keys() - vars(Engine).keys()))
def test_missing_attribute_is_refused_at_construction(attribute: str) -> None:
    complete: Any = shown()

    class Lacking(complete):
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            delattr(self, attribute)

    class Wrong(complete):
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            setattr(self, attribute, "cpu")

    with pytest.raises(EngineError, match=f"Lacking does not set '{attribute}'"):
        Lacking(models.build())
    with pytest.raises(EngineError, match=f"Wrong sets '{attribute}' to a str"):
        Wrong(models.build())


def attach_to_a_part(held: str) -> None:
    """Attach to an engine whose last rank omits a tensor, has one twice, or renames one."""
    engine = shown()(models.build())
    spans, last = engine.spans(), cases.where()[0] == cases.where()[1] - 1
    if last:
        changed = {"less": spans[:-1], "twice": [*spans, spans[0]], "other": [replace(spans[0], name="x"), *spans[1:]]}
        engine.spans = lambda: changed[held]
    twa_scale.attach(engine, models.candidates())


@pytest.mark.parametrize(
    ("stored", "message"), [("less", "exactly one span"), ("twice", "exactly one"), ("other", "'x'")]
)
def test_spans_that_do_not_cover_all_elements_once_are_refused(ranks: Pool, stored: str, message: str) -> None:
    assert message in str(ranks.error(attach_to_a_part, 2, held=stored))


def test_page_documents_all_members() -> None:
    members = {name for name in (*vars(Engine), *Engine.__annotations__) if not name.startswith("_")}
    page = PAGE.read_text()
    assert [name for name in members if f"`{name}" not in page] == []

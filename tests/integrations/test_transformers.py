"""Averages in transformers' Trainer, in one process and on two ranks. One test runs the example of trainers.md."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import twa_scale
from tests.integrations.examples import run_example
from tests.integrations.small import same
from tests.integrations.train_transformers import (
    DECAY,
    HALF,
    LEARN,
    ON_RANKS,
    ROWS,
    STEPS,
    Texts,
    build,
    learned,
    train,
)
from twa_scale import ConfigError, StateError, TwaError, TwaWarning
from twa_scale.average.measures import effective_candidates, mean_coefficients
from twa_scale.integrations.saved_by_trainer import small_files_of
from twa_scale.integrations.transformers import CoefficientsCallback, TwaCallback
from twa_scale.output.model_files import files_of_model
from twa_scale.tools.report import write_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for each kind of training, with the results of a training and of its resumed second half."""
    path = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "tests.integrations.train_transformers", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(params=["plain", *ON_RANKS])
def directory(request: pytest.FixtureRequest, trained: Path) -> Path:
    return trained / str(request.param)


def averaged(directory: Path) -> dict[str, torch.Tensor]:
    """Return the exponential average of the weights in the checkpoints."""
    steps = [load_file(directory / f"checkpoint-{step}" / "model.safetensors") for step in range(1, STEPS + 1)]
    average = steps[0]
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    return average


def loss_of(model: Any) -> float:
    """Return the loss as Trainer computes it: the sum over 11 predictions, divided by 12 labels."""
    with torch.no_grad():
        losses = [float(model(**{key: value[None] for key, value in text.items()}).loss) for text in texts()]
    return sum(losses) / len(losses) * 11 / 12


def texts() -> Iterator[dict[str, torch.Tensor]]:
    return (Texts()[i] for i in range(len(Texts())))


@pytest.mark.slow
def test_a_trainer_keeps_averages(directory: Path) -> None:
    """The averages equal those of the checkpoints. They are evaluated, saved, resumed, and used to learn."""
    actual = load_file(directory / f"checkpoint-{STEPS}" / "average" / "model.safetensors")
    for name, value in averaged(directory).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)
    uninterrupted = load_file(directory / "uninterrupted.safetensors")
    assert all(torch.equal(value, actual[name]) for name, value in uninterrupted.items())
    metrics = torch.load(directory / "metrics.pt", weights_only=True)
    for path, metric in ((f"checkpoint-{STEPS}/average", "eval_loss"), (f"checkpoint-{STEPS}", "own_loss")):
        model = AutoModelForCausalLM.from_pretrained(directory / path).eval()
        assert loss_of(model) == pytest.approx(metrics[metric], abs=1e-5)
    assert abs(metrics["eval_loss"] - metrics["own_loss"]) > 1e-4
    assert metrics["twa_step"] == metrics["learned_steps"] == 3 and metrics["twa_lr"] == 0.05
    assert {path.name for path in (directory / f"checkpoint-{HALF}").glob("averages-*")}
    AutoModelForCausalLM.from_pretrained(directory / "average")
    text = ModelCard.load(directory / f"checkpoint-{HALF}" / "average" / "README.md").text
    assert "The weights are an exponential average" in text and f" at step {HALF}. twa_scale " in text


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["fsdp2", "zero3"], indirect=True)
def test_averages_are_whole_where_the_trainer_saves_shards(directory: Path) -> None:
    shards = directory / "shards"
    assert not (shards / f"checkpoint-{STEPS}" / "model.safetensors").exists()
    for average, whole in (
        (f"checkpoint-{STEPS}/average", "uninterrupted.safetensors"),
        ("average", "learned.safetensors"),
    ):
        actual, wanted = load_file(shards / average / "model.safetensors"), load_file(directory / whole)
        assert wanted.keys() - actual.keys() <= {"lm_head.weight"}  # tied; Accelerate writes it twice with FSDP2
        assert all(torch.equal(value, wanted[name]) for name, value in actual.items())
        model = AutoModelForCausalLM.from_pretrained(shards / average)
        assert model.config.architectures == ["GPT2LMHeadModel"]
    assert "an exponential average" in ModelCard.load(shards / f"checkpoint-{STEPS}/average/README.md").text


@pytest.mark.slow
def test_adapters_are_whole_where_the_trainer_saves_shards(trained: Path) -> None:
    for average in (f"checkpoint-{STEPS}/average", "average"):
        actual, wanted = (
            load_file(trained / "fsdp2" / name / average / "adapter_model.safetensors")
            for name in ("adapters", "whole-adapters")
        )
        assert same(actual, wanted)
        PeftModel.from_pretrained(build(0), str(trained / "fsdp2" / "adapters" / average))


def test_small_files_are_those_that_transformers_saves(tmp_path: Path) -> None:
    """This includes the code of a model that transformers does not know."""
    source = tmp_path / "source"
    source.mkdir()
    code = {"Config": "PretrainedConfig", "Model": "PreTrainedModel"}
    for name, base in code.items():
        text = f"from transformers import {base}\nclass Own{name}({base}):\n    model_type = 'own'\n"
        (source / f"own_{name.lower()}.py").write_text(text)
    model = "from torch import nn\nfrom .own_config import OwnConfig\n" + (source / "own_model.py").read_text()
    model += "    config_class = OwnConfig\n    def __init__(self, config):\n        super().__init__(config)\n"
    model += "        self.layer = nn.Linear(2, 2)\n        self.post_init()\n"
    (source / "own_model.py").write_text(model)
    auto_map = {"AutoConfig": "own_config.OwnConfig", "AutoModel": "own_model.OwnModel"}
    (source / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    own = AutoModel.from_config(AutoConfig.from_pretrained(source, trust_remote_code=True), trust_remote_code=True)
    trainer = Trainer(model=own, args=TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True))
    trainer.save_model()
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    del wanted["model.safetensors"], wanted["training_args.bin"]
    assert wanted.keys() == {"config.json", "own_config.py", "own_model.py"}
    assert files_of_model(own) | small_files_of(trainer) == wanted


def learned_by_hand(settings: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = build(9)
    twa = twa_scale.attach(model, [build(seed).state_dict() for seed in range(3)], settings)
    rate = torch.optim.lr_scheduler.LambdaLR(twa.optimizer, lambda step: 1 - step / STEPS)  # as Trainer's
    tokens = torch.stack([text["input_ids"] for text in texts()])
    for _ in range(STEPS):
        (model(input_ids=tokens, labels=tokens).loss * 11 / 12).backward()
        twa.step()
        rate.step()
        twa.zero_grad()
    twa.close()
    return twa.coefficients, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.slow
def test_an_average_is_the_optimizer_of_a_trainer(tmp_path: Path) -> None:
    """Coefficients are those of a loop of one's own, and resume with the same bits, also if a callback is not given."""
    actual = learned(tmp_path)
    torch.testing.assert_close(actual, learned_by_hand(LEARN), rtol=1e-5, atol=1e-6)
    half = tmp_path / f"checkpoint-{HALF}"
    torch.testing.assert_close(learned(tmp_path, resume=str(half)), actual, rtol=0, atol=0)
    with pytest.raises(StateError, match=r"has no coefficients\.pt, which CoefficientsCallback writes"):
        learned(tmp_path, resume=str(half), given=True)
    with_callback = learned(tmp_path, given=True)
    torch.testing.assert_close(with_callback, actual, rtol=0, atol=0)
    with pytest.raises(StateError, match=r"give the Trainer this callback again"):
        learned(tmp_path, resume=str(half))
    (half / "coefficients.pt").write_bytes((half / "coefficients.pt").read_bytes()[:-9])
    with pytest.raises(StateError, match=r"coefficients\.pt: is not the state of an average: it is damaged"):
        learned(tmp_path, resume=str(half), given=True)


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["ddp"], indirect=True)
def test_an_average_with_rows_is_the_optimizer_of_a_trainer_on_two_ranks(directory: Path) -> None:
    """The callback saves the rows, each rank its own, and resumes with the same bits. Without it no rank begins."""
    of_ranks = [torch.load(directory / f"coefficients-{rank}.pt", weights_only=True) for rank in range(2)]
    (actual, resumed, messages), other = of_ranks
    assert messages == other[2] and "callbacks=[CoefficientsCallback(twa)]" in messages
    assert not list(directory.glob("refused/checkpoint-*"))
    torch.testing.assert_close([actual, resumed], [resumed, other[0]], rtol=0, atol=0)
    torch.testing.assert_close(actual, learned_by_hand(ROWS), rtol=1e-5, atol=1e-6)
    half = directory / "learned" / f"checkpoint-{HALF}"
    assert torch.load(half / "coefficients.pt", weights_only=True)["rows"]["values"] == {}
    assert len(list(half.glob("state.rows-*/rows.safetensors"))) == 1


@pytest.mark.slow
def test_checkpoint_without_averages_restarts_them(tmp_path: Path) -> None:
    trainer = train("plain", tmp_path)
    for path in tmp_path.glob(f"checkpoint-{HALF}/averages-*"):
        path.unlink()
    assert trainer.evaluate == type(trainer).evaluate.__get__(trainer)  # its own again
    with pytest.warns(TwaWarning, match=rf"new ones start at step {HALF}\..*resume from an earlier one"):
        train("plain", tmp_path, str(tmp_path / f"checkpoint-{HALF}"))


class Fail(TrainerCallback):
    """Ends a training by an error after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("after two steps")


def trainer_with(
    directory: Path, *callbacks: TrainerCallback, trainer: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    args = TrainingArguments(
        str(directory), max_steps=STEPS, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    return trainer(model=build(0), args=args, train_dataset=Texts(), eval_dataset=Texts(), callbacks=list(callbacks))


@pytest.mark.slow
def test_an_error_in_a_training_leaves_evaluations_of_the_trained_weights(tmp_path: Path) -> None:
    callback = TwaCallback(ema=[0.9])
    trainer = trainer_with(tmp_path, callback, Fail())
    with pytest.raises(RuntimeError, match="after two steps"):
        trainer.train()
    own = trainer.evaluate()["eval_loss"]
    assert callback.averages is not None
    with callback.averages.weights("ema"):
        averaged = trainer.evaluate()["eval_loss"]
    assert own == pytest.approx(loss_of(trainer.model), abs=1e-5) and abs(own - averaged) > 1e-4
    trainer.remove_callback(Fail)
    trainer.train()
    assert trainer.evaluate == type(trainer).evaluate.__get__(trainer)


@pytest.mark.slow
def test_further_averages_are_evaluated_with_prefixes_of_their_own(tmp_path: Path) -> None:
    window = {"every": 1, "keep": 2, "start_step": HALF + 1}
    callback = TwaCallback(ema=[0.9], window=window, evaluate_also=["last", "mean"], save=False)
    trainer = trainer_with(tmp_path, callback, eval_strategy="steps", eval_steps=HALF, save_strategy="no")
    trainer.train()
    logged = [key for entry in trainer.state.log_history for key in entry if key.endswith("_loss")]
    assert logged == ["eval_loss", "eval_last_loss", "eval_loss", "eval_last_loss", "eval_mean_loss", "train_loss"]
    history = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert history["eval_last_loss"] == pytest.approx(loss_of(trainer.model), abs=1e-5)
    assert len({history[key] for key in ("eval_loss", "eval_last_loss", "eval_mean_loss")}) == 3
    after = torch.get_rng_state()
    alone = TwaCallback(ema=[0.9], window=window, save=False)
    trainer_with(tmp_path, alone, eval_strategy="steps", eval_steps=HALF, save_strategy="no").train()
    assert torch.equal(torch.get_rng_state(), after)  # they change nothing that training draws


class Adding(Trainer):
    """Adds a metric to all that it logs, as the trainers of TRL do."""

    def log(self, logs: dict[str, float], *args: Any) -> None:
        logs["own" if self.model.training else "eval_own"] = 1.0
        super().log(logs, *args)


class Logged(TrainerCallback):
    """Keeps the names that loggers receive."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.names.append({name for name in logs if name.endswith("own")})


@pytest.mark.slow
def test_metrics_that_a_trainer_adds_have_the_prefix_of_their_average(tmp_path: Path) -> None:
    logged = Logged()
    window = {"every": 1, "keep": 2, "start_step": 2}
    averaging = TwaCallback(window=window, evaluate_also=["last"], learn=LEARN, learn_steps=1, save=False)
    every = {"eval_strategy": "steps", "eval_steps": STEPS, "save_strategy": "no", "logging_steps": STEPS}
    trainer = trainer_with(tmp_path, logged, averaging, trainer=Adding, **every)
    trainer.train()
    wanted = [
        "own",
        "eval_own",
        "eval_last_own",
        "eval_own",
        "twa_own",
        "eval_average_own",
    ]  # the fourth by its own mode
    assert logged.names == [{name} for name in wanted]
    assert [name for entry in trainer.state.log_history for name in entry if name.endswith("own")] == wanted
    trainer.evaluate()
    assert logged.names[-1] == {"eval_own"}


@pytest.mark.slow
def test_evaluations_wait_for_as_many_snapshots_as_coefficients(tmp_path: Path) -> None:
    callback = TwaCallback(window={"every": 2, "keep": 2}, evaluate_with=[0.0, 1.0], save=False)
    trainer_with(tmp_path, callback, eval_strategy="steps", eval_steps=1, save_strategy="no").train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    with pytest.raises(ConfigError, match=r"\(2,\)"):
        trainer_with(tmp_path, TwaCallback(window={"every": 2, "keep": 2}, evaluate_with=[0.3, 0.3, 0.4])).train()


class OneShotTexts(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Texts that can be read only once."""

    def __init__(self) -> None:
        self.rest = texts()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "message"), [(False, "yields no more batches"), (True, "ValueError: Batch does not contain any data")]
)
def test_learning_from_data_that_is_read_only_once_ends_with_the_running_average(
    tmp_path: Path, dispatch: bool, message: str
) -> None:
    callback = TwaCallback(window={"every": 1, "keep": 2}, learn=LEARN, learn_steps=2, save=False)
    accelerator = {"dispatch_batches": dispatch}  # with it, the error is that of Accelerate
    trainer = trainer_with(tmp_path, callback, save_strategy="no", accelerator_config=accelerator)
    trainer.train_dataset = OneShotTexts()
    with pytest.warns(TwaWarning, match=f"no learned average(.|\n)*{message}(.|\n)*average 'mean' was written before"):
        trainer.train()
    assert callback.averages is not None
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with callback.averages.weights("mean"):
        trainer.save_model(str(tmp_path / "mean"))
    assert same(load_file(tmp_path / "average/model.safetensors"), load_file(tmp_path / "mean/model.safetensors"))
    assert same(trained, trainer.model.state_dict())


@pytest.mark.slow
def test_an_error_while_the_learned_average_is_written_ends_the_training(tmp_path: Path) -> None:
    """What is on disk may belong to neither average."""
    callback = TwaCallback(window={"every": 1, "keep": 2}, learn=LEARN, learn_steps=2, save=False)
    trainer = trainer_with(tmp_path, callback, save_strategy="no")
    describe = callback._describe
    calls: list[int] = []

    def fail_at_second(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left")
        describe(*args, **options)

    callback._describe = fail_at_second  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space left"):
        trainer.train()


@pytest.mark.slow
def test_steps_that_a_loss_scaler_skips_do_not_count(tmp_path: Path) -> None:
    callback = TwaCallback(ema=[0.9], save=False)
    trainer = trainer_with(tmp_path, callback, save_strategy="no", max_grad_norm=0.0, optim="adamw_torch")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    trainer.train()
    taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert callback.averages is not None
    assert taken == {STEPS - 1} == {callback.averages.num_steps}  # the first one has overflowed


@pytest.mark.slow
def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has two"):
        trainer_with(tmp_path, TwaCallback(ema=[0.9]), TwaCallback(ema=[0.99])).train()


@pytest.mark.slow
def test_trainer_reports_unexpected_settings(tmp_path: Path) -> None:
    """Reported: a short window, the weights of the best checkpoint, and a checkpoint without averages."""

    class Forget(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for path in tmp_path.glob("checkpoint-*/averages-*"):
                path.unlink()

    every: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "save_steps": HALF,
        "load_best_model_at_end": True,
    }
    callback = TwaCallback(ema=[0.9], window={"every": STEPS, "keep": 2}, learn=LEARN, learn_steps=2)
    trainer = trainer_with(tmp_path, callback, Forget(), **every)
    with pytest.warns(TwaWarning) as caught:
        trainer.train()
    messages = [str(warning.message) for warning in caught if warning.category is TwaWarning]
    assert {warning.filename for warning in caught if warning.category is TwaWarning} == {__file__}
    assert len(messages) == 4 and "nothing is learned" in messages[3]
    assert (
        f"ends at step {STEPS}" in messages[0]
        and "has 1 snapshots" in messages[0]
        and "nothing will be learned" in messages[0]
    )
    assert "the average 'ema:0.9'" in messages[1] and "best_model_checkpoint + '/average'" in messages[1]
    assert "not of the best checkpoint" in messages[2]


@pytest.mark.slow
def test_adapters_of_peft_are_averaged(tmp_path: Path) -> None:
    """Only the adapter is averaged: `average/` is an adapter, the exponential average of those in the checkpoints."""
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(build(0), lora)
    options = {"max_steps": HALF, "save_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    args = TrainingArguments(str(tmp_path), label_names=["labels"], disable_tqdm=True, **options)
    Trainer(model=model, args=args, train_dataset=Texts(), callbacks=[TwaCallback(ema=[DECAY])]).train()
    adapters = [load_file(tmp_path / f"checkpoint-{i + 1}" / "adapter_model.safetensors") for i in range(HALF)]
    actual = load_file(tmp_path / "average" / "adapter_model.safetensors")
    assert actual.keys() == adapters[0].keys()
    for name, value in actual.items():
        average = adapters[0][name]
        for adapter in adapters[1:]:
            average = DECAY * average + (1 - DECAY) * adapter[name]
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6)
    PeftModel.from_pretrained(build(0), str(tmp_path / "average"))


@pytest.mark.slow
def test_example_of_the_documentation_runs(tmp_path: Path) -> None:
    options = {"max_steps": STEPS, "logging_steps": 0.5, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), **options)
    names = {"Trainer": Trainer, "args": args, "model": build(0), "train": Texts(), "validation": Texts()}
    run_example("transformers", names)
    (logged,) = [entry for entry in names["trainer"].state.log_history if "twa_step" in entry]
    assert logged["twa_step"] == 2  # each third step: half of the training, and the last step
    AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    origin = json.loads((tmp_path / "average/twa_scale.json").read_text())
    a = torch.tensor(origin["coefficients"], dtype=torch.float64)
    actual = [logged[f"twa_coefficients/{i}"] for i in range(len(a))]
    assert actual == pytest.approx(mean_coefficients(a, origin["elements"]).tolist(), rel=1e-12)
    assert logged["twa_effective_candidates"] == pytest.approx(effective_candidates(a, origin["elements"]), rel=1e-12)
    assert logged["twa_distance"] > 0
    card = ModelCard.load(tmp_path / "average/README.md")
    assert card.data.library_name == "transformers" and "the snapshot of step" in card.text
    assert "the snapshot of step" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give ema="),
        ({"ema": [0.9], "learn": {}, "learn_steps": 3}, "learn needs window"),
        ({"ema": [0.9], "learn_steps": 3}, "together"),
        ({"ema": [0.9], "evaluate_also": "last"}, "evaluate_also"),
        ({"window": {"every": 1, "keep": 2}, "learn": {"group": "block"}, "learn_steps": 3}, "groups"),
    ],
)
def test_contradictory_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwaCallback(**options)


def test_error_names_the_callback_outside_of_a_trainer() -> None:
    twa = twa_scale.attach(build(9), [build(seed).state_dict() for seed in range(2)])
    for callback in (CoefficientsCallback(twa), TwaCallback(ema=[0.9])):
        name = type(callback).__name__
        with pytest.raises(TwaError, match=rf"^{name}: give it to a Trainer, .*callbacks=\[{name}\("):
            callback.on_train_begin(None, None, None)
    twa.close()

"""The data and models of `image_classification`: Hugging Face directories, folders, and images in records."""

import io
import json
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from twa_scale.base.notices import TwaWarning
from twa_scale.config import TaskConfig
from twa_scale.errors import ConfigError
from twa_scale.run.batches import make_batches
from twa_scale.run.tasks import Examples, Task, arrow_columns, build_task, stack

SIZE = 32
COLORS = [(250, 0, 0), (0, 0, 250), (200, 50, 0), (0, 60, 180), (240, 10, 10)]
NAMES = ["red", "blue"]
CLASSES = [0, 1, 0, 1, 0]
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "ViT": {**SMALL, "intermediate_size": 8},
    "Dinov2": {**SMALL, "mlp_ratio": 1},
    "ConvNext": {"hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
    "ResNet": {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic"},
    "Swin": {"patch_size": 4, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
}
PROCESSORS = {"ViT": "ViT", "Dinov2": "Bit", "ConvNext": "ConvNext", "ResNet": "ConvNext", "Swin": "ViT"}


def images() -> list[Image.Image]:
    """Return images of several sizes. The color of the left half depends on the label."""
    made = []
    for i, color in enumerate(COLORS):
        image = Image.new("RGB", (40 + 8 * i, 48), (9, 9, 9))
        image.paste(color, (0, 0, 20 + 4 * i, 48))
        made.append(image)
    return made


def save_model(directory: Path, kind: str = "ViT", names: list[str] = NAMES, *, processor: bool = True) -> str:
    sizes = {"image_size": SIZE} if kind not in ("ConvNext", "ResNet") else {}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind], **sizes, **labels)
    config.save_pretrained(directory)
    if processor:
        size = {"shortest_edge": SIZE} if kind in ("Dinov2", "ConvNext", "ResNet") else {"height": SIZE, "width": SIZE}
        crop = {"crop_size": {"height": SIZE, "width": SIZE}} if kind == "Dinov2" else {}
        made = getattr(transformers, f"{PROCESSORS[kind]}ImageProcessorPil")(size=size, **crop)
        made.save_pretrained(directory)
    return str(directory)


def save_folder(directory: Path, names: list[str] = NAMES) -> str:
    for i, image in enumerate(images()):
        (directory / names[CLASSES[i]]).mkdir(parents=True, exist_ok=True)
        image.save(directory / names[CLASSES[i]] / f"{i}.png")
    return str(directory)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save_dataset(path: Path, names: list[str] = NAMES) -> str:
    """Write a parquet file, or a directory, with the library `datasets`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    dataset = datasets.Dataset.from_dict({"image": images(), "label": CLASSES}, features=features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.to_parquet(path, batch_size=2) if path.suffix else dataset.save_to_disk(path)
    return str(path)


def task_of(model: str, **options: object) -> Task:
    return build_task(TaskConfig.model_validate({"name": "image_classification", "model": model, **options}))


def labels_of(examples: Examples) -> list[int]:
    return [int(examples[i]["labels"]) for i in range(len(examples))]


@pytest.mark.parametrize("kind", MODELS)
def test_images_are_as_the_processor_makes_them(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path / "model", kind)
    task = task_of(model, train=save_folder(tmp_path / "data"))
    data = task.dataset("train")
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    order = [1, 3, 0, 2, 4]  # by the name of the class
    expected = processor([images()[i] for i in order], return_tensors="pt")["pixel_values"]
    batch = stack([data[i] for i in range(5)])
    assert torch.equal(batch["images"], expected) and batch["labels"].tolist() == [1, 1, 0, 0, 0]
    network = task.model().eval()
    logits = network(pixel_values=expected).logits
    assert logits.shape == (5, 2)
    assert task.loss(network, batch).item() == pytest.approx(cross_entropy(logits, batch["labels"]).item())
    assert task.metrics(network, batch)["accuracy"][1] == 5


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_images_in_records(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model")
    records = task_of(model, train=save_dataset(tmp_path / name)).dataset("train")
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    expected = processor(images(), return_tensors="pt")["pixel_values"]
    assert labels_of(records) == CLASSES
    assert torch.equal(stack([records[i] for i in range(5)])["images"], expected)


def test_names_of_classes_have_the_numbers_of_the_model(tmp_path: Path) -> None:
    """The data set has other numbers than the model, and folders have names only."""
    model = save_model(tmp_path / "model", names=["green", "blue", "red"])
    expected = [2, 1, 2, 1, 2]
    assert labels_of(task_of(model, train=save_dataset(tmp_path / "a.parquet")).dataset("train")) == expected
    task = task_of(model, train=save_folder(tmp_path / "data"))
    assert sorted(labels_of(task.dataset("train"))) == sorted(expected)
    made: Any = task.model()
    assert made.config.num_labels == 3


def test_data_of_all_splits_in_a_saved_dataset_dict(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save_dataset(tmp_path / "all" / split)
    task = task_of(save_model(tmp_path / "model"), data=str(tmp_path / "all"))
    assert len(task.dataset("train")) == len(task.dataset("validation")) == 5


def test_settings_replace_the_image_processor(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", processor=False)
    own = {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ConfigError, match=r"task\.model: the image processor of .*model' cannot be used"):
        task_of(model, train=save_folder(tmp_path / "data"))
    task = task_of(model, train=str(tmp_path / "data"), **own)
    data = task.dataset("train")
    batch = stack([data[0], data[1]])
    assert batch["images"].dtype == torch.uint8
    network = task.model().eval()
    logits = network(pixel_values=(batch["images"].float() / 255 - 0.5) / 0.5).logits
    assert task.loss(network, batch).item() == pytest.approx(cross_entropy(logits, batch["labels"]).item())


def test_arrays_go_through_the_image_processor(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    pixels = np.stack([np.asarray(image.resize((20, 24))).transpose(2, 0, 1) for image in images()])
    np.savez(tmp_path / "a.npz", images=pixels, labels=CLASSES)
    data = task_of(model, train=str(tmp_path / "a.npz")).dataset("train")
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    expected = processor(images()[1].resize((20, 24)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(data[1]["images"], expected) and labels_of(data) == CLASSES
    np.savez(tmp_path / "b.npz", images=pixels.astype(np.float32), labels=CLASSES)
    with pytest.raises(ConfigError, match=r"b\.npz: has images of dtype torch\.float32.*set task\.mean and task\.std"):
        task_of(model, train=str(tmp_path / "b.npz")).dataset("train")
    plain = task_of(model, train=str(tmp_path / "b.npz"), mean=[0.0] * 3, std=[1.0] * 3).dataset("train")
    assert torch.equal(plain[1]["images"], torch.from_numpy(pixels[1].astype(np.float32)))


class Wrapped(nn.Module):
    """A custom model that returns an object with `logits`, a tuple, or a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3 * 8 * 8, 2), kind

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.layer(x.flatten(1))
        output = transformers.modeling_outputs.ImageClassifierOutput(logits=logits)
        return {"logits": output, "tensor": logits, "tuple": (logits,)}[self.kind]


def test_models_that_return_an_object_with_logits(tmp_path: Path) -> None:
    losses = []
    for kind in ("tensor", "logits", "tuple"):
        options = {"train": save_folder(tmp_path / "data"), "image_size": 8, "model_options": {"kind": kind}}
        task = task_of(f"{__name__}:Wrapped", **options)
        torch.manual_seed(0)
        model, data = task.model(), task.dataset("train")
        if kind == "tuple":
            with pytest.raises(ConfigError, match="returned tuple, neither logits nor an object"):
                task.loss(model, stack([data[0]]))
        else:
            losses.append(task.loss(model, stack([data[i] for i in range(5)])).item())
    assert losses[0] == losses[1]


def test_row_groups_are_shuffled_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of rows are read one after another in a random order, for any number of ranks."""
    monkeypatch.setattr(arrow_columns, "_PIECE_COST", 1)
    monkeypatch.setattr(arrow_columns, "_CACHE", 1)
    raw = [encoded(image) for image in images()] * 8
    pyarrow.parquet.write_table(
        pa.table({"image": raw, "label": list(range(40))}), tmp_path / "a.parquet", row_group_size=8
    )
    task = task_of(f"{__name__}:Wrapped", train=str(tmp_path / "a.parquet"), image_size=8)
    data: Any = task.dataset("train")
    assert data.chunk_sizes == (8, 8, 8, 8, 8)

    def order(rank: int, size: int, step: int) -> list[int]:
        (batch,) = make_batches(data, "train", 8, None, rank, size, 0).training(step)
        return [int(label) for label in batch["labels"]]

    file = data._column._positions[0][1]
    piece = Mock(wraps=file.piece)
    monkeypatch.setattr(file, "piece", piece)
    steps = [order(0, 1, step) for step in range(5)]
    reads = [call.args[0] for call in piece.call_args_list]
    assert sorted(reads) == list(range(5)) and reads != list(range(5))
    assert [sorted(step) for step in steps] == [list(range(8 * i, 8 * i + 8)) for i in reads]
    assert any(step != sorted(step) for step in steps)
    assert order(0, 2, 1) + order(1, 2, 1) == steps[1] and order(0, 1, 5) != steps[0]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"pic": [b"x"], "label": [0]}, {}, r"has no column 'image'.*set task\.image_key"),
        ({"image": [b"x"], "class": [0]}, {}, r"has no column 'label'.*set task\.label_key"),
        ({"image": [b"not an image"], "label": [0]}, {}, r"a\.parquet, row 1: cannot be read as an image"),
        ({"image": ["x"], "label": [0]}, {}, r"row 1: 'x' is not an encoded image\. Set task\.image_key"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, {}, "save the dataset with its images embedded"),
        ({"image": [b"x", b"x"], "label": [0, None]}, {}, r"row 2: has no value in column 'label'"),
        ({"image": [b"x"], "label": [2]}, {"num_labels": 2}, r"task\.train: label 2 is out of range"),
        ({"image": [b"x"], "label": [0.5]}, {}, r"row 1: 0\.5 is not a class"),
    ],
)
def test_records_that_cannot_be_used(
    tmp_path: Path, table: dict[str, list[Any]], options: dict[str, object], message: str
) -> None:
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        task_of(save_model(tmp_path / "m"), train=str(tmp_path / "a.parquet"), **options).dataset("train")[0]


def test_models_and_data_that_cannot_be_used(tmp_path: Path) -> None:
    model, folder = save_model(tmp_path / "m"), save_folder(tmp_path / "data", ["rot", "blau"])
    with pytest.warns(TwaWarning, match="label2id has other names: 'blue', 'red', but not 'blau'"):
        task_of(model, train=folder)
    (tmp_path / "a.csv").write_text("image,label\n")
    for inputs, message in {"gone": "does not exist", "a.csv": r"a\.csv cannot hold images"}.items():
        with pytest.raises(
            ConfigError, match=rf"task\.train: .*{message}.*Give an \.npz file, a folder of classes, or"
        ):
            task_of(model, train=str(tmp_path / inputs))
    with pytest.raises(ConfigError, match="neither a Hugging Face model directory on disk nor an import path"):
        task_of("no-such-model", train=folder)
    ragged = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 8}, "do_center_crop": False}
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps(ragged))
    with pytest.warns(TwaWarning):
        data = task_of(model, train=folder).dataset("train")
    with pytest.raises(ConfigError, match=r"\.png: the image processor returns shape .*Set `crop_size`"):
        stack([data[0], data[1]])

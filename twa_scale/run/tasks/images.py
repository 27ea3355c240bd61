"""Images and labels from npz files, folders, and parquet and Arrow files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twa_scale.base.inputs import brief, named_errors, open_regular
from twa_scale.base.names import quoted
from twa_scale.base.paths import entries
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.arrow_columns import Column
from twa_scale.run.tasks.classification import integer_labels
from twa_scale.run.tasks.data_files import READABLE, data_files, refuse_dangling
from twa_scale.run.tasks.decoders import Decoder, decode, pillow
from twa_scale.run.tasks.task import Batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_npz(path: Path, prefix: str, key: str) -> tuple[Tensor, Tensor]:
    """Return the arrays `images` (N, ...) in the stored dtype and `labels` (N,) as int64.

    Args:
        path: the npz file.
        prefix: the prefix of both array names, such as "train_".
        key: the setting in error messages.

    Raises:
        ConfigError: the file cannot be read, an array is missing, or shapes or dtypes are not valid.
    """
    try:
        with os.fdopen(open_regular(path, ConfigError), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = (f"{prefix}images", f"{prefix}labels")
            missing = [name for name in names if name not in arrays]
            if missing:
                has = quoted(arrays.files)
                raise ConfigError(
                    f"{key}: {path} has no array {quoted(missing)}; it has {has}. Save it under that name."
                )
            images, labels = (torch.from_numpy(_native(arrays[name])) for name in names)
    except ConfigError:
        raise
    except Exception as error:  # for damaged archives, numpy, zipfile and zlib raise many kinds of exceptions
        raise ConfigError(f"{key}: {path} cannot be read as arrays: {error}. Write it with numpy.savez.") from error
    if images.dim() < 2 or len(images) != len(labels) or not len(images):
        raise ConfigError(
            f"{key}: {path} has images of shape {tuple(images.shape)} and labels of shape "
            f"{tuple(labels.shape)}. Give one label for each image, and at least one of both."
        )
    return images, integer_labels(labels, None, f"{key}: {path}")


def _native(array: Any) -> Any:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def class_names(root: Path, key: str) -> list[str]:
    """Return the names of the subfolders of an image folder, sorted. They are the classes. Hidden ones are left out.

    Raises:
        ConfigError: the folder has no subfolders or cannot be read, or a link in it is dangling.
    """
    with named_errors(ConfigError, READABLE):
        folders = entries(root) if root.is_dir() else []
        for path in folders:
            refuse_dangling(path)
        names = [path.name for path in folders if path.is_dir()]
    if not names:
        raise ConfigError(
            f"{key}: {root} holds no subfolders. Give a folder with one subfolder of images for each class."
        )
    return names


class ImageFolder:
    """Examples {"images": the result of the decoder, "labels": int64 scalar} from one folder for each class.

    An image is decoded on access.
    """

    def __init__(self, root: Path, classes: dict[str, int], decoder: Decoder, key: str) -> None:
        """List the images. Links are followed.

        Args:
            root: the folder.
            classes: the number of each class, by the name of its subfolder.
            decoder: makes the tensor of an image.
            key: the setting in error messages.

        Raises:
            ConfigError: there are no images, a folder cannot be read, or a link is dangling.
        """
        with named_errors(ConfigError, READABLE):
            folders = [(root / name, i) for name, i in sorted(classes.items()) if (root / name).is_dir()]
            self._files = [(path, i) for folder, i in folders for path in data_files(folder, SUFFIXES)]
        self._decoder = decoder
        if not self._files:
            raise ConfigError(f"{key}: {root} has no images. Put {', '.join(SUFFIXES)} files into its subfolders.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Batch:
        path, label = self._files[index]
        try:
            with os.fdopen(open_regular(path, ConfigError), "rb") as file:
                pixels = decode(file, self._decoder, str(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as an image: {error}. Repair or remove it.") from error
        return {"images": pixels, "labels": torch.tensor(label)}


class ImageTable:
    """Examples like those of `ImageFolder`, from rows of parquet and Arrow files in which `datasets` stores an `Image`.

    An image is decoded on access. The labels are in memory.
    """

    def __init__(self, files: Sequence[Path], column: str, labels: Tensor, decoder: Decoder) -> None:
        """Open the files.

        Args:
            files: parquet and Arrow files.
            column: the column of the images: bytes, or structs with `bytes`.
            labels: int64 (N,), the class of each row.
            decoder: makes the tensor of an image.

        Raises:
            ConfigError: a file cannot be read, or has no such column.
        """
        self._column = Column(files, column, "task.image_key")
        self._labels, self._decoder = labels, decoder
        self.chunk_sizes = self._column.chunk_sizes

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        location, value = self._column.read(index)
        raw = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(raw, bytes):
            raise ConfigError(
                f"{location}: {brief(value)} is not an encoded image. Set task.image_key to a column of bytes, or save "
                "the dataset with its images embedded."
            )
        return {"images": decode(io.BytesIO(raw), self._decoder, location), "labels": self._labels[index]}


class ProcessedArrays:
    """Examples of arrays in memory, each of which is passed to a decoder as an image."""

    def __init__(self, images: Tensor, labels: Tensor, decoder: Decoder, key: str) -> None:
        """Check the shape.

        Args:
            images: uint8 (N, 3, H, W) or (N, 1, H, W).
            labels: int64 (N,).
            decoder: makes the tensor of an image.
            key: the setting in error messages.

        Raises:
            ConfigError: the images have another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ConfigError(
                f"{key}: has images of dtype {images.dtype} and shape {tuple(images.shape[1:])}, which the image "
                "processor of the model cannot take. Give uint8 of shape (3, H, W), or set task.mean and task.std, so "
                "that the arrays are used as they are."
            )
        self._images, self._labels, self._decoder, self._key = images, labels, decoder, key

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Batch:
        pixels = self._images[index].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        image = pillow("PIL.Image").fromarray(pixels)
        return {"images": self._decoder(image, f"{self._key}, image {index}"), "labels": self._labels[index]}

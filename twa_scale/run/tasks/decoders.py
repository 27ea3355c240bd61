"""Decoders, which turn images into the tensors of examples."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from twa_scale.base.inputs import open_regular
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.packages import require_module


class Decoder(Protocol):
    """Turns images into tensors of one shape."""

    def __call__(self, image: Any, location: str) -> Tensor:
        """Return the tensor of a PIL image in RGB. `location` is the file or record in error messages."""


class Square:
    """Resizes an image to cover a square, and crops it at the center: uint8 (3, size, size)."""

    def __init__(self, size: int) -> None:
        self._size, self._ops = size, pillow("PIL.ImageOps")

    def __call__(self, image: Any, location: str) -> Tensor:
        """Return the pixels."""
        square = self._ops.fit(image, (self._size, self._size), pillow("PIL.Image").Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


class Stretched:
    """Resizes an image to a square, without keeping its shape: float32 (3, size, size) from 0 to 1."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Any, location: str) -> Tensor:
        """Return the pixels."""
        square = image.resize((self._size, self._size), pillow("PIL.Image").Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


class Processor:
    """The image processor of a Hugging Face directory, without data augmentation: float32 (C, H, W).

    It is the version for PIL images, so that results do not depend on whether torchvision is installed.
    """

    def __init__(self, directory: str, size: dict[str, int] | None = None) -> None:
        """Load the processor.

        Args:
            directory: the model directory.
            size: replaces the size of the processor; images are not padded then.

        Raises:
            ConfigError: the directory has no image processor, or it cannot be used.
        """
        pillow("PIL.Image")
        self._processor = huggingface.load_image_processor(directory)
        self._options = {} if size is None else {"size": size, "do_pad": False}
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: Any, location: str) -> Tensor:
        """Return the pixel values."""
        values = np.asarray(self._processor(image, return_tensors="np", **self._options)["pixel_values"][0], np.float32)
        self._shape = self._shape or values.shape
        if values.shape != self._shape:
            raise ConfigError(
                f"{location}: the image processor returns shape {values.shape}, but {self._shape} for another image. "
                "Set `crop_size` or a fixed `size` in preprocessor_config.json, or task.image_size, task.mean and "
                "task.std."
            )
        return torch.from_numpy(values)

    def detections(self, outputs: Any, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return `scores`, `labels` and `boxes` (left, top, right, bottom in pixels) that a detection model has found.

        Args:
            outputs: the outputs of the model.
            sizes: int64 (B, 2), height and width of each image.
        """
        results: list[dict[str, Tensor]] = self._processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes
        )
        return results


def open_image(path: Path) -> Any:
    """Return the PIL image of a file, in RGB.

    Raises:
        ConfigError: the file cannot be read or decoded.
    """
    with (
        _named_errors(path),
        os.fdopen(open_regular(path, ConfigError), "rb") as file,
        pillow("PIL.Image").open(file) as image,
    ):
        return image.convert("RGB")


def decode(file: IO[bytes], decoder: Decoder, location: str) -> Tensor:
    """Return the tensor of an encoded image, such as the content of a .jpg file.

    Raises:
        ConfigError: it cannot be decoded.
    """
    with _named_errors(location), pillow("PIL.Image").open(file) as image:
        return decoder(image.convert("RGB"), location)


@contextmanager
def _named_errors(location: str | Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # for damaged images, decoders raise many kinds of exceptions
        raise ConfigError(f"{location}: cannot be read as an image: {error}. Repair or remove it.") from error


def pillow(module: str) -> Any:
    """Return a module of Pillow.

    Raises:
        ConfigError: it is not installed.
    """
    return require_module(module, "task: images need Pillow", "twa-scale[data]")

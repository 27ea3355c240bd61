"""How an encoded image becomes the tensor of an example."""

from importlib import import_module
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface


class Decoder(Protocol):
    """Turns images into tensors of one shape."""

    def __call__(self, image: Any, place: str) -> Tensor:
        """Return the tensor of a PIL image in RGB. `place` is the file or record in error messages."""


class Square:
    """Resizes an image to cover a square, and crops it at the center: uint8 (3, size, size)."""

    def __init__(self, size: int) -> None:
        self._size, self._ops = size, pillow("PIL.ImageOps")

    def __call__(self, image: Any, place: str) -> Tensor:
        """Return the pixels."""
        square = self._ops.fit(image, (self._size, self._size), pillow("PIL.Image").Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


class Processor:
    """The image processor of a Hugging Face directory, without data augmentation: float32 (C, H, W).

    It is the one that works on PIL images, so that results do not depend on whether torchvision is installed.
    """

    def __init__(self, directory: str) -> None:
        """Load the processor.

        Raises:
            ConfigError: the directory has none, or it cannot be used.
        """
        pillow("PIL.Image")
        self._processor = huggingface.load_image_processor(directory)
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: Any, place: str) -> Tensor:
        """Return the pixel values."""
        values = np.asarray(self._processor(image, return_tensors="np")["pixel_values"][0], np.float32)
        self._shape = self._shape or values.shape
        if values.shape != self._shape:
            raise ConfigError(
                f"{place}: the image processor returns shape {values.shape}, but {self._shape} for another image. Set "
                "`crop_size` or a fixed `size` in preprocessor_config.json, or task.image_size, task.mean and task.std."
            )
        return torch.from_numpy(values)


def decode(file: IO[bytes], decoder: Decoder, place: str) -> Tensor:
    """Return the tensor of an encoded image, such as the content of a .jpg file.

    Raises:
        ConfigError: it cannot be decoded.
    """
    try:
        with pillow("PIL.Image").open(file) as image:
            return decoder(image.convert("RGB"), place)
    except ConfigError:
        raise
    except Exception as error:  # for damaged images, decoders raise many kinds of exceptions
        raise ConfigError(f"{place}: cannot be read as an image: {error}. Repair or remove it.") from error


def pillow(module: str) -> Any:
    """Return a module of Pillow.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"task: images need Pillow, but its import failed ({error}). Install it: pip install twa-scale[data]."
        ) from error

"""Images and labels from npz files and folders."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twa_scale.base.inputs import named_errors, open_regular
from twa_scale.base.names import some
from twa_scale.base.paths import entries
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.classification import integer_labels
from twa_scale.run.tasks.data_files import READABLE, data_files, refuse_dangling
from twa_scale.run.tasks.task import Batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_npz(path: Path, prefix: str, where: str) -> tuple[Tensor, Tensor]:
    """Return the arrays `images` (N, ...) in the stored dtype and `labels` (N,) as int64.

    Args:
        path: the npz file.
        prefix: the prefix of both array names, such as "train_".
        where: the setting in error messages.

    Raises:
        ConfigError: the file cannot be read, an array is missing, or shapes or dtypes are not valid.
    """
    try:
        with os.fdopen(open_regular(path, ConfigError), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = (f"{prefix}images", f"{prefix}labels")
            missing = [name for name in names if name not in arrays]
            if missing:
                has = some(arrays.files)
                raise ConfigError(
                    f"{where}: {path} has no array {some(missing)}; it has {has}. Save it under that name."
                )
            images, labels = (torch.from_numpy(_native(arrays[name])) for name in names)
    except ConfigError:
        raise
    except Exception as error:  # for damaged archives, numpy, zipfile and zlib raise many kinds of exceptions
        raise ConfigError(f"{where}: {path} cannot be read as arrays: {error}. Write it with numpy.savez.") from error
    if images.dim() < 2 or len(images) != len(labels) or not len(images):
        raise ConfigError(
            f"{where}: {path} has images of shape {tuple(images.shape)} and labels of shape "
            f"{tuple(labels.shape)}. Give one label for each image, and at least one of both."
        )
    return images, integer_labels(labels, None, f"{where}: {path}")


def _native(array: Any) -> Any:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def class_names(root: Path, where: str) -> list[str]:
    """Return the names of the subfolders of an image folder, sorted. They are the classes. Hidden ones are left out.

    Raises:
        ConfigError: the folder has no subfolders or cannot be read, or a link in it is dangling.
    """
    with named_errors(ConfigError, READABLE):
        inside = entries(root) if root.is_dir() else []
        for path in inside:
            refuse_dangling(path)
        names = [path.name for path in inside if path.is_dir()]
    if not names:
        raise ConfigError(
            f"{where}: {root} holds no subfolders. Give a folder with one subfolder of images for each class."
        )
    return names


class ImageFolder:
    """Examples {"images": uint8 (3, size, size), "labels": int64 scalar} from one folder per class.

    An image is decoded on access, resized to cover the square, and cropped at the center.
    """

    def __init__(self, root: Path, classes: list[str], size: int, where: str) -> None:
        """List the images. Links are followed.

        Raises:
            ConfigError: there are no images, a folder cannot be read, a link is dangling, or Pillow is not installed.
        """
        try:
            self._image, self._ops = import_module("PIL.Image"), import_module("PIL.ImageOps")
        except ImportError as error:
            raise ConfigError(f"{where}: an image folder needs Pillow. Install it: pip install pillow.") from error
        with named_errors(ConfigError, READABLE):
            folders = [(root / name, i) for i, name in enumerate(classes) if (root / name).is_dir()]
            self._files = [(path, i) for folder, i in folders for path in data_files(folder, SUFFIXES)]
        self._size = size
        if not self._files:
            raise ConfigError(f"{where}: {root} has no images. Put {', '.join(SUFFIXES)} files into its subfolders.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Batch:
        path, label = self._files[index]
        try:
            with os.fdopen(open_regular(path, ConfigError), "rb") as file, self._image.open(file) as image:
                square = self._ops.fit(image.convert("RGB"), (self._size, self._size), self._image.Resampling.BILINEAR)
        except ConfigError:
            raise
        except Exception as error:  # for damaged images, decoders raise many kinds of exceptions
            raise ConfigError(f"{path}: cannot be read as an image: {error}. Repair or remove it.") from error
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        return {"images": pixels, "labels": torch.tensor(label)}

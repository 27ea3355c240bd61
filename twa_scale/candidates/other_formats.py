"""Names and contents of files of weights in formats that are not read, for messages."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from twa_scale.base.urls import Url

_EXPORT = "Give the weights of the PyTorch model from which it was exported"
_CONVERT = "Load it with the library that wrote it, and save the tensors as safetensors"
_AS_TORCH = "Convert it to PyTorch, and save that model"
_ORIGINAL = "Give the weights from which it was converted"
_EXTRACT = "Extract it, and give the directory or the file of weights in it"
_WEB_PAGE = ("a web page, not weights; its download has failed", "Download it again")
_FORMATS_BY_NAME = (
    ("*.gguf", "a file of llama.cpp (GGUF)", _ORIGINAL),
    ("*.ggml", "a file of llama.cpp (GGML)", _ORIGINAL),
    (
        "*.msgpack",
        "a file of Flax (JAX)",
        "Convert it to PyTorch, and save that model with save_pretrained or torch.save",
    ),
    ("_CHECKPOINT_METADATA", "a checkpoint of Orbax (JAX)", _AS_TORCH),
    ("manifest.ocdbt", "a checkpoint of Orbax (JAX)", _AS_TORCH),
    ("*.h5", "a file of Keras or TensorFlow (HDF5)", _AS_TORCH),
    ("*.hdf5", "a file of Keras or TensorFlow (HDF5)", _AS_TORCH),
    ("*.keras", "a file of Keras", _AS_TORCH),
    ("*.ckpt.index", "a checkpoint of TensorFlow", _AS_TORCH),
    ("*.ckpt-*.index", "a checkpoint of TensorFlow", _AS_TORCH),
    ("*.pdparams", "a file of PaddlePaddle", _CONVERT),
    ("*.npz", "an archive of numpy arrays", _CONVERT),
    ("*.npy", "a numpy array", _CONVERT),
    ("*.ot", "a file of tch (Rust)", _CONVERT),
    ("*.pkl", "a plain pickle", _CONVERT),
    ("*.pickle", "a plain pickle", _CONVERT),
    ("*.onnx", "an exported program (ONNX)", _EXPORT),
    ("*.tflite", "an exported program (TFLite)", _EXPORT),
    ("*.mlmodel", "an exported program (Core ML)", _EXPORT),
    ("*.pte", "an exported program (ExecuTorch)", _EXPORT),
    ("*.pt2", "an exported program (torch.export)", _EXPORT),
    ("*.nemo", "an archive of NeMo", "Extract it (`tar -xf`), and give the directory or the file of weights in it"),
    ("*.tar", "an archive", _EXTRACT),
    ("*.tar.gz", "an archive", _EXTRACT),
    ("*.zip", "an archive", _EXTRACT),
    (
        "*.distcp",
        "a part of a checkpoint of torch.distributed.checkpoint, whose `.metadata` is not there",
        "Copy that "
        "hidden file too, or leave this candidate out: the file is written last, so the checkpoint may be incomplete",
    ),
)
"""Patterns of names, the format of such a file, and the fix."""

_ZIP = b"PK\x03\x04"
_ALSO_TORCH = (".tar", ".pkl", ".pickle")
"""Names of other formats under which programs also write with torch.save, which makes a zip archive."""

_FORMATS_BY_CONTENT = (
    (b"version ", "a Git LFS pointer, not the weights", "Fetch them with `git lfs pull`"),
    (b"gguf", "a file of llama.cpp (GGUF)", _ORIGINAL),
    (b"\x89hdf", "a file of Keras or TensorFlow (HDF5)", _AS_TORCH),
    (b"<!doctyp", *_WEB_PAGE),
    (b"<html", *_WEB_PAGE),
    (b"<?xml", *_WEB_PAGE),
)
"""The first bytes of files, in lower case, the format of such a file, and the fix."""


def named_format(paths: Iterable[Path | Url]) -> str | None:
    """Return the format and the fix for the first file with the name of a format that is not read, or None.

    The content of local files is also checked, because torch.save writes files of any name, such as `model.tar`.
    """
    for path in paths:
        for pattern, format_name, fix in _FORMATS_BY_NAME:
            if fnmatch(path.name.lower(), pattern.lower()):
                if path.suffix.lower() in _ALSO_TORCH and _is_zip(path):
                    return (
                        f"{path.name!r} is an archive as torch.save writes it, and files of this name are not read. "
                        f"Rename it to {path.name.removesuffix(path.suffix) + '.pt'!r}."
                    )
                return f"{path.name!r} is {format_name}, and this format is not read. {fix}."
    return None


def _is_zip(path: Path | Url) -> bool:
    if not isinstance(path, Path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except OSError:
        return False


def format_of(head: bytes | bytearray, size: int, *, safetensors: bool) -> str | None:
    """Return the format and the fix for a file whose content does not match its suffix, or None if it is not known.

    Args:
        head: the first 16 bytes of the file, or all if there are fewer.
        size: the size of the file in bytes.
        safetensors: whether the file has the name of a safetensors file, not of a file of torch.save.
    """
    if not size:
        return "is empty. Copy it again, or leave this candidate out."
    for start, format_name, fix in _FORMATS_BY_CONTENT:
        if head.lower().startswith(start):
            return f"is {format_name}. {fix}."
    is_archive = head.startswith(_ZIP)
    if safetensors and is_archive:
        return "is an archive as torch.save writes it, with the name of a safetensors file. Name it .pt or .bin."
    header = int.from_bytes(head[:8], "little")
    if not safetensors and head[8:9] == b"{" and 0 < header <= size - 8:
        return "is a safetensors file with the name of a file of torch. Name it .safetensors."
    return None

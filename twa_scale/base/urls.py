"""Files that are named by a URL, on object stores and other file systems of fsspec."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from twa_scale.errors import CandidateError, TwaError

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_PASSWORD = re.compile(r"://[^/@]*@")
_FILE_SCHEMES = ("file", "local")
_WEB = ("http", "https")
# Entries of file systems, in addition to the size, of which at least one changes when a file is written again.
_VERSIONS = (
    *("ETag", "etag", "e_tag", "md5Hash", "content_md5", "Content-MD5", "Digest", "generation", "VersionId"),
    *("version_id", "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created"),
)

Identity = tuple[int, tuple[str, ...]]
"""The size of a file in bytes, and values that change when it is written again."""


def is_url(value: object) -> bool:
    """Return whether a text is a URL, such as `s3://bucket/run` or `file:///run`."""
    return _URL.match(str(value)) is not None


def local_path(url: str) -> Path | None:
    """Return the path of a URL such as `file:///run`, or None for other URLs."""
    match = _URL.match(url)
    return Path(url[match.end() :]) if match and match["scheme"].lower() in _FILE_SCHEMES else None


def absolute(label: str) -> str:
    """Return a path without links and `..`, or a URL unchanged."""
    return label if is_url(label) else str(Path(label).resolve())


@dataclass(frozen=True)
class Url:
    """A file or directory at a URL, with methods that have the names of those of `pathlib.Path`.

    The file system of fsspec finds credentials as its library does. Lists of directories are not cached.
    """

    url: str
    kind: str = field(default="", compare=False)
    """`file` or `directory`, if a list of a directory contained it."""

    def __str__(self) -> str:
        """Return the URL without a password, and without the query of a web server, which may be signed."""
        text = self.url.partition("?")[0] if self._is_web else self.url
        return _PASSWORD.sub("://", text)

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last component of the path, without the query of a web server."""
        path = urlsplit(self.url).path if self._is_web else self.url
        return path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Url":
        """The directory that contains it."""
        return Url(self.url.rstrip("/").rpartition("/")[0])

    @property
    def parents(self) -> Sequence["Url"]:
        """The directories above it, nearest first."""
        result = [self.parent]
        while result[-1].url.rstrip("/").partition("://")[2].count("/"):
            result.append(result[-1].parent)
        return result

    @property
    def _is_web(self) -> bool:
        return self.url.lower().startswith(tuple(f"{scheme}://" for scheme in _WEB))

    def is_file(self) -> bool:
        """Return whether it exists and is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether it exists and is a directory."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """Return whether it exists."""
        return bool(self._kind())

    def is_symlink(self) -> bool:
        """Return False, because URLs have no links."""
        return False

    def _kind(self) -> str:
        if self.kind:
            return self.kind
        try:
            info = self._info()
        except FileNotFoundError:
            return ""
        # A web server answers the name of a directory with a page of its content.
        is_page = info.get("mimetype") == "text/html" and self.suffix.lower() not in (".html", ".htm")
        return "directory" if is_page else str(info["type"])

    def iterdir(self) -> Iterator["Url"]:
        """Yield the entries of the directory.

        Raises:
            CandidateError: the directory cannot be listed.
        """
        with self.errors():
            fs, path = self._opened()
            listing = fs.ls(path, detail=True)
        for info in listing:
            # Object stores also list the directory itself if it was created.
            if info["name"].rstrip("/") != path.rstrip("/"):
                yield self._of(fs, info["name"], info)

    def matches(self) -> list["Url"]:
        """Return the URLs that match the URL as a pattern.

        Raises:
            CandidateError: the file system cannot be read.
        """
        with self.errors():
            fs, path = self._opened()
            listing: dict[str, Any] = fs.glob(path, detail=True)
        return [self._of(fs, name, info) for name, info in listing.items()]

    def is_pattern(self) -> bool:
        """Return whether it has the special characters of a pattern. In a URL of a web server, `?` starts a query."""
        return has_magic(self.url.replace("?", "") if self._is_web else self.url)

    def identity(self) -> Identity:
        """Return a value that changes if the file is written again.

        Raises:
            CandidateError: the file does not exist, or its size is not known.
        """
        with self.errors():
            info = self._info()
        if not isinstance(info.get("size"), int) or info.get("partial") is False:
            raise CandidateError(
                f"{self}: the server does not give its size, or does not send ranges of bytes, so it cannot be read by "
                "slices. Download it, and give its path."
            )
        return info["size"], tuple(str(info[key]) for key in _VERSIONS if info.get(key) is not None)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of a range, or fewer if the file is shorter.

        Raises:
            CandidateError: the file cannot be read.
        """
        with self.errors():
            fs, path = self._opened()
            content: bytes = fs.cat_file(path, start=start, end=stop)
        return content

    def read_bounded(self, limit: int) -> bytes:
        """Return the content of a file of at most `limit` bytes.

        Raises:
            CandidateError: the file cannot be read, or is larger.
        """
        size, _ = self.identity()
        if size > limit:
            raise CandidateError(f"{self}: is larger than {limit} bytes, the maximum for such a file.")
        return self.read(0, size) if size else b""

    def _opened(self) -> tuple[Any, str]:
        """Return the file system, and the path in it."""
        import fsspec  # imported here, because it takes a tenth of a second

        fs, path = fsspec.core.url_to_fs(self.url)
        fs.invalidate_cache()
        return fs, path

    def _info(self) -> dict[str, Any]:
        with self.errors(FileNotFoundError):
            fs, path = self._opened()
            info: dict[str, Any] = fs.info(path)
        return info

    def _of(self, fs: Any, name: str, info: dict[str, Any]) -> "Url":
        url = name if is_url(name) else f"{self.url.partition('://')[0]}://{name.lstrip('/')}"
        known = not self._is_web or info["type"] == "directory"  # fsspec treats a link without a slash as a file
        return Url(url.rstrip("/"), str(info["type"]) if known else "")

    @contextmanager
    def errors(self, *but: type[Exception]) -> Iterator[None]:
        """Replace errors of a `with` block, but for some types, by a CandidateError that names the URL."""
        try:
            yield
        except TwaError:
            raise
        except but:
            raise
        except (ImportError, ValueError) as error:
            from fsspec import available_protocols

            scheme = self.url.partition("://")[0].lower()
            package = _PACKAGES.get(scheme)
            if package is None and scheme in available_protocols():
                raise self._error(error) from error
            fix = f"Install `{package}`" if package else "Give a URL of a file system of fsspec"
            raise CandidateError(
                f"{self}: {error}. {fix}, or download the candidates, and give their paths."
            ) from error
        except Exception as error:  # each library raises its own errors
            raise self._error(error) from error

    def _error(self, error: Exception) -> CandidateError:
        match error:
            case FileNotFoundError():
                reason = "there is no such file, directory or bucket"
            case PermissionError():
                reason = (
                    "the storage refuses access. Check the credentials of this process, and the rights that they give"
                )
            case _:
                reason = f"cannot be read: {type(error).__name__}"
        message = " ".join(str(error).replace(self.url, str(self)).split())[:300].rstrip(".")
        return CandidateError(f"{self}: {reason}{f' ({message})' if message else ''}.")

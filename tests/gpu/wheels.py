"""Wheels for a GPU machine without a network.

`collect FOLDER` downloads them, in the versions of this environment. `install FOLDER` installs the packages that the
machine does not have, without a network, and prints the directory. Torch and Triton must be installed there.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BINARY = [
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "hjson", "py-cpuinfo"),
    *("safetensors", "transformers", "tokenizers", "pytest", "pluggy", "iniconfig"),
]
PURE = ["deepspeed", "fairscale"]
"""Packages that are published as source distributions only. Their extensions are not compiled."""
PYTHON = "3.12"
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"]
MEGABYTES = 64
"""The maximum size of all wheels, in 10^6 bytes."""


def collect(folder: Path) -> None:
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    pinned = [f"{name}=={version(name)}" for name in BINARY]
    subprocess.run([*pip, "download", *quiet, *options, f"--dest={wheels}", *pinned], check=True)
    for name in PURE:
        command = [*pip, "wheel", *quiet, "--no-build-isolation", f"--wheel-dir={wheels}", f"{name}=={version(name)}"]
        subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) / 1e6
    print(f"{wheels}: {len(list(wheels.iterdir()))} wheels, {size:.1f} MB")
    if size > MEGABYTES:
        sys.exit(f"{wheels} has more than {MEGABYTES} MB")


def install(folder: Path) -> None:
    site = folder / "site"
    missing = [str(wheel) for wheel in sorted((folder / "wheels").glob("*.whl")) if not _has(wheel.name.split("-")[0])]
    if missing:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", *options, f"--target={site}", *missing]
        subprocess.run(command, check=False, stdout=sys.stderr)
    print(site.absolute())


def _has(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    {"collect": collect, "install": install}[sys.argv[1]](Path(sys.argv[2]))

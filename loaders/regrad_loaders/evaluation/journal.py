"""The answers of an evaluation as they are given, in a file: a run that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regrad_loaders.evaluation.results import Prediction, Stored
from regrad_qdrant.errors import DataError

# Settings that change no answer (a batch in 16 bits may, by rounding, as other hardware does), or stand beside each.
FREE = ("modes", "against", "batch", "sweep", "top_k")


def digest(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    hashed = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            hashed.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return hashed.hexdigest()[:16]


class Journal:
    """One JSON line an answer, below a line with the settings that all of them were given under.

    Args:
        path: of the file; it is made where there is none.

    Raises:
        DataError: for a file of other settings, or of something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        own = json.loads(json.dumps({name: value for name, value in settings.items() if name not in FREE}))
        self._known: dict[tuple[str, int, str], Prediction] = {}
        self.stored: dict[str, Stored] = {}  # by mode
        whole = 0
        if path.is_file():
            whole = self._read(path, own)
        self._file = path.open("r+b" if path.is_file() else "wb")
        self._file.truncate(whole)  # a line that was cut off by the end of the run before
        self._file.seek(whole)
        if not whole:
            self._write({"settings": own})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def known(self, names: Mapping[str, str], top_k: int) -> dict[tuple[str, str], Prediction]:
        """By mode and question, what was answered with this k.

        Args:
            names: of each mode as it runs, the name under which it is written.
        """
        runs = {name: run for run, name in names.items()}
        return {
            (runs[mode], key): replace(found, mode=runs[mode])
            for (mode, k, key), found in self._known.items()
            if k == top_k and mode in runs
        }

    def add(self, prediction: Prediction, mode: str, top_k: int) -> None:
        """Write an answer down, under the mode's own name."""
        self._write({"top_k": top_k} | asdict(prediction) | {"mode": mode})

    def keep(self, mode: str, stored: Stored) -> None:
        """Write down what a mode keeps of each document."""
        self.stored[mode] = stored
        self._write({"mode": mode, "stored": asdict(stored)})

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def _read(self, path: Path, own: Mapping[str, Any]) -> int:
        """Read what is there; returns how many bytes of it are whole lines."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        if not lines:
            if content and not content.startswith(b'{"settings"'[: len(content)]):
                raise DataError(f"{path} is no journal of an evaluation: choose another --resume file")
            return 0
        try:
            there = json.loads(lines[0])["settings"]
            for line in lines[1:]:
                row = json.loads(line)
                if "stored" in row:
                    self.stored[row["mode"]] = Stored(**row["stored"])
                    continue
                top_k = row.pop("top_k")
                row["answers"], row["hits"] = tuple(row["answers"]), tuple(row["hits"])
                prediction = Prediction(**row)
                self._known[prediction.mode, top_k, prediction.id] = prediction
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no journal of an evaluation: {error!r}") from error
        # A setting that a file of an older version does not have was off.
        names = own.keys() | there.keys()
        differing = sorted(name for name in names if (own.get(name) or None) != (there.get(name) or None))
        if differing:
            raise DataError(f"{path} is of other settings ({', '.join(differing)}): choose another --resume file")
        return whole

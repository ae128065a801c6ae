"""The folder of a run: what is in it, whose it is, and who may write into it.

| file | content |
|---|---|
| options.json | the options, all filled in, and the data's hash: what makes it this run |
| config.json, model.safetensors | the model, for ``manyheads.models.load_model`` |
| tokenizer.json or data.json | what turns text or series into the model's input |
| checkpoint.safetensors | all that training goes on from |
| metrics.csv | one row every few steps and at every evaluation |
| results.json | the final figures and what they were measured with |
| teacher.safetensors, student | of ``train distil``: outputs kept, a folder for transformers |
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

from manyheads.train.files import TEMPORARY, write_json
from manyheads.train.options import FREE, TrainOptions

__all__ = ["RunFolder", "load_options"]

O = TypeVar("O", bound=TrainOptions)  # noqa: E741
_FILES = frozenset(
    (
        "options.json", "config.json", "model.safetensors", "tokenizer.json", "data.json",
        "checkpoint.safetensors", "metrics.csv", "results.json", "student", "teacher.safetensors",
        ".lock",
    )
)  # fmt: skip


def load_options(options: O) -> O:
    """Return the options that a command means: filled in by the preset, or by ``--resume``.

    Raises:
        ValueError: values that do not fit each other; a folder to resume that is no run of this
            recipe; other options beside ``--resume`` than the run's.
    """
    if options.resume is None:
        return options.resolved()
    if options.out or options.restart:
        raise ValueError("--resume takes neither --out nor --restart: leave them away")
    stored = type(options).from_dict(_read_options(Path(options.resume), options)["options"])
    given = _given(options)
    for name, value in given.items():
        if name not in FREE and value != getattr(stored, name):
            raise ValueError(
                f"--resume goes on with the run's own {name} {getattr(stored, name)!r}, not "
                f"{value!r}: leave it away, or start another run with --out"
            )
    free = {name: value for name, value in given.items() if name in FREE}
    return stored.replace(**free | {"out": options.resume, "resume": None})


def _given(options: TrainOptions) -> dict[str, Any]:
    fields = type(options).__dataclass_fields__
    values = {name: getattr(options, name) for name in fields}
    return {n: v for n, v in values.items() if v != fields[n].default and n != "preset"}


def _read_options(folder: Path, options: TrainOptions) -> dict[str, Any]:
    path = folder / "options.json"
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{str(folder)!r} holds no run (no options.json): give the folder of one"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if stored.get("recipe") != options.recipe:
        raise ValueError(
            f"{str(folder)!r} holds a run of 'train {stored.get('recipe')}', not of "
            f"'train {options.recipe}': give another folder"
        )
    return stored


class RunFolder:
    """The folder of one run.

    ``RunFolder(options)`` only checks, so that it can be called before any work; :meth:`open`
    makes the folder and takes the lock, in the one process that writes.

    Raises:
        ValueError: the folder cannot be written, holds other files, or another run.
    """

    def __init__(self, options: TrainOptions) -> None:
        assert options.out is not None
        self.options, self.path = options, Path(options.out)
        self._lock: int | None = None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out {options.out!r} is a file: give a folder")
        _check_writable(self.path)
        if not self.path.is_dir():
            return
        if (self.path / "options.json").is_file():
            if not options.restart:
                self._check_same()
        elif not all(_ours(p) for p in self.path.iterdir()):
            raise ValueError(
                f"out {options.out!r} holds other files and no run: give an empty or a new folder"
            )

    @property
    def checkpoint(self) -> Path:
        """Where training goes on from."""
        return self.path / "checkpoint.safetensors"

    @property
    def results(self) -> Path:
        """The final figures; there once the run is finished."""
        return self.path / "results.json"

    def open(self, data: dict[str, Any]) -> Self:
        """Make the folder, take its lock and write the options.

        Args:
            data: what identifies the data, such as its hash.

        Raises:
            ValueError: another process trains in it, or the data are not those it began with.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.options.restart:
                self._delete()
        except OSError as error:
            raise ValueError(f"out {str(self.path)!r} cannot be written: {error}") from None
        described = {"recipe": self.options.recipe, "options": self.options.to_dict(), "data": data}
        path = self.path / "options.json"
        if path.is_file():
            stored = json.loads(path.read_text())["data"]
            for key, value in data.items():
                if stored.get(key) != value:
                    raise ValueError(
                        f"the data have changed since the run began ({key}: {stored.get(key)} is "
                        f"now {value}): give its data again, or --restart"
                    )
        else:
            write_json(path, described)
        return self

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_same(self) -> None:
        stored = type(self.options).from_dict(_read_options(self.path, self.options)["options"])
        before, now = stored.identity(), self.options.identity()
        changed = [k for k in now if before.get(k) != now[k]]
        if changed:
            listed = ", ".join(f"{k} {before.get(k)!r} is now {now[k]!r}" for k in changed)
            raise ValueError(
                f"out {str(self.path)!r} holds another run ({listed}): give another folder, "
                "--resume to go on with that run, or --restart to delete it"
            )

    def _take_lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"another process is training in {str(self.path)!r}: wait for it, or give another "
                "folder"
            ) from None

    def _delete(self) -> None:
        for path in self.path.iterdir():
            if _ours(path) and path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _ours(path: Path) -> bool:
    events = path.name.startswith("events.out.tfevents.")
    return path.name in _FILES or path.name.startswith(TEMPORARY) or events


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"out {str(folder)!r}: {str(existing)!r} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"out {str(folder)!r} cannot be written ({str(existing)!r} is read-only): give a "
            "folder of your own"
        )

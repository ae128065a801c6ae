"""What `choose` knows so far, as data: units of work, rows, the answer, in one results.json.

Every unit is written to disk as soon as it is done, so an interrupted run loses at most one. The
file holds no host name, no user name and no path. The rows are frozen configs: plain JSON types.

Three stages fill a `Results`, each in a module of its own with one function:

- `measure.measure_cost(results, seconds=..., progress=...)`: cost units, then the cost rows;
- `quality.measure_quality(results, seconds=..., progress=...)`: quality units and rows;
- `answer.decide(results) -> Answer`, from the rows alone, as often as one likes.

A stage skips the units that are there (`results.has(key)`), puts each new one at once
(`results.put(unit)`), lets KeyboardInterrupt through after keeping what it has, and calls
``progress(share, text)`` with its share done, 0 to 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manyheads._version import __version__
from manyheads.choose.workload import Workload
from manyheads.config import Config

if TYPE_CHECKING:
    from manyheads.data import TextSource
    from manyheads.data.images import ImageData

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "Answer",
    "CostRow",
    "Progress",
    "QualityRow",
    "Results",
    "Summary",
    "Unit",
]

SCHEMA = 1
FILE_NAME = "results.json"

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit(Config):
    """One piece of work, done or not.

    Attributes:
        key: "cost/train/gla/4096", "quality/text/gla": unique, stable over runs.
        status: measured; predicted (a figure from the closed forms in its place); skipped (no
            figure); failed (it raised).
        figures: what was measured, plain JSON types; raw samples included.
        seconds: wall time that it took.
        reason: why it is not measured.
        cause: the same in a word: time (left over from the budget), memory, or error.
    """

    key: str
    status: Literal["measured", "predicted", "skipped", "failed"]
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    cause: Literal["time", "memory", "error"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostRow(Config):
    """Cost of one layer of one mechanism (or of a hybrid's layers on average) at one length.

    Times are medians in seconds with quartiles; None: not part of the workload, or not known.

    Attributes:
        mixer: mechanism, or hybrid as it was written.
        length: N.
        forward_seconds, forward_lower, forward_upper: a forward pass over N tokens.
        train_seconds, train_lower, train_upper: forward and backward.
        decode_seconds, decode_lower, decode_upper: one more token after N.
        state_bytes: state or cache of a layer after N tokens.
        peak_bytes: peak tensor memory above the inputs: of forward and backward if the workload
            trains, else of the forward pass.
        flops: of a forward pass, from the closed form.
        counted_flops: the same from the counter (None: not counted).
        share: FLOP/s of the forward pass over this machine's matrix-product rate.
        predicted: the fields above that are predicted, not measured.
        reasons: why, for each cause once.
    """

    mixer: str
    length: int
    forward_seconds: float | None = None
    forward_lower: float | None = None
    forward_upper: float | None = None
    train_seconds: float | None = None
    train_lower: float | None = None
    train_upper: float | None = None
    decode_seconds: float | None = None
    decode_lower: float | None = None
    decode_upper: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    counted_flops: int | None = None
    share: float | None = None
    predicted: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary(Config):
    """What the lengths together say about one mixer.

    Attributes:
        mixer: mechanism or hybrid.
        forward_exponent, train_exponent: growth of the measured time, N ** exponent, fitted over
            the upper half of the lengths; None: fewer than two were measured.
        crossover: what is compared in `crossover_in`: from which length on it beats softmax.
        crossover_kind: at (see `crossover`), everywhere (faster at all lengths measured), never
            (slower at the longest), reference (it is softmax), unknown.
        crossover_in: forward or train.
        up_to: the longest length that the comparison covers.
    """

    mixer: str
    forward_exponent: float | None = None
    train_exponent: float | None = None
    crossover: float | None = None
    crossover_kind: Literal["at", "everywhere", "never", "reference", "unknown"] = "unknown"
    crossover_in: Literal["forward", "train"] = "train"
    up_to: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow(Config):
    """How well a small model with one mixer did at one task.

    Attributes:
        mixer: mechanism or hybrid.
        task: text, images, recall, copy or listops.
        regime: what was equal for all: seconds of training, or tokens.
        metric: bits_per_byte (less is better) or accuracy (0 to 1).
        value: at the end, on held-out data.
        spread: half-width of what chance may have added, None: not known.
        chance: the value of guessing, None: not meaningful.
        seconds, tokens: of training.
        parameters: of the model.
        state_bytes: of the whole model after the task's length, or the text window.
        curve: (seconds, tokens, value) along the training.
        details: anything else, plain JSON types.
    """

    mixer: str
    task: str
    regime: Literal["seconds", "tokens"]
    metric: Literal["bits_per_byte", "accuracy"]
    value: float | None
    spread: float | None = None
    chance: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    parameters: int = 0
    state_bytes: int | None = None
    curve: tuple[tuple[float, int, float], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Config):
    """The recommendation.

    Attributes:
        best: the recommended mixer, None: nothing was measured.
        reasons: two sentences.
        front: the mixers that no other beats in everything, best first.
        ties: mixers that the measured spread does not tell from the best.
        loses: cases in which the recommended one, or a favourite, loses, a sentence each.
        partial: whether units were missing when it was given.
        scores: by mixer, what the answer was computed from.
    """

    best: str | None
    reasons: tuple[str, ...] = ()
    front: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()
    partial: bool = False
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)


class Results:
    """Everything that is known for one workload on one machine; see the module's text.

    Attributes:
        workload: what it is for.
        folder: where results.json is kept, None: nowhere.
        key: hash of the workload, the data, the library and the machine; equal keys resume.
        machine: facts and the measured matrix-product rate, ``machine["matmul_flops"]``.
        data: name, sha256 and description of the text (and its bytes) or images, or None.
        units: by key, in the order they were done.
        cost, summary, quality: rows.
        answer: None until decided.
        notes: lines about the whole run (mechanisms left out and why).
        sessions: start, seconds and end of each run that contributed.
    """

    def __init__(
        self,
        workload: Workload,
        machine: dict[str, Any],
        source: TextSource | ImageData | None = None,
    ) -> None:
        self.workload = workload
        self.machine = dict(machine)
        self.source = source
        self.data = None if source is None else _data_facts(source, workload)
        self.key = _key(workload, self.machine, self.data)
        self.folder: Path | None = None
        self.units: dict[str, Unit] = {}
        self.cost: list[CostRow] = []
        self.summary: list[Summary] = []
        self.quality: list[QualityRow] = []
        self.answer: Answer | None = None
        self.notes: list[str] = []
        self.sessions: list[dict[str, Any]] = []
        self.complete = False
        self._clock = time.perf_counter()

    def has(self, key: str) -> bool:
        """Return whether the unit is done, or was given up for good."""
        return key in self.units

    def put(self, *units: Unit) -> None:
        """Keep units and write the file."""
        self.units.update((unit.key, unit) for unit in units)
        self.save()

    def measured(self, prefix: str = "") -> list[Unit]:
        """Return the measured units whose key begins so."""
        return [
            u for u in self.units.values() if u.status == "measured" and u.key.startswith(prefix)
        ]

    def spent(self, prefix: str = "") -> float:
        """Return the wall seconds that the units with such keys took."""
        return sum(u.seconds for u in self.units.values() if u.key.startswith(prefix))

    @property
    def skipped(self) -> list[Unit]:
        """The units without a measured figure, each with its reason."""
        return [u for u in self.units.values() if u.status != "measured"]

    def put_quality(self, *rows: QualityRow) -> None:
        """Keep quality rows; one of the same mixer, task and regime is replaced. Saves."""

        def name(row: QualityRow) -> tuple[str, str, str]:
            return row.mixer, row.task, row.regime

        new = {name(row) for row in rows}
        self.quality = [r for r in self.quality if name(r) not in new] + list(rows)
        self.save()

    def cost_row(self, mixer: str, length: int | None = None) -> CostRow | None:
        """Return the cost row of a mixer at a length (the workload's unless given)."""
        length = self.workload.length if length is None else length
        return next((r for r in self.cost if r.mixer == mixer and r.length == length), None)

    def begin(self) -> None:
        """Open a session: from here on the time counts."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.sessions.append({"started": started, "seconds": 0.0, "end": "running"})
        self._clock = time.perf_counter()

    def end(self, how: Literal["complete", "interrupted", "failed"]) -> None:
        """Close the session and save."""
        self.sessions[-1] |= {"seconds": time.perf_counter() - self._clock, "end": how}
        self.complete = how == "complete"
        self.save()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; numbers that are not finite become None."""
        workload = self.workload.to_dict()
        workload["data"] = None if self.data is None else self.data["name"]
        values = {
            "schema": SCHEMA,
            "kind": "manyheads.choose",
            "version": __version__,
            "key": self.key,
            "complete": self.complete,
            "workload": workload | {"candidates": list(self.workload.candidates)},
            "machine": self.machine,
            "data": self.data,
            "seeds": {"all": self.workload.seed},
            "sessions": self.sessions,
            "seconds": {
                "cost": self.spent("cost/"),
                "quality": self.spent("quality/"),
                "total": sum(s["seconds"] for s in self.sessions),
            },
            "answer": None if self.answer is None else self.answer.to_dict(),
            "summary": _dicts(self.summary),
            "cost": _dicts(self.cost),
            "quality": _dicts(self.quality),
            "skipped": [
                {"unit": u.key, "cause": u.cause, "reason": u.reason} for u in self.skipped
            ],
            "notes": self.notes,
            "units": _dicts(self.units.values()),
        }
        return _finite(values)

    def to_json(self) -> str:
        """Return the whole as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, folder: Path | None = None) -> None:
        """Write results.json whole or not at all, to ``folder`` or to the folder of this run."""
        folder = self.folder if folder is None else folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / FILE_NAME, self.to_json())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: another schema, or no results of `choose`.
        """
        if values.get("kind") != "manyheads.choose" or values.get("schema") != SCHEMA:
            raise ValueError(
                f"these are no results of schema {SCHEMA} "
                f"(kind {values.get('kind')!r}, schema {values.get('schema')!r}): measure anew"
            )
        workload = dict(values["workload"])
        workload.pop("candidates")
        new = cls(Workload.from_dict(workload), values["machine"])
        new.data, new.key = values["data"], values["key"]
        new.units = {u["key"]: Unit.from_dict(u) for u in values["units"]}
        new.cost = [CostRow.from_dict(r) for r in values["cost"]]
        new.summary = [Summary.from_dict(r) for r in values["summary"]]
        new.quality = [QualityRow.from_dict(r) for r in values["quality"]]
        new.answer = None if values["answer"] is None else Answer.from_dict(values["answer"])
        new.notes, new.sessions = list(values["notes"]), list(values["sessions"])
        new.complete = values["complete"]
        return new

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read the results.json of a folder (or that file).

        Raises:
            ValueError: there is none, or it is of another schema.
        """
        path = folder / FILE_NAME if folder.is_dir() else folder
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(f"{str(folder)!r} holds no {FILE_NAME}") from None
        except ValueError:
            raise ValueError(f"{str(path)!r} is no JSON: it was not written by choose") from None
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} holds no results of choose")
        return cls.from_dict(values)

    def keep_in(self, folder: Path, *, fresh: bool = False) -> bool:
        """Keep the results in a folder from now on, taking up what is there for the same key.

        Results of another workload found there are put aside as results-<key>.json, not lost,
        and taken up again when their workload comes back.

        Returns:
            Whether earlier units were taken up.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        found, aside = folder / FILE_NAME, folder / f"results-{self.key}.json"
        for path in (found, aside):
            earlier = _load_or_none(path)
            if earlier is not None and earlier.key == self.key and not fresh:
                self._take_up(earlier)
                break
        if (other := _load_or_none(found)) is not None and other.key != self.key:
            found.rename(folder / f"results-{other.key}.json")
        self.save()
        aside.unlink(missing_ok=True)
        return bool(self.units)

    def _take_up(self, earlier: Results) -> None:
        for name in ("units", "cost", "summary", "quality", "answer", "notes", "sessions"):
            setattr(self, name, getattr(earlier, name))
        self.complete = earlier.complete
        if "matmul_flops" in earlier.machine:
            self.machine["matmul_flops"] = earlier.machine["matmul_flops"]


def _load_or_none(path: Path) -> Results | None:
    try:
        return Results.load(path) if path.is_file() else None
    except (ValueError, KeyError, TypeError):
        return None


def _data_facts(source: TextSource | ImageData, workload: Workload) -> dict[str, Any]:
    from manyheads.data import TextSource

    if not isinstance(source, TextSource):
        given = workload.data or ""
        return {
            "name": given if given.startswith("builtin:") else source.name,
            "sha256": source.sha256,
            "description": f"{source.name}, {len(source.train):,} training and "
            f"{len(source.test):,} held-out images, {len(source.class_names)} classes",
        }
    name = source.name if source.name.startswith("builtin:") else Path(source.name).name
    return {
        "name": name,
        "sha256": source.sha256,
        "bytes": len(source),
        "description": source.description,
    }


def _key(workload: Workload, machine: dict[str, Any], data: dict[str, Any] | None) -> str:
    """Hash what the figures depend on; where the text lies does not matter, what it says does."""
    facts = {
        "schema": SCHEMA,
        "version": __version__,
        "workload": workload.to_dict() | {"data": data and data["sha256"]},
        "candidates": workload.candidates,
        "machine": {k: machine.get(k) for k in ("cpu", "architecture", "torch", "threads")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".json.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _dicts(rows: Iterable[Config]) -> list[dict[str, Any]]:
    return [row.to_dict() for row in rows]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value

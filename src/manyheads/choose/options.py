"""The flags of `manyheads choose`; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from manyheads.config import Config

__all__ = ["ChooseOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChooseOptions(Config):
    """Options of `manyheads choose`. Without any flag that describes a workload, the built-in
    example is run: length 4096, 8 heads of 64, causal, training and decoding, on builtin:python.

    Attributes:
        grid: rows x columns of a map, "56x56": compare token mixers on it instead of sequences
        dim: channels of the map (default: 96)
        length: number of tokens the answer is for (default: 4096, or the model's)
        lengths: lengths to measure at (default: a ladder of doublings up to --length)
        heads: query heads (default: 8; with --grid one for 32 channels)
        kv_heads: key-value heads, a divisor of --heads (default: as many)
        head_dim: width of a head (default: 64)
        causal: whether a token sees only earlier ones (default: it does)
        phases: what the workload does: train, prefill, decode (default: train,decode; without
          --causal: train)
        batch: sequences at once (default: 1)
        dtype: float32, bfloat16, float16 or float64 (default: float32)
        mixers: mechanisms to compare, "softmax,gla"; with a count it is one hybrid of layers,
          "gla*3,softmax"; several by ";" or by giving the flag again (default: all that fit);
          with --grid token mixers, "pool,attention,flow"
        data: text for the quality side: a file, a folder, builtin:python or builtin:kjv; with
          --grid labelled images: a folder, builtin:digits or builtin:emoji
        probes: small tasks for the quality side: recall, copy, listops
        layers: layers of the small models of the quality side (default: 2)
        model: folder with a transformers config.json to take the shapes from
        budget: time for everything, such as 90s, 5m or 1h
        seed: of data, weights and order
        threads: threads inside operators (default: as torch decides)
        out: folder for results.json, report.html and the pictures; the same command resumes there
        json: print results.json on standard output and nothing else
        fresh: start anew instead of resuming
    """

    grid: str | None = None
    dim: int | None = None
    length: int | None = None
    lengths: tuple[int, ...] = ()
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool | None = None
    phases: tuple[str, ...] = ()
    batch: int | None = None
    dtype: str | None = None
    mixers: tuple[str, ...] = field(default=(), metadata={"whole": True})
    data: str | None = None
    probes: tuple[str, ...] = ()
    layers: int | None = None
    model: str | None = None
    budget: str = "5m"
    seed: int = 0
    threads: int | None = None
    out: str = "manyheads-choose"
    json: bool = False
    fresh: bool = False

    @property
    def describes_workload(self) -> bool:
        """Whether any flag says what the workload is."""
        names = (
            "grid", "dim", "length", "lengths", "heads", "kv_heads", "head_dim", "causal", "phases",
            "batch", "dtype", "data", "probes", "model",
        )  # fmt: skip
        return any(getattr(self, name) not in (None, ()) for name in names)

"""What the attention is needed for: sizes, direction, phases, text. Checked before any work.

B batch, H heads, N length, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyheads.attention.grid import get_mixer, list_mixers
from manyheads.choose.grid import GridSubject, ladder_of, map_of
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.registry import Mechanism, Shape, get_mechanism, list_mechanisms

if TYPE_CHECKING:
    import torch

    from manyheads.data import TextSource
    from manyheads.data.images import ImageData

__all__ = [
    "DTYPES",
    "EXAMPLE",
    "PHASES",
    "PROBES",
    "REFERENCE",
    "Workload",
]

REFERENCE = "softmax"
PHASES = ("train", "prefill", "decode")
PROBES = ("recall", "copy", "listops")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# More text than a run of a few minutes can read; it bounds the time to load and hash it.
_TEXT_BYTES = 16 << 20
_SHORTEST_RUNG, _MOST_RUNGS = 128, 8
# Where only long sequences are asked for, one short one comes first: predictions start from it.
_PILOT = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload(Config):
    """What `choose` measures for.

    Attributes:
        grid: rows and columns of a map (B, C, H, W) with C = ``heads`` · ``head_dim`` channels;
            token mixers are compared on it, and mechanisms on the flattened map. ``length`` is
            then H · W, and nothing is causal. None: sequences.
        length: N, tokens in a sequence; the answer is for this length.
        lengths: lengths to measure at; empty for a ladder of doublings up to ``length``. Where
            all are long, 512 is added, from which the costs of the others are foreseen.
        heads, kv_heads, head_dim, batch, dtype: shapes of one layer; ``kv_heads`` None: as many
            as ``heads``.
        causal: whether a token sees only earlier ones.
        phases: any of train (forward and backward), prefill (forward over the whole sequence)
            and decode (token by token, causal only); empty: train, and decode if causal.
        mixers: mechanism names, and hybrids of layers as "gla*3,softmax"; empty: every
            registered mechanism that fits, or every token mixer on a map.
        data: text for the quality side as `load_text` takes it, on a map labelled images as
            `load_images` takes them; None: costs alone.
        probes: small tasks for the quality side: recall, copy, listops.
        layers: layers of the small models of the quality side.
        model_layers: layers of the model that the workload is about, to total its states; None:
            one layer is reported.
        budget: seconds for everything.
        seed: of inputs, data, weights and order.
        threads: inside operators; None: as torch decides.

    Raises:
        ValueError: a value out of range, an unknown name, kv_heads that do not divide heads.
    """

    grid: tuple[int, int] | None = None
    length: int = 4096
    lengths: tuple[int, ...] = ()
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    causal: bool = True
    phases: tuple[str, ...] = ()
    batch: int = 1
    dtype: str = "float32"
    mixers: tuple[str, ...] = ()
    data: str | None = None
    probes: tuple[str, ...] = ()
    layers: int = 2
    model_layers: int | None = None
    budget: float = 300.0
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.grid is not None:
            self._check_grid(self.grid)
        for name in ("length", "heads", "head_dim", "batch", "layers"):
            _check_positive(name, getattr(self, name))
        for name in ("kv_heads", "model_layers", "threads"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for length in self.lengths:
            _check_positive("lengths", length)
        if self.heads % (self.kv_heads or self.heads):
            fits = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}: "
                f"use one of {', '.join(map(str, fits))}"
            )
        if not self.budget > 0:
            raise ValueError(f"budget {self.budget:g} s must be above zero: write 90s, 5m or 1h")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative: give 0 or more")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        for phase in self.phases:
            if phase not in PHASES:
                raise unknown_name("phase", phase, PHASES)
        for probe in self.probes:
            if probe not in PROBES:
                raise unknown_name("probe", probe, PROBES)
        if not self.causal:
            self._check_bidirectional()
        for mixer in self.mixers:
            if self.grid is None:
                self._check_mixer(mixer)
            else:
                get_mixer(mixer)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if len(grid) != 2:
            raise ValueError(f"grid {grid} must be rows and columns, such as (56, 56)")
        for name, side in zip(("rows", "columns"), grid, strict=True):
            _check_positive(f"grid {grid[0]}x{grid[1]}: {name}", side)
        for name, empty in (("lengths", ()), ("kv_heads", None), ("model_layers", None)):
            if getattr(self, name) != empty:
                raise ValueError(f"{name} are of sequences: drop them, or drop grid")
        # Said once, by the grid; everything else reads the length and the direction.
        object.__setattr__(self, "length", grid[0] * grid[1])
        object.__setattr__(self, "causal", False)

    def _check_bidirectional(self) -> None:
        if "decode" in self.phases:
            flag = "--no-causal" if self.grid is None else "--grid"
            raise ValueError(f"phase decode is causal: drop it, or drop {flag}")
        if self.grid is not None and self.probes:
            raise ValueError("probes train causal language models: drop them, or drop --grid")
        if self.grid is None and (self.data is not None or self.probes):
            raise ValueError(
                "data and probes train causal language models: drop them, or drop --no-causal"
            )

    def _check_mixer(self, mixer: str) -> None:
        from manyheads.models.language.pattern import parse_pattern

        for name in dict.fromkeys(parse_pattern(mixer)):
            mechanism = get_mechanism(name)
            if mechanism.geometry != "sequence":
                raise ValueError(
                    f"mechanism {name!r} works on a {mechanism.geometry}, not on a sequence: "
                    "drop it from --mixers"
                )
            if not (mechanism.causal if self.causal else mechanism.bidirectional):
                only, flag = (
                    ("bidirectional", "--no-causal") if self.causal else ("causal", "--causal")
                )
                raise ValueError(
                    f"mechanism {name!r} is {only} only: use {flag}, or drop it from --mixers"
                )

    @property
    def does(self) -> tuple[str, ...]:
        """The phases, in the order of `PHASES`."""
        if self.phases:
            return tuple(p for p in PHASES if p in self.phases)
        return ("train", "decode") if self.causal else ("train",)

    @property
    def ladder(self) -> tuple[int, ...]:
        """The lengths to measure at, ascending; ``length`` is among them, and a short one."""
        if self.grid is not None:
            return tuple(rows * columns for rows, columns in ladder_of(self.grid))
        if self.lengths:
            rungs = {*self.lengths, self.length}
            return tuple(sorted(rungs if min(rungs) <= 2 * _PILOT else {*rungs, _PILOT}))
        doublings = [self.length]
        while len(doublings) < _MOST_RUNGS and doublings[-1] // 2 >= _SHORTEST_RUNG:
            doublings.append(doublings[-1] // 2)
        return tuple(reversed(doublings))

    @property
    def has_quality(self) -> bool:
        """Whether small models are to be trained."""
        return self.data is not None or bool(self.probes)

    @property
    def dim(self) -> int:
        """C, channels of a layer."""
        return self.heads * self.head_dim

    @property
    def main_task(self) -> str | None:
        """The task that ``data`` sets: text, or on a map images."""
        if self.data is None:
            return None
        return "text" if self.grid is None else "images"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What small models are trained at."""
        return (*([] if self.main_task is None else [self.main_task]), *self.probes)

    def where(self, length: int) -> str:
        """Return a length as people read it: "4,096", or the map "56 x 56"."""
        if self.grid is None:
            return f"{length:,}"
        return "{} x {}".format(*map_of(self.grid, length))

    def subject(self, name: str) -> Mechanism | GridSubject:
        """Return the record of what is measured under a name."""
        return get_mechanism(name) if self.grid is None else GridSubject(name, self.grid)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Names of all mechanisms to measure: those asked for and the parts of hybrids, or every
        one whose facts fit the workload."""
        from manyheads.models.language.pattern import parse_pattern

        if self.grid is not None:
            return self.candidates if self.mixers else tuple(list_mixers())
        if self.mixers:
            return tuple(dict.fromkeys(n for m in self.candidates for n in parse_pattern(m)))
        return tuple(n for n in list_mechanisms() if self._fits(get_mechanism(n)))

    @property
    def candidates(self) -> tuple[str, ...]:
        """What is compared: names of mechanisms, and hybrids as they were written; softmax, the
        reference, is always among them."""
        if not self.mixers:
            return self.mechanisms
        return self.mixers if REFERENCE in self.mixers else (*self.mixers, REFERENCE)

    @property
    def hybrids(self) -> tuple[str, ...]:
        """Those candidates that are patterns of layers."""
        return tuple(m for m in self.mixers if "," in m or "*" in m)

    def _fits(self, mechanism: Mechanism) -> bool:
        return mechanism.geometry == "sequence" and (
            mechanism.causal if self.causal else mechanism.bidirectional
        )

    def shape(self, length: int | None = None) -> Shape:
        """Return the shapes of one layer at a length (N unless given)."""
        return Shape(
            batch=self.batch,
            heads=self.heads,
            length=self.length if length is None else length,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            is_causal=self.causal,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def element_bytes(self) -> int:
        """Bytes of a number of the dtype."""
        return self.torch_dtype.itemsize

    def load_data(self) -> TextSource | ImageData | None:
        """Return the text (its first 16 MiB) or the images, or None where the workload has none.

        Raises:
            ValueError: no such file, an empty or a binary one, no UTF-8; no such images.
            MissingExtraError: the package of built-in data is not installed.
        """
        from manyheads.data import load_text
        from manyheads.data.images import load_images

        if self.data is None:
            return None
        if self.grid is not None:
            return load_images(self.data, seed=self.seed)
        return load_text(self.data, max_bytes=_TEXT_BYTES)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} {value} must be at least 1")


# What runs when nothing is asked for: no download, about five minutes.
EXAMPLE = Workload(data="builtin:python", probes=("recall", "copy"))

"""What the attention is needed for: sizes, direction, phases, text. Checked before any work.

B batch, H heads, N length, D head dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.choose.options import ChooseOptions
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.registry import Mechanism, Shape, get_mechanism, list_mechanisms

if TYPE_CHECKING:
    import torch

    from manyheads.data import TextSource

__all__ = [
    "DTYPES",
    "EXAMPLE",
    "PHASES",
    "PROBES",
    "REFERENCE",
    "Workload",
    "read_mixers",
    "shapes_of_model",
    "workload_from_options",
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
        length: N, tokens in a sequence; the answer is for this length.
        lengths: lengths to measure at; empty for a ladder of doublings up to ``length``. Where
            all are long, 512 is added, from which the costs of the others are foreseen.
        heads, kv_heads, head_dim, batch, dtype: shapes of one layer; ``kv_heads`` None: as many
            as ``heads``.
        causal: whether a token sees only earlier ones.
        phases: any of train (forward and backward), prefill (forward over the whole sequence)
            and decode (token by token, causal only); empty: train, and decode if causal.
        mixers: mechanism names, and hybrids of layers as "gla*3,softmax"; empty: every
            registered mechanism that fits.
        data: text for the quality side as `load_text` takes it; None: no text.
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
            self._check_mixer(mixer)

    def _check_bidirectional(self) -> None:
        if "decode" in self.phases:
            raise ValueError("phase decode is causal: drop it, or drop --no-causal")
        if self.data is not None or self.probes:
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
    def mechanisms(self) -> tuple[str, ...]:
        """Names of all mechanisms to measure: those asked for and the parts of hybrids, or every
        one whose facts fit the workload."""
        from manyheads.models.language.pattern import parse_pattern

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

    def load_data(self) -> TextSource | None:
        """Return the text (its first 16 MiB), or None where the workload has none.

        Raises:
            ValueError: no such file, an empty or a binary one, no UTF-8.
            MissingExtraError: the package of a built-in text is not installed.
        """
        from manyheads.data import load_text

        return None if self.data is None else load_text(self.data, max_bytes=_TEXT_BYTES)


def workload_from_options(options: ChooseOptions) -> Workload:
    """Return the workload that the flags describe; flags go before what a model's config says.

    Raises:
        ValueError: a flag with a wrong value, or a config.json without the needed keys.
    """
    from manyheads.options import seconds

    values: dict[str, Any] = {} if options.describes_workload else EXAMPLE.to_dict()
    if options.model is not None:
        values |= shapes_of_model(Path(options.model))
    given = ("heads", "kv_heads", "head_dim", "causal", "phases", "batch", "dtype", "layers")
    for name in (*given, "length", "lengths", "data", "probes", "threads"):
        if getattr(options, name) not in (None, ()):
            values[name] = getattr(options, name)
    if options.heads is not None and options.kv_heads is None and options.model is not None:
        values.pop("kv_heads", None)
    if options.lengths and options.length is None:
        values["length"] = max(options.lengths)
    if options.mixers:
        values["mixers"] = read_mixers(options.mixers)
    values |= {"budget": seconds(options.budget), "seed": options.seed}
    return Workload.from_dict(values)


def read_mixers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the candidates that texts name: "a,b" is two mechanisms, "a*3,b" one hybrid.

    Raises:
        ValueError: nothing is named.
    """
    found: list[str] = []
    for text in (part.strip() for whole in texts for part in whole.split(";")):
        names = [n.strip() for n in text.split(",") if n.strip()]
        found += [",".join(names)] if "*" in text else names
    if not found:
        raise ValueError('mixers name nothing: write "softmax,gla" or "gla*3,softmax"')
    return tuple(dict.fromkeys(found))


# Each size by the names that the families of transformers give it, most common first.
_MODEL_KEYS = {
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
}
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_BIDIRECTIONAL = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "modernbert", "mpnet", "roberta", "xlm-roberta", "vit", "deit",
}  # fmt: skip


def shapes_of_model(folder: Path) -> dict[str, Any]:
    """Read length, heads, kv_heads, head_dim, causality and layers from a config.json.

    Args:
        folder: a folder with the config.json of a transformers model, or that file.

    Raises:
        ValueError: no such file, no JSON object, or a key that is needed is missing.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"model {str(folder)!r} has no config.json: give the folder of a transformers model"
        ) from None
    except ValueError:
        raise ValueError(f"model: {str(path)!r} is no JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {str(path)!r} holds no JSON object")
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    sizes = {name: _first(config, keys) for name, keys in _MODEL_KEYS.items()}
    head_dim = config.get("head_dim")
    needed = {"heads", "layers"} | (set() if head_dim else {"width"})
    missing = [" or ".join(_MODEL_KEYS[n][:2]) for n in sorted(needed) if sizes[n] is None]
    if missing:
        raise ValueError(
            f"model: {path.name} has no {', no '.join(missing)}: give --heads, --head-dim and "
            "--length instead of --model"
        )
    heads, width = int(sizes["heads"] or 0), int(sizes["width"] or 0)
    if heads < 1 or (not head_dim and width % heads):
        raise ValueError(
            f"model: {path.name} has hidden size {width}, not a multiple of its {heads} heads, "
            "and no head_dim: give --heads and --head-dim instead of --model"
        )
    values: dict[str, Any] = {
        "heads": heads,
        "head_dim": int(head_dim) if head_dim else width // heads,
        "model_layers": int(sizes["layers"] or 0),
        "causal": config.get("model_type") not in _BIDIRECTIONAL or bool(config.get("is_decoder")),
    }
    if (length := _first(config, _LENGTH_KEYS)) is not None:
        values["length"] = int(length)
    if config.get("num_key_value_heads") is not None:
        values["kv_heads"] = int(config["num_key_value_heads"])
    elif config.get("multi_query"):
        values["kv_heads"] = 1
    return values


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[k] for k in keys if config.get(k) is not None), None)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} {value} must be at least 1")


# What runs when nothing is asked for: no download, about five minutes.
EXAMPLE = Workload(data="builtin:python", probes=("recall", "copy"))

"""The flags of the recipes on models of any mechanisms. Importing this file imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from manyheads.train.options import TrainOptions, json_object

__all__ = [
    "ClassifyOptions",
    "LMOptions",
    "MixerOptions",
    "RecallOptions",
    "SharedMixerOptions",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerOptions(TrainOptions):
    """What the recipes on a model of any mechanisms take.

    Attributes:
        mixers: mechanisms by layer, such as 'gla*3,softmax'.
        num_layers: repeat the pattern to this number of layers (default: once).
        embed_dim: width of the model.
        num_heads: heads of every layer.
        mlp_ratio: hidden width of the MLP, in widths of the model.
        mixer_options: options of single mechanisms as JSON, such as '{"gla": {"conv_size": 4}}'.
        dropout: on both branches of every block.
    """

    mixers: str = "gla*3,softmax"
    num_layers: int | None = None
    embed_dim: int = 128
    num_heads: int = 4
    mlp_ratio: float = 4.0
    mixer_options: str = "{}"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a share from 0 to below 1")
        self.read_mixer_options()

    def _least(self) -> dict[str, float]:
        sizes = dict.fromkeys(("num_layers", "embed_dim", "num_heads"), 1.0)
        return TrainOptions._least(self) | sizes

    def _title(self) -> tuple[str | None, ...]:
        return (self.mixers,)

    def read_mixer_options(self) -> dict[str, dict[str, Any]]:
        """Return ``mixer_options`` as a mapping from mechanism names.

        Raises:
            ValueError: no JSON object of objects.
        """
        read = json_object("mixer_options", self.mixer_options)
        if not all(isinstance(v, dict) for v in read.values()):
            raise ValueError(
                f"mixer_options {self.mixer_options!r} must map mechanisms to options: "
                """'{"gla": {"conv_size": 4}}'"""
            )
        return read


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMixerOptions(MixerOptions):
    """What the recipes take whose layers can share their attention matrices.

    Attributes:
        share_attention: matrices that all layers share, for each of query, key, value and output
          (masa); with the usual mixers and no num_layers the model has three softmax layers for
          each, which saves two thirds of them.
        sharing: how they are shared, as JSON, such as '{"kind": "repeat"}' or
          '{"projections": ["query", "key", "value"]}'.
    """

    share_attention: int | None = None
    sharing: str = "{}"

    def __post_init__(self) -> None:
        MixerOptions.__post_init__(self)
        self.read_sharing()

    def resolved(self) -> Self:
        """Return a copy with the layers that share filled in, and the rest."""
        usual = [f.default for f in dataclasses.fields(self) if f.name == "mixers"]
        usual.append(self.presets.get(self.preset, {}).get("mixers"))
        done = self
        if self.share_attention and self.mixers in usual and self.num_layers is None:
            done = self.replace(mixers=f"softmax*{3 * self.share_attention}")
        return MixerOptions.resolved(done)

    def read_sharing(self) -> dict[str, Any]:
        """Return what a model's config takes as ``sharing``; empty without ``share_attention``.

        Raises:
            ValueError: no JSON object, or ways of sharing without a number of matrices.
        """
        read = json_object("sharing", self.sharing)
        if self.share_attention is None:
            if read:
                raise ValueError(f"sharing {self.sharing!r} needs share_attention: give a number")
            return {}
        return {"atoms": self.share_attention} | read

    def _least(self) -> dict[str, float]:
        return MixerOptions._least(self) | {"share_attention": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class LMOptions(SharedMixerOptions):
    """Train a language model of any mechanisms on text.

    Attributes:
        data: a text file, a folder of them, builtin:python (the standard library's sources),
          builtin:kjv (the King James Bible), builtin:lee (news) or builtin:gcide (a dictionary).
        max_bytes: read at most this much of the text.
        valid_fraction: share of the text, from its end, that is held out to measure on.
        eval_tokens: held-out tokens read at evaluations on the way; the last one reads all.
        tokenizer: byte, or bpe: byte pairs learnt on the training text.
        vocab_size: tokens of the bpe vocabulary.
        tie_embeddings: use the embedding as output matrix.
        length: tokens a sequence.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 300, "batch_size": 8, "learning_rate": 5e-3, "eval_every": 100,
            "mixers": "gla,softmax", "embed_dim": 64, "num_heads": 4, "length": 128,
            "eval_tokens": 1 << 14, "max_bytes": 500_000,
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "lm"

    data: str = "builtin:python"
    max_bytes: int | None = None
    valid_fraction: float = 0.1
    eval_tokens: int = 1 << 16
    tokenizer: str = field(default="byte", metadata={"choices": ("byte", "bpe")})
    vocab_size: int = 4096
    tie_embeddings: bool = True
    length: int = 512

    def _least(self) -> dict[str, float]:
        least = {"length": 1, "eval_tokens": 2, "max_bytes": 1}
        return SharedMixerOptions._least(self) | least

    def _title(self) -> tuple[str | None, ...]:
        return (self.mixers, self.data.rstrip("/").split("/")[-1].split(":")[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyOptions(SharedMixerOptions):
    """Train a classifier of time series; ragged ones are read at their own length.

    Attributes:
        data: a set that ships with aeon (basic_motions, japanese_vowels, ...), a folder with
          NAME_TRAIN.ts and NAME_TEST.ts, or a .csv or .npz file (docs/train.md says which).
        valid_fraction: share of each class of the training series that is held out to choose
          the best weights by; 0 trains on all of them and keeps the last weights.
        pool: which of the sequence's features are classified.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 80, "batch_size": 16, "learning_rate": 2e-3, "eval_every": 20,
            "mixers": "softmax*2", "embed_dim": 32, "num_heads": 2,
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "classify"

    steps: int = 600
    learning_rate: float = 1e-3
    mixers: str = "softmax*2"
    embed_dim: int = 64
    data: str = "japanese_vowels"
    valid_fraction: float = 0.0
    pool: str = field(default="mean", metadata={"choices": ("mean", "first", "last")})

    def __post_init__(self) -> None:
        SharedMixerOptions.__post_init__(self)
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(
                f"valid_fraction is {self.valid_fraction}: give a share from 0 to below 1"
            )

    def _title(self) -> tuple[str | None, ...]:
        return (self.mixers, self.data.rstrip("/").split("/")[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallOptions(MixerOptions):
    """Train a small model to name the value that stood beside a key.

    Attributes:
        vocab_size: ids of the task, half of them keys and half values.
        length: tokens a segment; a sequence is one segment unless ``segments`` says more.
        pairs: pairs of key and value to keep in mind; four times as many must fit the length.
        segments: segments a sequence, each of which binds the keys anew.
        power: exponent of the distances of the queries; 1 spreads them evenly.
        eval_samples: held-out sequences that accuracy is measured on.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 200, "batch_size": 32, "learning_rate": 5e-3, "eval_every": 50,
            "mixers": "gla*2", "embed_dim": 32, "num_heads": 2, "vocab_size": 32, "length": 24,
            "pairs": 2, "eval_samples": 200,
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "recall"

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 3e-3
    eval_every: int = 250
    mixers: str = "gla*2"
    embed_dim: int = 64
    num_heads: int = 2
    vocab_size: int = 256
    length: int = 64
    pairs: int = 8
    segments: int = 1
    power: float = 0.01
    eval_samples: int = 1000

    def _least(self) -> dict[str, float]:
        return MixerOptions._least(self) | {
            "length": 1, "pairs": 1, "segments": 1, "eval_samples": 1
        }  # fmt: skip

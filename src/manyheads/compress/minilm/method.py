"""The procedure: a smaller BERT in place of a BERT, trained on the calibration text. Lossy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.compress.minilm.capture import capture_qkv
from manyheads.compress.minilm.files import needs_assistant, student_config
from manyheads.compress.minilm.losses import MINILM_V1, MINILM_V2, minilm_loss
from manyheads.compress.minilm.start import collect_streams, start_from_teacher, stream_basis
from manyheads.compress.minilm.training import distil, padded
from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.config import Config
from manyheads.models.language.bert import BertConfig, BertEncoder

__all__ = ["MiniLM", "MiniLMConfig"]

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_STREAM_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniLMConfig(Config):
    """Options of MiniLM.

    Attributes:
        num_layers: of the student; 0 for half the teacher's
        hidden_size: of the student; 0 for half the teacher's
        num_heads: of the student; 0 for the teacher's
        intermediate_size: of the student; 0 for the teacher's proportion to the width
        start: "teacher" starts from its weights as far as they go, "random" as the paper
        relations: "v1" attention and value relations, "v2" queries, keys and values with themselves
        relation_heads: heads that both sides are cut into; 0 for their own
        teacher_layer: to learn from, from 0 or from the end
        relation_weight: of MiniLM's loss
        embedding_weight: of 1 - cosine of mean-pooled embeddings; 0 as the paper
        steps: of training
        minutes: stop training after so long; 0 for no limit
        batch_size: sentences of a step
        learning_rate: at its peak
        seed: of random weights and of the order of sentences
        checkpoint: file to keep the training in and go on from; "" for none
    """

    num_layers: int = 0
    hidden_size: int = 0
    num_heads: int = 0
    intermediate_size: int = 0
    start: str = field(default="teacher", metadata={"choices": ("teacher", "random")})
    relations: str = field(default="v1", metadata={"choices": ("v1", "v2")})
    relation_heads: int = 0
    teacher_layer: int = -1
    relation_weight: float = 1.0
    embedding_weight: float = 10.0
    steps: int = 500
    minutes: float = 0.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    checkpoint: str = ""

    def __post_init__(self) -> None:
        for name, known in (("start", ("teacher", "random")), ("relations", ("v1", "v2"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size",
                     "relation_heads", "relation_weight", "embedding_weight", "minutes", "seed",
                     "steps"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"batch_size {self.batch_size} and learning_rate {self.learning_rate} must be "
                "above 0"
            )
        if not self.relation_weight and not self.embedding_weight:
            raise ValueError("relation_weight and embedding_weight are both 0: nothing to learn")


class MiniLM(Procedure):
    """Replace a BERT by a thinner, shallower one that is trained on the calibration text. Lossy.

    "MiniLM: Deep Self-Attention Distillation", 2002.10957. The plan holds the sizes and the
    sentences, applying it trains; the result is a stock BERT. For long trainings, several
    processes and held-out text there is ``manyheads train distil``. A pooler is not trained.

    Example:
        >>> config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2,
        ...                     num_attention_heads=4, intermediate_size=48)
        >>> model = BertEncoder(config)
        >>> text = [{"input_ids": torch.randint(1, 50, (8, 7))}]
        >>> plan = MiniLM(steps=2, batch_size=4).plan(model, text)
        >>> plan.apply(model).config.hidden_size
        12
    """

    name: ClassVar[str] = "minilm"
    settings_class: ClassVar[type[Config]] = MiniLMConfig

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Fix the sizes, try the losses on two tokens and keep the calibration's sentences.

        Args:
            model: a ``transformers.BertModel`` or a ``BertEncoder``.
            calibration: batches of input_ids (B, N) with attention_mask, if padded.

        Raises:
            ValueError: no BERT, no calibration, or sizes and heads that do not fit.
        """
        s = self.settings
        teacher = _encoder(model)
        t = teacher.config
        config = student_config(
            t,
            num_layers=s.num_layers or max(1, t.num_hidden_layers // 2),
            hidden_size=s.hidden_size or t.hidden_size // 2,
            num_heads=s.num_heads or None,
            intermediate_size=s.intermediate_size or None,
        )
        if s.embedding_weight and config.hidden_size > t.hidden_size:
            raise ValueError(
                f"hidden_size {config.hidden_size} exceeds the teacher's {t.hidden_size}: give "
                "embedding_weight 0, or less width"
            )
        rows = _rows(calibration, t)
        _try(s, teacher, config)
        return self._plan(
            model,
            {name: getattr(config, name) for name in _SIZES},
            tensors={
                "tokens": torch.cat(rows).int(),
                "lengths": torch.tensor([len(r) for r in rows], dtype=torch.int32),
            },
            measured={
                "sentences": len(rows),
                "tokens": sum(len(r) for r in rows),
                "teacher_parameters": teacher.num_parameters(),
                "student_parameters": _count(config),
                "assistant_advised": needs_assistant(t, config) and s.start == "random",
            },
        )

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        """Train the student and return it, a BERT of the model's own class."""
        s = MiniLMConfig.from_dict(plan.settings)
        teacher = _encoder(model)
        rows = list(plan.tensors["tokens"].long().split(plan.tensors["lengths"].tolist()))
        config = teacher.config.replace(**plan.structure)
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            student = BertEncoder(config)
        streams = collect_streams(teacher, [padded([r]) for r in rows[:_STREAM_ROWS]])
        basis = None
        if s.start == "teacher" or s.embedding_weight:
            basis = stream_basis(streams, config.hidden_size)
        if s.start == "teacher":
            assert basis is not None
            start_from_teacher(student, teacher, streams, basis)
        with torch.enable_grad():
            distil(
                teacher,
                student,
                rows,
                relations=MINILM_V1 if s.relations == "v1" else MINILM_V2,
                relation_heads=s.relation_heads or None,
                teacher_layer=s.teacher_layer,
                relation_weight=s.relation_weight,
                embedding_weight=s.embedding_weight,
                basis=basis,
                steps=s.steps,
                seconds=60 * s.minutes or None,
                batch_size=s.batch_size,
                learning_rate=s.learning_rate,
                seed=s.seed,
                checkpoint=Path(s.checkpoint) if s.checkpoint else None,
            )
        made = cls.restructure(plan.structure, model)
        made.load_state_dict(student.to_official())
        kind = next(model.parameters())
        return made.to(kind.device, kind.dtype).train(model.training)

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        """Return a BERT of the model's class in the student's sizes, with random weights."""
        if isinstance(model, BertEncoder):
            return BertEncoder(model.config.replace(**structure))
        config: Any = copy.deepcopy(model.config)
        for name, value in structure.items():
            setattr(config, name, value)
        build: Any = _base_class(model)
        made: nn.Module = build(config, add_pooling_layer=model.pooler is not None)
        return made

    @classmethod
    def is_stock(cls, structure: dict[str, Any], model: nn.Module) -> bool:
        """A student is a BERT of other sizes, which every BERT class can express."""
        return True


def _base_class(model: nn.Module) -> type:
    """Return transformers' own class, also of a model that was shrunken before."""
    return next(c for c in type(model).__mro__ if not hasattr(c, "_manyheads_saves"))


def _encoder(model: nn.Module) -> BertEncoder:
    """Return the model as a BertEncoder with the same weights, in float32."""
    if isinstance(model, BertEncoder):
        return copy.deepcopy(model).float().eval()
    config: Any = getattr(model, "config", None)
    names = [c.__name__ for c in type(model).__mro__]
    if getattr(config, "model_type", "") != "bert" or "BertModel" not in names:
        raise ValueError(
            f"{type(model).__name__} is no BertModel and no BertEncoder: distil the encoder alone "
            "and put its head on the student; other encoders go through capture_qkv and minilm_loss"
        )
    pooler = getattr(model, "pooler", None) is not None
    own = BertConfig.from_official(config.to_dict()).replace(add_pooler=pooler)
    weights = {k: t.float().cpu() for k, t in model.state_dict().items()}
    with torch.random.fork_rng():
        return BertEncoder(own).load_official(weights).eval()


def _rows(calibration: Iterable[Batch] | None, config: BertConfig) -> list[Tensor]:
    rows: list[Tensor] = []
    for batch in calibration or ():
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError("a batch has no input_ids: MiniLM is calibrated on token ids")
        tokens = batch["input_ids"].cpu()
        mask = batch.get("attention_mask")
        real = torch.ones_like(tokens) if mask is None else mask.cpu()
        rows += [row[keep.bool()] for row, keep in zip(tokens, real, strict=True)]
    rows = [r[: config.max_position_embeddings] for r in rows if len(r) > 1]
    if not rows:
        raise ValueError(
            "calibration holds no sentence of two tokens or more: MiniLM trains on its text"
        )
    return rows


def _try(s: MiniLMConfig, teacher: BertEncoder, config: BertConfig) -> None:
    """Raise what the losses and the start would raise, before any work."""
    tokens = torch.zeros(1, 2, dtype=torch.long)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad(), torch.random.fork_rng():
        student = BertEncoder(config)
        target, own = (
            capture_qkv(m, {"input_ids": tokens}, layer=layer).qkv
            for m, layer in ((teacher, s.teacher_layer), (student, -1))
        )
        relations = MINILM_V1 if s.relations == "v1" else MINILM_V2
        if s.relation_weight:
            minilm_loss(target, own, relations=relations, relation_heads=s.relation_heads or None)
        if s.start == "teacher":
            streams = collect_streams(teacher, [(tokens, mask)])
            start_from_teacher(student, teacher, streams, stream_basis(streams, config.hidden_size))


def _count(config: BertConfig) -> int:
    with torch.device("meta"):
        return BertEncoder(config).num_parameters()

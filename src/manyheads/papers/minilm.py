"""MiniLM: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from manyheads.choose.timing import forward, interleaved
from manyheads.compress.minilm import (
    MINILM_V1,
    QKV,
    capture_qkv,
    load_bert,
    minilm_loss,
    student_config,
)
from manyheads.data.packages import minilm_folder
from manyheads.models.base import create_model
from manyheads.models.language.bert import BertEncoder
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "learn", "measure", "same_network", "speed"]

_POOL, _BATCH, _LENGTH = 400, 16, 32
_PARAMETERS = {
    "minilm_l12_h384_uncased": 33_360_000,
    "minilm_l6_h384_uncased": 22_713_216,
    "minilm_l6_h768_uncased": 66_955_008,
    "minilm_multilingual_l12_h384": 117_653_760,
}

Progress = Callable[[str], None]


def learn(teacher: BertEncoder, *, steps: int, progress: Progress) -> list[float]:
    """Return MiniLM's loss of a random student of 2 layers and width 96, step by step.

    Every step sees other sequences, of ids drawn from a pool of 400; with dropout, as the paper
    trains.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = student_config(teacher.config, num_layers=2, hidden_size=96, add_pooler=False)
        student = BertEncoder(config).train()
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        pool = torch.randint(1000, teacher.config.vocab_size, (_POOL,))
        losses = []
        for step in range(steps):
            if step % 25 == 0:
                progress(f"a random student, step {step} of {steps}")
            batch = {"input_ids": pool[torch.randint(_POOL, (_BATCH, _LENGTH))]}
            with torch.no_grad():
                target = capture_qkv(teacher, batch).qkv
            loss = minilm_loss(target, capture_qkv(student, batch).qkv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def same_network(teacher: BertEncoder) -> dict[str, float]:
    """Return the loss of a teacher against itself, and of its third layer against its last."""
    tokens = torch.randint(
        1000, teacher.config.vocab_size, (4, 21), generator=torch.Generator().manual_seed(0)
    )
    last, third = (capture_qkv(teacher, {"input_ids": tokens}, layer=n).qkv for n in (-1, 2))
    heads = teacher.config.num_attention_heads
    v1 = minilm_loss(last, third)
    general = minilm_loss(last, QKV(*third), relations=MINILM_V1, relation_heads=heads, chunk=5)
    return {
        "itself": float(minilm_loss(last, last).abs()),
        "third_layer": float(v1),
        "general_form": float((general - v1).abs() / v1),
    }


def speed(*, repeats: int = 7) -> dict[str, float]:
    """Return seconds of the 12-layer and the 6-layer student of width 384, on 128 tokens."""
    tokens = torch.randint(1000, 30000, (1, 128), generator=torch.Generator().manual_seed(0))
    models = {
        name: create_model(f"minilm_{name}_h384_uncased", add_pooler=False).eval()
        for name in ("l12", "l6")
    }
    with torch.no_grad():
        timings = interleaved(
            {name: forward(_Features(model), tokens) for name, model in models.items()},
            repeats=repeats,
        )
    return {name: t.median for name, t in timings.items()}


class _Features(nn.Module):
    def __init__(self, model: BertEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features = self.model(tokens).features
        assert isinstance(features, torch.Tensor)
        return features


def measure(progress: Progress) -> Measurement:
    """Measure that a random student learns its teacher's relations, the sizes and the speed."""
    teacher = load_bert(minilm_folder())
    losses = learn(teacher, steps=100, progress=progress)
    progress("the same network, and the speed of two students")
    start, end = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    same, times = same_network(teacher), speed()
    ratio = times["l12"] / times["l6"]
    counts = {n: create_model(n, device="meta").num_parameters() for n in _PARAMETERS}
    return Measurement(
        checks=(
            Check(
                what="loss of a random student after 100 steps over its start, all-MiniLM-L6-v2 "
                "as the teacher",
                claimed="the student learns by imitating the last attention alone",
                measured=end / start,
                unit="x",
                direction=end < start,
                size=end < 0.5 * start,
                bound=f"below 0.5; from {start:.2f} to {end:.2f} nats",
            ),
            Check(
                what="loss of the teacher against itself",
                claimed="zero for a student that is its teacher",
                measured=same["itself"],
                unit="nats",
                direction=same["itself"] < same["third_layer"],
                size=same["itself"] < 1e-5,
                bound=f"below 1e-5; its third layer {same['third_layer']:.2f}",
            ),
            Check(
                what="time of the student of 12 layers over that of 6, width 384, 128 tokens",
                claimed="5.3 / 2.7 of BERT-base (1.96)",
                measured=ratio,
                unit="x",
                direction=ratio > 1,
                size=1.5 < ratio < 2.5,
                bound="between 1.5 and 2.5",
            ),
            Check(
                what="parameters of MiniLM-L12-H384",
                claimed="33 million, 21 million without embeddings",
                measured=counts["minilm_l12_h384_uncased"],
                direction=True,
                size=counts == _PARAMETERS,
                bound="equal to the four published checkpoints, to the integer",
            ),
        ),
        figures={"losses": losses[::10], "seconds": times, "same": same},
        notes=(
            "the published scores need Wikipedia, BookCorpus and 400,000 steps, and were not "
            "re-measured",
            "manyheads train distil measures a real student on real judgements of similarity",
        ),
    )


PAPER = Paper(
    slug="minilm",
    title=(
        "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained "
        "Transformers"
    ),
    arxiv="2002.10957",
    summary=(
        "Distils a BERT-like encoder into a thinner, shallower one by the attention distributions "
        "and the relations of values in its last layer alone. No layers are matched and nothing is "
        "projected, so depth and width are free; the second version frees the number of heads too."
    ),
    implements=(
        "manyheads.compress.minilm.minilm_loss",
        "manyheads.compress.minilm.capture_qkv",
        "manyheads.compress.minilm.MiniLM",
        "manyheads.models.language.bert.BertEncoder",
        "manyheads.train.distil.train",
    ),
    recipe="manyheads train distil",
    claim=Claim(
        statement=(
            "Imitating the last layer's self-attention makes a small student of any depth and "
            "width that keeps most of its teacher at a fraction of the cost."
        ),
        measure=measure,
    ),
    reconstruction=True,
)

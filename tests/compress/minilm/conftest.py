"""A tiny BERT and sentences whose tokens follow each other by a rule."""

from __future__ import annotations

import pytest
import torch

from manyheads.models.language.bert import BertConfig, BertEncoder

SIZES = {
    "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 52, "max_position_embeddings": 24,
}  # fmt: skip


@pytest.fixture
def teacher() -> BertEncoder:
    """Weights larger than at the start of training, so that attention is not uniform."""
    torch.manual_seed(1)
    return BertEncoder(BertConfig(**SIZES, initializer_range=0.15)).eval()


@pytest.fixture
def text() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    tokens = torch.randint(1, 61, (30, 11))
    lengths = torch.randint(3, 12, (30, 1))
    mask = (torch.arange(11) < lengths).long()
    return [
        {"input_ids": (tokens * mask)[i : i + 7], "attention_mask": mask[i : i + 7]}
        for i in range(0, 30, 7)
    ]

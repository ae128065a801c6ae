"""MiniLM: deep self-attention distillation (2002.10957). The student needs training.

A student learns the attention distributions and the relations of values of its teacher's last
layer. Depth and width of the student are free: no layers are matched, nothing is projected.
"""

from __future__ import annotations

from manyheads.compress.minilm.capture import Captured, capture_qkv
from manyheads.compress.minilm.definition import relation_loss_reference
from manyheads.compress.minilm.files import load_bert, needs_assistant, save_bert, student_config
from manyheads.compress.minilm.losses import (
    MINILM_V1,
    MINILM_V2,
    QKV,
    Relation,
    attention_transfer_loss,
    minilm_loss,
    relation_loss,
    split_relation_heads,
    value_relation_loss,
)
from manyheads.compress.minilm.method import MiniLM, MiniLMConfig

__all__ = [
    "MINILM_V1",
    "MINILM_V2",
    "QKV",
    "Captured",
    "MiniLM",
    "MiniLMConfig",
    "Relation",
    "attention_transfer_loss",
    "capture_qkv",
    "load_bert",
    "minilm_loss",
    "needs_assistant",
    "relation_loss",
    "relation_loss_reference",
    "save_bert",
    "split_relation_heads",
    "student_config",
    "value_relation_loss",
]

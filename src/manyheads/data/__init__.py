"""Data: texts, tokenizers, batches, generated tasks and labelled time series. Nothing downloads.

What comes from a package (aeon, pythonbible, tokenizers) is asked for at use; its absence is an
error that names what to install.
"""

from __future__ import annotations

from manyheads.data.batches import HeldOutWindows, TokenBatch, TokenBatches
from manyheads.data.series import SERIES, SeriesData, SeriesSplit, load_series
from manyheads.data.synthetic import TASKS, Task, TaskBatch, TaskBatches, TaskConfig, get_task
from manyheads.data.text import TextSource, TextSplit, load_text, split_text
from manyheads.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    TextStream,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "SERIES",
    "TASKS",
    "BPETokenizer",
    "ByteTokenizer",
    "HeldOutWindows",
    "SeriesData",
    "SeriesSplit",
    "Task",
    "TaskBatch",
    "TaskBatches",
    "TaskConfig",
    "TextSource",
    "TextSplit",
    "TextStream",
    "TokenBatch",
    "TokenBatches",
    "Tokenizer",
    "get_task",
    "load_series",
    "load_text",
    "load_tokenizer",
    "split_text",
]

"""BERT folders, transformers' or ours: read, written, and what a student of one looks like."""

from __future__ import annotations

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.models.base import load_model
from manyheads.models.language.bert import BertConfig, BertEncoder

__all__ = [
    "TOKENIZER_FILES",
    "load_bert",
    "mean_pool",
    "needs_assistant",
    "save_bert",
    "student_config",
]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
)  # fmt: skip


def load_bert(folder: str | PathLike[str]) -> BertEncoder:
    """Read a BERT out of a folder of transformers or of ours, in eval mode.

    Raises:
        ValueError: no such folder, another architecture, or weights that do not fit.
    """
    path = Path(folder)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{str(path)!r} has no config.json: give the folder of a BERT")
    try:
        described = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file} is no JSON: {error}") from None
    if "model_type" not in described and "model" in described:
        model = load_model(path)
        if not isinstance(model, BertEncoder):
            raise ValueError(f"{str(path)!r} holds a {type(model).__name__}, not a BertEncoder")
        return model.eval()
    found = [p for n in ("model.safetensors", "pytorch_model.bin") if (p := path / n).is_file()]
    if not found:
        raise ValueError(f"{str(path)!r} has no model.safetensors or pytorch_model.bin")
    # The file says whether there is a pooler, the config does not.
    from manyheads.layers.keymap import read_weights

    weights = read_weights(found[0])
    pooler = any(k.endswith("pooler.dense.weight") for k in weights)
    config = BertConfig.from_official(described).replace(add_pooler=pooler)
    with torch.random.fork_rng():
        return BertEncoder(config).load_official(weights).eval()


def save_bert(
    model: BertEncoder, folder: str | PathLike[str], *, tokenizer: str | PathLike[str] | None = None
) -> None:
    """Write a folder that transformers' ``AutoModel`` and sentence-transformers read.

    Args:
        model: the BERT.
        folder: made if need be; each file is moved to its place whole.
        tokenizer: folder to copy the tokenizer's files from.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    draft = path / ".writing-model.safetensors"
    tensors = {k: t.detach().contiguous() for k, t in model.to_official().items()}
    save_file(tensors, draft, {"format": "pt"})
    draft.replace(path / "model.safetensors")
    draft = path / ".writing-config.json"
    draft.write_text(json.dumps(model.config.to_official(), indent=2) + "\n")
    draft.replace(path / "config.json")
    for name in TOKENIZER_FILES if tokenizer is not None else ():
        source = Path(str(tokenizer)) / name
        if source.is_file() and source.resolve() != (path / name).resolve():
            shutil.copyfile(source, path / name)


def student_config(
    teacher: BertConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    **changes: Any,
) -> BertConfig:
    """Return a student's config: as many heads as the teacher and an MLP in its proportion.

    Raises:
        ValueError: sizes that do not divide.
    """
    ratio = teacher.intermediate_size / teacher.hidden_size
    return teacher.replace(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_heads or teacher.num_attention_heads,
        intermediate_size=intermediate_size or round(ratio * hidden_size),
        **changes,
    )


def needs_assistant(teacher: BertConfig, student: BertConfig) -> bool:
    """Say whether the paper puts a teacher assistant between: at most half as deep and as wide.

    The assistant has the teacher's depth and the student's width.

    Example:
        >>> needs_assistant(BertConfig(), BertConfig(hidden_size=384, num_hidden_layers=6))
        True
    """
    half_as_deep = 2 * student.num_hidden_layers <= teacher.num_hidden_layers
    return half_as_deep and 2 * student.hidden_size <= teacher.hidden_size


def mean_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the real tokens' features: (B, N, C) and (B, N) to (B, C)."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    return (features * mask[..., None]).sum(1) / count

"""Reading a folder, and rows of different lengths as one batch. B rows, N tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.data.tokenizers import Tokenizer, load_tokenizer
from manyheads.models import load_model
from manyheads.models.language.causal import CausalLM
from manyheads.train.generate import load_run

__all__ = ["batches", "before_stop", "load", "pad", "pick_device"]

_LOG = logging.getLogger("manyheads.bridges.lm_eval")


def pick_device(name: str | None) -> torch.device:
    device = torch.device(name or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        # The harness's command line asks for CUDA where nobody said anything.
        _LOG.warning("no CUDA here: manyheads runs on the CPU")
        return torch.device("cpu")
    return device


def load(folder: Path, tokenizer: str | None) -> tuple[CausalLM, Tokenizer]:
    config = folder / "config.json"
    if tokenizer is None and not (folder / "tokenizer.json").is_file() and config.is_file():
        raise ValueError(f"{str(folder)!r} has no tokenizer.json: pass tokenizer=FILE")
    described = json.loads(config.read_text()) if config.is_file() else {}
    if described.get("model_type") == "manyheads":
        from manyheads.bridges.transformers import ManyheadsForCausalLM

        model = ManyheadsForCausalLM.from_pretrained(folder).model
        return model.eval(), load_tokenizer(tokenizer or folder / "tokenizer.json")
    if tokenizer is None:
        return load_run(folder)
    loaded = load_model(folder)
    if not isinstance(loaded, CausalLM):
        raise ValueError(f"{str(folder)!r} holds a {type(loaded).__name__}, no language model")
    return loaded.eval(), load_tokenizer(tokenizer)


def batches(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def pad(rows: list[Tensor], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (B, N) and True at real tokens (B, N)."""
    length = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        own = slice(length - len(row), length) if left else slice(len(row))
        ids[i, own], mask[i, own] = row.to(device), True
    return ids, mask


def before_stop(text: str, until: tuple[str, ...]) -> str:
    places = [at for at in (text.find(s) for s in until) if at >= 0]
    return text[: min(places)] if places else text

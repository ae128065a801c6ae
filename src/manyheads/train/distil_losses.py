"""The losses of ``train distil``, and what its teacher computes once. B batch, N length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.compress.minilm import MINILM_V1, MINILM_V2, QKV, capture_qkv, minilm_loss
from manyheads.compress.minilm.files import mean_pool
from manyheads.compress.minilm.start import collect_streams, stream_basis
from manyheads.models.language.bert import BertEncoder
from manyheads.train.distil_data import SentenceBatch, embed, pad
from manyheads.train.distil_options import DistilOptions
from manyheads.train.files import TEMPORARY, replace_file
from manyheads.train.logs import Terminal
from manyheads.train.stop import StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "cosine",
    "freeze_unreached",
    "loss_of",
    "relation_loss_of",
    "stream_batches",
    "teacher_outputs",
]

_STREAM_SENTENCES = 256


def stream_batches(rows: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """Return the sentences that the streams are measured on, one a batch."""
    return [pad([r]) for r in rows[:_STREAM_SENTENCES]]


def teacher_outputs(
    fabric: Fabric,
    options: DistilOptions,
    folder: Path,
    source: Path,
    teacher: BertEncoder,
    rows: dict[str, list[np.ndarray]],
    stop: StopRequest,
) -> dict[str, Tensor]:
    """Make in the first process, or read: the basis, and embeddings in it of all sentences."""
    path = folder / "teacher.safetensors"
    if fabric.is_global_zero and not path.is_file():
        width = min(options.hidden_size, teacher.config.hidden_size)
        if options.embedding_weight:
            embeddings = {name: _shown(options, teacher, some, stop) for name, some in rows.items()}
        else:
            embeddings = {name: torch.zeros(len(some), 0) for name, some in rows.items()}
        streams = collect_streams(teacher.cpu(), stream_batches(rows["train"]))
        if options.start == "random" and options.embedding_weight:
            # Nothing but the embeddings has to be held.
            streams = streams._replace(states=(), pooled=embeddings["train"])
        basis = stream_basis(streams, width)
        fabric.to_device(teacher)
        made = {n: e @ basis if options.embedding_weight else e for n, e in embeddings.items()}
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        save_file({"basis": basis.contiguous()} | made, temporary)
        replace_file(temporary, path)
        # The tokenizer makes the folder a teacher for a further student.
        name = "tokenizer.json"
        (folder / f"{TEMPORARY}{name}").write_bytes((source / name).read_bytes())
        replace_file(folder / f"{TEMPORARY}{name}", folder / name)
    fabric.barrier()
    return load_file(path)


def _shown(
    options: DistilOptions, teacher: BertEncoder, rows: list[np.ndarray], stop: StopRequest
) -> Tensor:
    """Return the teacher's embeddings, telling how far it is."""
    with Terminal(steps=len(rows), done=0, shown=options.progress) as terminal:
        terminal.say(f"the teacher reads {len(rows):,} sentences, once")
        return embed(teacher, rows, stop, terminal.update)


def relation_loss_of(
    options: DistilOptions, teacher: BertEncoder, own: Any, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """Return MiniLM's loss of the student's queries, keys and values against the teacher's."""
    batch = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    with torch.no_grad():
        target = capture_qkv(teacher, batch, layer=options.teacher_layer).qkv
    return minilm_loss(
        target,
        QKV(*own),
        mask=mask,
        relations=MINILM_V1 if options.relations == "v1" else MINILM_V2,
        relation_heads=options.relation_heads,
    )


def freeze_unreached(options: DistilOptions, student: BertEncoder) -> None:
    """Leave what no loss reaches as it is: without embeddings, all after the last projections."""
    if options.embedding_weight:
        return
    last = cast(nn.ModuleList, student.encoder["layer"])[-1]
    for module in (last.attention["output"], last.intermediate, last.output):  # type: ignore[index]
        cast(nn.Module, module).requires_grad_(False)


def loss_of(
    options: DistilOptions, teacher: BertEncoder
) -> Callable[[nn.Module, SentenceBatch], Tensor]:
    """Return the loss of a batch; early steps hold MiniLM's beside that of the embeddings."""
    last = options.relation_steps() * options.accumulate

    def compute(module: nn.Module, batch: SentenceBatch) -> Tensor:
        related = int(batch.step) < last
        output = "both" if related else "features"
        if not options.embedding_weight:
            output = "qkv"
        features, *own = module(batch.tokens, mask=batch.mask, output=output)
        total = torch.zeros((), device=batch.tokens.device)
        if related:
            relation = relation_loss_of(options, teacher, own, batch.tokens, batch.mask)
            total = total + options.relation_weight * relation
        if options.embedding_weight:
            apart = 1 - cosine(features, batch.mask, batch.target)
            total = total + options.embedding_weight * apart.mean()
        return total

    return compute


def cosine(features: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Return the cosine of mean-pooled features (B, N, C) with a target (B, C): (B,)."""
    return F.cosine_similarity(mean_pool(features.float(), mask), target, dim=-1)

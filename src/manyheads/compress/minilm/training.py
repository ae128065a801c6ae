"""The short training that the procedure does: one process, one file to go on from.

B batch, N padded length, C teacher width, r student width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from manyheads.compress.minilm.capture import capture_qkv
from manyheads.compress.minilm.files import mean_pool
from manyheads.compress.minilm.losses import QKV, Relation, minilm_loss
from manyheads.data.seeding import epoch_indices
from manyheads.models.language.bert import BertEncoder

__all__ = ["distil", "padded"]

_SAVE_EVERY = 50
_EMBED_BATCH = 64
_WARM_UP_SHARE = 0.1
_CLIP = 1.0


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids (B, N), padded by 0 to the longest row, and the mask."""
    mask = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.bool)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
        mask[place, : len(row)] = True
    return tokens, mask


def distil(
    teacher: BertEncoder,
    student: BertEncoder,
    rows: Sequence[Tensor],
    *,
    relations: Sequence[Relation],
    relation_heads: int | None,
    teacher_layer: int,
    relation_weight: float,
    embedding_weight: float,
    basis: Tensor | None,
    steps: int,
    seconds: float | None,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train the student in place, without dropout; returns steps done, first and last loss.

    Args:
        teacher, student: as many heads, or ``relation_heads`` is given.
        rows: token ids of sentences.
        relations, relation_heads: as in :func:`minilm_loss`.
        teacher_layer: to learn from.
        relation_weight, embedding_weight: of MiniLM's loss, and of 1 - cosine of the mean-pooled
            embedding with the teacher's in the basis.
        basis: (C, r), needed by the embeddings.
        steps: of the schedule.
        seconds: stop after so long, with what is there.
        batch_size, learning_rate, seed: as named.
        checkpoint: file that the state is kept in, and gone on from if it is there; it belongs to
            one teacher, one student's sizes and these options.
        progress: told the step and the loss.

    Raises:
        ValueError: a checkpoint of another run, or a loss that is no number.
    """
    # What no loss reaches has no gradient and is left alone by the optimiser.
    trained = {n: p for n, p in student.named_parameters() if not n.startswith("pooler.")}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01
    )
    identity = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
                "seed": seed, "rows": len(rows), "weights": [relation_weight, embedding_weight],
                "sizes": student.config.to_dict(), "relations": [list(r) for r in relations],
                "relation_heads": relation_heads, "teacher_layer": teacher_layer}  # fmt: skip
    state: dict[str, Any] = {"step": 0, "first": None, "last": None}
    if checkpoint is not None and checkpoint.is_file():
        state = _restore(checkpoint, student, optimizer, trained, identity)
    teacher.eval()
    student.eval()
    begun = time.monotonic()
    goals = torch.zeros(0)
    if embedding_weight:
        assert basis is not None
        goals = _embeddings(teacher, rows) @ basis
    while state["step"] < steps:
        some = epoch_indices(
            state["step"], len(rows), batch_size=min(batch_size, len(rows)), seed=seed
        )
        tokens, mask = padded([rows[i] for i in some])
        batch = {"input_ids": tokens, "attention_mask": mask}
        loss = torch.zeros(())
        both = "both" if embedding_weight else "qkv"
        features, *own = student(tokens, mask=mask, output=both)
        if relation_weight:
            with torch.no_grad():
                target = capture_qkv(teacher, batch, layer=teacher_layer).qkv
            loss = loss + relation_weight * minilm_loss(
                target, QKV(*own), mask=mask, relations=relations, relation_heads=relation_heads
            )
        if embedding_weight:
            cosine = F.cosine_similarity(mean_pool(features, mask), goals[some], dim=-1)
            loss = loss + embedding_weight * (1 - cosine).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), _CLIP)
        value = loss.item()
        if value != value:
            raise ValueError(f"the loss is no number at step {state['step'] + 1}: lower "
                             f"learning_rate {learning_rate}")  # fmt: skip
        warm = max(1, round(_WARM_UP_SHARE * steps))
        done = state["step"]
        rate = min((done + 1) / warm, (steps - done) / max(1, steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        optimizer.step()
        state = {
            "step": done + 1,
            "first": value if state["first"] is None else state["first"],
            "last": value,
        }
        if progress is not None:
            progress(state["step"], value)
        late = seconds is not None and time.monotonic() - begun > seconds
        regular = state["step"] % _SAVE_EVERY == 0 or state["step"] == steps
        if checkpoint is not None and (late or regular):
            _save(checkpoint, student, optimizer, trained, identity, state)
        if late:
            break
    return state


@torch.no_grad()
def _embeddings(teacher: BertEncoder, rows: Sequence[Tensor]) -> Tensor:
    """Return the teacher's mean-pooled embeddings (len(rows), C), which no step asks for again."""
    found = torch.zeros(len(rows), teacher.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), _EMBED_BATCH):
        some = order[start : start + _EMBED_BATCH]
        tokens, mask = padded([rows[i] for i in some])
        features = teacher(tokens, mask=mask).features
        assert features is not None
        found[some] = mean_pool(features, mask)
    return found


def _save(
    path: Path,
    student: BertEncoder,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Parameter],
    identity: dict[str, Any],
    state: dict[str, Any],
) -> None:
    tensors = {f"model.{n}": t.contiguous() for n, t in student.state_dict().items()}
    for name, parameter in trained.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    save_file(tensors, draft, {"identity": json.dumps(identity), "state": json.dumps(state)})
    draft.replace(path)


def _restore(
    path: Path,
    student: BertEncoder,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Parameter],
    identity: dict[str, Any],
) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if json.loads(header.get("identity", "{}")) != json.loads(json.dumps(identity)):
            raise ValueError(
                f"checkpoint {str(path)!r} is of another distillation: give another file, or "
                "delete it"
            )
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    student.load_state_dict(
        {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    )
    for name, parameter in trained.items():
        kinds = ("step", "exp_avg", "exp_avg_sq")
        found = {k: tensors[f"{k}.{name}"] for k in kinds if f"{k}.{name}" in tensors}
        if found:
            optimizer.state[parameter] = found
    state: dict[str, Any] = json.loads(header["state"])
    return state

"""Start a thinner, shallower BERT from its teacher's weights instead of from random ones. Lossy.

An option of ours beside the paper, which draws students at random. One basis of r directions
stands for the teacher's stream in all layers: embeddings and matrices are projected onto it, the
products of queries with keys and of values with outputs are cut to the student's head dim by a
singular value decomposition weighted by what the layer sees, and the MLP keeps its busiest units.
C teacher width, r student width, N tokens seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from manyheads.models.language.bert import BertEncoder

__all__ = ["Streams", "collect_streams", "start_from_teacher", "stream_basis", "teacher_layers"]

_POOLED_SHARE = 1.0


class Streams(NamedTuple):
    """What a teacher's layers saw: inputs of every layer and the last output, (N, C) each."""

    states: tuple[Tensor, ...]
    pooled: Tensor  # (sentences, C)


def teacher_layers(teacher: int, student: int) -> tuple[int, ...]:
    """Return which layers a student of fewer layers takes: evenly spaced, the last among them.

    Example:
        >>> teacher_layers(6, 3)
        (1, 3, 5)
    """
    if not 1 <= student <= teacher:
        raise ValueError(
            f"the student's {student} layers must be from 1 to the teacher's {teacher}: start "
            "deeper students at random"
        )
    return tuple((i + 1) * teacher // student - 1 for i in range(student))


@torch.no_grad()
def collect_streams(teacher: BertEncoder, batches: list[tuple[Tensor, Tensor]]) -> Streams:
    """Run a teacher over (tokens, mask) batches and keep what its layers see at real tokens."""
    layers: list[Any] = list(cast(nn.ModuleList, teacher.encoder["layer"]))
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    pooled: list[Tensor] = []
    mask_now: list[Tensor] = [torch.zeros(0)]

    def listen(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept[place].append(args[0][mask_now[0]])

        return hook

    hooks = [
        layer.attention["self"].query.register_forward_hook(listen(i))
        for i, layer in enumerate(layers)
    ]
    try:
        for tokens, mask in batches:
            mask_now[0] = mask
            features = teacher(tokens, mask=mask).features
            kept[-1].append(features[mask])
            pooled.append((features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    finally:
        for hook in hooks:
            hook.remove()
    return Streams(tuple(torch.cat(k) for k in kept), torch.cat(pooled))


def stream_basis(streams: Streams, width: int) -> Tensor:
    """Return r orthonormal directions (C, r) that hold most of the streams and of the means.

    Not centred, so that products of vectors are kept as far as r directions can.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x, share in (
        *((s, 1 / len(streams.states)) for s in streams.states),
        (streams.pooled, _POOLED_SHARE),
    ):
        x = x.double()
        moment = x.mT @ x
        total = total + share * moment / moment.trace()
    return torch.linalg.eigh(total)[1].flip(1)[:, :width].to(streams.pooled.dtype)


@torch.no_grad()
def start_from_teacher(
    student: BertEncoder, teacher: BertEncoder, streams: Streams, basis: Tensor
) -> BertEncoder:
    """Fill the student with what it can hold of the teacher; returns the student.

    Args:
        student: of as many heads as the teacher, not deeper and not wider in any size.
        teacher: whose tokens and positions the student shares.
        streams: of :func:`collect_streams`.
        basis: (C, r) of :func:`stream_basis`, r the student's width.

    Raises:
        ValueError: sizes that the student cannot take from the teacher.
    """
    t, s = teacher.config, student.config
    for name in ("vocab_size", "num_attention_heads", "type_vocab_size", "hidden_act"):
        if getattr(t, name) != getattr(s, name):
            raise ValueError(
                f"{name} is {getattr(t, name)} in the teacher and {getattr(s, name)} in the "
                "student: they must be equal to start from its weights"
            )
    for name in ("hidden_size", "intermediate_size", "max_position_embeddings"):
        if getattr(s, name) > getattr(t, name):
            raise ValueError(
                f"{name} {getattr(s, name)} exceeds the teacher's {getattr(t, name)}: start such "
                "a student at random"
            )
    for name in ("word", "position", "token_type"):
        own, theirs = (
            cast(nn.Embedding, m.embeddings[f"{name}_embeddings"]).weight
            for m in (student, teacher)
        )
        own.copy_(theirs[: len(own)] @ basis)
    chosen = teacher_layers(t.num_hidden_layers, s.num_hidden_layers)
    _norm(student.embeddings["LayerNorm"], teacher.embeddings["LayerNorm"], basis)
    layers = cast(nn.ModuleList, student.encoder["layer"])
    for layer, place in zip(layers, chosen, strict=True):
        source = cast(nn.ModuleList, teacher.encoder["layer"])[place]
        _attention(layer, source, streams.states[place], basis)
        _mlp(layer, source, streams.states[place], basis)
    return student


def _norm(own: Any, theirs: Any, basis: Tensor) -> None:
    """Keep the length of what the norm puts out: r coordinates instead of C carry it."""
    grow = (basis.shape[0] / basis.shape[1]) ** 0.5
    own.weight.copy_((basis**2 * theirs.weight[:, None]).sum(0) * grow)
    own.bias.copy_(theirs.bias @ basis)


def _attention(own: Any, theirs: Any, seen: Tensor, basis: Tensor) -> None:
    core, target = theirs.attention["self"], own.attention["self"]
    heads, old, new = core.num_heads, core.head_dim, target.head_dim
    root, inverse = _roots(seen @ basis)
    q, k, v = (
        torch.cat((p.weight @ basis, p.bias[:, None]), 1).view(heads, old, -1).double()
        for p in (core.query, core.key, core.value)
    )  # (heads, old, r + 1): the bias acts on a 1 beside the stream
    scores = root @ q.mT @ k @ root
    left, size, right = torch.linalg.svd(scores)
    size = size[:, :new].sqrt() * (new / old) ** 0.25
    q = (inverse @ left[:, :, :new] * size[:, None]).mT
    k = size[..., None] * right[:, :new] @ inverse
    out = (basis.mT @ theirs.attention["output"].dense.weight).double()
    out = out.unflatten(1, (heads, old)).transpose(0, 1)  # (heads, r, old)
    left, size, right = torch.linalg.svd(out @ v @ root, full_matrices=False)
    v = size[:, :new, None] * right[:, :new] @ inverse
    for projection, rows in ((target.query, q), (target.key, k), (target.value, v)):
        rows = rows.flatten(0, 1).to(projection.weight)
        projection.weight.copy_(rows[:, :-1])
        projection.bias.copy_(rows[:, -1])
    dense = own.attention["output"].dense
    dense.weight.copy_(left[:, :, :new].transpose(0, 1).flatten(1).to(dense.weight))
    dense.bias.copy_(theirs.attention["output"].dense.bias @ basis)
    _norm(own.attention["output"].LayerNorm, theirs.attention["output"].LayerNorm, basis)


def _mlp(own: Any, theirs: Any, seen: Tensor, basis: Tensor) -> None:
    up, down = theirs.intermediate["dense"], theirs.output.dense
    # What the attention adds before is small beside the stream: its input ranks the units.
    busy = theirs.act(up(seen)).square().mean(0) * (down.weight.mT @ basis).square().sum(1)
    units = busy.topk(own.intermediate["dense"].out_features).indices.sort().values
    own.intermediate["dense"].weight.copy_(up.weight[units] @ basis)
    own.intermediate["dense"].bias.copy_(up.bias[units])
    own.output.dense.weight.copy_(basis.mT @ down.weight[:, units])
    own.output.dense.bias.copy_(down.bias @ basis)
    _norm(own.output.LayerNorm, theirs.output.LayerNorm, basis)


def _roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of the mean square of [x, 1], (r + 1, r + 1), and its inverse."""
    x = torch.cat((x, x.new_ones(len(x), 1)), 1).double()
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    root = values.clamp_min(values[-1] * 1e-9).sqrt()
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT

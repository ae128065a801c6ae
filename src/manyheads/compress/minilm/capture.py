"""Queries, keys and values of one layer of an encoder that exists, and nothing more than that.

Only the projections are listened to: the model's own attention runs as fast as it can, and after
the last of the three the forward pass is given up if the rest is not wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from manyheads.compress.anatomy import Anatomy, Attention, Projection, anatomy
from manyheads.compress.minilm.losses import QKV
from manyheads.layers.heads import split_heads
from manyheads.models.language.bert import BertEncoder

__all__ = ["Captured", "call", "capture_qkv"]


class Captured(NamedTuple):
    """Queries, keys and values (B, A, N, D), and what the model returned (None if stopped)."""

    qkv: QKV
    output: Any = None


class _Enough(Exception):
    """All that was wanted is there."""


def call(model: nn.Module, batch: Mapping[str, Tensor] | Tensor) -> Any:
    """Return ``model(**batch)``; ``BertEncoder`` too takes transformers' names here."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(model, BertEncoder):
        given = dict(batch)
        mask = given.get("attention_mask")
        return model(
            given["input_ids"],
            segments=given.get("token_type_ids"),
            mask=None if mask is None else mask.bool(),
        )
    return model(**batch)


def capture_qkv(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Tensor,
    *,
    layer: int = -1,
    rest: bool = False,
) -> Captured:
    """Run an encoder and return the queries, keys and values of one layer, gradients included.

    The attention of the layers before is not touched, so it may be a fused one. Read before any
    rotation of queries and keys: for encoders with absolute or no positions.

    Args:
        model: of transformers (BERT, RoBERTa, ALBERT, ViT, ...), timm or ours, as
            :func:`manyheads.compress.anatomy.anatomy` finds it.
        batch: for ``model(**batch)``, or one tensor for ``model(batch)``.
        layer: from 0, or from the end.
        rest: run what comes after, for the model's output; otherwise it stops there.

    Raises:
        ValueError: no such layer, a decoder, or an attention without three equal projections.

    Example:
        >>> import torch
        >>> from manyheads.models.language.bert import BertConfig, BertEncoder
        >>> config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2,
        ...                     num_attention_heads=4, intermediate_size=48)
        >>> model = BertEncoder(config)
        >>> capture_qkv(model, {"input_ids": torch.randint(1, 50, (2, 7))}).qkv.query.shape
        torch.Size([2, 4, 7, 6])
    """
    found = anatomy(model)
    attention, turn = _find(found, layer)
    seen: dict[str, Tensor] = {}
    projections = {
        "query": attention.query, "key": attention.key, "value": attention.value,
    }  # fmt: skip
    calls = dict.fromkeys(projections, 0)

    def listen(name: str, projection: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] += 1
            if calls[name] != turn + 1:
                return
            own = output.chunk(projection.parts, -1)[projection.part]
            seen[name] = split_heads(own, attention.num_heads)
            if len(seen) == 3 and not rest:
                raise _Enough

        return hook

    with ExitStack() as hooks:
        for name, projection in projections.items():
            if projection is None:
                raise ValueError(
                    f"the attention at {attention.path!r} has no matrix of its own for {name}: "
                    "MiniLM needs queries, keys and values"
                )
            module = model.get_submodule(projection.path)
            hooks.callback(module.register_forward_hook(listen(name, projection)).remove)
        try:
            output = call(model, batch)
        except _Enough:
            output = None
    if len(seen) < 3:
        raise ValueError(
            f"layer {layer} of {type(model).__name__} did not run its projections: is it dropped?"
        )
    return Captured(QKV(**seen), output)


def _find(found: Anatomy, layer: int) -> tuple[Attention, int]:
    """Return the layer's attention, and how many times its weights run before it (ALBERT)."""
    encoders = [b for b in found.blocks if b.role == "encoder"]
    if not encoders:
        raise ValueError("the model is a decoder: MiniLM's relations are those of an encoder")
    if found.shared and len(encoders) > 1:
        raise ValueError(
            f"{len(encoders)} blocks are shared by {found.layers} layers: only one shared block "
            "is supported"
        )
    count = found.layers if found.shared else len(encoders)
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} is outside the model's {count} layers")
    place = layer % count
    sublayer = encoders[0 if found.shared else place].of_kind("attention")
    if sublayer is None or sublayer.attention is None:
        raise ValueError(f"layer {layer} has no attention: choose another")
    attention = sublayer.attention
    if attention.num_kv_heads != attention.num_heads:
        raise ValueError(
            f"layer {layer} has {attention.num_heads} query heads on {attention.num_kv_heads} "
            "key-value heads: MiniLM needs as many of both"
        )
    return attention, place if found.shared else 0

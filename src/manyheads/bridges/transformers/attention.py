"""Our attention functions inside transformers' own models, with the masks that belong to them.

B batch, H heads, H_kv key-value heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from manyheads.attention.lean import lean
from manyheads.attention.lean.run import default_workers, run_plan, settle
from manyheads.attention.sla import sla
from manyheads.attention.softmax import softmax
from manyheads.bridges.transformers.check import check_causal, check_sla
from manyheads.errors import unknown_name

__all__ = ["ATTENTION", "lean_attention", "register", "sla_attention", "softmax_attention"]

Result = tuple[Tensor, None]

# What transformers hands to attention that changes nothing here: windows, packing and padding have
# become the mask already. Any other argument that is set is refused rather than ignored.
_HARMLESS = {
    "cache",
    "cache_position",
    "kwargs",
    "layer_idx",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}
_TILE = 256


def softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Result:
    """Softmax attention by :func:`manyheads.attention.softmax`, in transformers' convention. Exact.

    Args:
        module: the attention module; its ``is_causal`` counts where the argument is None.
        query: (B, H, N, D); key: (B, H_kv, M, D); value: (B, H_kv, M, V).
        attention_mask: True where a query may attend, broadcast to (B, H, N, M), or a bias; None
            where causality alone, or nothing, is masked.
        dropout: must be 0.
        scaling: factor on the scores.
        is_causal: whether query i sees keys 0..i, if there is no mask.
        kwargs: what changes nothing; anything else must be None or False.

    Returns:
        (B, N, H, V), and no weights.

    Raises:
        ValueError: dropout, a soft cap, attention sinks, weights or anything else unknown.
    """
    _refuse(dropout, kwargs)
    out = _softmax(query, key, value, attention_mask, scaling, _is_causal(module, is_causal))
    return out.transpose(1, 2), None


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Result:
    """Decode by :func:`manyheads.attention.lean`: keys dealt evenly to all threads. Exact.

    Arguments and errors as :func:`softmax_attention`, which reads prompts and trains. Padding and
    sliding windows are left out of the work, not masked, and nothing is copied.
    """
    _refuse(dropout, kwargs)
    length = query.shape[2]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    rows = _key_mask(attention_mask, query, key)
    decodes = length == 1 and not recorded and not torch.compiler.is_compiling()
    if not decodes or (attention_mask is not None and rows is None):
        out = _softmax(query, key, value, attention_mask, scaling, _is_causal(module, is_causal))
    elif rows is None:
        out = lean(query, key, value, scale=scaling)
    else:
        out = _decode(query, key, value, rows, scaling)
    return out.transpose(1, 2), None


def sla_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Result:
    """Attend to few key blocks by :func:`manyheads.attention.sla`, for vision models and encoders.

    **Approximate**: the model must be fine-tuned with it; without its linear branch, which has
    weights. It **looks ahead**, so that causal modules are refused. Other arguments and errors as
    :func:`softmax_attention`.

    Args:
        options: of ``sla``: topk, block_q, block_k.

    Raises:
        ValueError: also a causal module, or a mask that is more than padding of keys.
    """
    _refuse(dropout, kwargs)
    if _is_causal(module, is_causal):
        raise ValueError(
            f"{type(module).__name__} is causal and manyheads_sla looks ahead: use it in encoders, "
            "or attn_implementation='manyheads_lean' here"
        )
    mask = _key_mask(attention_mask, query, key)
    if attention_mask is not None and mask is None:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and differs between queries "
            "or heads: manyheads_sla knows padding alone"
        )
    out = sla(query, key, value, scale=scaling, mask=mask, **(options or {}))
    return out.transpose(1, 2), None


ATTENTION: dict[str, Callable[..., Result]] = {
    "manyheads_softmax": softmax_attention,
    "manyheads_lean": lean_attention,
    "manyheads_sla": sla_attention,
}


def register(
    names: Iterable[str] | None = None, *, sla_options: dict[str, Any] | None = None
) -> tuple[str, ...]:
    """Enter our attention functions, each with its mask, and try them on small random models.

    Afterwards ``attn_implementation="manyheads_lean"`` works in ``from_pretrained`` and
    ``from_config``, and ``set_attn_implementation`` takes it. Causality, padding on both sides,
    windows, grouped heads and decoding are compared with transformers' own "eager" before this
    returns.

    Args:
        names: out of "manyheads_softmax" and "manyheads_lean" (exact) and "manyheads_sla"
            (approximate, bidirectional); None for all.
        sla_options: options of :func:`manyheads.attention.sla` for "manyheads_sla".

    Returns:
        The names that are registered now.

    Raises:
        ValueError: no such function, with the nearest.
        RuntimeError: transformers and our function do not agree; nothing stays registered.

    Example:
        >>> register(["manyheads_lean"])
        ('manyheads_lean',)
    """
    chosen = tuple(ATTENTION if names is None else names)
    for name in chosen:
        if name not in ATTENTION:
            raise unknown_name("attention function", name, ATTENTION)
    for name in chosen:
        function = ATTENTION[name]
        if name == "manyheads_sla":
            function = partial(sla_attention, options=dict(sla_options or {}))
        check = check_sla if name == "manyheads_sla" else check_causal
        tried = partial(sla_attention, options={"topk": 1.0}) if check is check_sla else function
        try:
            _enter(name, tried)
            check(name)
            _enter(name, function)
        except Exception:
            _forget(name)
            raise
    return chosen


def _enter(name: str, function: Callable[..., Result]) -> None:
    AttentionInterface.register(name, function)
    # Boolean masks, left out where is_causal says the same.
    AttentionMaskInterface.register(name, sdpa_mask)


def _forget(name: str) -> None:
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported: set the config's attention dropout to "
            "0, or train with attn_implementation='sdpa'"
        )
    for name, value in kwargs.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise ValueError(
                f"the model asks attention for {name}, which is not supported here: use "
                "attn_implementation='eager'"
            )


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    length = query.shape[2]
    causal = is_causal and mask is None and length > 1
    if causal and key.shape[2] > length:
        # A cache of fixed size whose places behind the prompt are still empty.
        key, value = key[:, :, :length], value[:, :, :length]
    return softmax(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def _key_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return (B, M), True = a key that all queries and heads see; None if they differ."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    rows = mask[:, 0, 0]
    if mask.shape[2] > 1 and not bool((mask[:, 0] == rows[:, None]).all()):
        return None
    return rows.expand(query.shape[0], key.shape[2])


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attend from one token a row to the keys that ``mask`` (B, M) leaves, without copying them."""
    counts = mask.sum(1).tolist()
    first = mask.int().argmax(1).tolist()
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1).tolist()
    if any(b - a + 1 != n for a, b, n in zip(first, last, counts, strict=True)):
        return lean(query, key, value, mask=mask, scale=scale)
    if len(set(zip(first, counts, strict=True))) == 1:
        span = slice(first[0], first[0] + counts[0])
        return lean(query, key[:, :, span], value[:, :, span], scale=scale)
    workers = default_workers(counts, heads=key.shape[1], tile=_TILE)
    if workers == 1:
        parts = [
            lean(query[i : i + 1], key[i : i + 1, :, a : a + n], value[i : i + 1, :, a : a + n],
                 scale=scale)
            for i, (a, n) in enumerate(zip(first, counts, strict=True))
        ]  # fmt: skip
        return torch.cat(parts)

    def read(request: int, heads: slice, keys: slice) -> tuple[Tensor, Tensor]:
        span = slice(first[request] + keys.start, first[request] + keys.stop)
        return key[request, heads, span], value[request, heads, span]

    plan = settle(
        None, counts, heads=key.shape[1], queries=1, is_causal=False, workers=workers, tile=_TILE,
        order="request",
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        out, _ = run_plan(wide, read, counts, plan, scale=scale, dim=value.shape[-1])
    return out.to(query.dtype)

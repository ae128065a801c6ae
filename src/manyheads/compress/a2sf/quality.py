"""What eviction costs: the loss of continuations read through an evicting cache.

B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.compress.a2sf.own import held_bytes, own_model
from manyheads.compress.procedure import Batch
from manyheads.models.language.causal import CausalLM

if TYPE_CHECKING:
    from manyheads.compress.a2sf.policy import CachePolicy

__all__ = ["bits_per_byte", "cache_bytes", "compare", "continuation_loss"]

_NAMES = ("input_ids", "tokens"), ("attention_mask", "mask")


@torch.no_grad()
def continuation_loss(
    model: nn.Module,
    ids: Tensor,
    *,
    prompt: int,
    policy: CachePolicy | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Return the loss of each token after the prompt, read one by one as generation does.

    Args:
        model: a causal language model of transformers or ours.
        ids: (B, N).
        prompt: tokens that are read at once and not scored.
        policy: of the cache; None for one that holds everything.
        mask: (B, N), nonzero at real tokens.

    Returns:
        (B, N - prompt) in nats, 0 at padding; and the bytes that the cache held at the end.

    Raises:
        ValueError: a prompt that leaves nothing to score.
    """
    length = ids.shape[1]
    if not 0 < prompt < length:
        raise ValueError(f"prompt is {prompt} of {length} tokens: leave at least one to score")
    real = torch.ones_like(ids) if mask is None else mask
    own = own_model(model)
    if own is not None:
        return _own_loss(own, ids, prompt, policy, mask)
    losses = []
    with nullcontext() if policy is None else policy.attach(model) as cache:
        start, stop = 0, prompt
        while stop < length:
            # Positions by real tokens, as generate() counts them.
            places = (real[:, :stop].long().cumsum(-1) - 1).clamp_min(0)[:, start:]
            options = {} if mask is None else {"position_ids": places}
            out = model(
                ids[:, start:stop], attention_mask=real[:, :stop], use_cache=True,
                cache=cache, **options,
            )  # fmt: skip
            cache = out.cache
            loss = F.cross_entropy(out.logits[:, -1].float(), ids[:, stop], reduction="none")
            losses.append(loss * (real[:, stop] != 0))
            start, stop = stop, stop + 1
        held = cache_bytes(cache)
    return torch.stack(losses, 1), held


def bits_per_byte(
    model: nn.Module,
    ids: Tensor,
    *,
    prompt: int,
    text_bytes: int,
    policy: CachePolicy | None = None,
) -> float:
    """Return the bits that a model needs for each byte of the text after the prompt.

    Args:
        model, ids, prompt, policy: as :func:`continuation_loss`.
        text_bytes: of the text that the tokens after the prompt stand for, all rows together.

    Raises:
        ValueError: no bytes.
    """
    if text_bytes < 1:
        raise ValueError(f"text_bytes is {text_bytes}, expected the length of the scored text")
    losses, _ = continuation_loss(model, ids, prompt=prompt, policy=policy)
    return float(losses.sum()) / math.log(2) / text_bytes


def compare(policy: CachePolicy, model: nn.Module, calibration: Iterable[Batch]) -> dict[str, Any]:
    """Return loss and bytes with everything held and under a policy, over calibration batches.

    The first half of each batch is the prompt.

    Raises:
        ValueError: no batch of at least two tokens with ``input_ids`` (``tokens`` of our models).
    """
    sums, bytes_held, tokens = [0.0, 0.0], [0, 0], 0
    for batch in calibration:
        ids, mask = (_either(batch, *names) for names in _NAMES)
        if ids is None or ids.shape[1] < 2:
            raise ValueError("a calibration batch needs input_ids of at least two tokens")
        for place, chosen in enumerate((None, policy)):
            losses, held = continuation_loss(
                model,
                ids,
                prompt=ids.shape[1] // 2,
                policy=chosen,
                mask=mask,
            )
            sums[place] += float(losses.sum())
            bytes_held[place] = max(bytes_held[place], held)
        real = (torch.ones_like(ids) if mask is None else mask)[:, ids.shape[1] // 2 :]
        tokens += int((real != 0).sum())
    if not tokens:
        raise ValueError("the calibration holds no token to score")
    return {
        "tokens": tokens,
        "loss_full": sums[0] / tokens,
        "loss": sums[1] / tokens,
        "cache_bytes_full": bytes_held[0],
        "cache_bytes": bytes_held[1],
    }


def _either(batch: Batch, *names: str) -> Tensor | None:
    return next((batch[name] for name in names if name in batch), None)


def _own_loss(
    model: CausalLM, ids: Tensor, prompt: int, policy: CachePolicy | None, mask: Tensor | None
) -> tuple[Tensor, int]:
    real = None if mask is None or bool((mask != 0).all()) else mask != 0
    losses = []
    with nullcontext() if policy is None else policy.attach(model):
        state = model.init_state(len(ids))
        first = None if real is None else real[:, :prompt]
        logits, state = model.update(ids[:, :prompt], state, mask=first)
        last = logits[:, -1]
        for place in range(prompt, ids.shape[1]):
            losses.append(F.cross_entropy(last.float(), ids[:, place], reduction="none"))
            if place + 1 == ids.shape[1]:
                break
            if real is None or bool(real[:, place].all()):
                last, state = model.step(ids[:, place], state)
            else:
                one = slice(place, place + 1)
                logits, state = model.update(ids[:, one], state, mask=real[:, one])
                last = logits[:, -1]
    stacked = torch.stack(losses, 1)
    scored = stacked if real is None else stacked * real[:, prompt:]
    return scored, held_bytes(state.layers)


def cache_bytes(cache: Any) -> int:
    """Return the bytes that a transformers cache holds, those of an encoder's keys included."""
    if hasattr(cache, "cross_attention_cache"):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    own: int | None = getattr(cache, "nbytes", None)
    if own is not None:
        return own
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

"""Cache policies on our own language models: evicting caches in the place of growing ones.

B batch, H heads, G key-value heads, N new tokens, n all tokens at hand, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from manyheads.attention.clipped_softmax import ClippedSoftmaxAttention
from manyheads.attention.gated import GatedAttention
from manyheads.attention.lean import LeanAttention
from manyheads.attention.softmax import SoftmaxAttention, SoftmaxState
from manyheads.attention.softmax.module import SoftmaxLayerState
from manyheads.compress.a2sf.policy import CachePolicy
from manyheads.compress.a2sf.state import EvictionState, Rotate
from manyheads.layers.cache import KeptCache
from manyheads.layers.ragged import positions
from manyheads.layers.rotary import apply_rotary, rotary_angles
from manyheads.layers.state import state_tensors
from manyheads.models.language.causal import CausalLM
from manyheads.models.language.mixer_lm import MixerLM
from manyheads.registry import get_mechanism

__all__ = [
    "EvictingKeys",
    "EvictingStates",
    "attached",
    "held_bytes",
    "held_lengths",
    "held_positions",
    "install",
    "own_model",
]

# Layers whose weights are a softmax over keys in any order. Others that inherit from the first
# weigh by distance or by blocks of tokens, which gaps would change.
_KINDS = (SoftmaxAttention, LeanAttention, GatedAttention, ClippedSoftmaxAttention)


def own_model(model: nn.Module) -> CausalLM | None:
    """Return the language model of ours that ``model`` is, or has inside; None where it has none.

    A transformers model of ours keeps it in ``model``.
    """
    inside = model if isinstance(model, CausalLM) else getattr(model, "model", None)
    return inside if isinstance(inside, CausalLM) else None


class EvictingKeys(KeptCache):
    """The keys and values of one layer under a policy, as the layer's state holds them.

    Positions are counted among real tokens.
    """

    def __init__(self, state: EvictionState, length: Tensor) -> None:
        self.state, self.length = state, length

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, scales, positions and scores."""
        return self.state.nbytes

    def tensors(self) -> list[Tensor]:
        held = self.state.held
        return [self.length, *(held.tensors.values() if held is not None else ())]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        other = copy.copy(self)
        other.state, other.length = copy.copy(self.state), fn(self.length)
        other.state.batch(fn)
        return other

    def expect(self, prompt: int) -> None:
        self.state.prompt = prompt

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        first: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        later: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        new = query.shape[2]
        mask = None if mask is None or bool(mask.all()) else mask
        places = positions(mask, new, device=query.device) + self.length[:, None]
        keys, values = self.state.append(key, value, places=places)
        allowed = self.state.mask(None if mask is None else _sees(mask), query)
        if keys.shape[2] == new:
            out = first(query, key, value, mask)
        elif allowed is None:
            out = later(query, keys, values, None)
        else:
            nobody = ~allowed.any(-1, keepdim=True)  # padding before the first token of a row
            out = later(query, keys, values, allowed | nobody).masked_fill(nobody, 0)
        self.state.settle(query, keys, mask=allowed)
        self.length = self.length + (new if mask is None else mask.sum(1))
        return out


class EvictingStates:
    """What a model holds that generates under a policy: of the text that was begun last."""

    def __init__(self) -> None:
        self.layers: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, recurrent states included."""
        return held_bytes(self.layers)

    def lengths(self) -> list[int]:
        """Return the tokens that each layer holds, 0 where its state has a constant size."""
        return held_lengths(self.layers)

    def positions(self, layer: int) -> Tensor:
        """Return which tokens a layer holds, (B, G, n), counted among a row's real ones.

        Raises:
            ValueError: a layer that evicts nothing, or nothing was read.
        """
        return held_positions(self.layers, layer)


def held_bytes(layers: Any) -> int:
    """Return the bytes that layers' states hold; free places of a growing cache do not count."""
    total = 0
    for own in layers:
        cache = getattr(own, "cache", None)
        if isinstance(cache, EvictingKeys):
            total += cache.nbytes
        elif isinstance(cache, SoftmaxState):
            used = int(cache.length.max())
            parts = (cache.key[:, :, :used], cache.value[:, :, :used])
            total += sum(t.numel() * t.element_size() for t in parts)
        else:
            total += sum(t.numel() * t.element_size() for t in state_tensors(own))
    return total


def held_lengths(layers: Any) -> list[int]:
    """Return the tokens that each layer's state holds, 0 where it has a constant size."""
    out = []
    for own in layers:
        cache = getattr(own, "cache", None)
        if isinstance(cache, EvictingKeys):
            out.append(0 if cache.state.held is None else len(cache.state.held))
        else:
            out.append(int(cache.length.max()) if isinstance(cache, SoftmaxState) else 0)
    return out


def held_positions(layers: Any, layer: int) -> Tensor:
    """Return which tokens a layer holds, (B, G, n), counted among a row's real ones.

    Raises:
        ValueError: a layer that evicts nothing, or nothing was read.
    """
    if not layers:
        raise ValueError("no text was begun: generate first")
    cache = getattr(layers[layer], "cache", None)
    if not isinstance(cache, EvictingKeys):
        raise ValueError(f"layer {layer} keeps a {type(layers[layer]).__name__}: it evicts nothing")
    if cache.state.held is None:
        raise ValueError("the cache is empty: generate first")
    return cache.state.held["position"]


@contextmanager
def attached(policy: CachePolicy, model: nn.Module) -> Iterator[EvictingStates]:
    """Let a model of ours begin its states within a policy's budget; afterwards it is as before."""
    own, seen = _check(policy, model), EvictingStates()
    before = own.make_caches
    own.make_caches = _Maker(policy, seen)
    try:
        yield seen
    finally:
        own.make_caches = before


def install(policy: CachePolicy, model: nn.Module) -> None:
    """Make a model of ours begin its states so from now on, in place of a policy that was there.

    Raises:
        ValueError: a model without layers that the policy could act on.
    """
    _check(policy, model).make_caches = _Maker(policy)


class _Maker:
    """In a model's ``make_caches``; copies and pickles with it."""

    def __init__(self, policy: CachePolicy, seen: EvictingStates | None = None) -> None:
        self.policy, self.seen = policy, seen

    def __call__(self, model: MixerLM, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        made = []
        for number, (block, own) in enumerate(zip(model.layers, layers, strict=True)):
            mixer: Any = block.mixer
            if type(mixer) in _KINDS:
                rotate = _rotation(mixer) if self.policy.rotates else None
                state = EvictionState(self.policy, number, rotate=rotate)
                own = SoftmaxLayerState(EvictingKeys(state, own.cache.length))
            made.append(own)
        if self.seen is not None:
            self.seen.layers = tuple(made)
        return tuple(made)


def _check(policy: CachePolicy, model: nn.Module) -> MixerLM:
    own = own_model(model)
    if not isinstance(own, MixerLM):
        raise ValueError(
            f"a cache policy knows the layers of a MixerLM among our models, not those of a "
            f"{type(own).__name__}"
        )
    mixers: list[Any] = [block.mixer for block in own.layers]
    evicting = [m for m in mixers if type(m) in _KINDS]
    for number, mixer in enumerate(mixers):
        if type(mixer) not in _KINDS and _grows(mixer):
            raise ValueError(
                f"layer {number} is a {type(mixer).__name__}, whose cache grows and whose weights "
                "are no softmax over keys in any order: nothing can be evicted from it"
            )
    if policy.settings.cross_budget is not None:
        raise ValueError(
            f"cross_budget is {policy.settings.cross_budget} and a MixerLM has no encoder: leave "
            "it out"
        )
    if not evicting:
        kinds = ", ".join(sorted({getattr(m, "mechanism", type(m).__name__) for m in mixers}))
        raise ValueError(
            f"no layer keeps keys and values ({kinds}): states of constant size need no cache "
            "policy; it is for softmax, lean, gated and clipped_softmax layers"
        )
    if policy.rotates:
        if own.config.has_positions:
            raise ValueError(
                "the embeddings carry positions, which cannot be moved in keys: use sink-recent"
            )
        for mixer in evicting:
            _rotation(mixer)
    for number, mixer in enumerate(mixers):
        if type(mixer) in _KINDS:
            policy.budget(number, 1)
    return own


def _grows(mixer: Any) -> bool:
    name = getattr(mixer, "mechanism", None)
    return name is not None and not get_mechanism(name).constant_state


def _rotation(mixer: SoftmaxAttention) -> Rotate:
    theta = mixer.config.rotary_theta
    if theta is None:
        raise ValueError(
            "rotary_theta is None: there are no rotary positions, so that keys cannot be moved: "
            "use sink-recent"
        )

    def rotate(keys: Tensor, shift: Tensor) -> Tensor:
        cos, sin = (t.flatten(0, 1) for t in rotary_angles(shift, keys.shape[-1], theta=theta))
        wide = keys.flatten(0, 1)[:, None].to(torch.promote_types(keys.dtype, torch.float32))
        return apply_rotary(wide, cos, sin).view(keys.shape).to(keys.dtype)

    return rotate


def _sees(mask: Tensor) -> Tensor:
    """Return who sees whom among new tokens, (B, 1, N, N); padding is seen by nobody."""
    length = mask.shape[1]
    below = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return (below & mask[:, None])[:, None]

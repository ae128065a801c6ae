"""Caches that evict, inside transformers' ``generate``: see :mod:`manyheads.compress.a2sf`.

B batch, H heads, G key-value heads, N new tokens, n all keys, D head dim.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyheads.bridges.transformers.rotation import rotation
from manyheads.compress.a2sf.policy import CachePolicy
from manyheads.compress.a2sf.state import EvictionState, Rotate

__all__ = ["EvictingCache", "EvictingLayer", "attached", "install", "new_cache"]

_PREFIX = "manyheads_evicting_"
_INNER = ("eager", "sdpa", "manyheads_softmax", "manyheads_lean")
# The layer travels with the keys that it hands to the attention function, which is told of no
# cache.
_LAYER = "_manyheads_layer"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class EvictingLayer(CacheLayerMixin):
    """One layer: the number of tokens that it saw is its length, what it holds is its budget's."""

    is_croppable = False

    def __init__(self, state: EvictionState) -> None:
        self.state = state
        super().__init__()
        self.is_sliding = state.window is not None

    @property
    def keys(self) -> Tensor | None:
        """(B, G, n, D), of the tokens held."""
        return self.state.read("key")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _refuse(value)

    @property
    def values(self) -> Tensor | None:
        """(B, G, n, D), of the tokens held."""
        return self.state.read("value")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        _refuse(value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values that the new tokens may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.state.append(key_states, value_states)
        setattr(keys, _LAYER, self)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Ask for the mask of the new tokens among themselves; the state knows the rest."""
        return query_length, self.state.seen

    def get_seq_length(self) -> int:
        """Return the tokens seen, evicted ones included."""
        return self.state.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"{tokens_to_remove} tokens cannot be taken back from a cache that evicts: "
                "generate without an assistant model"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.batch(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self.state.batch(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        self.state.batch(lambda t: t.to(self.device))


class EvictingCache(DynamicCache):
    """A cache whose layers hold no more than a policy's budget."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers: keys, values, scales, positions and scores."""
        return sum(_nbytes(layer) for layer in self.layers)

    def lengths(self) -> list[int]:
        """Return the tokens that each layer holds."""
        return [_held(layer) for layer in self.layers]

    def positions(self, layer: int) -> Tensor:
        """Return which tokens a layer holds, (B, G, n), counted from the first one it saw."""
        chosen = self.layers[layer]
        if not isinstance(chosen, EvictingLayer):
            raise ValueError(f"layer {layer} is a {type(chosen).__name__}, which evicts nothing")
        if chosen.state.held is None:
            raise ValueError("the cache is empty: generate with it first")
        return chosen.state.held["position"]


def new_cache(policy: CachePolicy, model: nn.Module, *, prompt: int | None = None) -> Cache:
    """Return an empty cache of a policy for a model.

    Args:
        policy: says which tokens stay.
        model: a causal language model of transformers, or Whisper.
        prompt: its tokens, where it is read in chunks and the budget is a share of it.

    Returns:
        An :class:`EvictingCache`; of an encoder-decoder an ``EncoderDecoderCache`` whose
        ``self_attention_cache`` is one: what the encoder said is never evicted.
    """
    own = _check(model)
    config = _decoder_config(own)
    rotate: Rotate | None = rotation(model) if policy.rotates else None
    layers: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(layer)
            continue
        window = getattr(layer, "sliding_window", None)
        if window is not None and _bounded(policy, index, window):
            layers.append(layer)
            continue
        state = EvictionState(policy, index, window=window, rotate=rotate, prompt=prompt)
        layers.append(EvictingLayer(state))
    cache = EvictingCache(layers)
    if own.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=config))
    return cache


@contextmanager
def attached(policy: CachePolicy, model: nn.Module) -> Iterator[Cache]:
    """Let a model generate within a policy's budget; afterwards it is as before."""
    own = _check(model)
    before = own.config._attn_implementation
    had = model.__dict__.get("_prepare_cache_for_generation")
    cache = new_cache(policy, model)
    try:
        install(policy, model)
        yield cache
    finally:
        own.set_attn_implementation(before)
        model.__dict__.pop("_prepare_cache_for_generation", None)
        if had is not None:
            model.__dict__["_prepare_cache_for_generation"] = had


def install(policy: CachePolicy, model: nn.Module) -> None:
    """Make ``model.generate`` create a cache of this policy at each call.

    Raises:
        ValueError: no model of transformers that generates, or an attention function that
            cannot be asked who attends to whom.
    """
    own = _check(model)
    inner = str(own.config._attn_implementation)
    if inner.startswith(_PREFIX):
        inner = inner.removeprefix(_PREFIX)
    if inner not in _INNER:
        raise ValueError(
            f"attention is {inner!r}, which an evicting cache does not work with: "
            f"model.set_attn_implementation('sdpa') first, or one of {', '.join(_INNER)}"
        )
    if policy.rotates:
        rotation(model)
    name = _PREFIX + inner
    AttentionInterface.register(name, _evicting(inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    own.set_attn_implementation(name)
    model.__dict__["_prepare_cache_for_generation"] = MethodType(_CacheMaker(policy), model)


class _CacheMaker:
    """In place of a model's ``_prepare_cache_for_generation``; copies and pickles with it."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy

    def __call__(
        self,
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kw: Any,
    ) -> Any:
        chosen = generation_config.cache_implementation
        if chosen is not None:
            raise ValueError(
                f"cache_implementation={chosen!r} and the {self.policy.name} policy are two "
                "caches: leave one away"
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            mask = model_kwargs.get("attention_mask")
            encodes = getattr(model.config, "is_encoder_decoder", False)
            prompt = None if mask is None or encodes else mask.shape[-1]
            model_kwargs["cache"] = new_cache(self.policy, model, prompt=prompt)
            return None
        make = type(model)._prepare_cache_for_generation
        return make(model, generation_config, model_kwargs, *args, **kw)


def _evicting(inner: str) -> Attention:
    """Return an attention function: ``inner``'s output, and the cache told who attended to whom."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attend: Attention = ALL_ATTENTION_FUNCTIONS.get_interface(inner, _eager(module))
        layer: EvictingLayer | None = getattr(key, _LAYER, None)
        if layer is None:
            return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        delattr(key, _LAYER)
        if kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
            raise ValueError(
                f"{type(module).__name__} adds a bias or sinks to its attention, which an "
                "evicting cache does not know"
            )
        mask = layer.state.mask(attention_mask, query)
        out, rows = attend(module, query, key, value, mask, scaling=scaling, **kwargs)
        layer.state.settle(query, key, mask=mask, scale=scaling, rows=rows)
        return out, rows

    return attention


def _eager(module: nn.Module) -> Attention:
    """Return the eager form of the file that an attention module comes from."""
    found: Attention | None = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", None
    )
    if found is None:
        raise ValueError(
            f"{type(module).__name__} has no eager attention function to ask: "
            "model.set_attn_implementation('sdpa') first"
        )
    return found


def _check(model: nn.Module) -> Any:
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} is no transformers model that generates: a cache policy needs "
            "one, such as AutoModelForCausalLM returns"
        )
    if getattr(model.config, "reorder_and_upcast_attn", False):
        raise ValueError("reorder_and_upcast_attn=True is not supported: set it to False")
    return model


def _decoder_config(model: PreTrainedModel) -> Any:
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "decoder_layers", None)
    if getattr(model.config, "is_encoder_decoder", False) and layers is not None:
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
    return config


def _refuse(value: Tensor | None) -> None:
    if value is not None:
        raise ValueError("an evicting cache is filled by update() alone")


def _bounded(policy: CachePolicy, layer: int, window: int) -> bool:
    """Say whether transformers' own sliding window holds no more than the budget."""
    return policy.settings.budget_ratio is None and policy.budget(layer, 0) >= window


def _nbytes(layer: Any) -> int:
    if isinstance(layer, EvictingLayer):
        return layer.state.nbytes
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


def _held(layer: Any) -> int:
    if isinstance(layer, EvictingLayer):
        return 0 if layer.state.held is None else len(layer.state.held)
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else int(keys.shape[-2])

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

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyheads.bridges.transformers.base import Wrapped
from manyheads.bridges.transformers.evicting_cache import (
    LAYER,
    EvictingCache,
    EvictingCrossLayer,
    EvictingLayer,
)
from manyheads.bridges.transformers.rotation import rotation
from manyheads.compress.a2sf import own as own_models
from manyheads.compress.a2sf.cross import CrossState
from manyheads.compress.a2sf.policy import CachePolicy
from manyheads.compress.a2sf.sink_recent import SinkRecent
from manyheads.compress.a2sf.state import EvictionState, Rotate

__all__ = ["EvictingCache", "EvictingLayer", "attached", "install", "new_cache"]

_PREFIX = "manyheads_evicting_"
_INNER = ("eager", "sdpa", "manyheads_softmax", "manyheads_lean")

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def new_cache(policy: CachePolicy, model: nn.Module, *, prompt: int | None = None) -> Cache:
    """Return an empty cache of a policy for a model.

    Args:
        policy: says which tokens stay.
        model: a causal language model of transformers, or Whisper.
        prompt: its tokens, where it is read in chunks and the budget is a share of it.

    Returns:
        An :class:`EvictingCache`; of an encoder-decoder an ``EncoderDecoderCache`` whose
        ``self_attention_cache`` is one, and with ``cross_budget`` the ``cross_attention_cache``
        too.
    """
    own = _check(model)
    if isinstance(own, Wrapped):
        raise ValueError(
            f"a {type(own).__name__} makes its caches itself: use policy.attach(model), and "
            "model.new_cache() inside"
        )
    config = _decoder_config(own)
    crosses = policy.settings.cross_budget is not None
    said: CachePolicy = SinkRecent(budget=sys.maxsize) if policy.holds_all else policy
    rotate: Rotate | None = rotation(model) if policy.rotates else None
    layers: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(layer)
            continue
        window = getattr(layer, "sliding_window", None)
        if window is not None and _bounded(said, index, window):
            layers.append(layer)
            continue
        state = EvictionState(said, index, window=window, rotate=rotate, prompt=prompt)
        layers.append(EvictingLayer(state))
    cache = EvictingCache(layers)
    if own.config.is_encoder_decoder:
        heard: DynamicCache = DynamicCache(config=config)
        if crosses:
            count = len(heard.layers)
            heard = EvictingCache(
                [EvictingCrossLayer(CrossState(policy), cache) for _ in range(count)]
            )
        return EncoderDecoderCache(cache, heard)
    return cache


@contextmanager
def attached(policy: CachePolicy, model: nn.Module) -> Iterator[Cache]:
    """Let a model generate within a policy's budget; afterwards it is as before."""
    own = _check(model)
    if isinstance(own, Wrapped):
        with own_models.attached(policy, own.model):
            yield own.new_cache()
        return
    before, had = own.config._attn_implementation, _take_away(own)
    try:
        cache = new_cache(policy, model)
        install(policy, model)
        yield cache
    finally:
        _take_away(own)
        own.set_attn_implementation(before)
        if had is not None:
            _give(own, had)


def install(policy: CachePolicy, model: nn.Module) -> None:
    """Make a model create a cache of this policy wherever it begins one.

    That is in ``generate`` and in calls with ``use_cache=True``; it is in place of a policy that
    was there.

    Raises:
        ValueError: no model of transformers that generates, or an attention function that
            cannot be asked who attends to whom.
    """
    own = _check(model)
    if isinstance(own, Wrapped):
        own_models.install(policy, own.model)
        return
    inner = str(own.config._attn_implementation)
    if inner.startswith(_PREFIX):
        inner = inner.removeprefix(_PREFIX)
    if inner not in _INNER:
        raise ValueError(
            f"attention is {inner!r}, which an evicting cache does not work with: "
            f"model.set_attn_implementation('sdpa') first, or one of {', '.join(_INNER)}"
        )
    if policy.settings.cross_budget is not None and not own.config.is_encoder_decoder:
        raise ValueError(
            f"cross_budget is {policy.settings.cross_budget} and {type(own).__name__} has no "
            "encoder: leave it out"
        )
    if policy.rotates and next(model.parameters()).device.type != "meta":
        rotation(model)
    name = _PREFIX + inner
    AttentionInterface.register(name, _evicting(inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    own.set_attn_implementation(name)
    _take_away(own)
    _give(own, policy)


def _give(model: Any, policy: CachePolicy) -> None:
    maker = _CacheMaker(policy)
    model.__dict__["_prepare_cache_for_generation"] = MethodType(maker, model)
    model.register_forward_pre_hook(maker.before_call, with_kwargs=True)


def _take_away(model: Any) -> CachePolicy | None:
    """Undo :func:`_give`; return the policy, None if there was none."""
    method = model.__dict__.pop("_prepare_cache_for_generation", None)
    if method is None:
        return None
    hooks = model._forward_pre_hooks
    for number, hook in list(hooks.items()):
        if isinstance(getattr(hook, "__self__", None), _CacheMaker):
            del hooks[number]
            model._forward_pre_hooks_with_kwargs.pop(number, None)
    policy: CachePolicy = method.__func__.policy
    return policy


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
            prompt = self._prompt(generation_config, model_kwargs)
            model_kwargs["cache"] = new_cache(self.policy, model, prompt=prompt)
            return None
        make = type(model)._prepare_cache_for_generation
        return make(model, generation_config, model_kwargs, *args, **kw)

    def before_call(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a cache where a call asks for one and brings none."""
        given = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        if given or kwargs.get("use_cache") is not True:
            return None
        return args, kwargs | {"cache": new_cache(self.policy, model)}

    def _prompt(self, generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
        """Return the prompt's tokens where they are not simply those of the first call."""
        if not generation_config.prefill_chunk_size or self.policy.settings.budget_ratio is None:
            return None
        mask, new = model_kwargs.get("attention_mask"), generation_config.max_new_tokens
        if mask is not None:
            return int(mask.shape[-1])
        if new is None:
            raise ValueError(
                "a budget that is a share of a prompt read in chunks needs to know the prompt: "
                "give max_new_tokens instead of max_length"
            )
        return int(generation_config.max_length - new)


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
        layer: EvictingLayer | EvictingCrossLayer | None = getattr(key, LAYER, None)
        if layer is None:
            return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        delattr(key, LAYER)
        if kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
            raise ValueError(
                f"{type(module).__name__} adds a bias or sinks to its attention, which an "
                "evicting cache does not know"
            )
        if isinstance(layer, EvictingCrossLayer):
            if attention_mask is not None:
                raise ValueError(
                    f"{type(module).__name__} masks positions of its encoder, which cross_budget "
                    "does not know: leave it out"
                )
            out, rows = attend(module, query, key, value, None, scaling=scaling, **kwargs)
            layer.settle(query, key, scale=scaling, rows=rows)
            return out, rows
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


def _bounded(policy: CachePolicy, layer: int, window: int) -> bool:
    """Say whether transformers' own sliding window holds no more than the budget."""
    return policy.settings.budget_ratio is None and policy.budget(layer, 0) >= window

"""One layer of a cache that evicts, and the cache of all layers, as transformers has them.

B batch, G key-value heads, n tokens held, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from manyheads.compress.a2sf.cross import CrossState
from manyheads.compress.a2sf.state import EvictionState

__all__ = ["LAYER", "EvictingCache", "EvictingCrossLayer", "EvictingLayer"]

# The layer travels with the keys that it hands to the attention function, which is told of no
# cache.
LAYER = "_manyheads_layer"


class _Layer(CacheLayerMixin):
    """One layer: the number of tokens that it saw is its length, what it holds is its budget's."""

    is_croppable = False
    state: EvictionState | CrossState

    def __init__(self, state: EvictionState | CrossState) -> None:
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
        setattr(keys, LAYER, self)
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


class EvictingLayer(_Layer):
    """A decoder's attention to its own tokens."""

    state: EvictionState


class EvictingCrossLayer(_Layer):
    """The cross-attention of one layer: filled once, read from :attr:`keys` at later calls.

    Args:
        state: what it holds.
        said: the decoder's own cache, which knows what of a prompt is padding.
    """

    state: CrossState

    def __init__(self, state: CrossState, said: EvictingCache) -> None:
        self.said = said
        super().__init__(state)

    @property
    def keys(self) -> Tensor | None:
        """(B, G, n, D), of the positions held."""
        keys = self.state.read("key")
        if keys is not None and not self.state.is_decided:
            setattr(keys, LAYER, self)
        return keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _refuse(value)

    def settle(self, query: Tensor, keys: Tensor, **options: Any) -> None:
        """Take note of an attention to the positions held; see :meth:`CrossState.settle`."""
        real = next(
            (own.state.real for own in self.said.layers if isinstance(own, EvictingLayer)), None
        )
        # A first layer without attention to itself comes before the padding is known.
        if real is not None and real.shape != (query.shape[0], query.shape[2]):
            real = None
        self.state.settle(query, keys, real=real, **options)


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
        if not isinstance(chosen, _Layer):
            raise ValueError(f"layer {layer} is a {type(chosen).__name__}, which evicts nothing")
        if chosen.state.held is None:
            raise ValueError("the cache is empty: generate with it first")
        return chosen.state.held["position"]


def _refuse(value: Tensor | None) -> None:
    if value is not None:
        raise ValueError("an evicting cache is filled by update() alone")


def _nbytes(layer: Any) -> int:
    if isinstance(layer, _Layer):
        return layer.state.nbytes
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


def _held(layer: Any) -> int:
    if isinstance(layer, _Layer):
        return 0 if layer.state.held is None else len(layer.state.held)
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else int(keys.shape[-2])

"""The decoding state of a model as a transformers cache.

B batch, N new tokens, T tokens read so far (padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from manyheads.attention.landmark import LandmarkMemory, LandmarkState
from manyheads.attention.softmax import SoftmaxState
from manyheads.compress.a2sf.own import held_bytes, held_lengths, held_positions
from manyheads.layers.state import clone_state, reorder_state
from manyheads.models.language.causal import CausalLM, LMState

__all__ = ["ManyheadsCache"]


class _Record(NamedTuple):
    """A block that was read while recording: how the state was before, and its tokens."""

    state: LMState
    tokens: Tensor  # (B, N)
    mask: Tensor  # (B, N)


class ManyheadsCache(Cache):
    """The state of all layers of a model, whatever their kinds, for ``generate()``.

    Rows are reordered, repeated and selected exactly. :meth:`crop` is exact where all layers keep
    keys and values; a recurrent state cannot be cut back, so with such layers it needs
    :meth:`activate_past_recording`, which keeps copies of those states (as assisted generation
    asks for) and reads again what is left of a block.

    Args:
        model: the model whose state it is.
        options: of its ``init_state``.

    Example:
        >>> from manyheads.models import create_model
        >>> from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
        >>> model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="softmax"))
        >>> cache = ManyheadsCache(model)
        >>> logits = cache.advance(torch.randint(256, (1, 9)))
        >>> cache.crop(-2)
        >>> cache.get_seq_length()
        7
    """

    def __init__(self, model: CausalLM, *, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(layers=[])
        self.model, self.options = model, dict(options or {})
        self.state: LMState | None = None
        self.mask: Tensor | None = None  # (B, T)
        self._records: list[_Record] | None = None

    def advance(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read the next tokens (B, N), True in ``mask`` (B, N) where real: logits (B, N, V).

        Raises:
            ValueError: another batch than was read before.
        """
        batch = tokens.shape[0]
        if self.state is None:
            self.state = self.model.init_state(batch, **self.options)
            self.mask = torch.zeros(batch, 0, dtype=torch.bool, device=tokens.device)
        elif batch != self.batch_size:
            raise ValueError(
                f"input_ids has batch {batch}, the cache holds {self.batch_size} rows: use "
                "batch_repeat_interleave or batch_select_indices, or a new cache"
            )
        assert self.mask is not None
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if self._records is not None:
            self._records.append(_Record(self._kept(), tokens, real))
        logits = self._read(tokens, None if bool(real.all()) else real)
        self.mask = torch.cat((self.mask, real), 1)
        return logits

    def _read(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        assert self.state is not None
        if tokens.shape[1] == 1 and mask is None:
            logits, self.state = self.model.step(tokens[:, 0], self.state)
            return logits[:, None]
        logits, self.state = self.model.update(tokens, self.state, mask=mask)
        return logits

    def _kept(self) -> LMState:
        """Return the state as it is now, safe from what will be written in place."""
        assert self.state is not None
        layers = []
        for own in self.state.layers:
            if _has_keys(own):
                layers.append(own)  # written behind its length alone
            else:
                layers.append(own.clone() if isinstance(own, LandmarkMemory) else clone_state(own))
        return LMState(tuple(layers), clone_state(self.state.position))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, padding included.

        Args:
            tokens_to_remove: how many, as a negative number; a positive number is the length to
                keep, as older versions of transformers ask for. 0 drops what was recorded.

        Raises:
            ValueError: a layer is recurrent and the tokens were not recorded.
        """
        seen = self.get_seq_length()
        keep = min(tokens_to_remove, seen) if tokens_to_remove > 0 else seen + tokens_to_remove
        if keep < 0:
            raise ValueError(f"tokens_to_remove {tokens_to_remove}: the cache holds {seen} tokens")
        if keep < seen:
            assert self.state is not None
            assert self.mask is not None
            if all(_has_keys(own) for own in self.state.layers):
                self._shorten(self.mask[:, keep:].sum(1))
            else:
                self._go_back(keep)
            self.mask = self.mask[:, :keep]
        if self._records is not None:
            self._records = []

    def _shorten(self, counts: Tensor) -> None:
        """Take the last ``counts`` (B,) tokens off every row: their places become free."""
        assert self.state is not None
        layers = tuple(
            own._replace(cache=own.cache._replace(length=own.cache.length - counts))
            for own in self.state.layers
        )
        position = self.state.position
        self.state = LMState(layers, None if position is None else position - counts)

    def _go_back(self, keep: int) -> None:
        assert self.state is not None
        assert self.mask is not None
        start = self.mask.shape[1]
        for record in reversed(self._records or []):
            start -= record.tokens.shape[1]
            if start <= keep:
                break
        else:
            kinds = {type(s).__name__ for s in self.state.layers if not _has_keys(s)}
            raise ValueError(
                f"crop to {keep} tokens: states that forget ({', '.join(sorted(kinds))}) cannot be "
                "cut back to tokens that were not recorded; call activate_past_recording() before "
                "reading them, or begin a new cache"
            )
        self.state = record.state
        if keep > start:
            left = slice(keep - start)
            mask = record.mask[:, left]
            with torch.no_grad():
                self._read(record.tokens[:, left], None if bool(mask.all()) else mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select and repeat rows: row i becomes old row ``beam_idx[i]``."""
        if self.state is None or self.mask is None:
            return
        layers = []
        for own in self.state.layers:
            if isinstance(own, LandmarkMemory):
                own.reorder(beam_idx)
                layers.append(own)
            else:
                layers.append(reorder_state(own, beam_idx))
        self.state = LMState(tuple(layers), reorder_state(self.state.position, beam_idx))
        self.mask = self.mask.index_select(0, beam_idx.to(self.mask.device))
        if self._records:
            self._records = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side."""
        if self.mask is not None:
            rows = torch.arange(self.mask.shape[0], device=self.mask.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these numbers (or True at them)."""
        if self.mask is not None:
            rows = torch.arange(self.mask.shape[0], device=self.mask.device)
            self.reorder_cache(rows[indices.to(rows.device)])

    def activate_past_recording(self) -> None:
        """From now on keep what is needed to :meth:`crop` the tokens to come.

        Raises:
            ValueError: under a cache policy, which evicts otherwise when a block is read at once.
        """
        if self.model.make_caches is not None:
            raise ValueError(
                "an evicting cache cannot take back what it evicted: generate without an "
                "assistant model"
            )
        if self._records is None:
            self._records = []

    def is_recording_past(self, layer_idx: int) -> bool:
        return self._records is not None

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.mask = None
        if self._records is not None:
            self._records = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return T."""
        return 0 if self.mask is None else self.mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: no bound of the cache's own."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.state is not None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Our layers keep states of their own and never call this."""
        raise ValueError("a ManyheadsCache belongs to the model that it was made for")

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers; free places of a growing cache do not count."""
        return held_bytes(() if self.state is None else self.state.layers)

    def lengths(self) -> list[int]:
        """Return the tokens that each layer holds, 0 where its state has a constant size."""
        return held_lengths(() if self.state is None else self.state.layers)

    def positions(self, layer: int) -> Tensor:
        """Return which tokens a layer holds under a cache policy, see :func:`held_positions`."""
        return held_positions(() if self.state is None else self.state.layers, layer)

    @property
    def batch_size(self) -> int:
        return -1 if self.mask is None else self.mask.shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        layers = () if self.state is None else self.state.layers
        return self._records is not None or all(_has_keys(own) for own in layers)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    # Not "linear" in transformers' sense even where all layers are: this cache knows its length.
    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def __len__(self) -> int:
        return 1 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"ManyheadsCache({type(self.model).__name__}, {self.get_seq_length()} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> ManyheadsCache:
        """Return an independent copy of the state, of the same model: to branch from a prompt."""
        other = ManyheadsCache(self.model, options=self.options)
        if self.state is not None and self.mask is not None:
            layers = (
                own.clone() if isinstance(own, LandmarkMemory) else clone_state(own)
                for own in self.state.layers
            )
            other.state = LMState(tuple(layers), clone_state(self.state.position))
            other.mask = self.mask.clone()
        other._records = None if self._records is None else []
        return other


def _has_keys(own: Any) -> bool:
    """Whether a layer's state is keys and values in order, which a length alone bounds."""
    return isinstance(getattr(own, "cache", None), SoftmaxState | LandmarkState)

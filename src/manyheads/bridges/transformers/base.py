"""What both transformers classes share: a model of ours inside, and how it reads.

B batch, N length, T length with what a cache holds, V vocabulary, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from manyheads.attention.landmark import insert_landmarks, strip_landmarks
from manyheads.bridges.transformers.cache import ManyheadsCache
from manyheads.bridges.transformers.config import ManyheadsConfig
from manyheads.layers.ragged import check_mask
from manyheads.models.base import load_model
from manyheads.models.language.causal import CausalLM
from manyheads.models.language.landmark import LandmarkLM

__all__ = ["Change", "Wrapped", "before"]

Change = Callable[[Tensor], Tensor]


class Wrapped(PreTrainedModel):
    """A model of ours in ``self.model``, and how it reads with and without a cache."""

    config_class = ManyheadsConfig
    config: ManyheadsConfig
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: ManyheadsConfig, *, model: CausalLM | None = None) -> None:
        super().__init__(config)
        self.model = config.build() if model is None else model
        head = self._head
        tied = isinstance(head, nn.Linear) and head.weight is self.model.embed.weight
        config.tie_word_embeddings = tied
        self._tied_weights_keys = {"model.head.weight": "model.embed.weight"} if tied else {}
        self.post_init()

    @classmethod
    def from_model(cls, model: CausalLM, **options: Any) -> Self:
        """Wrap a model that exists; its weights are shared, not copied.

        Args:
            model: a causal language model of ours.
            options: of :class:`ManyheadsConfig`, beside the model's own settings.
        """
        return cls(ManyheadsConfig.from_model(model, **options), model=model)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], **options: Any) -> Self:
        """Load what ``Model.save`` or ``manyheads train lm`` wrote; options as in from_model.

        Raises:
            ValueError: the folder holds no model, or none that predicts the next token.
        """
        model = load_model(folder)
        if not isinstance(model, CausalLM):
            raise ValueError(f"{str(folder)!r} holds a {type(model).__name__}, no language model")
        return cls.from_model(model.eval(), **options)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load what ``save_pretrained`` wrote, strictly.

        Raises:
            ValueError: weights are missing or left over.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = [
            f"{n} {sorted(info[n])[:5]}" for n in ("missing_keys", "unexpected_keys") if info[n]
        ]
        if wrong:
            raise ValueError(f"the weights do not fit a {model.config.family}: {', '.join(wrong)}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Our models draw their weights when they are built."""

    @property
    def _head(self) -> nn.Module:
        return cast(nn.Module, self.model.head)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.model.embed)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self._head if isinstance(self._head, nn.Linear) else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the vocabulary; arguments as of ``PreTrainedModel.resize_token_embeddings``."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.model.config.replace(vocab_size=embed.num_embeddings)
        self.config.settings = self.model.config.to_dict()
        return embed

    def new_cache(self) -> ManyheadsCache:
        """Return an empty cache for this model."""
        return ManyheadsCache(self.model, options=self.config.cache_options)

    def _run(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        change: Change | None,
    ) -> Tensor:
        """Return logits (B, N', V); ``change`` takes what they are made of, (B, N, C), first."""
        marked = isinstance(self.model, LandmarkLM)
        if cache is None:
            changes = [] if change is None else [change]
            if marked and self.config.insert_landmarks:
                tokens = self._mark(tokens, mask)
                freq = self.model.config.freq
                changes.insert(0, lambda x: strip_landmarks(x, freq))
                mask = None
            with before(self._head, changes):
                return self.model(tokens, mask=mask)
        if marked and not self.config.insert_landmarks:
            raise ValueError(
                "a cache puts landmarks in by itself: set config.insert_landmarks=True and give "
                "tokens without them"
            )
        if not isinstance(cache, ManyheadsCache) or cache.model is not self.model:
            raise ValueError(
                f"cache is a {type(cache).__name__} that is not this model's: use new_cache()"
            )
        # One token is read as (B, C); there is nothing to select then.
        single = tokens.shape[1] == 1 and (mask is None or bool(mask.all()))
        with before(self._head, [] if change is None or single else [change]):
            return cache.advance(tokens, mask)

    def _mark(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                "attention_mask has padding: rows of a landmark model share one layout of blocks; "
                "give rows of one length"
            )
        c = self.model.config
        return insert_landmarks(tokens, c.freq, c.landmark_id)

    def _new_part(
        self, attention_mask: Tensor | None, tokens: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """Return the mask of the new tokens, (B, N)."""
        if attention_mask is None:
            return None
        batch, length = tokens.shape
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, cached "
                f"+ new tokens) = ({batch}, {past + length})"
            )
        mask = attention_mask[:, past:] != 0
        return check_mask(mask, batch, length)

    def _start(
        self,
        input_ids: Tensor | None,
        cache: Cache | None,
        past_key_values: Cache | None,
        refused: dict[str, Any],
        use_cache: bool | None,
    ) -> tuple[Tensor, Cache | None]:
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by {type(self).__name__}: leave it away")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.shape[1]:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids has shape {shape}: need (batch, length >= 1)")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.new_cache()
        return input_ids, cache


@contextmanager
def before(head: nn.Module, changes: list[Change]) -> Iterator[None]:
    """Let ``changes`` act on what enters the head, in order, inside the block."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        for change in changes:
            x = change(x)
        return (x, *rest)

    handle = head.register_forward_pre_hook(hook) if changes else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()

"""The contract of a causal language model: one state for all layers, three ways to feed it.

B batch, N length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import unknown_name
from manyheads.layers.cache import KeptCache
from manyheads.models.base import Model

__all__ = ["CausalLM", "LMState", "next_token_loss", "sample_token"]


class LMState(NamedTuple):
    """The decoding state of a whole model.

    ``layers``: what each layer holds, whatever its kind. ``position`` (B,): tokens read by each
    row, for models that add positions to their embeddings.
    """

    layers: tuple[Any, ...]
    position: Any = None


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy of token t + 1 given those up to t, over real targets, in nats.

    Args:
        logits: (B, N, V).
        tokens: (B, N) integers; -100 is never scored.
        mask: (B, N), True = a real token.
    """
    targets = tokens[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row from logits (B, V); temperature 0 takes the largest.

    Raises:
        ValueError: temperature below 0, top_k below 1, top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative: 0 is greedy, 1 the model's own")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k {top_k} must be at least 1")
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p} must lie in (0, 1]")
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


class CausalLM(Model):
    """Base of language models that predict the next token.

    A subclass gives ``forward(tokens, *, mask, cu_seqlens)`` -> logits (B, N, V),
    ``init_state(batch_size)``, and ``update(tokens, state, *, mask)`` -> (logits, state).

    ``make_caches``, where it is set and the model knows it, exchanges the states of the layers
    before the first token: see :meth:`manyheads.compress.a2sf.CachePolicy.attach`.
    """

    make_caches: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]] | None = None

    def init_state(self, batch_size: int) -> LMState:
        """Return the state before the first token."""
        raise unknown_name("streaming form of", type(self).__name__, ())

    def start(self, prompt: Tensor) -> LMState:
        """Return the state that a prompt (B, N) is read into, in one block or in several."""
        state = self.init_state(prompt.shape[0])
        for own in state.layers:
            cache = getattr(own, "cache", None)
            if isinstance(cache, KeptCache):
                cache.expect(prompt.shape[1])
        return state

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """Read a block (B, N) of tokens: logits (B, N, V) and the next state."""
        raise unknown_name("streaming form of", type(self).__name__, ())

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Read one token a row, (B,): logits (B, V) and the next state."""
        logits, state = self.update(tokens[:, None], state)
        return logits[:, 0], state

    @property
    def never_generated(self) -> tuple[int, ...]:
        """Tokens that :meth:`generate` does not yield, whatever their logits."""
        return ()

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
        prefill_block: int = 1024,
    ) -> Iterator[Tensor]:
        """Yield the next token of each row, (B,), one step at a time.

        Args:
            prompt: (B, N), N >= 1; of different lengths with left padding and ``mask``.
            max_new_tokens: how many to yield at most; stops early when all rows gave ``eos``.
            mask: (B, N), True = a real token.
            temperature, top_k, top_p, generator: see :func:`sample_token`.
            prefill_block: tokens of the prompt read at once; bounds memory, and changes the result
                only under a cache policy, which evicts after each block.

        Raises:
            ValueError: the prompt is empty, or padded on the right.
        """
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"prompt has shape {tuple(prompt.shape)}: need (batch, length >= 1)")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("prompts of different lengths must be padded on the left")
        state = self.start(prompt)
        logits = None
        for start in range(0, prompt.shape[1], prefill_block):
            block = slice(start, start + prefill_block)
            part = None if mask is None else mask[:, block]
            logits, state = self.update(prompt[:, block], state, mask=part)
            logits = logits[:, -1]
        done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        for i in range(max_new_tokens):
            assert logits is not None
            for never in self.never_generated:
                logits[:, never] = -torch.inf
            token = sample_token(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            if eos is not None:
                token = token.masked_fill(done, eos)
                done = done | (token == eos)
            yield token
            if bool(done.all()) or i + 1 == max_new_tokens:
                return
            logits, state = self.step(token, state)

"""Any causal language model of ours as a transformers model.

B batch, N length, T length with what a cache holds, V vocabulary, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from manyheads.attention.landmark import strip_landmarks
from manyheads.bridges.transformers.base import Change, Wrapped, before
from manyheads.bridges.transformers.config import ManyheadsConfig
from manyheads.models.language.causal import CausalLM
from manyheads.models.language.landmark import LandmarkLM

__all__ = ["ManyheadsForCausalLM", "ManyheadsModel"]


class ManyheadsModel(Wrapped):
    """A causal language model of ours without its head, as ``AutoModel`` returns it.

    Example:
        >>> config = ManyheadsConfig(settings={"mixers": "gla", "embed_dim": 64})
        >>> ManyheadsModel(config)(torch.randint(256, (1, 30))).last_hidden_state.shape
        torch.Size([1, 30, 64])
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Return what the head reads, (B, N, C); arguments as :class:`ManyheadsForCausalLM`."""
        refused = {
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        tokens, cache = self._start(input_ids, cache, past_key_values, refused, use_cache)
        mask = self._new_part(attention_mask, tokens, cache)
        seen: list[Tensor] = []
        with before(self._head, [_taker(seen)]):
            self._run(tokens, mask, cache, None)
        hidden = seen[0] if seen[0].ndim == 3 else seen[0][:, None]
        if cache is None and isinstance(self.model, LandmarkLM) and self.config.insert_landmarks:
            hidden = strip_landmarks(hidden, self.model.config.freq)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)
        return output if return_dict is not False else output.to_tuple()


class ManyheadsForCausalLM(Wrapped, GenerationMixin):
    """A causal language model of ours with ``generate()``, ``save_pretrained`` and ``Trainer``.

    Greedy, sampled and beam search; recurrent layers generate at constant memory. Prompts of
    different lengths may be padded on either side if ``attention_mask`` is given, landmark models
    excepted. No attention maps, hidden states of layers, ``inputs_embeds`` or gradient
    checkpointing. A routing model's clustering loss is not part of ``loss``.

    Example:
        >>> config = ManyheadsConfig(settings={"mixers": "gla,softmax", "embed_dim": 64})
        >>> model = ManyheadsForCausalLM(config).eval()
        >>> model.generate(torch.randint(256, (1, 9)), max_new_tokens=5, do_sample=False).shape
        torch.Size([1, 14])
    """

    accepts_loss_kwargs = True

    def __init__(self, config: ManyheadsConfig, *, model: CausalLM | None = None) -> None:
        super().__init__(config, model=model)
        if isinstance(self.model, LandmarkLM) and config.insert_landmarks:
            # Landmarks are put in by place; one that is drawn would have no block to stand for.
            self.generation_config.suppress_tokens = [self.model.config.landmark_id]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Return logits, and the mean cross entropy where ``labels`` are given.

        Args:
            input_ids: (B, N) the new tokens.
            attention_mask: (B, T), nonzero at real tokens, cached ones included.
            cache: from :meth:`new_cache` or an earlier output; changed. ``past_key_values`` is its
                old name.
            inputs_embeds, output_attentions, output_hidden_states: not supported.
            labels: (B, N), usually ``input_ids``: token t + 1 is predicted from those up to t.
                -100 and padding are never scored.
            use_cache: begin a cache if none is given; not by default.
            logits_to_keep: 0 for all; k for the last k, where 1 means the last real token of each
                row, wherever padding stands; a tensor of indices for those.
            return_dict: False for a tuple.
            num_items_in_batch: divide the summed loss by this, as ``Trainer`` asks when one step
                is made of several batches.

        Raises:
            ValueError: shapes that do not fit, a foreign cache, something unsupported.
        """
        refused = {
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        tokens, cache = self._start(input_ids, cache, past_key_values, refused, use_cache)
        mask = self._new_part(attention_mask, tokens, cache)
        logits = self._run(tokens, mask, cache, _keep(logits_to_keep, mask))
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)}, expected that of the logits, "
                    f"{tuple(logits.shape[:2])}"
                )
            loss = _loss(logits, labels, mask, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output if return_dict is not False else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # states are not keys and values

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind is not None:
            raise ValueError(
                f"cache_implementation={kind!r} is for keys and values: leave it away, this model "
                "brings its own cache"
            )
        policy = getattr(self.model.make_caches, "policy", None)
        ratio = None if policy is None else policy.settings.budget_ratio
        if ratio is not None and generation_config.prefill_chunk_size:
            raise ValueError(
                f"budget_ratio={ratio} is a share of a prompt, and prefill_chunk_size reads it in "
                "chunks: give budget_tokens, or the prompt at once"
            )
        given = model_kwargs.get("cache")
        if given is not None:
            given._is_user_defined = True  # generate() may not leave it half-way
        if generation_config.use_cache is not False and given is None:
            model_kwargs["cache"] = self.new_cache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs["cache"].activate_past_recording()


def _taker(seen: list[Tensor]) -> Change:
    """Return a change that keeps what enters the head and hands on nothing, so that it is idle."""

    def take(x: Tensor) -> Tensor:
        seen.append(x)
        return x[:, :0] if x.ndim == 3 else x

    return take


def _keep(logits_to_keep: int | Tensor, mask: Tensor | None) -> Change | None:
    if isinstance(logits_to_keep, Tensor):
        index = logits_to_keep
        return lambda x: x[:, index]
    if logits_to_keep == 0:
        return None
    if logits_to_keep != 1 or mask is None:
        return lambda x: x[:, -logits_to_keep:]
    # The last real token; rows without any give their last place, which nobody reads.
    places = torch.arange(mask.shape[1], device=mask.device)
    last = places.masked_fill(~mask, -1).amax(1)
    last = last.where(last >= 0, mask.shape[1] - 1)
    return lambda x: x.take_along_dim(last[:, None, None].to(x.device), 1)


def _loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None, count: Tensor | int | None
) -> Tensor:
    targets = labels[:, 1:].to(logits.device)
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    reduction = "mean" if count is None else "sum"
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction=reduction
    )
    return loss if count is None else loss / count

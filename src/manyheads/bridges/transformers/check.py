"""Does an attention function that was registered do what transformers expects of it?

Small random models are run with it and with transformers' own "eager". A mask that goes missing
shows here and not in a training run that looks too good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

__all__ = ["check_causal", "check_sla"]

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LIMIT = 1e-4


def check_causal(name: str) -> None:
    """Compare a causal, exact function with "eager" on a Llama and on a Mistral with a window.

    Raises:
        RuntimeError: it sees later tokens or padding, or differs; says where.
    """
    grouped = _SIZES | {"num_key_value_heads": 2, "attn_implementation": "eager"}
    with _quiet():
        llama = LlamaForCausalLM(LlamaConfig(**grouped)).eval()
        window = MistralForCausalLM(MistralConfig(**grouped, sliding_window=5)).eval()
        tokens = torch.randint(1, 40, (3, 11))
        for model in (llama, window):
            for side in ("left", "right"):
                mask = _padding(side)
                wanted = _decode(model, tokens, mask)
                model.set_attn_implementation(name)
                _compare(name, _decode(model, tokens, mask), wanted, f"{side} padding", model)
                model.set_attn_implementation("eager")
            model.set_attn_implementation(name)
            changed = tokens.clone()
            changed[:, -1] = (changed[:, -1] + 1) % 40
            seen = [model(t).logits[:, :-1] for t in (tokens, changed)]
            _compare(name, seen[1], seen[0], "a later token that changes", model)


def check_sla(name: str) -> None:
    """Compare a bidirectional function that is exact at ``topk`` 1 with "eager" on a BERT.

    Raises:
        RuntimeError: padding is seen, results differ, or a causal model is not refused.
    """
    with _quiet():
        model = BertModel(BertConfig(**_SIZES | {"attn_implementation": "eager"})).eval()
        tokens = torch.randint(1, 40, (3, 11))
        for side in ("left", "right"):
            mask = _padding(side)
            wanted = model(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
            model.set_attn_implementation(name)
            found = model(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
            model.set_attn_implementation("eager")
            _compare(name, found, wanted, f"{side} padding", model)
        llama = LlamaForCausalLM(LlamaConfig(**_SIZES | {"attn_implementation": name}))
        try:
            llama(tokens)
        except ValueError:
            return
    raise RuntimeError(f"{name} ran in a causal Llama although it looks ahead")


def _padding(side: str) -> Tensor:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :1] = 0
    return mask if side == "left" else mask.flip(1)


def _decode(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of real tokens: a prompt of 8, then one by one."""
    out = model(tokens[:, :8], attention_mask=mask[:, :8], use_cache=True)
    parts = [out.logits]
    for i in range(8, tokens.shape[1]):
        out = model(
            tokens[:, i : i + 1],
            attention_mask=mask[:, : i + 1],
            use_cache=True,
            cache=out.cache,
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)[mask.bool()]


def _compare(name: str, found: Tensor, wanted: Tensor, what: str, model: PreTrainedModel) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error < _LIMIT:
        raise RuntimeError(
            f"{name} does not agree with transformers' eager attention in {type(model).__name__} "
            f"({what}: {error:.1e} of the largest output): this version of transformers may hand "
            "masks over in another way"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave generators, default dtype and device as they are."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)

"""The transformers config that carries one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from transformers import PretrainedConfig

from manyheads.config import Config
from manyheads.models.base import get_model_class
from manyheads.models.language.causal import CausalLM

__all__ = ["ManyheadsConfig"]

# What transformers calls layers whose cache is keys and values; all others count as recurrent.
_KEY_VALUE = {"landmark", "lean", "softmax", "urpe"}
_DERIVED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_types",
    "tie_word_embeddings",
)  # fmt: skip


class ManyheadsConfig(PretrainedConfig):
    """Config of any causal language model of ours, for transformers.

    ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and, for models
    made of named mechanisms, ``layer_types`` are read off the model's own config.

    Args:
        family: class of the model, "MixerLM" or "GLAForCausalLM".
        settings: fields of its config that differ from the defaults.
        cache_options: of ``init_state`` when a cache begins, such as ``{"top_k": 4}`` of the
            landmark models.
        insert_landmarks: landmark models alone: tokens come without landmarks, which are put in
            and whose logits are taken out; False: they carry them, and nothing is generated.
        options: those of every transformers config.

    Raises:
        ValueError: an unknown family or setting, with the nearest; a size that contradicts the
            settings.

    Example:
        >>> config = ManyheadsConfig(settings={"mixers": "gla,softmax", "embed_dim": 64})
        >>> config.layer_types
        ['linear_attention', 'full_attention']
    """

    model_type = "manyheads"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        family: str = "MixerLM",
        settings: Mapping[str, Any] | None = None,
        cache_options: Mapping[str, Any] | None = None,
        insert_landmarks: bool = True,
        **options: Any,
    ) -> None:
        self.family = family
        own = _model_class(family).config_class.from_dict(settings or {})
        self.settings = own.to_dict()
        self.cache_options = dict(cache_options or {})
        self.insert_landmarks = insert_landmarks
        sizes = _sizes(own)
        for name in _DERIVED:
            given = options.pop(name, None)
            if given is not None and given != sizes.get(name, given):
                raise ValueError(
                    f"{name}={given!r} contradicts the settings of {family}, which make it "
                    f"{sizes[name]!r}: change the settings instead"
                )
        tied = sizes.pop("tie_word_embeddings", False)
        for name, value in sizes.items():
            setattr(self, name, value)
        options["tie_word_embeddings"] = tied
        super().__init__(**options)

    @classmethod
    def from_model(cls, model: CausalLM, **options: Any) -> Self:
        """Return the config of a model that exists."""
        return cls(family=type(model).__name__, settings=model.config.to_dict(), **options)

    @property
    def own(self) -> Config:
        """The model's own config."""
        return _model_class(self.family).config_class.from_dict(self.settings)

    def build(self) -> CausalLM:
        """Return the model, with new weights."""
        return _model_class(self.family).from_config(self.own)


def _model_class(family: str) -> type[CausalLM]:
    found = get_model_class(family)
    if not issubclass(found, CausalLM):
        raise ValueError(f"family {family!r} is no causal language model: it cannot generate")
    return found


def _sizes(own: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": own.vocab_size,
        "hidden_size": own.embed_dim,
    }
    if hasattr(own, "num_heads"):
        sizes["num_attention_heads"] = own.num_heads
    types = getattr(own, "layer_types", None)
    if types is None:
        sizes["num_hidden_layers"] = own.num_layers
    else:
        sizes["num_hidden_layers"] = len(types)
        sizes["layer_types"] = [
            "full_attention" if t in _KEY_VALUE else "linear_attention" for t in types
        ]
    # Models without such a field have one way only; the model itself says which once it is built.
    if hasattr(own, "tie_embeddings"):
        sizes["tie_word_embeddings"] = own.tie_embeddings
    return sizes

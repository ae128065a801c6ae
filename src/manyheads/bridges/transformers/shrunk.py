"""Folders that `manyheads shrink` wrote, for transformers' Auto classes.

A folder whose model the stock class cannot express (a branch dropped, weights shared or in int8)
has the model type ``manyheads_shrunk``. What the Auto class returns is the original architecture
with the steps done to it: ``generate()``, caches and ``save_pretrained`` are its own.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from manyheads.compress.files import load_model

__all__ = ["ShrunkConfig", "register_shrunk"]


class ShrunkConfig(PreTrainedConfig):
    """The original config and the steps, as ``config.json`` keeps them."""

    model_type = "manyheads_shrunk"
    manyheads_shrunk: dict[str, Any] | None = None


class _Shrunk(PreTrainedModel):
    """What an Auto class finds for :class:`ShrunkConfig`; its instances are the originals'."""

    config_class = ShrunkConfig
    endings: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *args: Any, **kwargs: Any
    ) -> Any:
        unknown = set(kwargs) - _READ
        if unknown:
            raise ValueError(
                f"a shrunken model is read without {', '.join(sorted(unknown))}: load it, then "
                "change it (model.to(dtype), model.set_attn_implementation(name))"
            )
        model: Any = load_model(folder)
        name = type(model).__name__
        if cls.endings and not name.endswith(cls.endings):
            raise ValueError(
                f"{str(folder)!r} holds a {name}, which this Auto class does not build: use the "
                "one for its task, or manyheads.compress.load_model"
            )
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if dtype not in (None, "auto"):
            model = model.to(dtype)
        if kwargs.get("attn_implementation"):
            model.set_attn_implementation(kwargs["attn_implementation"])
        # Without a task, the stock class would be the one without a head.
        headless = not cls.endings and model.base_model is not model
        return model.base_model if headless else model


_READ = {
    "_commit_hash",
    "_from_auto",
    "adapter_kwargs",
    "attn_implementation",
    "config",
    "dtype",
    "local_files_only",
    "revision",
    "torch_dtype",
    "trust_remote_code",
}


def _class(name: str, *endings: str) -> type[_Shrunk]:
    return type(name, (_Shrunk,), {"endings": endings, "__module__": __name__})


def register_shrunk() -> None:
    """Enter the model type in transformers' Auto classes."""
    AutoConfig.register("manyheads_shrunk", ShrunkConfig, exist_ok=True)
    for auto, built in (
        (AutoModel, _class("ShrunkModel")),
        (AutoModelForCausalLM, _class("ShrunkForCausalLM", "ForCausalLM", "LMHeadModel")),
        (AutoModelForMaskedLM, _class("ShrunkForMaskedLM", "ForMaskedLM")),
        (
            AutoModelForSequenceClassification,
            _class("ShrunkForSequenceClassification", "ForSequenceClassification"),
        ),
        (
            AutoModelForImageClassification,
            _class("ShrunkForImageClassification", "ForImageClassification"),
        ),
        (
            AutoModelForSpeechSeq2Seq,
            _class("ShrunkForSpeechSeq2Seq", "ForConditionalGeneration"),
        ),
    ):
        auto.register(ShrunkConfig, built, exist_ok=True)

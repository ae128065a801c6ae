"""What was done to a model, kept with it: its original config and the steps, in order.

A shrunken model is built again from these: the original architecture, then each step's
``restructure``, then the saved weights.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from manyheads.compress.procedure import get_procedure

__all__ = ["describe", "is_stock", "record_step", "restructure", "steps_of"]

_ATTRIBUTE = "_manyheads_steps"


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what builds this model's architecture anew, as JSON types: library and config.

    Raises:
        ValueError: a model of no library that is known here.
    """
    kept = getattr(model, _ATTRIBUTE, None)
    if kept is not None:
        return kept["original"]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        values = json.loads(config.to_json_string(use_diff=False))
        values.pop("_name_or_path", None)  # where it lay on this machine
        return {
            "library": "transformers",
            "architecture": type(model).__name__,
            "model_type": config.model_type,
            "config": values,
        }
    if hasattr(config, "to_dict") and hasattr(model, "config_class"):
        return {
            "library": "manyheads",
            "architecture": type(model).__name__,
            "config": config.to_dict(),
        }
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("architecture"):
        return {"library": "timm", "architecture": cfg["architecture"], "config": _timm(model)}
    raise ValueError(
        f"{type(model).__name__} is of none of: transformers, timm, manyheads. It cannot be built "
        "again from a folder: keep its plan and apply that to your own model"
    )


def _timm(model: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {"num_classes": int(getattr(model, "num_classes", 1000))}
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None:
        values["img_size"] = list(size)
    if isinstance(getattr(model, "blocks", None), nn.Sequential) and embed is not None:
        values["depth"] = len(model.blocks)  # type: ignore[arg-type]
    proj = getattr(embed, "proj", None)
    if isinstance(proj, nn.Conv2d):
        values["in_chans"] = proj.in_channels
    return values


def steps_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the steps that made this model, oldest first; empty if it is as it was built."""
    kept = getattr(model, _ATTRIBUTE, None)
    return list(kept["steps"]) if kept else []


def record_step(
    model: nn.Module, original: dict[str, Any], earlier: list[dict[str, Any]], step: dict[str, Any]
) -> nn.Module:
    """Note a step on the model that it made, so that the model can be saved and built again."""
    object.__setattr__(model, _ATTRIBUTE, {"original": original, "steps": [*earlier, step]})
    if original["library"] == "transformers":
        model.__class__ = _saving_class(type(model))
    return model


def restructure(model: nn.Module, steps: list[dict[str, Any]], original: dict[str, Any]) -> Any:
    """Give a freshly built model the shape that these steps left."""
    for number, step in enumerate(steps):
        model = get_procedure(step["method"]).restructure(step["structure"], model)
        model = record_step(model, original, steps[:number], step)
    return model


def is_stock(model: nn.Module) -> bool:
    """Return whether the library that the model comes from can load it without us."""
    return all(get_procedure(s["method"]).is_stock(s["structure"], model) for s in steps_of(model))


class _Saves:
    """Mixed into a shrunken transformers model: ``save_pretrained`` writes all that it takes."""

    _manyheads_saves = True

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, **options: Any
    ) -> None:
        from manyheads.compress.files import save_model

        refused = {k for k, v in options.items() if k not in _SAVED and v}
        if refused:
            raise ValueError(
                f"a shrunken model is saved without {', '.join(sorted(refused))}: it is written "
                "whole, as safetensors"
            )
        if is_main_process:
            save_model(self, save_directory, overwrite=True)  # type: ignore[arg-type]


# What transformers' Trainer hands over and changes nothing: weights are the model's own.
_SAVED = {"max_shard_size", "safe_serialization", "save_function", "state_dict", "token"}
_CLASSES: dict[type, type] = {}


def _saving_class(base: type) -> type:
    if getattr(base, "_manyheads_saves", False):
        return base
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (_Saves, base), {"__module__": base.__module__})
    return _CLASSES[base]

"""Our backbones in timm's registry: importing this file is enough.

``timm.create_model("manyheads_poolformer_s12")`` builds any of our vision backbones; where timm has
no model of that name, it is entered under the plain name as well. timm's arguments keep their
names (``in_chans``, ``img_size``, ``drop_rate``, ``drop_path_rate``, ``features_only``).

Nothing is downloaded: ``pretrained=True`` needs ``pretrained_cfg_overlay={"file": PATH}``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from manyheads.errors import require_extra
from manyheads.models.base import Variant, create_model, get_variant, list_models
from manyheads.models.vision.base import VisionModel

__all__: list[str] = ["PREFIX", "register"]

PREFIX = "manyheads_"
# timm's argument and the config fields that answer to it, the first that a config has.
_ARGUMENTS = {
    "in_chans": ("in_channels",),
    "img_size": ("image_size",),
    "drop_rate": ("dropout",),
    "drop_path_rate": ("drop_path",),
    "num_classes": ("num_classes",),
}
# What timm passes to every model and means nothing to ours.
_SILENT = ("cache_dir", "pretrained_cfg", "scriptable", "exportable", "no_jit")


def register() -> list[str]:
    """Enter all vision backbones in timm's registry; returns the names they have there."""
    require_extra("timm", "vision", "manyheads.bridges.timm")
    from timm.models import is_model, register_model

    entered = []
    for name in list_models():
        variant = get_variant(name)
        if not issubclass(variant.model, VisionModel):
            continue
        for theirs in (PREFIX + name, name):
            if not is_model(theirs):
                register_model(_entry(theirs, variant))
                entered.append(theirs)
    return entered


def _entry(theirs: str, variant: Variant) -> Any:
    def build(pretrained: bool = False, **arguments: Any) -> Any:
        overlay = arguments.pop("pretrained_cfg_overlay", None) or {}
        file = overlay.get("file")
        if pretrained and file is None:
            raise ValueError(
                f"{theirs} downloads nothing: pass pretrained_cfg_overlay={{'file': PATH}} with "
                "pretrained=True, or manyheads.create_model(name, weights=PATH)"
            )
        for name in _SILENT:
            arguments.pop(name, None)
        return create_model(
            variant.name, weights=file if pretrained else None, **_ours(theirs, variant, arguments)
        )

    build.__name__ = build.__qualname__ = theirs
    build.__module__ = __name__
    build.__doc__ = f"{variant.model.__name__}, variant {variant.name!r}, of manyheads."
    return build


def _ours(theirs: str, variant: Variant, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return timm's arguments under our names."""
    known = {f.name for f in fields(variant.config)}
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in ("features_only", "out_indices"):
            found[name] = value
        elif name == "global_pool":
            if value not in ("", "avg"):
                raise ValueError(f"global_pool {value!r}: {theirs} pools by 'avg'")
        elif name in _ARGUMENTS:
            ours = next((f for f in _ARGUMENTS[name] if f in known), None)
            if ours is None and value:
                raise ValueError(f"{theirs} has no {name}: leave it out")
            if ours is not None:
                found[ours] = value
        else:
            found[name] = value
    return found


register()

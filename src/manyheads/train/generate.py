"""Continue a prompt with a language model that ``train lm`` made, printing as it goes.

The model reads one token a step and keeps its state alone: the memory is constant where all
layers are recurrent, and grows by a key and a value a token in softmax layers.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError

from manyheads.data.tokenizers import Tokenizer, load_tokenizer
from manyheads.models import load_model
from manyheads.models.language.causal import CausalLM
from manyheads.train.options import GenerateOptions

__all__ = ["GenerateOptions", "continuation", "load_run", "run"]


def run(options: GenerateOptions) -> int:
    """Do ``manyheads generate``; returns the exit code (130: Ctrl-C).

    Raises:
        ValueError: no run of a language model in the folder, files that are damaged, an empty
            prompt, options out of range.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_run(options.run)
    prompt = _read_prompt(options.prompt)
    pieces = continuation(
        model,
        tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens or sys.maxsize,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=tuple(_escapes(s) for s in options.stop),
        seed=options.seed,
    )
    out = sys.stdout
    try:
        if options.echo:
            _write(out, prompt)
        for piece in pieces:
            _write(out, piece)
        _write(out, "\n")
    except KeyboardInterrupt:
        _write(out, "\n")
        return 130
    except BrokenPipeError:
        # The reader, such as head, has had enough; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return 0


def load_run(folder: str | os.PathLike[str]) -> tuple[CausalLM, Tokenizer]:
    """Load the model and the tokenizer of a run.

    Raises:
        ValueError: the folder is no run, holds another kind of model, or its files are damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"run {str(path)!r} is no folder: give one that 'train lm' wrote")
    if not (path / "config.json").is_file():
        begun = (path / "options.json").is_file()
        fix = "its training has saved no model yet" if begun else "give one that 'train lm' wrote"
        raise ValueError(f"run {str(path)!r} holds no model (no config.json): {fix}")
    try:
        model = load_model(path)
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the model in {str(path)!r} is damaged ({reason})") from None
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"run {str(path)!r} holds a {type(model).__name__}, which does not generate text: give "
            "a run of 'train lm'"
        )
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"run {str(path)!r} has no tokenizer.json: give one that 'train lm' wrote")
    tokenizer = load_tokenizer(path / "tokenizer.json")
    return model.eval(), tokenizer


def continuation(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Yield what follows a prompt, text by text as tokens complete it.

    No character is cut in two, and nothing that may yet become a stop text is given out.

    Args:
        stop: ends before the first of these.
        seed: of the draws; the same seed gives the same text.

    Raises:
        ValueError: an empty prompt or stop text, or options out of range.
    """
    if "" in stop:
        raise ValueError("a stop text is empty: give at least one character")
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise ValueError("the prompt is empty: give at least one character")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    stream, held = tokenizer.stream(), ""
    for token in model.generate(
        ids[None].to(device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    ):
        held += stream.push(int(token))
        places = [at for at in (held.find(s) for s in stop) if at >= 0]
        if places:
            if rest := held[: min(places)]:
                yield rest
            return
        keep = _begun(held, stop)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if rest := held + stream.flush():
        yield rest


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """Return how many characters at the end of the text may be the start of a stop text."""
    longest = min(max((len(s) for s in stop), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the standard input is not UTF-8 text (byte {error.start}): convert it with iconv"
        ) from None


def _escapes(text: str) -> str:
    if "\\" not in text:
        return text
    try:
        return codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stop text {text!r}: {error.reason}; write \\\\ for a backslash"
        ) from None


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()

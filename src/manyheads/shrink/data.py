"""Batches for a model out of a text, images or recordings: to calibrate by and to time with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.compress.files import Opened
from manyheads.data.tokenizers import Tokenizer, load_tokenizer
from manyheads.shrink.recall import SOURCE, RecallRun, recall_run

__all__ = ["Feed", "feed_for", "kind_of"]

Kind = Literal["causal", "encoder", "image", "speech"]
_SENTENCE = 128


def kind_of(model: nn.Module) -> Kind:
    """Return what a model takes and gives.

    Raises:
        ValueError: it takes nothing that is known here.
    """
    main = getattr(model, "main_input_name", "")
    if main == "input_features":
        return "speech"
    if main == "pixel_values" or hasattr(model, "forward_features"):
        return "image"
    if main == "input_ids":
        generates = getattr(model, "can_generate", lambda: False)()
        return "causal" if generates else "encoder"
    if hasattr(model, "init_state"):
        return "causal"
    raise ValueError(
        f"{type(model).__name__} takes neither tokens, nor images, nor recordings as far as can "
        "be seen: use the method's Python form with batches of your own"
    )


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What turns data into batches for one model.

    Attributes:
        kind: of the model.
        tokenizer: of the folder (ours for our models), None where the model reads bytes, images
            or sound.
        vocab: how many tokens the model knows, 0 where it reads none.
        extractor: of features out of sound.
        image_name: the model's name for its images.
        size: of images, (channels, height, width).
        length: tokens a piece.
        batch: pieces a batch.
        recall: the task of a run of ``manyheads train recall``, whose sequences are the only data.
    """

    kind: Kind
    tokenizer: Any = None
    vocab: int = 0
    extractor: Any = None
    image_name: str = "x"
    size: tuple[int, int, int] | None = None
    length: int = 256
    batch: int = 8
    recall: RecallRun | None = None

    def batches(
        self, source: str, *, samples: int, to_judge: bool = False
    ) -> list[dict[str, Tensor]]:
        """Return batches of the first ``samples`` pieces of a data source.

        Args:
            source: of text, images or sound.
            samples: pieces.
            to_judge: pieces of a text that calibration does not read while the text is long
                enough: the last ones of a running text, whose end ``manyheads train lm`` holds
                out, or the lines between calibration's for an encoder.

        Raises:
            ValueError: no such data, too short for one piece, or of another tokenizer.
        """
        if self.kind == "image":
            return self._images(source, samples)
        if self.kind == "speech":
            return self._speech(source, samples)
        self.check(source)
        if self.recall is not None:
            found = self.recall.batches(samples, self.batch, held_out=False)
            return [{"tokens": batch.inputs} for batch in found]
        from manyheads.data.text import load_text

        text = load_text(source).data.decode("utf-8", errors="replace")
        if self.kind == "encoder":
            return self.sentences(_sentences(text, samples, between=to_judge))
        return self.chunks(text, samples, source, from_end=to_judge)

    def check(self, source: str) -> None:
        """Raise ``ValueError`` where one of the model and the data is of recall, the other not."""
        if self.recall is not None and source not in ("", SOURCE):
            raise ValueError(
                f"the model is a run of recall, which knows no other data: give {SOURCE}, not "
                f"{source!r}"
            )
        if self.recall is None and source == SOURCE:
            raise ValueError(f"{SOURCE} is for folders that 'manyheads train recall' wrote")

    def chunks(
        self, text: str, samples: int, source: str = "the text", *, from_end: bool = False
    ) -> list[dict[str, Tensor]]:
        """Return pieces of ``length`` tokens of a running text's start or end, batched."""
        most = 16 * samples * self.length
        ids = self.ids(text[-most:] if from_end else text[:most])
        count = min(samples, len(ids) // self.length)
        if count < 1:
            raise ValueError(
                f"{source!r} has {len(ids)} tokens, fewer than one piece of {self.length}: give a "
                "longer text, or a smaller --length"
            )
        used = slice(-count * self.length, None) if from_end else slice(count * self.length)
        rows = ids[used].reshape(count, self.length)
        ours = self.tokenizer is None or isinstance(self.tokenizer, Tokenizer)
        name = "tokens" if ours else "input_ids"
        return [{name: part} for part in rows.split(self.batch)]

    def ids(self, text: str) -> Tensor:
        """Return the tokens of a text, (N,).

        Raises:
            ValueError: a token that the model does not know.
        """
        if self.tokenizer is None:
            ids = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))
        elif isinstance(self.tokenizer, Tokenizer):
            ids = self.tokenizer.encode(text)
        else:
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = torch.tensor(found, dtype=torch.long)
        if len(ids) and int(ids.max()) >= self.vocab:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, and the model knows {self.vocab}: "
                "the tokenizer in the folder is of another model"
            )
        return ids

    def sentences(self, lines: list[str]) -> list[dict[str, Tensor]]:
        """Return padded batches of short texts, in order."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer in its folder: add tokenizer.json")
        out = []
        for at in range(0, len(lines), self.batch):
            found = self.tokenizer(
                lines[at : at + self.batch],
                padding=True,
                truncation=True,
                max_length=min(self.length, _SENTENCE),
                return_tensors="pt",
            )
            if int(found["input_ids"].max()) >= self.vocab:
                raise ValueError("the tokenizer in the folder is of another model: ids beyond it")
            out.append({k: found[k] for k in ("input_ids", "attention_mask")})
        return out

    def _images(self, source: str, samples: int) -> list[dict[str, Tensor]]:
        from manyheads.data.images import load_images

        data = load_images(source)
        step = max(1, len(data.train) // samples)
        images = [data.train.images[i] for i in range(0, len(data.train), step)][:samples]
        return self.image_batches(images)

    def image_batches(self, images: list[Any]) -> list[dict[str, Tensor]]:
        """Return batches of images at the model's size, scaled to [-1, 1]."""
        from manyheads.data.images import open_image

        assert self.size is not None
        channels, height, width = self.size
        out = []
        for at in range(0, len(images), self.batch):
            rows = []
            for image in images[at : at + self.batch]:
                opened = open_image(image, channels).resize((width, height))
                array = np.asarray(opened, dtype=np.float32).reshape(height, width, channels)
                rows.append(torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1))
            out.append({self.image_name: torch.stack(rows)})
        return out

    def _speech(self, source: str, samples: int) -> list[dict[str, Tensor]]:
        from manyheads.data.speech import load_speech

        found = load_speech(source, limit=samples)
        out = []
        for at in range(0, len(found), self.batch):
            part = found[at : at + self.batch]
            features = self.features([r.samples for r in part])
            texts = self.tokenizer([" " + r.text for r in part], add_special_tokens=False)
            longest = max(len(t) for t in texts["input_ids"])
            rows = torch.full((len(part), longest + 2), self.prompt[-1], dtype=torch.long)
            mask = torch.zeros_like(rows)
            for row, ids in enumerate(texts["input_ids"]):
                whole = torch.tensor([*self.prompt, *ids])
                rows[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            out.append(
                {
                    "input_features": features,
                    "decoder_input_ids": rows,
                    "decoder_attention_mask": mask,
                }
            )
        return out

    def features(self, sounds: list[np.ndarray]) -> Tensor:
        found: Tensor = self.extractor(
            sounds, sampling_rate=16_000, return_tensors="pt"
        ).input_features
        return found

    @property
    def prompt(self) -> list[int]:
        """Tokens that a transcript begins with."""
        ids = self.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
        return [int(i) for i in ids]


def feed_for(opened: Opened, *, length: int, batch: int) -> Feed:
    """Return what feeds a model, with the tokenizer or extractor of its folder.

    Raises:
        ValueError: the folder lacks what its model needs.
    """
    model: Any = opened.model
    kind = kind_of(model)
    common: dict[str, Any] = {"kind": kind, "batch": batch}
    if kind == "image":
        name = "pixel_values" if opened.library == "transformers" else "x"
        return Feed(size=_image_size(model), image_name=name, length=0, **common)
    if opened.library != "transformers":
        vocab = int(model.config.vocab_size)
        recall = recall_run(opened.folder)
        if recall is not None:
            return Feed(vocab=vocab, length=recall.task.longest, recall=recall, **common)
        tokenizer = None
        if opened.folder is not None and (opened.folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(opened.folder / "tokenizer.json")
        elif vocab != 256:
            raise ValueError(
                f"without a tokenizer.json only models of bytes are fed here, and this one knows "
                f"{vocab} tokens: copy the run's own there"
            )
        return Feed(tokenizer=tokenizer, vocab=vocab, length=length, **common)
    tokenizer = _tokenizer(opened.folder)
    vocab = int(model.get_input_embeddings().num_embeddings)
    longest = int(getattr(model.config, "max_position_embeddings", 0) or length)
    extractor = None
    if kind == "speech":
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor.from_pretrained(str(opened.folder))
    return Feed(
        tokenizer=tokenizer,
        vocab=vocab,
        extractor=extractor,
        length=min(length, longest),
        **common,
    )


def _tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if folder is None or not any((folder / n).is_file() for n in names):
        raise ValueError(
            f"{str(folder)!r} has no tokenizer ({', '.join(names)}): copy the model's own there"
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _image_size(model: Any) -> tuple[int, int, int]:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") == "vit":
        size = config.image_size
        return (config.num_channels, size, size)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    channels = int(cfg.get("input_size", (3, 224, 224))[0])
    proj = getattr(embed, "proj", None)
    if isinstance(proj, nn.Conv2d):
        channels = proj.in_channels
    if size is None:
        size = cfg.get("input_size", (3, 224, 224))[1:]
    return (channels, int(size[0]), int(size[1]))


def _sentences(text: str, samples: int, *, between: bool) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if len(line.split()) >= 4]
    if not lines:
        raise ValueError("the text has no line of four words or more: an encoder reads lines")
    step = max(1, len(lines) // samples)
    return lines[step // 2 if between else 0 :: step][:samples]

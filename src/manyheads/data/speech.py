"""Recordings with what is said in them: a folder, or two sets that Debian packages."""

from __future__ import annotations

import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyheads.errors import nearest, require_extra

__all__ = ["BUILTIN_SPEECH", "Recording", "load_speech", "read_wav", "word_error_rate"]

_LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
_PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
BUILTIN_SPEECH = {
    "librivox": (_LIBRIVOX, "pocketsphinx-testdata"),
    "prompts": (_PROMPTS, "asterisk-core-sounds-en-wav"),
}


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording.

    Attributes:
        name: of the file.
        samples: (T,) float32 in [-1, 1], at 16 kHz.
        text: what is said.
    """

    name: str
    samples: np.ndarray
    text: str


def load_speech(source: str, *, limit: int | None = None, rate: int = 16_000) -> list[Recording]:
    """Read recordings and their texts.

    Args:
        source: "builtin:librivox" (five sentences read aloud, 16 kHz), "builtin:prompts"
            (numbers and a few words of a telephone's announcements, 8 kHz), or a folder of
            ``.wav`` files with a ``transcription`` of lines "text (name)", or with a ``.txt``
            beside each.
        limit: read so many at most, spread over the set.
        rate: samples a second; other rates are resampled.

    Raises:
        ValueError: no such data (the Debian package is named), or no texts beside the recordings.
        MissingExtraError: scipy is not installed and a rate must be changed.
    """
    if source.startswith("builtin:"):
        key = source.removeprefix("builtin:")
        if key not in BUILTIN_SPEECH:
            raise ValueError(
                f"no recordings {source!r}{nearest(key, BUILTIN_SPEECH)}: there are "
                + ", ".join(f"builtin:{k}" for k in BUILTIN_SPEECH)
            )
        folder, package = BUILTIN_SPEECH[key]
        if not folder.is_dir():
            raise ValueError(f"{source} needs {str(folder)!r}: apt-get install {package}")
        pairs = _numbers(folder) if key == "prompts" else _transcribed(folder)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"{source!r} is no folder of recordings, nor builtin:librivox")
        pairs = _transcribed(folder)
    if not pairs:
        raise ValueError(
            f"no recording in {str(folder)!r} has a text: give a file 'transcription' of lines "
            "'text (name)', or NAME.txt beside NAME.wav"
        )
    if limit is not None and limit < len(pairs):
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    return [Recording(p.stem, read_wav(p, rate=rate), text) for p, text in pairs]


def read_wav(path: Path, *, rate: int = 16_000) -> np.ndarray:
    """Return (T,) float32 samples of a 16-bit PCM file, channels averaged, resampled to ``rate``.

    Raises:
        ValueError: the file is no such WAV.
    """
    try:
        with wave.open(str(path)) as file:
            own, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no WAV file that is read here: {error}") from None
    if width != 2:
        raise ValueError(f"{str(path)!r} has {8 * width}-bit samples: 16-bit PCM is read")
    samples = np.frombuffer(raw, "<i2").astype(np.float32).reshape(-1, channels).mean(1) / 32768
    if own != rate:
        require_extra("scipy", "audio", f"resampling {own} Hz to {rate} Hz")
        from math import gcd

        from scipy.signal import resample_poly

        common = gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common).astype(np.float32)
    return samples


def _transcribed(folder: Path) -> list[tuple[Path, str]]:
    listed = folder / "transcription"
    if listed.is_file():
        pairs = []
        for line in listed.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"\s*(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)\s*", line)
            if match and (folder / f"{match[2]}.wav").is_file():
                pairs.append((folder / f"{match[2]}.wav", match[1]))
        return pairs
    return [
        (path, path.with_suffix(".txt").read_text(encoding="utf-8").strip())
        for path in sorted(folder.rglob("*.wav"))
        if path.with_suffix(".txt").is_file()
    ]


def _numbers(folder: Path) -> list[tuple[Path, str]]:
    """Spoken numbers: their file names are what is said (other prompts' are abbreviations)."""
    said = (folder / "digits").glob("*.wav")
    keep = [p for p in said if p.stem.isdigit() or p.stem in _WORDS]
    return [(path, path.stem) for path in sorted(keep, key=lambda p: (len(p.stem), p.stem))]


_WORDS = {"billion", "hundred", "million", "minus", "thousand", "today", "tomorrow", "yesterday"}


def word_error_rate(heard: Sequence[str], said: Sequence[str]) -> float:
    """Return the word error rate over all pairs, letters and digits alone, case ignored.

    Numbers are written out in digits and common contractions undone, as Whisper's own
    evaluation does.

    Raises:
        ValueError: different counts, or nothing was said.
        MissingExtraError: jiwer or transformers is not installed.
    """
    require_extra("jiwer", "audio", "the word error rate")
    require_extra("transformers", "transformers", "the word error rate")
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    if len(heard) != len(said) or not said:
        raise ValueError(f"{len(heard)} texts were heard and {len(said)} said: give as many, not 0")
    plain = EnglishTextNormalizer({})
    return float(jiwer.wer([plain(t) for t in said], [plain(t) for t in heard]))

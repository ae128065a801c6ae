"""The options of `manyheads shrink`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from manyheads.compress.procedure import get_procedure, list_procedures
from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["ShrinkOptions", "Step", "read_budget", "read_steps"]

_BUDGETS = ("parameters", "bytes", "latency", "quality")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkOptions(Config):
    """Options of `manyheads shrink`.

    Attributes:
        model: folder of transformers or of ours, a name of ours or of timm, builtin:minilm or
            builtin:whisper (real weights that packages ship)
        weights: official checkpoint for a name
        method: what to do, by name (manyheads shrink --list names them)
        set: an option of the method as NAME=VALUE; may be given several times
        drop_attention: attention layers to drop (llm-drop)
        drop_mlp: MLPs to drop (llm-drop)
        drop_blocks: whole blocks to drop (llm-drop)
        drop_joint: attentions and MLPs to drop, ranked together (llm-drop)
        drop_cross: cross-attentions to drop (llm-drop)
        then: a further method after the first, as "NAME OPTION=VALUE ..."; may be given several
            times
        plan: a plan to apply; or where to write the plan, if there is no such file yet
        budget: search the method's settings for a share of the original that is not exceeded, as
            parameters=0.8, bytes=0.5, latency=0.7, or for a loss, as quality=0.02
        calibrate: text, images or recordings to measure by: a file, a folder or builtin:NAME
        evaluate: data to judge by, or builtin:lee, builtin:verses, builtin:librivox,
            builtin:prompts, builtin:recall (a run of train recall)
        samples: pieces of calibration data that are used
        length: tokens a piece of text
        batch: pieces at once
        out: folder for the result; without it nothing is written
        repeats: rounds of timing
        threads: threads inside operators (0: as torch decides)
        seed: of what is drawn at random
        list: name the methods and stop
        json: print JSON alone
    """

    model: str = field(default="", metadata={"positional": True})
    weights: str | None = None
    method: str = ""
    set: tuple[str, ...] = field(default=(), metadata={"whole": True})
    drop_attention: int = 0
    drop_mlp: int = 0
    drop_blocks: int = 0
    drop_joint: int = 0
    drop_cross: int = 0
    then: tuple[str, ...] = field(default=(), metadata={"whole": True})
    plan: str | None = None
    budget: str = ""
    calibrate: str = ""
    evaluate: str = ""
    samples: int = 64
    length: int = 256
    batch: int = 8
    out: str = ""
    repeats: int = 7
    threads: int = 0
    seed: int = 0
    list: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.repeats < 3:
            raise ValueError(f"repeats {self.repeats} is less than 3, too few for a median")


@dataclass(frozen=True, slots=True)
class Step:
    """A method and its settings, as asked for."""

    method: str
    settings: dict[str, Any]

    @property
    def text(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.settings.items())])


def read_steps(options: ShrinkOptions) -> list[Step]:
    """Return the methods in order with their settings, checked.

    Raises:
        ValueError: an unknown method or option (the nearest is named), a value that is refused.
    """
    if not options.method:
        raise ValueError(f"give --method: one of {', '.join(list_procedures())}")
    first = [f"{options.method}", *options.set]
    drops = {
        kind: n
        for kind in ("attention", "mlp", "blocks", "joint", "cross")
        if (n := getattr(options, f"drop_{kind}"))
    }
    if drops and options.method != "llm-drop":
        raise ValueError(f"--drop-{next(iter(drops))} is of llm-drop, not of {options.method}")
    if options.budget and drops:
        raise ValueError("--budget searches how much to drop: leave out --drop-...")
    steps = [_step(first, drops, check=not options.budget)]
    steps += [_step(text.split(), {}, check=True) for text in options.then]
    return steps


def _step(words: list[str], given: dict[str, Any], *, check: bool) -> Step:
    if not words or words[0] not in list_procedures():
        raise unknown_name("method", words[0] if words else "", list_procedures())
    settings = dict(given)
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"the option {word!r} of {words[0]} is not NAME=VALUE")
        settings[name.replace("-", "_")] = _value(value)
    procedure = get_procedure(words[0])
    known = procedure.settings_class.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise unknown_name(f"option of {words[0]}", name, known)
    if check:
        try:
            procedure(**settings)
        except TypeError as error:
            shown = ", ".join(f"{n}={json.dumps(v)}" for n, v in settings.items())
            raise ValueError(
                f"an option of {words[0]} is of a wrong type ({error}): {shown}; values are "
                "JSON: numbers, true, false, null"
            ) from error
    return Step(words[0], settings)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def read_budget(text: str) -> tuple[str, float] | None:
    """Return what the budget is of and its limit, None where there is none.

    Raises:
        ValueError: not NAME=SHARE, an unknown name, a share that is not above 0.
    """
    if not text:
        return None
    name, equals, value = text.partition("=")
    if name not in _BUDGETS or not equals:
        raise ValueError(f"budget {text!r} is not NAME=SHARE with a name of {', '.join(_BUDGETS)}")
    try:
        share = float(value)
    except ValueError:
        raise ValueError(f"budget {text!r}: {value!r} is no number") from None
    if not 0 <= share < (10 if name == "quality" else 1):
        raise ValueError(f"budget {text!r}: give a share of the original between 0 and 1")
    return name, share

"""The command line: a table of verbs over plain functions.

A verb names its options (a config class, read by manyheads.options) and the function that does
it. Nothing but this table is imported until a verb is known, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from manyheads._version import __version__
from manyheads.errors import MissingExtraError

__all__ = ["VERBS", "Verb", "main"]


@dataclass(frozen=True)
class Verb:
    """A verb: its help, its options as ``module:Class`` and its function as ``module:function``.

    The function takes the options and returns the exit code. A verb with ``kinds`` has one
    further word (``train lm``), each with options and function of its own.
    """

    help: str
    options: str = ""
    run: str = ""
    kinds: dict[str, Verb] | None = None


VERBS: dict[str, Verb] = {
    "choose": Verb(
        "measure which mechanism fits a workload on this machine",
        "manyheads.choose.options:ChooseOptions",
        "manyheads.choose.verb:run",
    ),
    "train": Verb(
        "train a model with a recipe",
        kinds={
            "lm": Verb(
                "a language model of any mechanisms on text",
                "manyheads.train.lm:LMOptions",
                "manyheads.train.lm:run",
            ),
            "classify": Verb(
                "a classifier of real time series, ragged ones included",
                "manyheads.train.classify:ClassifyOptions",
                "manyheads.train.classify:run",
            ),
            "recall": Verb(
                "a small model on multi-query associative recall",
                "manyheads.train.recall:RecallOptions",
                "manyheads.train.recall:run",
            ),
            "vision": Verb(
                "a vision backbone on labelled images",
                "manyheads.train.vision:VisionOptions",
                "manyheads.train.vision:run",
            ),
            "distil": Verb(
                "a smaller BERT from a trained one, by MiniLM's losses",
                "manyheads.train.distil_options:DistilOptions",
                "manyheads.train.distil:run",
            ),
            "ia-red2": Verb(
                "a vision transformer that drops the patches it does not need",
                "manyheads.train.ia_red2:IARed2Options",
                "manyheads.train.ia_red2:run",
            ),
            "urpe-tasks": Verb(
                "the two synthetic position tasks of URPE",
                "manyheads.train.urpe_tasks:URPETaskOptions",
                "manyheads.train.urpe_tasks:run",
            ),
        },
    ),
    "shrink": Verb(
        "make a model that exists already smaller or faster, and measure the loss",
        "manyheads.shrink.options:ShrinkOptions",
        "manyheads.shrink.verb:run",
    ),
    "generate": Verb(
        "continue a prompt with a trained model",
        "manyheads.train.generate:GenerateOptions",
        "manyheads.train.generate:run",
    ),
    "predict": Verb(
        "name what images show, with a model that train vision made",
        "manyheads.train.predict:PredictOptions",
        "manyheads.train.predict:run",
    ),
    "bench": Verb(
        "time every mechanism against softmax, or backbones with --vision, and write results/",
        "manyheads.choose.bench:BenchOptions",
        "manyheads.choose.bench:run",
    ),
    "claims": Verb(
        "measure the papers' headline claims here",
        "manyheads.papers.verbs:ClaimsOptions",
        "manyheads.papers.verbs:claims",
    ),
    "papers": Verb(
        "list the papers and where they live, or show one card",
        "manyheads.papers.verbs:PapersOptions",
        "manyheads.papers.verbs:papers",
    ),
    "list": Verb(
        "list mechanisms and their facts",
        "manyheads.choose.facts:ListOptions",
        "manyheads.choose.facts:run",
    ),
    "draw": Verb(
        "draw which blocks of an attention matrix are computed",
        "manyheads.choose.block_map:DrawOptions",
        "manyheads.choose.block_map:run",
    ),
    "inspect": Verb(
        "look at what a model looks at",
        kinds={
            "drop": Verb(
                "draw which patches of an image a model with interpreters keeps",
                "manyheads.inspect.drop:DropOptions",
                "manyheads.inspect.drop:run",
            ),
        },
    ),
    "native": Verb(
        "compile the CPU kernels ahead of their first use, or see which are compiled",
        kinds={
            "build": Verb(
                "compile the kernels that are not in the cache yet",
                "manyheads.native.verbs:BuildOptions",
                "manyheads.native.verbs:build",
            ),
            "status": Verb(
                "say which kernels are compiled, and what the absence of the others costs",
                "manyheads.native.verbs:StatusOptions",
                "manyheads.native.verbs:status",
            ),
        },
    ),
    "doctor": Verb(
        "say what is installed, what is missing and what that costs",
        "manyheads.choose.doctor:DoctorOptions",
        "manyheads.choose.doctor:run",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the whole usage is for those who ask for it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (2: wrong input, 130: interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="manyheads",
        description="Attention on a CPU: choose a mechanism, train it, generate with it.",
    )
    parser.add_argument("--version", action="version", version=f"manyheads {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    chosen = _add_verbs(verbs, VERBS, arguments, wanted)
    namespace = parser.parse_args(arguments)
    assert chosen is not None
    options = getattr(import_module(chosen.options.partition(":")[0]), chosen.options.split(":")[1])
    from manyheads.options import read_flags

    try:
        return _resolve(chosen.run)(read_flags(namespace, options))
    except (ValueError, MissingExtraError) as error:
        print(f"manyheads {wanted}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _add_verbs(
    parsers: Any, verbs: dict[str, Verb], arguments: list[str], wanted: str | None
) -> Verb | None:
    """Add all verbs to the parser; only the one that is wanted gets its flags, and is returned."""
    chosen = None
    for name, verb in verbs.items():
        parser = parsers.add_parser(name, help=verb.help, description=verb.help)
        if name != wanted:
            continue
        if verb.kinds is not None:
            rest = arguments[arguments.index(name) + 1 :]
            kind = next((a for a in rest if not a.startswith("-")), None)
            kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
            chosen = _add_verbs(kinds, verb.kinds, rest, kind)
        else:
            from manyheads.options import add_flags

            add_flags(parser, _resolve(verb.options))
            chosen = verb
    return chosen


if __name__ == "__main__":
    sys.exit(main())

"""Without its neighbour a bridge names the extra that brings it; nothing else imports bridges."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("package", "extra", "bridge"),
    [("transformers", "transformers", "transformers"), ("lm_eval", "lm-eval", "lm_eval")],
)
def test_an_absent_neighbour_names_the_extra(package, extra, bridge) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import manyheads.bridges.{bridge}"
    error = run(code).stderr
    assert "MissingExtraError" in error
    assert f"pip install 'manyheads[{extra}]'" in error


def test_models_and_training_do_without_bridges() -> None:
    code = (
        "import sys, manyheads.models, manyheads.train.lm, manyheads.bridges; "
        "print([m for m in ('transformers', 'lm_eval') if m in sys.modules])"
    )
    assert run(code).stdout.strip() == "[]"

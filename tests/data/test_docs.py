"""The snippets of docs/data.md run, top to bottom, as one program."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
NEEDS = {"BPETokenizer": "tokenizers", "load_series": "aeon"}


def run(*, with_packages: bool) -> str:
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 6
    names: dict[str, object] = {}
    for snippet in snippets:
        if with_packages or not any(name in snippet for name in NEEDS):
            exec(compile(snippet, str(PAGE), "exec"), names)
    return str(names["inputs"].shape)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(with_packages=False) == "torch.Size([32, 64])"
    printed = capsys.readouterr().out
    assert "8.000 bits per byte" in printed
    assert "['', 'é', '!']" in printed


@pytest.mark.realdata
def test_the_page_runs_with_all_packages(capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS.values():
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    run(with_packages=True)
    printed = capsys.readouterr().out
    assert "1024 True" in printed
    assert "tensor(7) ('1', '2'" in printed

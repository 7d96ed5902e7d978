"""What the study says of its figures, and no more than they bear out."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="the study draws")
pytest.importorskip("safetensors", reason="the study keeps models")

from taylor_kernels.studies.language import findings, pages


def made_up(values: dict[str, dict[str, float | tuple[float, ...]]]) -> dict:
    """A result of one fraction: kind -> criterion -> bits as pruned, or several of them by draw,
    and half of it trained on."""
    cells = [
        {
            "kind": kind, "fraction": 0.5, "criterion": name, "draw": draw, "bits": b,
            "recovered": b / 2, "parameters": 500,
        }
        for kind, each in values.items()
        for name, bits in each.items()
        for draw, b in enumerate(bits if isinstance(bits, tuple) else (bits,))
    ]  # fmt: skip
    names = list(next(iter(values.values())))
    told = {"kinds": list(values), "fractions": [0.5], "criteria": names}
    dense = {"parameters": 1000, "bits": 1.0, "recovered": 0.5}
    return {"settings": told, "cells": cells, "dense": dense}


def test_which_criterion_is_better_is_said_as_it_is():
    result = made_up(
        {
            "heads": {"taylor_fo": 2.0, "magnitude_l2": 3.0, "random": 4.0},
            "width": {"taylor_fo": 3.0, "magnitude_l2": 2.5, "random": (2.98, 3.04)},
            "all": {"taylor_fo": 2.0, "magnitude_l2": 4.0, "random": (2.5, 3.5)},
        }
    )
    heads, width, together = findings.remarks(result)
    assert heads.startswith(
        "**heads, 50% gone.** As pruned: `taylor_fo` 4.00, `magnitude_l2` 8.00, `random` 16.00. "
        "`taylor_fo` is better than `magnitude_l2` by 1.00 bits and `random` by 2.00 bits. Trained "
    )
    assert "`magnitude_l2` is better than `taylor_fo` by 0.50 bits" in width
    assert "`taylor_fo` is better than `random` by 0.01 bits (within the range of draws)" in width
    assert "`random` is better" not in width
    assert "`random` is better than `magnitude_l2` by 1.00 bits." in together
    heads, width, all_kinds = findings.cells(result)
    assert findings.better(result, "taylor_fo", "magnitude_l2", "bits") == [heads, all_kinds]
    assert findings.better(result, "random", "magnitude_l2", "bits") == [all_kinds]
    each = findings.cells(result)
    near = [c for c in each if findings.near(result, *c, "taylor_fo", "random", "bits")]
    assert near == [width]


def test_models_of_unequal_size_are_told_apart():
    values = {"taylor_fo": 2.0, "magnitude_l2": 3.0, "random": (4.0, 5.0)}
    result = made_up({"heads": values, "all": values})
    left = {"magnitude_l2": 416, "taylor_fo": 499}
    for cell in result["cells"]:
        if cell["kind"] == "all":
            cell["parameters"] = left.get(cell["criterion"], 480 + 20 * cell["draw"])
    assert findings.unequal(result, "heads", 0.5) == {}
    shares = {"taylor_fo": "50%", "magnitude_l2": "42%", "random": "48–50%"}
    assert findings.unequal(result, "all", 0.5) == shares
    heads, together = findings.remarks(result)
    assert "size" not in heads
    assert together.endswith(
        "Not models of one size; of the parameters are left: `taylor_fo` 50%, `magnitude_l2` 42%, "
        "`random` 48–50%."
    )
    same, differing = pages.perplexity_table(result, "bits").rows
    assert same == [
        "heads",
        "50%",
        "50%",
        "4.00 (2.00)",
        "8.00 (3.00)",
        "22.63 (4.50), 16.00–32.00",
    ]
    assert differing[2] == "42–50%"
    assert [cell.rpartition(" at ")[2] for cell in differing[3:]] == list(shares.values())
    rows = pages.summary_table(result).rows
    assert [" at " in cell for row in rows for cell in row[2:]] == [False] * 6 + [True] * 3

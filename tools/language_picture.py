"""The plot of docs/language.md, for light and dark pages.

    python -m tools.language_picture

Each file names the figures that it was drawn from by a hash, as those of tools/docs_picture.py do.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from taylor_kernels.studies.language.plots import curves
from taylor_kernels.studies.plotting import draw
from tools.docs_picture import ASSETS, ROOT
from tools.language_block import LANGUAGE

THEMES = ("light", "dark")


def kept() -> dict[str, Any]:
    return json.loads((ROOT / LANGUAGE).read_text())


def mark(result: dict[str, Any]) -> str:
    """A line that stands for what is drawn."""
    content = json.dumps([result["settings"], result["dense"], result["cells"]], sort_keys=True)
    return f"<!-- figures: {hashlib.sha256(content.encode()).hexdigest()[:16]} -->"


def path(theme: str) -> Path:
    return ASSETS / f"language-{theme}.svg"


def main() -> None:
    result = kept()
    with tempfile.TemporaryDirectory() as folder:
        figure = draw(curves(result), Path(folder) / "language.png", alt="", caption="")
    for theme, drawn in zip(THEMES, (figure.light, figure.dark), strict=True):
        # Lines that end in blanks would be changed by editors, and the file with them.
        text = "\n".join(line.rstrip() for line in drawn.decode().splitlines())
        path(theme).write_text(f"{text}\n{mark(result)}\n")
        print(f"wrote {path(theme).relative_to(ROOT)}")


if __name__ == "__main__":
    main()

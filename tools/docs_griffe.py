"""What the site makes of docstrings beyond the Google style, before it reads them.

"Example:" becomes "Examples:", the section whose code is shown with its output. Indented lines of
"case: what happens" under a title that is no section become a list.
"""

from __future__ import annotations

import re

import griffe

_SECTIONS = "Args|Attributes|Examples|Raises|Returns|Warns|Yields"
_CASES = re.compile(rf"^(?!(?:{_SECTIONS}):)(\S.*:)\n((?: {{4}}.*\n?)+)", re.MULTILINE)


def _as_list(found: re.Match[str]) -> str:
    return f"{found[1]}\n\n" + re.sub(r"^ {4}(?=\S)", "- ", found[2], flags=re.MULTILINE)


def readable(text: str) -> str:
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _CASES.sub(_as_list, text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)

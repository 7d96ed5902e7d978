"""A docstring's "Example:" becomes the section that the site shows as code with its output."""

from __future__ import annotations

import re

import griffe


class Examples(griffe.Extension):
    """The Google style knows "Examples:"; a box of running text is what it makes of "Example:"."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

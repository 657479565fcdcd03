"""For MkDocs: links to files outside of docs/, which the site does not have, become the files' paths."""

import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What MkDocs calls with the text of each page."""
    return _LINK.sub(_path_of, markdown)


def _path_of(found: re.Match[str]) -> str:
    text, path = found.groups()
    return f"`{path}`" if text.strip("`/") in path else f"{text} (`{path}`)"

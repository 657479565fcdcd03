"""The markup of a self-contained HTML page: no scripts, no requests, light and dark, for phones, screens and paper.

Names come from checkpoints and paths, so they are escaped. The functions return HTML. They escape what they receive as
plain text; the HTML that they return is joined without further escaping.
"""

from __future__ import annotations

import contextlib
import html
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from quantize8 import __version__
from quantize8.artifact.manifest import MANIFEST_NAME
from quantize8.errors import OutputError
from quantize8.reports.pages.names import plain

_SUFFIXES = (".html", ".htm")  # only a page may be replaced, so that a typo never overwrites a weight file
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser then loads nothing else
_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1b1b19; --muted: #5f5e5a; --grid: #dddcd6;
  --s1: #2a78d6; --s2: #c8511b; --s3: #16876b; --s4: #a8479b; --s5: #96720a; --s6: #5b53c9; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1e; --ink: #f1f0ec; --muted: #b0afa8;
  --grid: #3b3b38; --s1: #6aa9f4; --s2: #f2875a; --s3: #4cc0a0; --s4: #dd8ad1; --s5: #d5b04a; --s6: #a49df5; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --muted: #444; --grid: #ccc;
  --s1: #2a78d6; --s2: #c8511b; --s3: #16876b; --s4: #a8479b; --s5: #96720a; --s6: #5b53c9; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 20px 12px 40px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.05em; line-height: 1.3; margin: 0; }
p { margin: 4px 0 0; }
p, li, dt, summary { overflow-wrap: anywhere; }
.muted, figcaption p, dt { color: var(--muted); }
dl { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; margin: 18px 0; }
@media (min-width: 640px) { dl { grid: auto / auto-flow 1fr; } }
dl div, figure, details { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
dl div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: 10px 12px; }
dt { font-size: .84em; line-height: 1.35; }
dd { margin: 0; font-size: 1.3em; font-weight: 600; line-height: 1.3; text-wrap: balance; }
.advice { border-left: 4px solid var(--s1); padding: 2px 0 2px 12px; margin: 18px 0; }
.advice ul { margin: 4px 0 0; padding-left: 20px; }
.figures { columns: 420px 2; column-gap: 14px; }
@media print { .figures { columns: 2; } }
figure { margin: 0 0 14px; padding: 12px 12px 8px; break-inside: avoid; }
figcaption p { font-size: .88em; line-height: 1.4; margin-bottom: 8px; }
svg { display: block; width: 100%; max-width: 520px; height: auto; margin: 0 auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
details { margin: 14px 0; padding: 10px 12px; }
summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; font-size: .84em; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--grid); white-space: nowrap;
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
.left { text-align: left; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .92em; }
footer { margin-top: 22px; font-size: .84em; }
"""


def text(value: object) -> str:
    """Plain text as HTML; characters that HTML cannot contain are replaced."""
    return html.escape(plain(str(value)))


def code(value: object) -> str:
    """Plain text as HTML in a code font."""
    return f"<code>{text(value)}</code>"


def facts(items: Iterable[tuple[str, str]]) -> str:
    """The key figures of the page, as pairs of (number, what it is)."""
    return "<dl>" + "".join(f"<div><dt>{text(what)}</dt><dd>{text(n)}</dd></div>" for n, what in items) + "</dl>\n"


def advice(items: Sequence[str]) -> str:
    """A list of next steps; the items are HTML."""
    return '<div class="advice"><h2>What to do</h2><ul>' + "".join(f"<li>{i}</li>" for i in items) + "</ul></div>\n"


def figure(title: str, caption: str, svg: str) -> str:
    """A plot with its title and a caption of one or two sentences."""
    return f"<figure><figcaption><h2>{text(title)}</h2><p>{text(caption)}</p></figcaption>\n{svg}</figure>\n"


def figures(items: Iterable[str]) -> str:
    """Plots, in two columns where there is room."""
    inner = "".join(items)
    return f'<div class="figures">\n{inner}</div>\n' if inner else ""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A collapsed section with a table.

    Args:
        title: Title of the section.
        columns: Names of the columns. Those that begin with < are aligned left, the others right.
        rows: The cells of each row, as plain text.
    """
    sides = [' class="left"' if name.startswith("<") else "" for name in columns]

    def row(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{s}>{text(c)}</{tag}>" for s, c in zip(sides, cells, strict=True)) + "</tr>\n"

    head = row([name.removeprefix("<") for name in columns], "th")
    body = "".join(row(cells, "td") for cells in rows)
    inner = f"<table><thead>{head}</thead><tbody>\n{body}</tbody></table>"
    return f'<details><summary>{text(title)}</summary><div class="wide" tabindex="0">{inner}</div></details>\n'


def document(title: str, lead: str, parts: Iterable[str]) -> bytes:
    """The complete page in UTF-8.

    Args:
        title: Title, as plain text.
        lead: First paragraph, as HTML.
        parts: The sections, as HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{text(title)}</h1><p>{lead}</p></header>
<main>
{"".join(parts)}</main>
<footer class="muted">Made by quantize8 {text(__version__)}. This page is self-contained: it loads nothing.</footer>
</body>
</html>
""".encode()


def check(path: Path) -> None:
    """Check, before the long computation, that the page can be written and would not replace anything but a page.

    Raises:
        OutputError: The page cannot be written there.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: a report is a web page; give --report a file name that ends in .html")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give --report a file name")
    if any((parent / MANIFEST_NAME).exists() for parent in path.absolute().parents):
        raise OutputError(f"{path}: is inside an artifact, which has only its own files; give --report another folder")
    _write(path, b"", keep=False)


def write(path: Path, data: bytes) -> None:
    """Write a page atomically, replacing an existing one; raises OutputError."""
    _write(path, data)


def _write(path: Path, data: bytes, keep: bool = True) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
        if keep:
            partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); give --report another file") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()

"""One self-contained HTML page from a report's data.

The page loads nothing: no script, no font, no image from outside; a content security policy in its head makes the
browser enforce that. Every text is escaped as text, whatever its type. The page follows the reader's light or dark
setting, prints in black on white, and fits a phone.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from soundly.errors import InvalidInput

from .figures import Legend, Picture, optional


class Verdict(Enum):
    """What the page says first. The value explains the word to a reader who meets it for the first time."""

    PROVED = "A certificate stands for it; anyone can check it again without trusting the program that made it."
    REFUTED = "A counterexample was found and confirmed by the original model."
    UNKNOWN = "Neither proved nor refuted: nothing may be concluded."
    MEASURED = "Counted on samples; no proof stands behind it."

    @property
    def word(self) -> str:
        return self.name.lower()


Cell = str | int | float | Verdict


@dataclass(frozen=True)
class Table:
    """Columns and rows; a column of numbers is set flush right, a verdict in its colour."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise InvalidInput(f"row {index} of the table has {len(row)} cells for {len(self.columns)} columns")

    @property
    def numeric(self) -> list[bool]:
        """For every column, whether it holds numbers only."""
        return [all(isinstance(row[k], (int, float)) for row in self.rows) for k in range(len(self.columns))]


@dataclass(frozen=True)
class Row:
    """Pictures to be seen side by side."""

    title: str
    pictures: Sequence[Picture]
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (parted by empty lines), rows of pictures with their legend, a table."""

    title: str
    text: str = ""
    rows: Sequence[Row] = ()
    legend: Legend | None = None
    table: Table | None = None

    @property
    def width(self) -> int:
        """Pictures in the longest row: the columns of the section's grid."""
        return max((len(row.pictures) for row in self.rows), default=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate file, its SHA-256 in hexadecimal and the command that checks it again."""

    path: str
    sha256: str
    command: str

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise InvalidInput(f"sha256 must be 64 lower-case hexadecimal digits, not {self.sha256!r}")

    @classmethod
    def of(cls, path: Path, *, command: str = "") -> Certificate:
        """The certificate at this path, hashed as it lies there."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(path.name, digest, command or f"soundly check {shlex.quote(path.name)}")


@dataclass(frozen=True)
class Report:
    """All that a page says. `facts` are (name, value) pairs, `statement` is the claim in one sentence."""

    title: str
    verdict: Verdict
    statement: str = ""
    facts: Sequence[tuple[str, Cell]] = ()
    sections: Sequence[Section] = ()
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        if self.verdict is Verdict.PROVED and self.certificate is None:
            raise InvalidInput("a report that says proved needs the certificate; without one, say measured or unknown")


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file and return its path.

    Raises: ImportError, naming the command that installs jinja2 and matplotlib, if one is missing.
    """
    page = render(report)
    path = Path(path)
    path.write_bytes(page.encode("utf-8"))
    return path


def render(report: Report) -> str:
    """The report as HTML."""
    jinja2 = optional("jinja2")
    environment = jinja2.Environment(
        autoescape=True, finalize=_plain, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.from_string(_PAGE.replace("STYLE", _style())).render(report=report)
    return page


def _plain(value: object) -> str:
    """Text and nothing else: floats in four digits, no object that vouches for its own HTML, nothing invisible."""
    if isinstance(value, Verdict):
        return value.word
    text = f"{value + 0.0:.4g}" if isinstance(value, float) else str(value)  # -0.0 + 0.0 is 0.0
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text)


# Control characters, lone surrogates, and the marks that reorder the text around them.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


# Text colours reach 4.5 to 1 on both backgrounds (WCAG 2.2, criterion 1.4.3).
LIGHT = {
    "paper": "#fffdf9",
    "panel": "#f6f2ea",
    "ink": "#1f1d1a",
    "quiet": "#625d55",
    "line": "#ded8cc",
    "proved": "#1b6a41",
    "refuted": "#a32a2a",
    "unknown": "#7d5400",
    "measured": "#245a8f",
}
DARK = {
    "paper": "#171614",
    "panel": "#211f1c",
    "ink": "#ece7de",
    "quiet": "#aaa398",
    "line": "#3a3732",
    "proved": "#6cc495",
    "refuted": "#f08d85",
    "unknown": "#e0b355",
    "measured": "#8bb8e8",
}


def _style() -> str:
    def colours(palette: dict[str, str]) -> str:
        return " ".join(f"--{name}: {value};" for name, value in palette.items())

    return (
        f":root {{ color-scheme: light dark; {colours(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {colours(DARK)} }} }}\n"
        f"@media print {{ :root {{ color-scheme: light; --paper: #ffffff; }} }}\n{_CSS}"
    )


_CSS = """
* { box-sizing: border-box; }
html { font-size: 106.25%; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; padding: 3.5rem 1.5rem 3rem; background: var(--paper); color: var(--ink);
  line-height: 1.55; overflow-wrap: anywhere;
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, "Liberation Serif", Georgia, serif;
}
body > * { max-width: 64rem; margin-left: auto; margin-right: auto; }
.label, figcaption, table, dt, footer, .scale {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
}
.label { margin: 0 0 .6rem; font-size: .74rem; letter-spacing: .09em; text-transform: uppercase; color: var(--quiet); }
h1 {
  margin: 0 0 1.6rem; max-width: 24em; text-wrap: balance;
  font-size: 2.25rem; font-weight: 600; line-height: 1.16; letter-spacing: -.012em;
}
h2 { margin: 0 0 .7rem; font-size: 1.42rem; font-weight: 600; line-height: 1.25; }
h3 { margin: 0 0 .1rem; font-size: 1.04rem; font-weight: 600; }
p { margin: 0 0 .8rem; max-width: 40em; }
.verdict { padding: .2rem 0 .2rem 1.3rem; border-left: .3rem solid var(--tone); }
.verdict strong { display: block; margin-bottom: .15rem; color: var(--tone); font-size: 1.75rem; line-height: 1.2; }
.verdict strong::first-letter { text-transform: uppercase; }
.verdict p { margin: 0; }
.verdict p + p { margin-top: .25rem; color: var(--quiet); font-size: .92rem; font-style: italic; }
.proved { --tone: var(--proved); } .refuted { --tone: var(--refuted); }
.unknown { --tone: var(--unknown); } .measured { --tone: var(--measured); }
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.5rem), 1fr)); gap: 1.1rem 2.2rem;
  margin: 2.2rem 0 0; padding: 1.3rem 0; border: solid var(--line); border-width: 1px 0;
}
dt { font-size: .76rem; color: var(--quiet); }
dd { margin: .1rem 0 0; font-variant-numeric: tabular-nums; }
.certificate { margin-top: 1.6rem; padding: 1.15rem 1.3rem 1.25rem; background: var(--panel); border-radius: .3rem; }
.certificate dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .5rem 1.3rem; align-items: baseline; margin: 0;
}
.certificate dd { margin: 0; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .83em; }
section { margin-top: 3.6rem; }
.row { margin-top: 1.9rem; }
.row > p { margin: 0; color: var(--quiet); font-size: .94rem; }
.pictures {
  display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 17rem)); gap: 1rem; margin-top: .65rem;
}
figure { margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; border-radius: .15rem; }
figcaption { margin-top: .42rem; font-size: .78rem; line-height: 1.35; }
figcaption span { display: block; color: var(--quiet); }
.scale { margin-top: 1.2rem; width: min(100%, 24rem); font-size: .76rem; color: var(--quiet); }
.scale img { display: block; width: 100%; height: .6rem; margin: .35rem 0 .2rem; border-radius: .1rem; }
.scale .ticks { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.table { margin-top: 1.7rem; overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; min-width: 60%; font-size: .82rem; line-height: 1.4; }
td { font-variant-numeric: lining-nums tabular-nums; }
caption { padding-bottom: .6rem; text-align: left; color: var(--quiet); }
th, td { padding: .44rem 1.5rem .44rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; vertical-align: bottom; }
thead th { border-bottom-color: var(--quiet); }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; }
td.verdict-word { color: var(--tone); font-weight: 600; }
footer {
  margin-top: 4rem; padding-top: .9rem; border-top: 1px solid var(--line); font-size: .76rem; color: var(--quiet);
}
@media (max-width: 44rem) {
  body { padding: 2rem 1.1rem; }
  h1 { font-size: 1.7rem; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .certificate dl { grid-template-columns: 1fr; gap: .15rem; }
  .certificate dd { margin-bottom: .6rem; }
  section { margin-top: 2.8rem; }
}
@media print {
  @page { margin: 16mm 15mm; }
  html { font-size: 10pt; }
  body { padding: 0; }
  h2, h3 { break-after: avoid; }
  .row, .certificate, .verdict, tr { break-inside: avoid; }
  .certificate { border: 1px solid var(--line); }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>STYLE</style>
</head>
<body>
<header>
<p class="label">soundly report</p>
<h1>{{ report.title }}</h1>
<div class="verdict {{ report.verdict }}">
<strong>{{ report.verdict }}</strong>
{% if report.statement %}
<p>{{ report.statement }}</p>
{% endif %}
<p>{{ report.verdict.value }}</p>
</div>
{% if report.facts %}
<dl class="facts">
{% for name, value in report.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if report.certificate %}
<div class="certificate">
<p class="label">Certificate</p>
<dl>
<dt>File</dt><dd><code>{{ report.certificate.path }}</code></dd>
<dt>SHA-256</dt><dd><code>{{ report.certificate.sha256 }}</code></dd>
<dt>Check it again</dt><dd><code>{{ report.certificate.command }}</code></dd>
</dl>
</div>
{% endif %}
</header>
<main>
{% for section in report.sections %}
<section aria-labelledby="section-{{ loop.index }}">
<h2 id="section-{{ loop.index }}">{{ section.title }}</h2>
{% for paragraph in section.text.split("\\n\\n") if paragraph.strip() %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if section.legend %}
<div class="scale">
{{ section.legend.caption }}
<img src="{{ section.legend.source }}" width="256" height="8"
 alt="Colour scale from {{ section.legend.ticks[0] }} to {{ section.legend.ticks[2] }}">
<div class="ticks">{% for tick in section.legend.ticks %}<span>{{ tick }}</span>{% endfor %}</div>
</div>
{% endif %}
{% for row in section.rows %}
<div class="row">
<h3>{{ row.title }}</h3>
{% if row.text %}
<p>{{ row.text }}</p>
{% endif %}
<div class="pictures" style="--columns: {{ section.width }}">
{% for picture in row.pictures %}
<figure>
<img src="{{ picture.source }}" width="{{ picture.array.shape[1] }}" height="{{ picture.array.shape[0] }}"
 alt="{{ row.title }}: {{ picture.alt or picture.caption }}">
<figcaption>{{ picture.caption }}{% if picture.note %}<span>{{ picture.note }}</span>{% endif %}</figcaption>
</figure>
{% endfor %}
</div>
</div>
{% endfor %}
{% if section.table %}
<div class="table" role="region" tabindex="0" aria-label="Table of {{ section.title }}">
<table>
{% if section.table.caption %}
<caption>{{ section.table.caption }}</caption>
{% endif %}
{% set numeric = section.table.numeric %}
<thead><tr>
{% for column in section.table.columns %}
<th scope="col"{% if numeric[loop.index0] %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr>
{% for cell in row %}
{% set kind = "verdict-word " ~ cell.word if cell.word is defined else "number" if numeric[loop.index0] else "" %}
<td{% if kind %} class="{{ kind }}"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</section>
{% endfor %}
</main>
<footer>Made by soundly. This page is one file and loads nothing from elsewhere.</footer>
</body>
</html>
"""

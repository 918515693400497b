"""A report says what it is given, as text, in one file that loads nothing; a browser paints it."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import jinja2
import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from soundly.errors import InvalidInput
from soundly.report import (
    Certificate,
    Legend,
    Picture,
    Report,
    Row,
    Section,
    Table,
    Verdict,
    heat_limits,
    heat_overlay,
    render,
    write_report,
)
from soundly.report.html import DARK, LIGHT

FLAT = {"crimson": (200, 30, 40), "azure": (20, 120, 200), "amber": (250, 200, 10)}
SHA = "0123456789abcdef" * 4


def flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((32, 32, 3), colour, dtype=np.uint8)


def sample(text: str = "plain words", *, name: str = "fact") -> Report:
    """A report with every feature, in which every free text is `text`."""
    pictures = [Picture(flat(colour), text, text, text) for colour in FLAT.values()]
    return Report(
        title=text,
        verdict=Verdict.PROVED,
        statement=text,
        facts=[(name, text), ("rows", 392)],
        sections=[
            Section(text, text, [Row(text, pictures, text)], Legend("diverging", (-0.5, 0.5), text)),
            Section(text, table=Table([text, "value", "verdict"], [[text, -0.25, Verdict.REFUTED]], text)),
        ],
        certificate=Certificate(text, SHA, text),
    )


class Outline(HTMLParser):
    """What a parser sees: the tags with their attributes' names, the attributes' values, and the text by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(tag, name, value or "") for name, value in attrs]
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text[self._open] = self.text.get(self._open, "") + data

    def of(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.values if attribute == name]


class Vouched(str):
    """Text that claims to be safe HTML."""

    def __html__(self) -> str:
        return str(self)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></p></table></main><iframe src=https://example.org></iframe>",
    "<!-- ",
    "]]> &lt; &amp; &#60;b&#62;",
    "{{ 7 * 7 }}{% for x in y %}{# #}",
    "javascript:alert(1)",
    Markup("<b>marked safe</b>"),
    Vouched("<i>vouched for</i>"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    hostile, harmless = Outline(render(sample(text, name=text))), Outline(render(sample(name="plain words")))
    assert hostile.tags == harmless.tags
    assert hostile.text["h1"] == hostile.text["title"] == str(text)
    assert hostile.of("alt").count(f"{text}: {text}") == len(FLAT)


def test_a_page_that_does_not_escape_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "Environment", lambda **options: real(**options | {"autoescape": False}))
    with pytest.raises(AssertionError):
        test_hostile_text_stays_text(HOSTILE[0])


def test_text_that_vouches_for_itself_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "Environment", lambda **options: real(**options | {"finalize": None}))
    with pytest.raises(AssertionError):
        test_hostile_text_stays_text(HOSTILE[-1])


real = jinja2.Environment


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=[*"\u202a\u202b\u202c\u202d\u202e"])))
def test_what_goes_in_comes_out(text: str) -> None:
    isolates = re.sub("[\u2066-\u2069]", "\ufffd", text)
    assert Outline(render(Report(text, Verdict.MEASURED))).text.get("h1", "") == isolates


def test_what_cannot_be_seen_is_shown_as_a_mark(tmp_path: Path) -> None:
    path = write_report(Report("a\x00b\ud800c\u202ed", Verdict.UNKNOWN), tmp_path / "report.html")
    assert Outline(path.read_text(encoding="utf-8")).text["h1"] == "a\ufffdb\ufffdc\ufffdd"


def outside(page: str) -> list[str]:
    """Everything in the page that could make a browser ask somebody else."""
    outline = Outline(page)
    tags = [tag for tag, _ in outline.tags if tag in {"script", "link", "iframe", "object", "embed", "base", "form"}]
    links = [
        value
        for _, name, value in outline.values
        if name in {"src", "href", "srcset", "action", "data", "poster"} and not value.startswith("data:image/png;")
    ]
    events = [name for _, name, _ in outline.values if name.startswith("on")]
    styles = re.findall(r"url\(|@import|https?:", outline.text["style"] + " ".join(outline.of("style")))
    return tags + links + events + styles


def test_the_page_names_nothing_outside_itself() -> None:
    page = render(sample())
    assert outside(page) == []
    policy = next(value for _, _, value in Outline(page).values if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for smuggled in ("img src=//example.org/x", "script", "p onclick=x", "p style='background: url(x)'", "a href=x"):
        assert outside(page.replace("<p>", f"<p><{smuggled}>", 1)), f"{smuggled} would go unseen"


def test_facts_tables_and_certificate_are_on_the_page() -> None:
    outline = Outline(render(sample()))
    assert "plain words392" in outline.text["dd"].replace("\n", "")
    assert outline.text["strong"] == "proved"
    assert SHA in outline.text["code"]
    assert outline.text["td"] == "plain words-0.25refuted"
    assert [value for tag, name, value in outline.values if (tag, name) == ("td", "class")] == [
        "number",
        "verdict-word refuted",
    ]


def test_pictures_survive_unchanged() -> None:
    rng = np.random.default_rng(0)
    bytes_, unit = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.random((5, 7, 3)).astype(np.float32)
    for array, expected in ((bytes_, bytes_), (unit, np.round(unit * 255.0).astype(np.uint8))):
        kind, data = Picture(array, "noise").source.split(",")
        assert kind == "data:image/png;base64"
        decoded = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")
        np.testing.assert_array_equal(np.round(decoded[:, :, :3] * 255), expected)


def test_a_picture_does_not_change_with_its_source() -> None:
    array = flat(FLAT["azure"])
    picture = Picture(array, "azure")
    array[:] = 0
    assert picture.array.max() == 200


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4, 4)),
        np.zeros((0, 4, 3)),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 1.01),
        np.full((4, 4, 3), -0.01),
        np.zeros((4, 4, 3), dtype=np.int64),
    ],
)
def test_what_is_no_picture_is_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="picture 'broken'"):
        Picture(array, "broken")


def test_a_heat_map_is_enlarged_as_torch_enlarges_it() -> None:
    values = np.random.default_rng(1).standard_normal((7, 7))
    overlay = heat_overlay(np.zeros((224, 160, 3)), values, strength=1.0).astype(int)
    limits = values.min(), values.max()

    def reference(*, align_corners: bool) -> np.ndarray:
        large = torch.nn.functional.interpolate(
            torch.from_numpy(values)[None, None], (224, 160), mode="bilinear", align_corners=align_corners
        )[0, 0].numpy()
        colours = matplotlib.colormaps["viridis"]((large - limits[0]) / (limits[1] - limits[0]))
        return np.round(colours[:, :, :3] * 255).astype(int)

    # The colour table has 256 entries: rounding may pick a neighbour, and neighbours differ by at most 4 levels.
    assert np.abs(overlay - reference(align_corners=False)).max() <= 4
    assert np.abs(overlay - reference(align_corners=True)).max() > 40


def test_a_heat_map_without_strength_is_the_grey_image() -> None:
    image = np.random.default_rng(2).random((6, 6, 3))
    overlay = heat_overlay(image, np.ones((2, 2)), strength=0.0)
    grey = 0.2126 * image[..., 0] + 0.7152 * image[..., 1] + 0.0722 * image[..., 2]
    assert (overlay[..., 0] == overlay[..., 1]).all() and (overlay[..., 1] == overlay[..., 2]).all()
    assert np.abs(overlay[..., 0] - grey * 255).max() <= 1.0  # the image and the result are each rounded once


def test_one_scale_gives_one_colour_to_one_value() -> None:
    first, second = np.array([[0.0, 1.0]]), np.array([[1.0, -4.0]])
    limits = heat_limits([first, second], "diverging")
    assert limits == (-4.0, 4.0)
    show = partial(heat_overlay, np.zeros((1, 2, 3)), colormap="diverging", strength=1.0)
    shared = [show(one, limits=limits) for one in (first, second)]
    assert (shared[0][0, 1] == shared[1][0, 0]).all()
    assert (show(first)[0, 1] != show(second)[0, 0]).any()  # each on its own scale would not
    assert int(np.ptp(shared[0][0, 0].astype(int))) <= 2, "zero is grey"
    red, _, blue = shared[1][0, 1].astype(int)
    assert blue > red + 60, "what is negative is blue"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_heat_map_that_is_not_finite_is_refused(bad: float) -> None:
    values = np.zeros((7, 7))
    values[3, 3] = bad
    with pytest.raises(InvalidInput, match="not finite"):
        heat_overlay(np.zeros((8, 8, 3)), values)
    with pytest.raises(InvalidInput, match="limits"):
        heat_overlay(np.zeros((8, 8, 3)), np.zeros((7, 7)), limits=(0.0, bad))


def test_proved_is_not_said_without_a_certificate() -> None:
    with pytest.raises(InvalidInput, match="certificate"):
        replace(sample(), certificate=None)
    for verdict in set(Verdict) - {Verdict.PROVED}:
        replace(sample(), certificate=None, verdict=verdict)


def test_a_certificate_is_named_with_its_hash_and_command(tmp_path: Path) -> None:
    path = tmp_path / "the edit; rm -rf.cert"
    path.write_bytes(b"abc")
    certificate = Certificate.of(path)
    # SHA-256 of "abc", FIPS 180-2 appendix B.1.
    assert certificate.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert certificate.command == "soundly check 'the edit; rm -rf.cert'"
    with pytest.raises(InvalidInput, match="sha256"):
        Certificate("a", "abc", "soundly check a")


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InvalidInput, match="row 1 of the table has 1 cells for 2 columns"):
        Table(["a", "b"], [[1, 2], [3]])


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.image"])
def test_what_is_missing_is_named_with_its_remedy(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape('pip install "soundly[report]"')):
        render(sample())


def test_importing_reports_imports_neither_torch_nor_the_extras() -> None:
    code = "import sys, soundly.report; print([m for m in ('torch', 'jinja2', 'matplotlib') if m in sys.modules])"
    command, here = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(command, env=here, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (brighter + 0.05) / (darker + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_text_colour_can_be_read(palette: dict[str, str]) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    texts = set(palette) - {"paper", "panel", "line"}
    assert {verdict.word for verdict in Verdict} <= texts
    for text, ground in product(texts, ("paper", "panel")):
        assert contrast(palette[text], palette[ground]) >= 4.5, f"{text} on {ground}"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the report with")


def browse(page: Path, profile: Path, *flags: str) -> str:
    """Open a file in a headless browser with a fresh profile; returns what it prints."""
    assert BROWSER is not None
    quiet = "gpu quic background-networking component-update sync extensions default-apps".split()
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    command += ["--hide-scrollbars", "--force-color-profile=srgb", f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def screenshot(page: Path, folder: Path, *flags: str) -> np.ndarray:
    """RGB pixels [h, w, 3] of the page in a window of 1200 by 1700."""
    browse(page, folder / "profile", f"--screenshot={folder / 'shot.png'}", "--window-size=1200,1700", *flags)
    return np.round(matplotlib.image.imread(folder / "shot.png")[:, :, :3] * 255).astype(int)


def painted(shot: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(shot - colour).max(axis=2) <= 2).sum())


@needs_browser
def test_a_browser_paints_every_picture(tmp_path: Path) -> None:
    page = write_report(sample(), tmp_path / "report.html")
    shot = screenshot(page, tmp_path)
    for name, colour in FLAT.items():
        assert painted(shot, colour) > 200 * 200, f"the {name} picture is not on the page"
    blind = tmp_path / "blind.html"
    blind.write_text(page.read_text(encoding="utf-8").replace("img-src data:;", ""), encoding="utf-8")
    shot = screenshot(blind, tmp_path)
    assert all(painted(shot, colour) == 0 for colour in FLAT.values()), "this test cannot tell painted from broken"


@needs_browser
@pytest.mark.parametrize("scheme, palette", [(1, LIGHT), (0, DARK)], ids=["light", "dark"])
def test_the_page_follows_the_reader_s_colours(scheme: int, palette: dict[str, str], tmp_path: Path) -> None:
    page = write_report(sample(), tmp_path / "report.html")
    shot = screenshot(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    paper = tuple(int(palette["paper"][k : k + 2], 16) for k in (1, 3, 5))
    assert tuple(shot[2, 2]) == paper


@needs_browser
def test_a_browser_finds_the_facts(tmp_path: Path) -> None:
    page = write_report(sample("the words & <b>nothing</b> else"), tmp_path / "report.html")
    dom = Outline(browse(page, tmp_path / "profile", "--dump-dom"))
    assert dom.text["h1"] == "the words & <b>nothing</b> else"
    assert SHA in dom.text["code"] and "392" in dom.text["dd"] and dom.text["strong"] == "proved"
    assert "b" not in {tag for tag, _ in dom.tags}


@needs_browser
def test_no_request_leaves_the_page(tmp_path: Path) -> None:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        loads = (
            f"<img src={home}/img><script src={home}/script></script><link rel=stylesheet href={home}/style>"
            f"<iframe src={home}/frame></iframe><p style='background: url({home}/background)'>x</p>"
        )
        # Escaped, and then, as if escaping had failed, raw: the policy in the page's head still forbids every load.
        escaped = write_report(sample(loads), tmp_path / "escaped.html")
        raw, bare = tmp_path / "raw.html", tmp_path / "bare.html"
        raw.write_text(render(sample()).replace("<main>", f"<main>{loads}"), encoding="utf-8")
        bare.write_text(f"<!DOCTYPE html><title>x</title><body>{loads}", encoding="utf-8")
        for page in (escaped, raw):
            screenshot(page, tmp_path)
            assert asked == [], f"{page.name} asked for {asked}"
        screenshot(bare, tmp_path)
        server.shutdown()
    assert {"/img", "/script", "/style", "/frame", "/background"} <= set(asked), "the listener is deaf"

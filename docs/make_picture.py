"""Draw the README's picture from a run of `luthier discover`: `python docs/make_picture.py runs/ioi` (the README has the command)."""

import shutil
import sys
import tempfile
from pathlib import Path

import viz
from circuits import Circuit, HeadScores

IMAGES = Path(__file__).resolve().parent / "img"


def draw(folder: Path) -> None:
    """`heatmap.png` and `heatmap-dark.png`, as a report shows them on a light and on a dark screen."""
    from playwright.sync_api import sync_playwright

    scores, circuit = HeadScores.load(folder / "scores"), Circuit.load(folder / "circuit.json")
    figure = viz.heatmap(scores, circuit, title="Heads that copy the right name")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page_file = viz.report(Path(place) / "page.html", figure)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, name in (("light", "heatmap.png"), ("dark", "heatmap-dark.png")):
            page = browser.new_page(
                viewport={"width": 900, "height": 700}, device_scale_factor=1.5, color_scheme=scheme
            )
            page.goto(page_file.as_uri())
            page.wait_for_selector("body[data-ready=yes]")
            page.locator("#plot-0").screenshot(path=IMAGES / name)
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

"""Run notebooks in place, and put a picture beside every interactive figure: `python notebooks/execute.py [FILE...]`.

Pages that show notebooks without running them (hosting sites, previews) draw the PNG; Jupyter draws the figure itself. Needs
the `tests` extra and Debian's chromium.
"""

import json
import os
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FIGURE = "application/vnd.plotly.v1+json"
WIDTH, SCALE = 880, 1


def execute(path: Path, browser) -> None:
    """Run, tidy and write one notebook."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress bars
        for output in cell.outputs:
            if FIGURE in output.get("data", {}):
                output.data["image/png"] = picture(output.data[FIGURE], browser)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def picture(figure: dict, browser) -> str:
    """The figure as plotly.js draws it, a PNG in base64."""
    from plotly.offline import get_plotlyjs

    page = browser.new_page()
    page.set_content("<!DOCTYPE html><html><body></body></html>")
    page.add_script_tag(content=get_plotlyjs())
    size = {"format": "png", "width": WIDTH, "height": figure["layout"].get("height", 420), "scale": SCALE}
    draw = "([figure, size]) => Plotly.toImage({data: figure.data, layout: figure.layout}, size)"
    url = page.evaluate(draw, [json.loads(json.dumps(figure)), size])
    page.close()
    return url.split(",", 1)[1]


def main(paths: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    os.environ["PYTHONPATH"] = str(FOLDER.parent)  # this checkout, whatever is installed
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for path in map(Path, paths or sorted(FOLDER.glob("*.ipynb"))):
            execute(path, browser)
            print(path.name, f"{path.stat().st_size / 1000:.0f} kB", file=sys.stderr)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])

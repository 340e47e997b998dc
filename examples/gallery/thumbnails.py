"""Run the examples of the gallery and make the picture of each that the documentation shows (four minutes).

A picture is taken as it is, a page by Chromium (needs playwright), and what is only printed is drawn as text.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

HERE = Path(__file__).parent
EXAMPLES = [HERE.parent / "quickstart.py", *sorted(HERE.glob("*.py"))]
WIDTH = 640
LINES = 17  # of a text


def run(script, folder):
    """Run an example as a reader does, in a folder, and return what it printed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if script.stem == "fsdp2" else []
    quiet = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    command = [sys.executable, *launcher, script]
    return subprocess.run(command, cwd=folder, env=quiet, stdout=subprocess.PIPE, text=True, check=True).stdout


def screenshot(page, path):
    """Take a picture of a page, with a query whose answer is of interest."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        tab = browser.new_page(viewport={"width": 900, "height": 600})
        tab.goto(page.resolve().as_uri())
        if (words := tab.locator("[role=button]")).count():
            words.last.click()
        tab.screenshot(path=path)
        browser.close()


def drawn(text, path):
    """Draw a text, as large as it fits."""
    rows, columns = len(text.splitlines()), max(map(len, text.splitlines()))
    size = min(12, 440 / (0.61 * columns), 270 / (1.6 * rows))  # points, of a letter 0.6 times as wide as it is high
    figure = plt.figure(figsize=(6.4, max(2.4, (1.6 * size * rows + 20) / 72)), facecolor="#f6f8fa")
    figure.text(0.03, 0.5, text, family="monospace", fontsize=size, va="center", color="#1f2328", linespacing=1.35)
    figure.savefig(path, dpi=200)


def thumbnail(script):
    with tempfile.TemporaryDirectory() as folder:
        printed = run(script, folder)
        found = dict(re.findall(r"^(picture|page): (.+)$", printed, re.MULTILINE))
        path = Path(folder) / "thumbnail.png"
        if "picture" in found:
            path = Path(folder) / found["picture"]
        elif "page" in found:
            screenshot(Path(folder) / found["page"], path)
        else:
            lines = [f"{line[:78]}…" if len(line) > 79 else line for line in printed.strip().splitlines()]
            drawn("\n".join(lines[:LINES]), path)
        picture = Image.open(path).convert("RGB")
        small = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
        small.quantize(256, dither=Image.Dither.NONE).save(HERE / f"{script.stem}.png", optimize=True)


if __name__ == "__main__":
    for example in EXAMPLES:
        if example != Path(__file__) and (len(sys.argv) == 1 or example.stem in sys.argv[1:]):
            thumbnail(example)

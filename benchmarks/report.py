"""How large a run's report is, how long it takes to build, and how soon it can be looked at.

    python benchmarks/report.py [--candidates 2000] [--size 64]

The run is made up: scenes that satisfy their prompts, with a little noise, and judgements at random, some of which
fail. Images above 128 px compress better than photographs would. The plain way of putting images into a page is the
file of each, base64. Where Chromium is installed it opens the page: milliseconds from the start of the navigation to
the first paint and to the thumbnails, and from a word in the search field to the next frame.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from srum.config import dump, load_config
from srum.images import save_image
from srum.records import (
    Candidate,
    Failure,
    Grounding,
    Judgement,
    LayoutJudgement,
    Prompt,
    Region,
    RegionJudgement,
    RewardMap,
)
from srum.run_dir import CONFIG, round_dir, write_records, write_text
from srum.shapes.prompts import from_metadata, prompt_set
from srum.shapes.render import render
from srum.shapes.scenes import IMAGE_SIZE, sample_scene
from srum.views.report import write_report

ROUNDS = 4
PER_PROMPT = 4
NOISE = 0.7  # standard deviation, of 255: 64x64 px then take as many bytes of the page as those of srum-tiny
FAILED = 0.1  # share of the candidates whose layout has no score
PATIENCE = 120  # seconds for the browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --window-size=1280,900"
)
LOOK = """new Promise((done) => {
  const shown = performance.now();
  addEventListener("load", () => setTimeout(() => {
    const [paint] = performance.getEntriesByName("first-contentful-paint");
    const start = performance.now();
    form.elements.text.value = "red";
    form.dispatchEvent(new Event("input"));
    requestAnimationFrame(() => setTimeout(() => {
      done({ "first paint": paint.startTime, thumbnails: shown, filter: performance.now() - start });
    }));
  }, 1000));
})"""


# --- a made-up run


def write_run(folder: Path, candidates: int, size: int) -> None:
    """At least so many judged candidates in ``ROUNDS`` rounds, images (size, size), a latent cell for each 8 pixels."""
    write_text(folder / CONFIG, dump(load_config()))
    rng = np.random.default_rng(0)
    for k in range(ROUNDS):
        prompts = prompt_set("train", -(-candidates // (ROUNDS * PER_PROMPT)), seed=k)
        _write_round(round_dir(folder, k), prompts, size, rng)


def _write_round(folder: Path, prompts: Sequence[Prompt], size: int, rng: np.random.Generator) -> None:
    made = [_make(folder, prompt, index, size, rng) for prompt in prompts for index in range(PER_PROMPT)]
    candidates, groundings, judgements, rewards = zip(*made, strict=True)
    write_records(folder / "prompts.jsonl", prompts)
    write_records(folder / "candidates.jsonl", candidates)
    write_records(folder / "regions.jsonl", groundings)
    write_records(folder / "judgements.jsonl", judgements)
    write_records(folder / "rewards.jsonl", [reward for reward in rewards if reward])


def _make(
    folder: Path, prompt: Prompt, index: int, size: int, rng: np.random.Generator
) -> tuple[Candidate, Grounding, Judgement, RewardMap | None]:
    name = f"{prompt.id}-{index}"
    scene = sample_scene(from_metadata(prompt.metadata), rng)
    pixels = np.asarray(Image.fromarray(render(scene)).resize((size, size))) + rng.normal(0, NOISE, (size, size, 3))
    save_image(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), folder / f"images/{name}.png")
    boxes = [tuple(value * size / IMAGE_SIZE for value in thing.box) for thing in scene.things]
    regions = [Region(id=i, box=box, area=1, source="truth") for i, box in enumerate(boxes, start=1)]
    said = [
        RegionJudgement(region_id=i, score=rng.uniform(-1, 1), label=thing.label, reason="it is asked for")
        for i, thing in enumerate(scene.things, start=1)
    ]
    failed = rng.random() < FAILED
    layout = (
        LayoutJudgement(score=None, failure=Failure.NO_SCORE, raw="The things are where they should be.")
        if failed
        else LayoutJudgement(score=rng.uniform(-1, 1), reason="one thing above the other")
    )
    return (
        Candidate(
            id=name,
            prompt_id=prompt.id,
            prompt=prompt.text,
            index=index,
            seed=0,
            image=f"images/{name}.png",
            latent=name,
            size=(size, size),
        ),
        Grounding(candidate_id=name, regions=regions),
        Judgement(candidate_id=name, regions=said, layout=layout),
        None if failed else _reward(folder, name, size // 8, rng),
    )


def _reward(folder: Path, name: str, cells: int, rng: np.random.Generator) -> RewardMap:
    """A reward map (cells, cells) of 16 patches, as few as the regions of an image."""
    values = np.kron(rng.uniform(-1, 1, (4, 4)), np.ones((cells // 4, cells // 4))).astype(np.float32)
    path = folder / f"rewards/{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({"reward": values}, path)
    score = float(values.min())
    facts = {"grid": values.shape, "mapping": "signed", "alpha": 0.5, "sample_score": score}
    return RewardMap(candidate_id=name, values=f"rewards/{name}.safetensors", **facts)


# --- the browser


def chromium() -> str | None:
    """The path of Chromium, where it is installed."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def ask(page: Path, expression: str, state: str = "") -> Any:
    """What a JavaScript expression, or the promise that it is, comes to at the end of a page opened with ``#state``.

    A headless Chromium opens a copy of the page beside it, which tells its console. Raises RuntimeError where nothing
    is told within ``PATIENCE`` seconds.
    """
    script = f"<script>(async () => console.log(`srum ${{JSON.stringify(await {expression})}}`))()</script>"
    asking = page.with_name("asking.html")
    asking.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    return told(f"{asking.as_uri()}#{state}")


def told(address: str) -> Any:
    """What the page of an address tells the console after ``srum``. Raises RuntimeError as ``ask``."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(chromium()), *OPTIONS.split(), f"--user-data-dir={profile}", address]
        with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as browser:
            timer = Timer(PATIENCE, browser.terminate)
            timer.start()
            said = (re.search('"srum (.*)", source: ', line) for line in browser.stderr or ())
            answer = next(filter(None, said), None)
            timer.cancel()
            browser.terminate()
    if answer is None:
        raise RuntimeError(f"Chromium said nothing of {address}")
    return json.loads(answer[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and what the browser says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels, a multiple of 32")
    args = parser.parse_args(argv)
    title = f"images of {args.size} px"
    table = Table("candidates", "build s", "page MB", "bytes each", "as PNG", "ratio", title=title)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_run(run, args.candidates, args.size)
        start = time.perf_counter()
        page = write_report(run)
        seconds = time.perf_counter() - start
        files = [path.stat().st_size for path in run.glob("round-*/images/*.png")]
        each, plain = page.stat().st_size / len(files), 4 / 3 * sum(files) / len(files)
        numbers = (f"{seconds:.1f}", f"{each * len(files) / 1e6:.2f}", f"{each:.0f}", f"{plain:.0f}")
        table.add_row(str(len(files)), *numbers, f"{plain / each:.2f}")
        times = ask(page, LOOK) if chromium() else {}
    Console().print(table, ", ".join(f"{name} {value:.0f} ms" for name, value in times.items()) or "no Chromium here")


if __name__ == "__main__":
    main()

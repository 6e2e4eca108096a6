"""Pictures of a run: pure functions from records and arrays to matplotlib figures.

A figure is a plain ``matplotlib.figure.Figure``: no global state, no display needed, saved with ``figure.savefig``.

Frames: images (H, W) are drawn in image pixels, origin at the top left corner; boxes are ``(x0, y0, x1, y1)`` in the
same pixels; a reward map (h, w) lies on the latent grid and is stretched over the whole image, cell by cell.
Colours: scores and rewards share one diverging, colour-blind safe scale, fixed to [-1, 1]: red contradicts the prompt,
white is neutral, blue is right. A map with the ``unit`` mapping therefore shows what it is: never red. Weights of the
training have the same colours, fixed to [-1.5, 1.5]: red is repelled, white ignored, blue preserved. Maps are opaque:
a cell has the colour that the bar gives its value, and of the image there are its outlines, in ink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from textwrap import fill, shorten, wrap
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray
from PIL.Image import Image, fromarray, new
from skimage.filters import sobel

from srum.geometry import rle_decode
from srum.images import open_image
from srum.plugins import SHIPPED, find
from srum.records import Judgement, MaskRLE, Region, RegionJudgement

if TYPE_CHECKING:
    import pathlib

    from srum.drawing.chaining import ChainRecord

INK = "#262626"  # text, axes and outlines
MISSING = "#808080"  # what has no score
SCORE_RANGE = Normalize(-1.0, 1.0)
SCORE_COLOURS = LinearSegmentedColormap.from_list("scores", colormaps["RdBu"](np.linspace(0.1, 0.9, 255)))  # ink shows
SCORE_BINS = np.linspace(-1, 1, 21)
WEIGHT_RANGE = Normalize(-1.5, 1.5)  # alpha R + lambda_c with the paper's lambda_c, 0.5, is in [-0.5, 1.5]
TIME_COLOURS = colormaps["viridis"]
EDGE = 0.2  # steepness of an image, of which a black line on white has 1, from where on it is an outline
WORDS = 34  # letters of a line of what the judge says
LINE = 0.155  # inches of such a line
BAR = 0.8  # inches that a colour bar takes
LABEL_ROOM = 0.1  # of the height of an image: what the label of a region takes
BASE_COLOUR = "#8c8c8c"
Colours = Mapping[str, str]  # of arms that are not shipped methods, by name
NO_COLOURS: Colours = {}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#b8a800")


class Accuracy(Protocol):
    """Share of correct images in percent and its 95% interval in percent (``srum.evaluation.accuracy`` makes them)."""

    @property
    def accuracy(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...


@dataclass(frozen=True)
class BeforeAfter:
    """The images of one prompt from the base model and from the trained one; ``correct`` is the checker's verdict."""

    prompt: str
    before: Image
    after: Image
    before_correct: bool
    after_correct: bool


@dataclass(frozen=True)
class Scored:
    """The image of a candidate, its one score in [-1, 1] (None where it has none), and a line to stand above it."""

    image: Image
    score: float | None
    caption: str


def score_colour(score: float | None) -> str:
    """The colour of a score or reward in [-1, 1] as ``#rrggbb``; grey where there is none."""
    return MISSING if score is None else to_hex(SCORE_COLOURS(SCORE_RANGE(score)))


def candidate_figure(
    image: Image,
    regions: Sequence[Region],
    judgement: Judgement | None = None,
    reward: NDArray[np.floating] | None = None,
    *,
    masks: bool = False,
    grid: bool = False,
    words: bool = True,
) -> Figure:
    """An image with its regions in image pixels, each with id and score (or label), coloured by score in [-1, 1].

    ``masks`` draws the mask of a region that has one in place of its box. Region 0, the background, has neither.
    Regions without a score are grey, wrong ones have a thick line. ``reward`` (h, w), where given, is shown beside the
    image (``reward_map_figure``), with the latent ``grid`` on demand, and the outlines of wrong regions on it. Beside
    both stands, unless ``words`` is false, what the judge says of each region, the background and the layout, what is
    wrong first.
    """
    said = said_of(regions, judgement) if judgement and words else []
    lines = [_wrapped(*one) for one in said]
    height = max(3.9, LINE * (sum(map(len, lines)) + len(lines) + 1))
    widths = [3.6, *([] if reward is None else [3.6]), *([2.7] if said else [])]
    figure = Figure(figsize=(sum(widths) + (0 if reward is None else BAR), height), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    _draw_regions(_image_axes(axes[0], image), regions, judgement, masks, short=judgement is not None)
    axes[0].set_title("regions with their scores" if judgement else "regions", color=INK, fontsize=9)
    if reward is not None:
        _draw_map(axes[1], image, reward, SCORE_RANGE, grid)
        _draw_wrong(axes[1], regions, judgement, masks)
        axes[1].set_title(_map_title("reward", reward), color=INK, fontsize=9)
        _colourbar(figure, axes[1], SCORE_RANGE, "reward")
    if said:
        _draw_words(axes[-1], [score for _, score, _ in said], lines, height)
    return figure


Said = tuple[str, float | None, str]  # of what, the score, the reason


def said_of(regions: Sequence[Region], judgement: Judgement) -> list[Said]:
    """What the judge says of every region, the background and the layout: the lowest score first, failures last."""
    labels = {region.id: region.label for region in regions}
    said = [(_name(one, labels.get(one.region_id)), one) for one in judgement.regions]
    lines = [(name, one.score, one.reason or one.failure or "") for name, one in [*said, ("layout", judgement.layout)]]
    return sorted(lines, key=lambda line: np.inf if line[1] is None else line[1])


def _name(said: RegionJudgement, label: str | None) -> str:
    return "background" if said.region_id == 0 else f"{said.region_id} {said.label or label or ''}".strip()


def _wrapped(name: str, score: float | None, reason: str) -> list[str]:
    """The lines of what is said of one thing, the first of them its name and score."""
    return [*wrap(f"{name}  {_score_text(score)}", WORDS), *wrap(reason, WORDS)]


def _draw_words(axes: Axes, scores: Sequence[float | None], words: Sequence[Sequence[str]], height: float) -> None:
    """The lines of each thing below one another, with a swatch of its score; the axes are ``height`` inches tall."""
    axes.set(xlim=(0, 1), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title("what the judge says", color=INK, fontsize=9, loc="left")
    y = LINE
    for score, lines in zip(scores, words, strict=True):
        wrong = score is not None and score < 0
        swatch = Rectangle((0, y - 0.09), 0.05, 0.1, facecolor=score_colour(score), edgecolor=INK, linewidth=0.7)
        axes.add_patch(swatch)
        for number, line in enumerate(lines):
            weight = "bold" if wrong or number == 0 else "normal"
            axes.text(0.09, y, line, fontsize=8, color=INK, weight=weight, parse_math=False)
            y += LINE
        y += LINE / 2


def groundings_figure(
    image: Image,
    groundings: Mapping[str, Sequence[Region]],
    judgements: Mapping[str, Judgement] | None = None,
    *,
    masks: bool = False,
) -> Figure:
    """One image under several groundings, side by side: ``groundings[name]``, with ``judgements[name]`` where given."""
    figure = Figure(figsize=(3.4 * len(groundings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groundings), squeeze=False)[0]
    for axes, (name, regions) in zip(panels, groundings.items(), strict=True):
        judgement = (judgements or {}).get(name)
        _draw_regions(_image_axes(axes, image), regions, judgement, masks, short=True)
        title = [name, _above(judgement)] if judgement else [name]
        axes.set_title("\n".join(title), color=INK, fontsize=9, parse_math=False)
    return figure


def reward_map_figure(
    image: Image, reward: NDArray[np.floating], mapping: str = "signed", *, grid: bool = False
) -> Figure:
    """An image beside its reward map: (h, w) on the latent grid, cell by cell, under the outlines of the image.

    ``mapping`` names the range of the array, ``signed`` [-1, 1] or ``unit`` [0, 1]; the colours are [-1, 1] for both.
    ``grid`` draws the borders of the latent cells.
    """
    return _map_figure(image, reward, SCORE_RANGE, f"reward, {mapping}", grid)


def weight_figure(image: Image, weight: NDArray[np.floating], *, grid: bool = False) -> Figure:
    """An image beside the weight (h, w) of each latent token in training, on the colours of [-1.5, 1.5].

    The weight of Eq. 3 is alpha R + lambda_c (``train/methods/srum.py``). As ``reward_map_figure`` otherwise, whose
    scale is that of an advantage, too.
    """
    return _map_figure(image, weight, WEIGHT_RANGE, "weight", grid)


def credit_figure(image: Image, credit: NDArray[np.floating], *, grid: bool = False) -> Figure:
    """An image beside the credit (h, w) in [-1, 1] of each latent token, as ``reward_map_figure`` draws a map."""
    return _map_figure(image, credit, SCORE_RANGE, "credit", grid)


def reward_maps_figure(
    image: Image, rewards: Mapping[str, NDArray[np.floating]], columns: int = 4, *, grid: bool = False
) -> Figure:
    """Several reward maps (h, w) of one image, ``rewards[name]``, in rows of ``columns``, on one scale."""
    columns = max(1, min(columns, len(rewards)))
    rows = max(1, ceil(len(rewards) / columns))
    figure = Figure(figsize=(2.4 * columns + 0.8, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, reward) in zip(panels.flat, rewards.items(), strict=False):
        _draw_map(axes, image, reward, SCORE_RANGE, grid)
        axes.set_title(name, color=INK, fontsize=9, parse_math=False)
    _colourbar(figure, panels, SCORE_RANGE, "reward")
    return figure


def gallery_figure(candidates: Sequence[Scored], columns: int = 6) -> Figure:
    """Candidates sorted by score, the highest first and those without one last; the frame has the score's colour."""
    ranked = sorted(candidates, key=lambda scored: -np.inf if scored.score is None else scored.score, reverse=True)
    columns = max(1, min(columns, len(ranked)))
    rows = max(1, ceil(len(ranked) / columns))
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows), layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(ranked) :]:
        axes.set_axis_off()
    for axes, scored in zip(panels.flat, ranked, strict=False):
        _framed_axes(axes, scored.image, _score_text(scored.score), score_colour(scored.score))
        title = fill(shorten(scored.caption, 72, placeholder=" …"), 26)
        axes.set_title(title, fontsize=6.5, color=INK, parse_math=False)
    return figure


def before_after_figure(
    pairs: Sequence[BeforeAfter], columns: int = 3, names: tuple[str, str] = ("before", "after")
) -> Figure:
    """Images before and after, side by side in image pixels, the prompt above; the frame tells right from wrong.

    ``names`` are what the two sides are called.
    """
    columns = max(1, min(columns, len(pairs)))
    rows = max(1, ceil(len(pairs) / columns))
    figure = Figure(figsize=(3.2 * columns, 2.0 * rows), layout="constrained")
    for cell, pair in zip(figure.subfigures(rows, columns, squeeze=False).flat, pairs, strict=False):
        cell.suptitle(pair.prompt, fontsize=8, color=INK, wrap=True, parse_math=False)
        left, right = cell.subplots(1, 2)
        _verdict_axes(left, pair.before, names[0], pair.before_correct)
        _verdict_axes(right, pair.after, names[1], pair.after_correct)
    return figure


def loop_figure(
    prompt: str,
    image: Image,
    regions: Sequence[Region],
    judgement: Judgement,
    reward: NDArray[np.floating],
    pair: BeforeAfter,
) -> Figure:
    """A round in one picture: a candidate, what the judge says of it, its reward map (h, w), and a pair of images from
    before and after the training; the new weights draw the next candidates."""
    figure = Figure(figsize=(11.0, 3.9))
    lefts, width, bottom = (0.01, 0.212, 0.414, 0.616, 0.818), 0.172, 0.3
    panels = [figure.add_axes((left, bottom, width, width * 11.0 / 3.9)) for left in lefts]
    _image_axes(panels[0], image)
    _draw_regions(_image_axes(panels[1], image), regions, judgement, masks=False, short=True)
    _draw_map(panels[2], image, reward, SCORE_RANGE, grid=True)
    _draw_wrong(panels[2], regions, judgement, masks=False)
    _verdict_axes(panels[3], pair.before, "before", pair.before_correct)
    _verdict_axes(panels[4], pair.after, "after", pair.after_correct)
    titles = ("1  draw", "2  judge, region by region", "3  map the scores", "4  train, and draw again", "")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10, color=INK, loc="left", weight="bold")
    for text, x in ((prompt, lefts[0]), (pair.prompt, lefts[3])):
        figure.text(x, 0.93, f"“{shorten(text, 60, placeholder=' …')}”", fontsize=10, color=INK, parse_math=False)
    said = [one for one in said_of(regions, judgement) if one[1] is not None and one[1] < 0]
    for number, (name, score, reason) in enumerate(said[:3]):
        line = shorten(f"{name} {_score_text(score)}: {reason}", 64, placeholder=" …")
        figure.text(lefts[1], 0.25 - 0.05 * number, line, fontsize=8, color=INK, weight="bold", parse_math=False)
    _arrow(figure, [(lefts[4] + width / 2, 0.2), (lefts[4] + width / 2, 0.06), (0.04, 0.06), (0.04, 0.27)])
    figure.text(0.5, 0.02, "the new weights draw the next round", fontsize=9, color=INK, ha="center")
    return figure


def _arrow(figure: Figure, corners: Sequence[tuple[float, float]]) -> None:
    """An arrow along the corners, in shares of the figure."""
    path = Path(list(corners))
    figure.add_artist(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.2))


def strips_figure(chains: Sequence[ChainRecord], folder: pathlib.Path) -> Figure:
    """Chains one below the other: their images (in ``folder``) from the first on, under each what was drawn after it
    was looked at, and how the chain ended."""
    columns = max([1, *(len(chain.images) for chain in chains)])
    figure = Figure(figsize=(2.6 * columns, 3.8 * len(chains)))
    places = figure.subplots(len(chains), columns, squeeze=False, gridspec_kw={"hspace": 0.6})
    for row, chain in zip(places, chains, strict=True):
        said = [turn.text or "" for turn in chain.turns if turn.kind in ("reflect", "inspect")]
        for axes in row:
            axes.set_axis_off()
        for number, name in enumerate(chain.images):
            axes, reply = row[number], said[number] if number < len(said) else f"({chain.end})"
            axes.imshow(open_image(folder / "images" / f"{name}.png"))
            axes.set_title(fill(shorten(chain.prompt, 70), 30) if number == 0 else "", fontsize=8, color=INK)
            axes.text(
                0.5, -0.04, fill(shorten(reply, 150), 38), transform=axes.transAxes, ha="center", va="top", fontsize=6
            )
    return figure


def accuracy_figure(summary: Mapping[str, Mapping[str, Accuracy]], colours: Colours = NO_COLOURS) -> Figure:
    """Accuracy in percent with 95% intervals: a bar per category and arm, ``summary[arm][category]``."""
    categories = list(dict.fromkeys(category for arm in summary.values() for category in arm))
    thickness = 0.8 / max(1, len(summary))
    figure = Figure(figsize=(4.6, 0.8 + 0.14 * len(categories) * (len(summary) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for index, (arm, values) in enumerate(summary.items()):
        shown = [(row, values[category]) for row, category in enumerate(categories) if category in values]
        axes.barh(
            [row - 0.4 + (index + 0.5) * thickness for row, _ in shown],
            [value.accuracy for _, value in shown],
            height=0.9 * thickness,
            xerr=_whiskers([value for _, value in shown]),
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 1.5},
            color=colours.get(arm) or arm_colour(arm, index),
            label=arm,
        )
    axes.set_yticks(range(len(categories)), [category.replace("_", " ") for category in categories])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("correct images, %")
    _legend(figure, axes, len(summary))
    return _finish(figure, axes)


def loss_figure(metrics: Mapping[str, Sequence[Mapping[str, float]]], colours: Colours = NO_COLOURS) -> Figure:
    """Training loss over optimiser steps, a panel per arm with a scale of its own: arms minimise different things.

    Each row has at least ``step`` and ``loss``.
    """
    count = max(1, len(metrics))
    figure = Figure(figsize=(4.6, 0.7 + 1.5 * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, (arm, rows)) in enumerate(zip(panels, metrics.items(), strict=False)):
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color=colours.get(arm) or arm_colour(arm, index), linewidth=1.3)
        axes.set_title(arm, color=INK, fontsize=9, loc="left", parse_math=False)
    for axes in panels:
        axes.set_ylabel("loss")
        _finish(figure, axes)
    panels[-1].set_xlabel("step")
    return figure


POLICY_PANELS = (  # what is shown of a policy's training, by panels
    ("value", "second_value", "right"),
    ("zero_spread_groups", "failed_values", "formed"),
    ("stops", "right_stops", "right_stopped"),
    ("mended", "broken"),
)


def policy_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Rewards, groups and replies, and the distance from the weights that entered, over the steps of one training; None
    where rows know of no rewards."""
    known = {name for row in rows for name in row}
    panels = [shown for names in POLICY_PANELS if (shown := [name for name in names if name in known])]
    if "value" not in known:
        return None
    figure = Figure(figsize=(4.6, 0.7 + 1.5 * (len(panels) + 1)), layout="constrained")
    *tops, bottom = figure.subplots(len(panels) + 1, 1, sharex=True)
    for axes, names in zip(tops, panels, strict=True):
        for name in names:
            own = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*own, strict=True), label=name.replace("_", " "), linewidth=1.3, marker=".", markersize=3)
        axes.set_ylim(-0.04, 1.04)
        _key_above(figure, axes)
    for name in sorted({part for row in rows for part in row["parts"] if part.endswith("_kl")}):
        own = [(row["step"], row["parts"][name]) for row in rows if name in row["parts"]]
        bottom.plot(*zip(*own, strict=True), label=f"{name.replace('_', ' ')}, as weighted", linewidth=1.3)
    bottom.set_xlabel("step")
    return _key_above(figure, bottom)


def _key_above(figure: Figure, axes: Axes) -> Figure:
    if axes.lines:
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return _finish(figure, axes)


def timestep_loss_figure(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss over optimiser steps by timestep, from clean (t = 0) to noise (t = 1): one panel per arm.

    Each row has ``step`` and ``loss_by_timestep``: the mean in each of equal parts of [0, 1], None where no token fell.
    """
    figure = Figure(figsize=(4.6, 0.8 + 2.2 * max(1, len(metrics))), layout="constrained")
    panels = figure.subplots(max(1, len(metrics)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (arm, rows) in zip(panels, metrics.items(), strict=False):
        bins = len(rows[0]["loss_by_timestep"]) if rows else 0
        for index in range(bins):
            losses = np.array([row["loss_by_timestep"][index] for row in rows], dtype=float)  # None as NaN
            label = f"t {index / bins:.2f} to {(index + 1) / bins:.2f}"
            colour = TIME_COLOURS((index + 0.5) / bins)
            axes.plot([row["step"] for row in rows], losses, color=colour, linewidth=1.2, label=label)
        axes.set_ylabel(f"loss, {arm}")
    for axes in panels:
        _finish(figure, axes)
    panels[-1].set_xlabel("step")
    _legend(figure, panels[0], len(metrics))
    return figure


def score_figure(scores: Mapping[str, Sequence[float]]) -> Figure:
    """How scores in [-1, 1] are distributed: a histogram of 20 bins for each kind, ``scores[kind]``, on one axis."""
    figure = Figure(figsize=(4.6, 0.7 + 1.3 * max(1, len(scores))), layout="constrained")
    panels = figure.subplots(max(1, len(scores)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (kind, values) in zip(panels, scores.items(), strict=False):
        counts, edges = np.histogram(values, SCORE_BINS)
        colours = [score_colour(float(centre)) for centre in (edges[:-1] + edges[1:]) / 2]
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor=INK, linewidth=0.5)
        mean = f", mean {np.mean(values):+.2f}" if len(values) else ""
        axes.set_title(f"{kind}: {len(values)}{mean}", color=INK, fontsize=9)
    for axes in panels:
        _finish(figure, axes)
        axes.set_xlim(-1, 1)
    panels[-1].set_xlabel("score")
    return figure


def rounds_figure(rounds: Mapping[str, Mapping[int, Accuracy]], colours: Colours = NO_COLOURS) -> Figure:
    """Accuracy in percent with 95% intervals over the rounds, one line per arm (``rounds[arm][round]``).

    Round 0 is the model before any training.
    """
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for index, (arm, values) in enumerate(rounds.items()):
        numbers, points = list(values), list(values.values())
        axes.errorbar(
            numbers,
            [point.accuracy for point in points],
            yerr=_whiskers(points),
            color=colours.get(arm) or arm_colour(arm, index),
            marker="o",
            markersize=4,
            linewidth=1.3,
            capsize=2,
            label=arm,
        )
    axes.set_xticks(sorted({number for values in rounds.values() for number in values}))
    axes.set_xlabel("rounds of training")
    axes.set_ylabel("correct images, %")
    _legend(figure, axes, len(rounds))
    return _finish(figure, axes)


def steps_figure(steps: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Quantities over the denoising steps, a panel for each and a line per arm (``steps[quantity][arm]``)."""
    figure = Figure(figsize=(2.9 * max(len(steps), 1), 2.9), layout="constrained")
    panels = figure.subplots(1, max(len(steps), 1), squeeze=False)[0]
    for axes, (quantity, arms) in zip(panels, steps.items(), strict=False):
        for index, (arm, values) in enumerate(arms.items()):
            axes.plot(range(1, len(values) + 1), values, color=arm_colour(arm, index), linewidth=1.3, label=arm)
        axes.set_xlabel("denoising step")
        axes.set_ylabel(quantity)
        _finish(figure, axes)
    _legend(figure, panels[0], len(next(iter(steps.values()), {})))
    return figure


def side_by_side(images: Sequence[Image], gap: int = 4) -> Image:
    """Images in a row, with some white pixels between them."""
    size = sum(image.width for image in images) + gap * (len(images) - 1), max(image.height for image in images)
    row, x = new("RGB", size, "white"), 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + gap
    return row


def as_image(figure: Figure, dpi: int = 100) -> Image:
    """The figure as RGB pixels."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    canvas.draw()
    return fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def arm_colour(arm: str, index: int = 0) -> str:
    """The colour of an arm: a shipped method says its own; the ``index`` picks one for the others."""
    if arm in SHIPPED["method"]:
        return str(find("method", arm).colour)
    return BASE_COLOUR if arm == "base" else OTHER_COLOURS[index % len(OTHER_COLOURS)]


def _whiskers(values: Sequence[Accuracy]) -> NDArray[np.floating]:
    """Lengths (2, N) of the intervals below and above the values."""
    ends = [(value.accuracy - value.interval[0], value.interval[1] - value.accuracy) for value in values]
    return np.array(ends, dtype=float).reshape(-1, 2).T


def _image_axes(axes: Axes, image: Image, **options: object) -> Axes:
    extent = (0, image.width, image.height, 0)
    axes.imshow(np.asarray(image), interpolation="nearest", extent=extent, **options)  # type: ignore[arg-type]
    axes.set_axis_off()
    return axes


def _draw_regions(
    axes: Axes, regions: Sequence[Region], judgement: Judgement | None, masks: bool, short: bool = False
) -> None:
    """The regions on an image, the wrong ones above the others; ``short`` labels have no words."""
    said = {region.region_id: region for region in judgement.regions} if judgement else {}
    shown = sorted((region for region in regions if region.id != 0), key=lambda r: _is_wrong(said.get(r.id)))
    for region in shown:
        _draw_region(axes, region, said.get(region.id), masks)
    for region in shown:
        _draw_label(axes, region, said.get(region.id), short)


def _draw_wrong(axes: Axes, regions: Sequence[Region], judgement: Judgement | None, masks: bool) -> None:
    """On a map the regions that contradict the prompt, with their numbers."""
    said = {region.region_id: region for region in judgement.regions} if judgement else {}
    wrong = [region for region in regions if region.id != 0 and _is_wrong(said.get(region.id))]
    for region in wrong:
        _draw_region(axes, region, said[region.id], masks)
        _draw_label(axes, region, said[region.id], short=True)


def _is_wrong(said: RegionJudgement | None) -> bool:
    return said is not None and said.score is not None and said.score < 0


def _above(judgement: Judgement) -> str:
    """The scores that have no place in the image."""
    background = [f"background {_score_text(one.score)}" for one in judgement.regions if one.region_id == 0]
    return ", ".join([*background, f"layout {_score_text(judgement.layout.score)}"])


def _draw_region(axes: Axes, region: Region, said: RegionJudgement | None, masks: bool) -> None:
    x0, y0, x1, y1 = region.box
    colour, width = score_colour(said.score if said else None), 3.6 if _is_wrong(said) else 2.0
    outline = [patheffects.Stroke(linewidth=width + 1.8, foreground=INK), patheffects.Normal()]
    if masks and region.mask is not None:
        _draw_mask(axes, region.mask, colour, width, outline)
    else:
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, path_effects=outline)
        axes.add_patch(box)


def _draw_label(axes: Axes, region: Region, said: RegionJudgement | None, short: bool = False) -> None:
    """Id, label and score above the region; where the image ends there, inside a tall region and below a short one."""
    x0, y0, x1, y1 = region.box
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    y, side = y0, "bottom"
    if y0 < LABEL_ROOM * height:
        y, side = (y0, "top") if y1 - y0 > 3 * LABEL_ROOM * height else (y1, "top")
    x, end = (x1, "right") if x0 + x1 > width else (x0, "left")
    score, label = (said.score, said.label or region.label) if said else (None, region.label)
    colour = score_colour(score)
    words = [str(region.id), *([] if short else [shorten(label or "", 24, placeholder=" …")]), _score_text(score)]
    axes.text(
        x,
        y,
        " ".join(filter(None, words)),
        fontsize=8,
        weight="bold" if _is_wrong(said) else "normal",
        ha=end,
        va=side,
        parse_math=False,
        color=_readable_on(colour),
        bbox={"facecolor": colour, "edgecolor": INK, "linewidth": 0.7, "boxstyle": "square,pad=0.2"},
    )


def _draw_mask(
    axes: Axes, rle: MaskRLE, colour: str, width: float, outline: Sequence[patheffects.AbstractPathEffect]
) -> None:
    """The outline of a mask (H, W), closed where it meets the border of the image."""
    rows, columns = rle.size
    x, y = np.arange(-1, columns + 1) + 0.5, np.arange(-1, rows + 1) + 0.5  # centres of the pixels, one more all round
    mask = np.pad(rle_decode(rle), 1).astype(float)
    line = axes.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=width)
    line.set(path_effects=outline)
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def _score_text(score: float | None) -> str:
    return "no score" if score is None else f"{score:+.2f}"


def _map_figure(image: Image, values: NDArray[np.floating], norm: Normalize, what: str, grid: bool) -> Figure:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _image_axes(left, image).set_title("image", color=INK, fontsize=9)
    _draw_map(right, image, values, norm, grid)
    right.set_title(_map_title(what, values), color=INK, fontsize=9)
    _colourbar(figure, right, norm, what.partition(",")[0])
    return figure


def _map_title(what: str, values: NDArray[np.floating]) -> str:
    h, w = values.shape
    return f"{what}, {h}×{w} latent cells"  # noqa: RUF001


def _draw_map(axes: Axes, image: Image, values: NDArray[np.floating], norm: Normalize, grid: bool) -> None:
    """A map (h, w), cell by cell, in the very colours of the bar, under the outlines of the image."""
    extent = (0, image.width, image.height, 0)
    axes.imshow(values, cmap=SCORE_COLOURS, norm=norm, interpolation="nearest", extent=extent)
    axes.imshow(outlines(image), interpolation="nearest", extent=extent)
    axes.set_axis_off()
    if grid:
        h, w = values.shape
        _draw_grid(axes, (h, w), image)


def outlines(image: Image) -> NDArray[np.float64]:
    """Where the image (H, W) is steep, as RGBA (H, W, 4) in [0, 1]: ink, opaque on an outline, clear elsewhere."""
    steep = sobel(np.asarray(image.convert("RGB"), dtype=float) / 255, axis=(0, 1)).max(axis=-1)
    shade = np.full((*steep.shape, 4), (*to_rgb(INK), 0.0))
    shade[..., 3] = np.clip(steep / EDGE - 1, 0, 1)
    return shade


def _draw_grid(axes: Axes, grid: tuple[int, int], image: Image) -> None:
    h, w = grid
    style = {"color": INK, "linewidth": 0.5, "alpha": 0.6}
    axes.hlines(np.linspace(0, image.height, h + 1), 0, image.width, **style)  # type: ignore[arg-type]
    axes.vlines(np.linspace(0, image.width, w + 1), 0, image.height, **style)  # type: ignore[arg-type]


def _colourbar(figure: Figure, axes: Axes | NDArray[np.object_], norm: Normalize, label: str) -> None:
    scale = ScalarMappable(norm, SCORE_COLOURS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.05, ticks=MultipleLocator(0.5))
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=INK)


def _verdict_axes(axes: Axes, image: Image, name: str, correct: bool) -> None:
    colour = score_colour(0.8 if correct else -0.8)
    _framed_axes(axes, image, f"{name}: {'right' if correct else 'wrong'}", colour)


def _framed_axes(axes: Axes, image: Image, text: str, colour: str) -> None:
    """An image with a frame, and a text below it."""
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, fontsize=8, color=INK, parse_math=False)
    axes.spines[:].set(color=colour, linewidth=2)


def _legend(figure: Figure, axes: Axes, arms: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if arms:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(color=MISSING, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure

"""Pictures of a run: pure functions from records and arrays to matplotlib figures.

A figure is a plain ``matplotlib.figure.Figure``: no global state, no display needed, saved with ``figure.savefig``.

Frames: images (H, W) are drawn in image pixels, origin at the top left corner; boxes are ``(x0, y0, x1, y1)`` in the
same pixels; a reward map (h, w) lies on the latent grid and is stretched over the whole image, cell by cell.
Colours: scores and rewards share one diverging, colour-blind safe scale, fixed to [-1, 1]: red contradicts the prompt,
white is neutral, blue is right. A map with the ``unit`` mapping therefore shows what it is: never red.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL.Image import Image

from srum.records import Judgement, Region, RegionJudgement

INK = "#262626"  # text, axes and outlines
MISSING = "#808080"  # what has no score
SCORE_RANGE = Normalize(-1.0, 1.0)
SCORE_COLOURS = colormaps["RdBu"]
ARM_COLOURS = {"base": "#8c8c8c", "sft": "#e69f00", "srum_paper": "#56b4e9", "srum": "#0072b2"}
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


def score_colour(score: float | None) -> str:
    """The colour of a score or reward in [-1, 1] as ``#rrggbb``; grey where there is none."""
    return MISSING if score is None else to_hex(SCORE_COLOURS(SCORE_RANGE(score)))


def candidate_figure(image: Image, regions: Sequence[Region], judgement: Judgement | None = None) -> Figure:
    """An image with its regions as boxes in image pixels, each with id, score and label, coloured by score in [-1, 1].

    Region 0, the background, has no box: its score stands above the image, beside the layout's. Regions without a score
    are grey. The reasons are printed below.
    """
    said = {region.region_id: region for region in judgement.regions} if judgement else {}
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axes = _image_axes(figure.add_subplot(), image)
    for region in regions:
        if region.id != 0:
            _draw_region(axes, region, said.get(region.id))
    if judgement:
        background = f"background {_score_text(said[0].score)}, " if 0 in said else ""
        axes.set_title(f"{background}layout {_score_text(judgement.layout.score)}", color=INK, fontsize=9)
        lines = [f"{i}: {region.reason or region.failure or 'no reason'}" for i, region in sorted(said.items())]
        lines.append(f"layout: {judgement.layout.reason or judgement.layout.failure or 'no reason'}")
        figure.supxlabel("\n".join(lines), fontsize=8, color=INK, ha="left", x=0.02, wrap=True, parse_math=False)
    return figure


def reward_map_figure(
    image: Image, reward: NDArray[np.floating], mapping: str = "signed", *, grid: bool = False
) -> Figure:
    """An image beside its reward map: (h, w) on the latent grid, laid over the image in grey, nearest cell.

    ``mapping`` names the range of the array, ``signed`` [-1, 1] or ``unit`` [0, 1]; the colours are [-1, 1] for both.
    ``grid`` draws the borders of the latent cells.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _image_axes(left, image).set_title("image", color=INK, fontsize=9)
    _image_axes(right, image.convert("L"), cmap="gray", vmin=0, vmax=255)
    extent = (0, image.width, image.height, 0)
    right.imshow(reward, cmap=SCORE_COLOURS, norm=SCORE_RANGE, alpha=0.7, interpolation="nearest", extent=extent)
    h, w = reward.shape
    right.set_title(f"reward, {mapping}, {h}×{w} latent cells", color=INK, fontsize=9)  # noqa: RUF001
    if grid:
        _draw_grid(right, (h, w), image)
    _colourbar(figure, right, "reward")
    return figure


def before_after_figure(pairs: Sequence[BeforeAfter], columns: int = 3) -> Figure:
    """Images before and after, side by side in image pixels, the prompt above; the frame tells right from wrong."""
    columns = max(1, min(columns, len(pairs)))
    rows = max(1, ceil(len(pairs) / columns))
    figure = Figure(figsize=(3.2 * columns, 2.0 * rows), layout="constrained")
    for cell, pair in zip(figure.subfigures(rows, columns, squeeze=False).flat, pairs, strict=False):
        cell.suptitle(pair.prompt, fontsize=8, color=INK, wrap=True, parse_math=False)
        left, right = cell.subplots(1, 2)
        _verdict_axes(left, pair.before, "before", pair.before_correct)
        _verdict_axes(right, pair.after, "after", pair.after_correct)
    return figure


def accuracy_figure(summary: Mapping[str, Mapping[str, Accuracy]]) -> Figure:
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
            color=arm_colour(arm, index),
            label=arm,
        )
    axes.set_yticks(range(len(categories)), [category.replace("_", " ") for category in categories])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("correct images, %")
    _legend(figure, axes, len(summary))
    return _finish(figure, axes)


def loss_figure(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss over optimiser steps, one line per arm; each row has at least ``step`` and ``loss``."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for index, (arm, rows) in enumerate(metrics.items()):
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color=arm_colour(arm, index), linewidth=1.3, label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _legend(figure, axes, len(metrics))
    return _finish(figure, axes)


def rounds_figure(rounds: Mapping[str, Mapping[int, Accuracy]]) -> Figure:
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
            color=arm_colour(arm, index),
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


def arm_colour(arm: str, index: int = 0) -> str:
    """The colour of an arm; the ``index`` picks one for arms without their own."""
    return ARM_COLOURS.get(arm, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def _whiskers(values: Sequence[Accuracy]) -> NDArray[np.floating]:
    """Lengths (2, N) of the intervals below and above the values."""
    ends = [(value.accuracy - value.interval[0], value.interval[1] - value.accuracy) for value in values]
    return np.array(ends, dtype=float).reshape(-1, 2).T


def _image_axes(axes: Axes, image: Image, **options: object) -> Axes:
    extent = (0, image.width, image.height, 0)
    axes.imshow(np.asarray(image), interpolation="nearest", extent=extent, **options)  # type: ignore[arg-type]
    axes.set_axis_off()
    return axes


def _draw_region(axes: Axes, region: Region, said: RegionJudgement | None) -> None:
    x0, y0, x1, y1 = region.box
    score, label = (said.score, said.label or region.label) if said else (None, region.label)
    colour = score_colour(score)
    outline = [patheffects.Stroke(linewidth=4, foreground=INK), patheffects.Normal()]
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2.2, path_effects=outline)
    axes.add_patch(box)
    text = " ".join(filter(None, [str(region.id), label, _score_text(score)]))
    axes.text(
        x0,
        y0,
        text,
        fontsize=8,
        va="bottom",
        parse_math=False,
        color=_readable_on(colour),
        bbox={"facecolor": colour, "edgecolor": INK, "linewidth": 0.7, "boxstyle": "square,pad=0.2"},
    )


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def _score_text(score: float | None) -> str:
    return "no score" if score is None else f"{score:+.2f}"


def _draw_grid(axes: Axes, grid: tuple[int, int], image: Image) -> None:
    h, w = grid
    style = {"color": INK, "linewidth": 0.5, "alpha": 0.6}
    axes.hlines(np.linspace(0, image.height, h + 1), 0, image.width, **style)  # type: ignore[arg-type]
    axes.vlines(np.linspace(0, image.width, w + 1), 0, image.height, **style)  # type: ignore[arg-type]


def _colourbar(figure: Figure, axes: Axes, label: str) -> None:
    scale = ScalarMappable(SCORE_RANGE, SCORE_COLOURS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.05, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=INK)


def _verdict_axes(axes: Axes, image: Image, name: str, correct: bool) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{name}: {'right' if correct else 'wrong'}", fontsize=8, color=INK)
    axes.spines[:].set(color=score_colour(0.8 if correct else -0.8), linewidth=2)


def _legend(figure: Figure, axes: Axes, arms: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if arms:
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(color=MISSING, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure

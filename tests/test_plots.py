"""The figures are drawn from records, in image pixels and in the fixed colours of scores."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from srum import plots
from srum.records import Failure, Judgement, LayoutJudgement, Region, RegionJudgement

IMAGE = Image.new("RGB", (64, 48), "#cccccc")
REGIONS = [
    Region(id=0, box=(0, 0, 64, 48), area=2000, source="background"),
    Region(id=1, box=(4, 6, 20, 30), area=384, source="classical", label="circle"),
    Region(id=2, box=(30, 8, 60, 40), area=960, source="classical"),
]
JUDGEMENT = Judgement(
    candidate_id="a",
    regions=[
        RegionJudgement(region_id=0, score=0.0, reason="plain"),
        RegionJudgement(region_id=1, score=-0.8, label="red circle", reason="costs $5 and $6, not <green>"),
        RegionJudgement(region_id=2, score=None, failure=Failure.NO_SCORE, raw="?"),
    ],
    layout=LayoutJudgement(score=0.5, reason="fine"),
)
ACCURACY = SimpleNamespace(accuracy=60.0, interval=(52.0, 67.5))


def _png(figure: Figure) -> np.ndarray:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=40)
    return np.asarray(Image.open(data))


def _texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def _boxes(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


@pytest.mark.parametrize(("worse", "better"), [(-1.0, -0.5), (-0.5, 0.0)])
def test_score_colours_go_from_red_over_white_to_blue(worse: float, better: float) -> None:
    red, _, blue = (int(plots.score_colour(-1)[i : i + 2], 16) for i in (1, 3, 5))
    assert red > 2 * blue
    red, _, blue = (int(plots.score_colour(1)[i : i + 2], 16) for i in (1, 3, 5))
    assert blue > 2 * red
    green = [int(plots.score_colour(score)[3:5], 16) for score in (worse, better, -better, -worse)]
    assert green[0] < green[1] and green[3] < green[2]
    assert plots.score_colour(None) == plots.MISSING


def test_candidate_boxes_lie_in_image_pixels_in_the_colour_of_their_score() -> None:
    figure = plots.candidate_figure(IMAGE, REGIONS, JUDGEMENT)
    _png(figure)
    first, second = _boxes(figure)
    assert (*first.get_xy(), first.get_width(), first.get_height()) == (4, 6, 16, 24)
    assert plots.to_hex(first.get_edgecolor()) == plots.score_colour(-0.8)
    assert plots.to_hex(second.get_edgecolor()) == plots.MISSING
    texts = _texts(figure)
    for said in ("1 red circle -0.80", "2 no score", "background +0.00, layout +0.50", "costs $5 and $6", "no_score"):
        assert said in texts


def test_candidate_without_judgement() -> None:
    figure = plots.candidate_figure(IMAGE, REGIONS)
    assert _png(figure).any()
    assert "1 circle no score" in _texts(figure)


def test_reward_map_covers_the_image_on_the_fixed_scale() -> None:
    reward = np.array([[-1.0, 0.0, 0.25], [0.5, 0.75, 1.0]])
    figure = plots.reward_map_figure(IMAGE, reward, "unit", grid=True)
    _png(figure)
    overlay = figure.axes[1].images[1]
    assert overlay.get_extent() == [0, 64, 48, 0]
    assert (overlay.norm.vmin, overlay.norm.vmax) == (-1, 1)
    assert np.array_equal(overlay.get_array(), reward)
    assert "unit, 2×3 latent cells" in _texts(figure)  # noqa: RUF001


@pytest.mark.parametrize("number", [1, 4])
def test_before_after_names_every_prompt_and_verdict(number: int) -> None:
    pairs = [plots.BeforeAfter(f"prompt ${i}$ $", IMAGE, IMAGE, False, True) for i in range(number)]
    figure = plots.before_after_figure(pairs)
    _png(figure)
    texts = _texts(figure)
    assert all(pair.prompt in texts for pair in pairs)
    assert texts.count("before: wrong") == texts.count("after: right") == number


def test_accuracy_bars_have_their_values_and_intervals() -> None:
    summary = {"base": {"overall": ACCURACY, "counting": ACCURACY}, "srum": {"overall": ACCURACY}}
    figure = plots.accuracy_figure(summary)
    _png(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [60, 60, 60]
    (whiskers,) = figure.axes[0].containers[1].errorbar[2]
    assert np.allclose(whiskers.get_segments()[0][:, 0], [52.0, 67.5])


@pytest.mark.parametrize(
    "figure",
    [
        plots.loss_figure({"srum": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]}),
        plots.loss_figure({}),
        plots.rounds_figure({"srum": {0: ACCURACY, 1: ACCURACY}}),
        plots.accuracy_figure({}),
    ],
)
def test_charts_draw(figure: Figure) -> None:
    assert _png(figure).any()

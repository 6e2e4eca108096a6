"""The figures are drawn from records, in image pixels and in the fixed colours of scores."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from srum.geometry import rle_encode
from srum.records import Failure, Judgement, LayoutJudgement, Region, RegionJudgement
from srum.views import plots

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
    second, first = _boxes(figure)  # what is wrong lies above the others
    assert (*first.get_xy(), first.get_width(), first.get_height()) == (4, 6, 16, 24)
    assert plots.to_hex(first.get_edgecolor()) == plots.score_colour(-0.8)
    assert plots.to_hex(second.get_edgecolor()) == plots.MISSING
    texts = _texts(figure)
    for said in ("1 -0.80", "2 no score", "1 red circle  -0.80", "layout  +0.50", "costs $5 and $6", "no_score"):
        assert said in texts


def test_candidate_without_judgement() -> None:
    figure = plots.candidate_figure(IMAGE, REGIONS)
    assert _png(figure).any()
    assert "1 circle no score" in _texts(figure)


def test_reward_map_covers_the_image_on_the_fixed_scale() -> None:
    reward = np.array([[-1.0, 0.0, 0.25], [0.5, 0.75, 1.0]])
    figure = plots.reward_map_figure(IMAGE, reward, "unit", grid=True)
    _png(figure)
    overlay = figure.axes[1].images[0]
    assert overlay.get_extent() == [0, 64, 48, 0]
    assert (overlay.norm.vmin, overlay.norm.vmax) == (-1, 1)
    assert np.array_equal(overlay.get_array(), reward)
    assert "unit, 2×3 latent cells" in _texts(figure)  # noqa: RUF001


def test_a_cell_has_the_colour_that_the_bar_gives_its_value() -> None:
    """-1 is drawn as the bar's -1, +1 as its +1: the map is opaque, and of an image without edges nothing is on it."""
    figure = plots.reward_map_figure(IMAGE, np.array([[-1.0, 1.0]]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    colours = []
    for x, y in ((16, 24), (48, 24)):
        column, row = figure.axes[1].transData.transform((x, y))
        colours.append(pixels[len(pixels) - 1 - int(row), int(column), :3])
    of_bar = 255 * plots.SCORE_COLOURS([0.0, 1.0])[:, :3]
    assert np.abs(np.array(colours) - of_bar).max() <= 1
    assert plots.score_colour(-1) == plots.to_hex(plots.SCORE_COLOURS(0.0))


def test_outlines_are_where_the_image_changes() -> None:
    half = Image.new("RGB", (16, 16), "white")
    half.paste("black", (8, 0, 16, 16))
    opaque = plots.outlines(half)[..., 3].max(axis=0)
    assert opaque[7:9].all() and not opaque[:6].any() and not opaque[10:].any()
    assert not plots.outlines(IMAGE)[..., 3].any()


def test_what_is_wrong_is_said_first_and_stands_out_on_the_map() -> None:
    assert [name for name, _, _ in plots.said_of(REGIONS, JUDGEMENT)] == ["1 red circle", "background", "layout", "2"]
    figure = plots.candidate_figure(IMAGE, REGIONS, JUDGEMENT, np.zeros((6, 8)))
    _png(figure)
    on_image, on_map = ([p for p in axes.patches if isinstance(p, Rectangle)] for axes in figure.axes[:2])
    assert [box.get_linewidth() for box in on_map] == [3.6] and on_map[0].get_xy() == (4, 6)
    assert sorted(box.get_linewidth() for box in on_image) == [2.0, 3.6]


def test_long_reasons_make_the_figure_taller() -> None:
    said = [RegionJudgement(region_id=i, score=0.0, reason="very " * 60) for i in range(4)]
    long = JUDGEMENT.model_copy(update={"regions": said})
    low, high = (plots.candidate_figure(IMAGE, REGIONS, judgement) for judgement in (JUDGEMENT, long))
    _png(high)
    assert high.get_figheight() > 1.5 * low.get_figheight()
    words = high.axes[-1]
    assert all(0 <= y <= words.get_ylim()[0] for _, y in (text.get_position() for text in words.texts))


def test_every_arm_has_a_loss_scale_of_its_own() -> None:
    rows = {"sft": [{"step": 1, "loss": 100.0}, {"step": 2, "loss": 90.0}], "srum": [{"step": 1, "loss": -0.1}] * 2}
    figure = plots.loss_figure(rows)
    _png(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sft", "srum"]
    assert figure.axes[1].get_ylim()[1] < 1 < 80 < figure.axes[0].get_ylim()[0]


def test_a_mask_is_outlined_at_the_borders_of_its_pixels() -> None:
    mask = np.zeros((48, 64), dtype=bool)
    mask[10:20, 30:64] = True  # up to the border of the image
    region = Region(id=1, box=(30, 10, 64, 20), mask=rle_encode(mask), area=340, source="classical")
    figure = plots.candidate_figure(IMAGE, [region], masks=True)
    _png(figure)
    assert _boxes(figure) == []
    (outline,) = [line for line in figure.axes[0].collections if isinstance(line, ContourSet)]
    corners = np.concatenate([path.vertices for path in outline.get_paths()])
    assert np.array_equal([corners.min(axis=0), corners.max(axis=0)], [(30, 10), (64, 20)])
    assert len(_boxes(plots.candidate_figure(IMAGE, [region]))) == 1


def test_a_candidate_and_its_reward_map_in_one_figure() -> None:
    figure = plots.candidate_figure(IMAGE, REGIONS, JUDGEMENT, np.zeros((6, 8)), grid=True)
    _png(figure)
    assert len(_boxes(figure)) == 2
    assert "reward, 6×8 latent cells" in _texts(figure) and "fine" in _texts(figure)  # noqa: RUF001


def test_labels_of_regions_stay_inside_the_image() -> None:
    """Above the box; at the upper border below a short box and inside a tall one; to the left of the right border."""
    boxes = [(4, 20, 12, 30), (4, 0, 12, 10), (4, 0, 12, 40), (50, 20, 64, 30)]
    regions = [Region(id=i, box=box, area=1, source="grid") for i, box in enumerate(boxes, start=1)]
    labels = plots.candidate_figure(IMAGE, regions).axes[0].texts
    places = [(*label.get_position(), label.get_ha(), label.get_va()) for label in labels]
    assert places == [
        (4, 20, "left", "bottom"),
        (4, 10, "left", "top"),
        (4, 0, "left", "top"),
        (64, 20, "right", "bottom"),
    ]


def test_groundings_stand_side_by_side_under_their_names() -> None:
    figure = plots.groundings_figure(IMAGE, {"classical": REGIONS, "grid": REGIONS[:2]}, {"classical": JUDGEMENT})
    _png(figure)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["classical\nbackground +0.00, layout +0.50", "grid"]
    assert [len([p for p in axes.patches if isinstance(p, Rectangle)]) for axes in figure.axes] == [2, 1]


def test_weights_have_a_fixed_scale_of_their_own() -> None:
    weight = 0.6 * np.array([[-1.0, 0.0], [0.5, 1.0]]) + 0.5
    figure = plots.weight_figure(IMAGE, weight)
    _png(figure)
    overlay = figure.axes[1].images[0]
    assert (overlay.norm.vmin, overlay.norm.vmax) == (-1.5, 1.5)
    assert np.array_equal(overlay.get_array(), weight)


def test_reward_maps_in_rows_share_one_scale() -> None:
    rewards = {f"rule {i}": np.full((2, 2), i / 10) for i in range(5)}
    figure = plots.reward_maps_figure(IMAGE, rewards, columns=3)
    _png(figure)
    drawn = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.get_title()}
    assert list(drawn) == list(rewards)
    assert all((overlay.norm.vmin, overlay.norm.vmax) == (-1, 1) for overlay in drawn.values())
    assert all(np.array_equal(overlay.get_array(), rewards[name]) for name, overlay in drawn.items())


def test_the_gallery_goes_from_the_best_to_those_without_a_score() -> None:
    scores = [-0.5, None, 0.75, 0.0]
    figure = plots.gallery_figure([plots.Scored(IMAGE, score, f"prompt $ {score}") for score in scores], columns=3)
    _png(figure)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in shown] == ["+0.75", "+0.00", "-0.50", "no score"]
    assert [axes.get_title() for axes in shown] == ["prompt $ 0.75", "prompt $ 0.0", "prompt $ -0.5", "prompt $ None"]
    assert plots.to_hex(shown[0].spines["left"].get_edgecolor()) == plots.score_colour(0.75)


def test_score_histograms_count_every_score_in_its_colour() -> None:
    figure = plots.score_figure({"regions": [-1.0, -0.95, 1.0], "layout": []})
    _png(figure)
    regions, layout = figure.axes
    assert [bar.get_height() for bar in regions.patches] == [2] + 18 * [0] + [1]
    assert plots.to_hex(regions.patches[0].get_facecolor()) == plots.score_colour(-0.95)
    assert (regions.get_title(), layout.get_title()) == ("regions: 3, mean -0.32", "layout: 0")


def test_losses_by_timestep_leave_a_gap_where_no_token_fell() -> None:
    rows = [{"step": 1, "loss_by_timestep": [0.5, None]}, {"step": 2, "loss_by_timestep": [0.25, 0.125]}]
    figure = plots.timestep_loss_figure({"srum": rows})
    _png(figure)
    clean, noise = figure.axes[0].lines
    assert (clean.get_label(), noise.get_label()) == ("t 0.00 to 0.50", "t 0.50 to 1.00")
    assert list(clean.get_ydata()) == [0.5, 0.25]
    assert np.isnan(noise.get_ydata()[0]) and noise.get_ydata()[1] == 0.125


@pytest.mark.parametrize("number", [1, 4])
def test_before_after_names_every_prompt_and_verdict(number: int) -> None:
    pairs = [plots.BeforeAfter(f"prompt ${i}$ $", IMAGE, IMAGE, False, True) for i in range(number)]
    figure = plots.before_after_figure(pairs)
    _png(figure)
    texts = _texts(figure)
    assert all(pair.prompt in texts for pair in pairs)
    assert texts.count("before: wrong") == texts.count("after: right") == number
    assert "runs/a: wrong" in _texts(plots.before_after_figure(pairs, names=("runs/a", "runs/b")))


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
        plots.steps_figure({"layout": {"base": [-1.0, 0.2], "srum": [-1.0, 0.4]}, "detail": {"base": [0.0, 0.0]}}),
        plots.steps_figure({}),
        plots.accuracy_figure({}),
        plots.gallery_figure([]),
        plots.score_figure({}),
        plots.timestep_loss_figure({}),
        plots.timestep_loss_figure({"srum": []}),
        plots.reward_maps_figure(IMAGE, {}),
    ],
)
def test_charts_draw(figure: Figure) -> None:
    assert _png(figure).any()


def test_a_policy_is_shown_by_what_its_rows_know() -> None:
    """A panel for each kind of figure there is, and one for the distances; other methods have none."""
    rows = [
        {"step": 1, "value": 0.25, "second_value": 0.5, "zero_spread_groups": 0.0, "parts": {"image_kl": 0.0}},
        {"step": 2, "mended": 0.75, "broken": 0.0, "stops": 0.5, "parts": {"image_kl": 0.1, "text_kl": 0.2}},
    ]
    figure = plots.policy_figure(rows)
    assert figure is not None
    *tops, bottom = figure.axes
    shown = {line.get_label(): list(line.get_xydata()[0]) for axes in tops for line in axes.lines}
    assert shown["second value"] == [1, 0.5] and shown["mended"] == [2, 0.75] and len(tops) == 4
    assert [line.get_label() for line in bottom.lines] == ["image kl, as weighted", "text kl, as weighted"]
    assert plots.policy_figure([{"step": 1, "loss": 0.5, "parts": {}}]) is None

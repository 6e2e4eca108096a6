"""A page to try a run or a model: type a prompt, see it drawn by base and trained weights from the same noise, judged,
and drawn again.

Images, regions, scores and maps are made by the functions of the stages, chains by those of the evaluation; ``Session``
holds what they need. Gradio (the extra ``ui``) is imported by ``page`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from srum import models
from srum.config import CONFIG, METHOD, RunConfig, changed, load_config, parse_config
from srum.drawing import Chain, Shot
from srum.errors import SrumError
from srum.evaluation.accuracy import drawn_planned
from srum.evaluation.comparison import eval_prompts
from srum.images import data_uri
from srum.init import SMALL, Answers, settings, usual_side
from srum.models.base import TrainableModel
from srum.records import Candidate, Grounding, Judgement, Prompt
from srum.run import BASE, Run, load_model
from srum.shapes.checker import Verdict, check
from srum.shapes.prompts import is_checkable, prompt_set
from srum.stages.reward_map import Skipped, binarized, rasterize, sample_score
from srum.stages.rollout import own_prompts
from srum.train.methods.base import Method
from srum.train.methods.r3 import R3Config
from srum.train.refining import ImageJudge, drawn_again, image_judge
from srum.train.reflect import drawn_in_chains
from srum.views.plots import as_image, candidate_figure, reward_maps_figure, said_of, score_colour
from srum.views.report import judge_of

if TYPE_CHECKING:
    import gradio

TYPED = "typed"  # the id of the prompt, which seeds its noise beside the seed
LONGEST = 1000  # characters of a prompt
SEEDS = 2**31
OFFERED = 7  # prompts; of the embedded world one of each category
GENERAL = ("a red fox on snow", "two cats on a sofa", "a blue cup left of a green book", "three apples and a knife")
HELD = 2  # sets of weights in memory
AGAIN, CHAIN = "draw again where the judge finds fault", "look, say what must change, draw that"
NEEDS = {AGAIN: {"seen"}, CHAIN: {"seen", "edit"}}  # abilities
PANEL, DPI = (2.9, 3.0), 180  # inches of a figure, and dots of each


class UiError(SrumError):
    """What was typed cannot be drawn, or there is no page to show it on; the message is one line."""


# --- what is tried


class Loaded(NamedTuple):
    """A set of weights, and who judges its images."""

    model: TrainableModel
    judge: ImageJudge


@dataclass(frozen=True, eq=False)
class Look:
    """An image of a prompt by the weights ``label``; with what the judge says of it, once that is known.

    ``reward`` (h, w) is None where the judgement allows no map, for the reason ``skipped``. ``verdict`` is the exact
    checker's, of prompts that it knows.
    """

    label: str
    image: Image
    plan: str | None = None
    grounding: Grounding | None = None
    judgement: Judgement | None = None
    reward: NDArray[np.floating] | None = None
    skipped: Skipped | None = None
    verdict: Verdict | None = None

    @property
    def score(self) -> float | None:
        """The one score in [-1, 1], where there is a map."""
        return None if self.reward is None or self.judgement is None else sample_score(self.judgement)

    def in_words(self) -> str:
        """``base: -0.99, wrong``."""
        right = "" if self.verdict is None else f", {'right' if self.verdict.correct else 'wrong'}"
        return f"{self.label}: {_number(self.score)}{right}"


class Session:
    """A run or a model that is tried: its config, its ``weights`` by label, the prompts that are offered.

    Two sets of weights are in memory at a time.
    """

    def __init__(self, config: RunConfig, weights: Mapping[str, str], method: Method, trained: str) -> None:
        self.config, self.weights, self.method = config, weights, method
        self.trained = trained  # label of the weights that are compared with base; base itself where none are
        self.loaded = lru_cache(HELD)(self._load)

    def _load(self, label: str) -> Loaded:
        model = load_model(self.config, self.weights[label])
        return Loaded(model, image_judge(model, self.config, self.config.seed))

    @property
    def ways(self) -> list[str]:
        """How an image can be drawn in more than one step, by this model and by the run's method."""
        abilities = self.loaded(BASE).model.abilities
        ways = [way for way, needed in NEEDS.items() if needed <= abilities]
        return ways + ([self._own] if self._own else [])

    @property
    def _own(self) -> str:
        """The way of the run's own method, where it has one that is none of the others."""
        shared = type(self.method).draw is Method.draw or self.method.name in ("rvr", "r3")
        return "" if shared else f"as {self.method.label} draws"

    @property
    def plans(self) -> bool:
        """Whether the model can write a plan before it draws."""
        return "plan" in self.loaded(BASE).model.abilities

    @cached_property
    def offered(self) -> dict[str, Prompt]:
        """Prompts to begin with, by their texts: held-out ones of the run, or of the embedded world."""
        if own := own_prompts(self.config):
            prompts = own
        elif self.config.eval.count:
            prompts = eval_prompts(self.config)
        else:
            prompts = [Prompt(id=text, text=text) for text in GENERAL]
        return {prompt.text: prompt for prompt in prompts[:OFFERED]}

    def looks(self, text: str, seed: int, plan: bool, labels: Sequence[str]) -> Iterator[tuple[str, list[Look]]]:
        """Draw and judge the prompt with each set of weights; yields what is being done, and the looks so far.

        The last says what came out. Raises UiError for a prompt or a seed that is none.
        """
        text, config = checked(text, seed), self._drawing(plan)
        seen: list[Look] = []
        for label in dict.fromkeys(labels):
            yield f"drawing with {label}", seen
            seen.append(self._drawn(label, text, seed, config))
            yield f"judging what {label} drew", seen
            seen[-1] = self._judged(seen[-1], text)
        yield ". ".join([*(look.in_words() for look in seen), *self.remarks(text)]), seen

    def steps(self, way: str, label: str, text: str, seed: int, plan: bool) -> Chain:
        """The prompt drawn in more than one step by these weights; the first image is that of ``looks``.

        Raises UiError as ``looks``, MissingAbility, and ConfigError where the config contradicts the way.
        """
        text, config, model = checked(text, seed), self._drawing(plan), self.loaded(label).model
        if way == AGAIN:
            draw = drawn_again(model, config, seed)
        elif way == CHAIN:
            draw = drawn_in_chains(model, chained(config), seed)
        else:
            own = self.method.draw(model, config, seed)
            assert own is not None
            draw = own
        (chain,) = draw({TYPED: Prompt(id=TYPED, text=text)})
        return chain

    def verdict(self, text: str, image: Image) -> Verdict | None:
        """The exact checker's verdict, where it knows the prompt and such images."""
        prompt = self.offered.get(text)
        if prompt is None or not is_checkable(prompt.metadata, (image.height, image.width)):
            return None
        return check(np.asarray(image), prompt.metadata)

    def remarks(self, text: str) -> list[str]:
        """What is to be said of a prompt that the model was not made for."""
        unknown = [word for word in dict.fromkeys(text.lower().split()) if word.strip(".,;:!?") not in known_words()]
        if self.config.model != "srum-tiny" or not unknown:
            return []
        words = ", ".join(map(repr, unknown[:5]))
        return [f"srum-tiny draws coloured shapes and has never met {words}: what it makes of that means nothing"]

    def _drawing(self, plan: bool) -> RunConfig:
        return self.config.model_copy(update={"eval": self.config.eval.model_copy(update={"plan": plan})})

    def _drawn(self, label: str, text: str, seed: int, config: RunConfig) -> Look:
        prompts = {TYPED: Prompt(id=TYPED, text=text)}
        ((made, plan),) = drawn_planned(self.loaded(label).model, prompts, config.eval, seed)
        return Look(label, made.image, plan, verdict=self.verdict(text, made.image))

    def _judged(self, look: Look, text: str) -> Look:
        prompt = self.offered.get(text)
        judge = self.loaded(look.label).judge
        ((grounding, judgement),) = judge([look.image], [text], [prompt.metadata if prompt else {}])
        made = self._rasterized(look, text, grounding, judgement)
        judged = replace(look, grounding=grounding, judgement=judgement)
        if isinstance(made, Skipped):
            return replace(judged, skipped=made)
        return replace(judged, reward=made[0].numpy())

    def _rasterized(
        self, look: Look, text: str, grounding: Grounding, judgement: Judgement
    ) -> tuple[Tensor, float] | Skipped:
        candidate = Candidate(
            id=TYPED,
            prompt_id=TYPED,
            prompt=text,
            index=0,
            seed=0,
            image=f"images/{TYPED}.png",
            latent=f"latents/{TYPED}.safetensors",
            size=(look.image.height, look.image.width),
        )
        rules, model = self.config.reward, self.loaded(look.label).model
        in_map = binarized(judgement) if rules.binary else judgement
        return rasterize(candidate, grounding, in_map, model.latent_grid(candidate.size), **rules.rules())


def open_session(name: str, config: Path | None = None, overrides: Sequence[str] = ()) -> Session:
    """What there is to try of a run's folder, or of a model. Raises SrumError where there is neither.

    A run has its own config; a model that of a file, or the usual settings of its size.
    """
    folder = Path(name)
    if (folder / CONFIG).exists():
        run = Run(folder, changed(load_config(config or folder / CONFIG), overrides))
        weights = weights_of(run)
        own = [label for label in weights if label.startswith(f"{run.method.name}, ")]
        return Session(run.pinned, weights, run.method, own[-1] if own else BASE)
    wanted = changed(load_config(config) if config else usual_config(name), overrides)
    return Session(wanted, {BASE: wanted.model}, Run(folder, wanted).method, BASE)


def weights_of(run: Run) -> dict[str, str]:
    """The model that entered the run, and every arm after every round that it was trained in: paths by label."""
    trained = {
        f"{arm}, round {k + 1}": str(folder)
        for arm in run.arms
        for k in range(run.config.rounds)
        if (folder := run.train_dir(arm, k) / "model").is_dir()
    }
    return {BASE: run.config.model} | trained


def usual_config(model: str) -> RunConfig:
    """The config that ``srum init`` would write for the model."""
    models.require_model(model)
    side = usual_side(model)
    grounder = "classical" if side <= SMALL else "sam"
    return parse_config(settings(Answers(model, 1, "train", grounder, "self", "", METHOD), side))


def chained(config: RunConfig) -> R3Config:
    """How chains are drawn: as a run of r3 says, else as that method does by default, with words that fit the model."""
    if isinstance(config, R3Config):
        return config
    words = "compact" if config.eval.size[0] <= SMALL else "released"
    return R3Config(eval=config.eval, template=words, refine_timesteps=config.eval.timesteps)


def checked(text: str, seed: int) -> str:
    """The prompt without blanks around it. Raises UiError for none, for one that is too long, and for no seed."""
    text = " ".join(text.split())
    if not text:
        raise UiError("there is no prompt: type one, or take one of the list")
    if len(text) > LONGEST:
        raise UiError(f"the prompt has {len(text)} characters, at most {LONGEST} are drawn")
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UiError(f"the seed is {seed!r}: give a whole number from 0 to {SEEDS - 1}")
    return text


@cache
def known_words() -> set[str]:
    """The words of the embedded world's prompts."""
    texts = [prompt.text for split in ("train", "held_out") for prompt in prompt_set(split, 400)]
    return {word.strip(",") for text in texts for word in text.split()}


# --- what is shown


@lru_cache(8)
def regions_image(look: Look) -> Image:
    """The image with its regions and their scores."""
    regions = look.grounding.regions if look.grounding else []
    return _panel(candidate_figure(look.image, regions, look.judgement, words=False))


@lru_cache(8)
def map_image(look: Look) -> Image | None:
    """The reward map, where there is one."""
    if look.reward is None:
        return None
    h, w = look.reward.shape
    return _panel(reward_maps_figure(look.image, {f"reward, {h}\u00d7{w} latent cells": look.reward}))


def _panel(figure: Figure) -> Image:
    figure.set_size_inches(*PANEL)
    return as_image(figure, DPI)


def words(look: Look) -> str:
    """What is said of an image, as HTML: the plan, the checker's verdict, the judge's words, the wrong ones first."""
    lines = [f"<b>planned</b> {escape(look.plan)}"] if look.plan else []
    if look.verdict is not None:
        lines.append(f"<b>exact checker</b> {escape(_in_words(look.verdict))}")
    if look.judgement is None:
        return _list(lines)
    why = f", no reward map: {look.skipped.replace('_', ' ')}" if look.skipped else ""
    lines.append(f"<b>score {_number(look.score)}</b>{why}")
    said = said_of(look.grounding.regions if look.grounding else [], look.judgement)
    return _list(lines) + _list([_line(*one) for one in said])


def _list(lines: Sequence[str]) -> str:
    return f"<ul class='said'>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def _line(name: str, score: float | None, reason: str) -> str:
    swatch = f"<span class='swatch' style='background:{score_colour(score)}'></span>"
    return f"{swatch}<b>{escape(name)} {_number(score)}</b> {escape(reason)}"


def strip(session: Session, chain: Chain, text: str) -> str:
    """The images of a chain as HTML, with what was said before each, its score, and the checker's verdict."""
    figures = [_figure(session, shot, n, n == chain.kept, text) for n, shot in enumerate(chain.shots)]
    return f"<div class='strip'>{''.join(figures)}</div>"


def _figure(session: Session, shot: Shot, number: int, kept: bool, text: str) -> str:
    verdict = session.verdict(text, shot.image)
    facts = [
        "" if shot.score is None else f"score {_number(shot.score)}",
        "" if verdict is None else _in_words(verdict),
        f"said before it: {shot.said}" if shot.said else "",
    ]
    kind = "pixelated" if max(shot.image.size) <= SMALL else ""
    name = f"image {number + 1}{', kept' if kept else ''}"
    caption = "".join(f"<br>{escape(fact)}" for fact in facts if fact)
    return (
        f"<figure class='{'kept' if kept else ''}'><img class='{kind}' src='{data_uri(shot.image)}' alt='{name}'>"
        f"<figcaption><b>{name}</b>{caption}</figcaption></figure>"
    )


def _in_words(verdict: Verdict) -> str:
    return "right" if verdict.correct else f"wrong: {'; '.join(verdict.reasons)}"


def _number(score: float | None) -> str:
    return "no score" if score is None else f"{score:+.2f}"


# --- the page


BUTTONS = ["fullscreen", "download"]
CSS = """
.said { list-style: none; padding: 0; margin: 0 0 .5rem; }
.said li { margin: .2rem 0; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid #888; }
.strip { display: flex; flex-wrap: wrap; gap: 1rem; }
.strip figure { margin: 0; flex: 0 1 220px; min-width: 140px; }
.strip img { width: 100%; border: 2px solid transparent; }
.strip .kept img { border-color: currentColor; }
.strip figcaption { font-size: .85em; overflow-wrap: anywhere; }
.pixelated { image-rendering: pixelated; }
"""


def page(session: Session, title: str) -> gradio.Blocks:
    """The page of a session. Raises UiError where gradio is missing."""
    gr = _gradio()
    compared, labels, ways = session.trained != BASE, list(session.weights), session.ways
    with gr.Blocks(title=f"srum ui {title}", analytics_enabled=False) as made:
        gr.Markdown(f"# {escape(title)}\n{_about(session)}")
        prompt = gr.Textbox(label="prompt", value=max(session.offered, key=len), max_length=LONGEST, elem_id="prompt")
        gr.Examples([[text] for text in session.offered], prompt, label="prompts to begin with")
        with gr.Row():
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=SEEDS - 1, min_width=120)
            left, right = (
                gr.Dropdown(labels, value=label, label=side, min_width=200, visible=compared)
                for side, label in (("left", BASE), ("right", session.trained))
            )
            plan = gr.Checkbox(session.config.eval.plan, label="plan first", min_width=120, visible=session.plans)
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=4, min_width=160)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        status = gr.HTML(_status("nothing is drawn yet"), elem_id="status")
        with gr.Row():
            columns = [part for shown in (True, compared) for part in _column(gr, shown)]
        with gr.Row():
            way = gr.Radio(ways, value=ways[0] if ways else None, label="then", min_width=320, visible=bool(ways))
            by = gr.Dropdown(labels, value=session.trained, label="with", min_width=160, visible=compared)
            more = gr.Button("Go on", interactive=False, visible=bool(ways), elem_id="more")
        shots = gr.HTML("", elem_id="shots")
        drawn = gr.State()  # prompt, seed and plan of what the columns show
        one_at_a_time = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",  # the time that passes, and one's place in the queue
            "show_progress_on": status,
            "api_visibility": "private",
        }
        asked, shown = [prompt, seed, plan, left, right], [status, *columns, shots, drawn, more]
        at_work = [
            event(partial(_draw, gr, session), asked, shown, **one_at_a_time) for event in (draw.click, prompt.submit)
        ]
        at_work.append(more.click(partial(_go_on, session), [drawn, way, by], [status, shots], **one_at_a_time))
        stop.click(lambda: _status("stopped"), None, status, cancels=at_work, queue=False, api_visibility="private")
    return made


def _column(gr: Any, shown: bool) -> list[Any]:
    """The parts of a column: whose image, the image with its regions, its map, what is said."""
    with gr.Column(min_width=320, visible=shown):
        label = gr.Markdown("")
        with gr.Row():
            panels = [
                gr.Image(label=name, show_label=False, format="png", interactive=False, min_width=220, buttons=BUTTONS)
                for name in ("regions", "reward map")
            ]
        return [label, *panels, gr.HTML("")]


def _draw(gr: Any, session: Session, text: str, seed: int, plan: bool, left: str, right: str) -> Iterator[list[Any]]:
    """What the page shows while a prompt is drawn and judged, and in the end."""
    labels, seen = [left, right] if session.trained != BASE else [left], list[Look]()
    try:
        for doing, seen in session.looks(text, seed, plan, labels):
            yield [_status(doing), *_columns(seen), "", None, gr.update(interactive=False)]
        yield [gr.skip(), *_columns(seen), "", (text, seed, plan), gr.update(interactive=True)]
    except SrumError as error:
        yield [_status(f"error: {error}"), *_columns(seen), "", None, gr.update(interactive=False)]


def _columns(looks: Sequence[Look]) -> list[Any]:
    """The values of both columns."""
    empty: list[Any] = ["", None, None, ""]
    filled = [[f"### {look.label}", regions_image(look), map_image(look), words(look)] for look in looks]
    return [value for column in [*filled, empty, empty][:2] for value in column]


def _go_on(session: Session, drawn: tuple[str, int, bool], way: str, label: str) -> Iterator[list[Any]]:
    """What the page shows while a drawn prompt is drawn in more than one step, and in the end."""
    yield [_status(f"{label} at work: {way}"), ""]
    try:
        chain = session.steps(way, label, *drawn)
    except SrumError as error:
        yield [_status(f"error: {error}"), ""]
        return
    yield [_status(f"{len(chain.shots)} images by {label}: {way}"), strip(session, chain, drawn[0])]


def _status(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _about(session: Session) -> str:
    """What there is to do, what is tried, and who judges."""
    judge = session.config.judge
    alone = judge.model == "self" and not (judge.server.url or judge.reward or judge.by != "self")
    who = "the model itself, each set of weights its own images" if alone else judge_of(judge)
    sides = f"{len(session.weights) - 1} trained sets of weights beside base; both sides begin from the same noise. "
    return (
        "Type a prompt and draw it: regions, what the judge says of each, and the reward map that training would get"
        f"{', but not centred over candidates, of which there is one' if session.config.reward.centred else ''}. "
        f"{sides if session.trained != BASE else ''}The judge: {who}."
    )


def serve(session: Session, title: str, port: int) -> None:
    """Show the page on this machine until Ctrl-C. Raises UiError where gradio is missing or the port is taken."""
    made = page(session, title)
    theme = _gradio().themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = made.queue(max_size=32).launch(
            server_name="127.0.0.1",
            server_port=port or None,
            theme=theme,
            css=CSS,
            footer_links=["gradio", "settings"],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UiError(f"port {port} cannot be listened on: {error}") from None
    print(f"open {address}   (stop with Ctrl-C)", flush=True)
    made.block_thread()


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError:
        raise UiError("gradio is missing: pip install 'srum[ui]'") from None
    return gradio

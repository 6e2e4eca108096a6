"""``srum ui``: what its page shows is what the evaluation draws and the stages judge; and the page in a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.report import chromium, told
from srum import models
from srum.cli import app
from srum.config import changed, load_config
from srum.evaluation.accuracy import drawn
from srum.records import LayoutJudgement, Prompt, RegionJudgement
from srum.run import BASE, Run, find_method
from srum.shapes.prompts import prompt_set
from srum.stages.reward_map import sample_score
from srum.views.ui import (
    AGAIN,
    CHAIN,
    CSS,
    LONGEST,
    TYPED,
    Look,
    Session,
    UiError,
    _about,
    open_session,
    page,
    strip,
    weights_of,
    words,
)
from tests.fakes import FakeModel

TEXT = "a red circle above a blue square"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    """Base, and beside it the same weights under another name."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    config = load_config(None, ["reward.on_failure=keep", "eval.count=14"])
    return Session(config, {BASE: "srum-tiny", "sft, round 1": "srum-tiny"}, find_method("sft"), "sft, round 1")


def last(steps: Iterator[tuple[str, list[Look]]]) -> tuple[str, list[Look]]:
    return list(steps)[-1]


def test_both_sides_are_drawn_as_the_evaluation_draws_from_the_same_noise(session: Session) -> None:
    doing = list(session.looks(TEXT, 3, False, list(session.weights)))
    assert [said for said, _ in doing[:-1]] == [
        f"{what} {label}{' drew' if what == 'judging what' else ''}"
        for label in session.weights
        for what in ("drawing with", "judging what")
    ]
    base, other = doing[-1][1]
    (made,) = drawn(FakeModel(), {TYPED: Prompt(id=TYPED, text=TEXT)}, session.config.eval, seed=3)
    for look in (base, other):
        assert look.image.tobytes() == made.image.tobytes()
    assert base.judgement == other.judgement and base.label == BASE
    (another,) = last(session.looks(TEXT, 4, False, [BASE]))[1]
    assert another.image.tobytes() != made.image.tobytes()


def test_the_map_and_the_score_are_those_of_the_judgement(session: Session) -> None:
    """A region's score fills the cells that it covers; the seed is one whose judgement allows a map."""
    looks = (last(session.looks(TEXT, seed, False, [BASE]))[1][0] for seed in range(20))
    look = next(look for look in looks if look.reward is not None)
    assert look.judgement is not None and look.grounding is not None and look.reward is not None
    scores = [said.score for said in look.judgement.regions if said.score is not None]
    assert look.reward.shape == (8, 8)
    assert min(scores) - 1e-6 <= look.reward.min() and look.reward.max() <= max(*scores, 0) + 1e-6
    assert look.score == sample_score(look.judgement)


@pytest.mark.parametrize("way", [AGAIN, CHAIN])
def test_more_steps_begin_with_the_image_that_is_shown(session: Session, way: str) -> None:
    _, (look,) = last(session.looks(TEXT, 5, True, [BASE]))
    chain = session.steps(way, BASE, TEXT, 5, True)
    assert look.plan == f"a plan of {TEXT}"
    assert chain.shots[0].image.tobytes() == look.image.tobytes()
    assert strip(session, chain, TEXT).count("<figure") == len(chain.shots)


def test_ways_are_those_of_the_model_and_of_the_method(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.ways == [AGAIN, CHAIN]
    strokes = Session(session.config, session.weights, find_method("process"), BASE)
    assert strokes.ways == [AGAIN, CHAIN, "as process-driven draws"]
    monkeypatch.setattr(FakeModel, "abilities", frozenset({"seen", "velocity"}))
    assert session.ways == [AGAIN] and not session.plans


@pytest.mark.parametrize(
    ("text", "seed", "why"),
    [("  ", 0, "no prompt"), ("a" * (LONGEST + 1), 0, "1001 characters"), (TEXT, None, "None"), (TEXT, -1, "-1")],
)
def test_what_cannot_be_drawn_is_said_in_one_line(session: Session, text: str, seed: Any, why: str) -> None:
    with pytest.raises(UiError, match=f"^[^\\n]*{why}[^\\n]*$"):
        last(session.looks(text, seed, False, [BASE]))


def test_words_that_srum_tiny_has_never_met_are_named(session: Session) -> None:
    said, _ = last(session.looks("a purple cat, above two MOONS", 0, False, [BASE]))
    assert "never met 'cat,', 'moons'" in said
    for split in ("development", "held_out", "compositional"):
        assert [text for one in prompt_set(split, 60) for text in session.remarks(one.text)] == []


def test_prompts_of_the_list_have_the_checkers_verdict(session: Session) -> None:
    assert len({prompt.metadata["tag"] for prompt in session.offered.values()}) == 7
    said, (look,) = last(session.looks(next(iter(session.offered)), 0, False, [BASE]))
    assert look.verdict is not None and said.endswith("right" if look.verdict.correct else "wrong")
    text = next(iter(session.offered))
    assert session.verdict("a cat", look.image) is None is session.verdict(text, look.image.resize((32, 32)))


def test_a_map_is_promised_as_it_is_shown(session: Session) -> None:
    assert "would get. " in _about(session)
    session.config = changed(session.config, ["reward.centred=true"])
    assert "would get, but not centred" in _about(session)


def test_what_is_said_is_shown_as_text(session: Session) -> None:
    _, (look,) = last(session.looks(TEXT, 0, False, [BASE]))
    assert look.judgement is not None
    hostile = "<script>alert(1)</script>"
    judgement = look.judgement.model_copy(
        update={
            "regions": [RegionJudgement(region_id=1, score=-0.5, label=hostile, reason=hostile)],
            "layout": LayoutJudgement(score=0.5, reason=hostile),
        }
    )
    shown = words(replace(look, plan=hostile, judgement=judgement))
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 4


def test_weights_of_a_run_are_named_by_arm_and_round(tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(None, ["rounds=3", "compare=[sft]"]))
    for k, arm in ((0, "sft"), (0, "region_nft"), (1, "sft")):
        (run.train_dir(arm, k) / "model").mkdir(parents=True)
    assert list(weights_of(run)) == [BASE, "sft, round 1", "sft, round 2", "region_nft, round 1"]


def test_a_model_has_the_config_of_srum_init(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_session("srum-tiny", overrides=["eval.guidance=4.0"])
    assert opened.config == load_config(None, ["eval.guidance=4.0"]) and opened.trained == BASE
    result = CliRunner().invoke(app, ["ui", "no-such-model"])
    assert result.exit_code == 2 and "no model 'no-such-model'" in result.stderr
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["ui", "srum-tiny"])
    assert (result.exit_code, result.stderr) == (2, "error: gradio is missing: pip install 'srum[ui]'\n")


# --- in a browser


CLICKS = """
const until = async (found) => {
    while (!found()) await new Promise((done) => setTimeout(done, 100));
};
const pictures = () => [...document.querySelectorAll(".image-container img, .image-frame img")];
const status = () => document.querySelector("#status").innerText;
(async () => {
    await until(() => document.querySelector("#draw") && document.querySelector("#status"));
    document.querySelector("#draw").click();
    await until(() => !document.querySelector("#more").disabled);
    const drawn = status();
    await until(() => pictures().length === 4 && pictures().every((image) => image.naturalWidth));
    const said = document.querySelectorAll(".said").length;
    document.querySelector("#more").click();
    await until(() => document.querySelector("#shots figure"));
    console.log(`srum ${JSON.stringify([drawn, said, status(), document.querySelectorAll("#shots img").length])}`);
})();
"""


@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason="no Chromium on the PATH")
def test_the_page_draws_judges_and_goes_on(session: Session) -> None:
    pytest.importorskip("gradio")
    made = page(session, "a run")
    _, address, _ = made.queue().launch(
        server_name="127.0.0.1", head=f"<script>{CLICKS}</script>", css=CSS, quiet=True, prevent_thread_lock=True
    )
    try:
        told_by_page = told(address)
    finally:
        made.close()
    shown, said, then, shots = told_by_page
    text = max(session.offered, key=len)
    assert shown.split() == last(session.looks(text, 0, False, list(session.weights)))[0].split()
    assert said == 4 and then.startswith(f"{shots} images by sft, round 1: {AGAIN}")

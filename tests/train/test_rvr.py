"""RvR: pairs, the layout of its examples, drawing again, the authors' parquet, and a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srum import models, open_run
from srum.config import ConfigError, PairConfig, RefineConfig, load_config
from srum.drawing import Shot
from srum.drawing.refining import best_of, refine, refine_context
from srum.evaluation.accuracy import CheckedImage
from srum.exchange.pair_interchange import import_pairs, read_rows, row_of, write_pairs
from srum.loop import run_loop
from srum.models.base import without_images, without_text
from srum.records import Candidate, Pair, Refinement, RewardMap
from srum.run import Run
from srum.run_dir import RunError, read_records
from srum.stages.pairs import REASONS, Scored, make_pairs, pairs_of
from srum.train.methods.rvr import Rvr, RvrConfig
from srum.train.refining import refine_run
from tests.fakes import FakeModel

SMALL = ["method=rvr", "compare=[]", "rounds=1", "prompt_count=8", "candidates_per_prompt=3", "eval.count=7"]
SMALL += [
    "train.steps=2",
    "train.batch_size=4",
    "reward.on_failure=keep",
    "pairs.select=relative",
    "pairs.min_gap=0.01",
]


def candidate(prompt: str, index: int, plan: str | None = None) -> Candidate:
    name = f"{prompt}-{index}"
    files = {"image": f"images/{name}.png", "latent": f"latents/{name}.safetensors"}
    return Candidate(id=name, prompt_id=prompt, prompt=prompt, index=index, seed=0, plan=plan, size=(64, 64), **files)


def group(*scores: float) -> list[Scored]:
    return [Scored(candidate("p", index), score) for index, score in enumerate(scores)]


# --- pairs


@pytest.mark.parametrize(
    ("scores", "values", "outcome"),
    [
        ((0.9, -0.5), {}, "paired"),
        ((0.5, 0.0), {}, "paired"),  # both ends count
        ((0.4, -0.5), {}, "none aligned"),
        ((0.9, 0.1), {}, "none misaligned"),
        ((0.3, 0.2), {}, "neither"),
        ((0.5, 0.0), {"min_gap": 0.6}, "too close"),
        ((), {}, "nothing judged"),
        ((0.3, -0.4), {"select": "relative"}, "paired"),
        ((0.3, 0.2), {"select": "relative"}, "too close"),
    ],
)
def test_outcomes(scores: Sequence[float], values: dict[str, Any], outcome: str) -> None:
    import random

    found, pairs = pairs_of(group(*scores), PairConfig(**values), random.Random(0))
    assert found == outcome and bool(pairs) == (outcome == "paired")
    assert outcome == "paired" or outcome in REASONS


def test_the_best_is_drawn_and_of_equals_the_first() -> None:
    import random

    _, [(bad, good)] = pairs_of(group(0.7, 0.9, 0.9, -1.0), PairConfig(), random.Random(0))
    assert (bad.candidate.index, good.candidate.index) == (3, 1)


scored = st.lists(st.tuples(st.integers(0, 4), st.floats(-1, 1)), min_size=1, max_size=24)


@given(scored, st.integers(1, 4), st.sampled_from(["threshold", "relative"]))
@settings(max_examples=60, deadline=None)
def test_laws_of_pairs(values: list[tuple[int, float]], per_prompt: int, select: Any) -> None:
    """Both of one prompt, on their sides, apart; every prompt has one outcome; no pair twice."""
    config = PairConfig(per_prompt=per_prompt, select=select)
    candidates: dict[str, Candidate] = {}
    rewards: dict[str, RewardMap] = {}
    for index, (prompt, score) in enumerate(values):
        one = candidate(f"p{prompt}", index)
        candidates[one.id] = one
        rewards[one.id] = RewardMap(
            candidate_id=one.id, values="x", grid=(1, 1), mapping="signed", alpha=0.5, sample_score=score
        )
    pairs, counts = make_pairs(candidates, rewards, config, seed=3)
    assert sum(counts["outcomes"].values()) == counts["prompts"] == len({c.prompt_id for c in candidates.values()})
    assert len({(p.misaligned, p.aligned) for p in pairs}) == len({p.id for p in pairs}) == len(pairs)
    for pair in pairs:
        assert candidates[pair.misaligned].prompt_id == candidates[pair.aligned].prompt_id == pair.prompt_id
        assert pair.aligned_score - pair.misaligned_score >= config.min_gap
        if select == "threshold":
            assert pair.misaligned_score <= config.misaligned and pair.aligned_score >= config.aligned


def test_planned_shares_are_reported() -> None:
    candidates = {c.id: c for c in (candidate("p", 0, "a plan"), candidate("p", 1))}
    rewards = {
        name: RewardMap(candidate_id=name, values="x", grid=(1, 1), mapping="signed", alpha=0.5, sample_score=score)
        for name, score in zip(candidates, (0.9, -0.9), strict=True)
    }
    _, counts = make_pairs(candidates, rewards, PairConfig(), seed=0)
    assert counts["planned"] == {"misaligned": 0.0, "aligned": 1.0}


# --- drawing again


class Judge:
    """Scores that follow one another for each prompt."""

    def __init__(self, **scores: Sequence[float | None]) -> None:
        self.left = {prompt: list(values) for prompt, values in scores.items()}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [self.left[prompt].pop(0) for prompt in prompts]


def drawn(judge: Judge, **values: Any) -> list[Any]:
    firsts = [Shot(Image.new("RGB", (64, 64))) for _ in judge.left]
    names = list(judge.left)
    return refine(FakeModel(), judge, names, names, firsts, RefineConfig(**values), seed=0)


def test_it_stops_where_the_judge_is_content_and_keeps_the_best() -> None:
    good, mended, worse, unknown = drawn(
        Judge(a=[0.8], b=[-1.0, 0.6], c=[0.2, -0.5, 0.1], d=[None, -0.9, None]), rounds=2
    )
    assert [len(chain.shots) for chain in (good, mended, worse, unknown)] == [1, 2, 3, 3]
    assert [chain.kept for chain in (good, mended, worse, unknown)] == [0, 1, 0, 1]


def test_always_and_last() -> None:
    (chain,) = drawn(Judge(a=[0.9, 0.7]), always=True, keep="last")
    assert len(chain.shots) == 2 and chain.kept == 1
    (chain,) = drawn(Judge(a=[0.9, 0.7, 0.8]), stop=None, rounds=2)
    assert len(chain.shots) == 3 and chain.kept == 0


def test_noise_is_seeded_by_name_and_round() -> None:
    one = drawn(Judge(a=[0.0, 0.0, 0.0], b=[0.0, 0.0, 0.0]), rounds=2)
    (alone,) = drawn(Judge(b=[0.0, 0.0, 0.0]), rounds=2)
    assert [shot.seed for shot in one[1].shots] == [shot.seed for shot in alone.shots]
    assert len({shot.seed for chain in one for shot in chain.shots[1:]}) == 4


def test_ties_go_to_the_earlier() -> None:
    assert best_of([None, 0.3, 0.3]) == 1 and best_of([None, None]) == 0


def test_contexts_of_guidance() -> None:
    """docs/specs/rvr.md, 5: the system text stays in all three."""
    context = refine_context(FakeModel(), Image.new("RGB", (64, 64)), "a star", RefineConfig(way="regenerate_clean"))
    assert [segment.kind for segment in context] == ["text", "clean", "seen", "text"]
    assert [segment.kind for segment in without_text(context)] == ["text", "clean", "seen"]
    assert [segment.text for segment in without_images(context)] == ["Again.", "Prompt: a star"]


def test_other_sizes_and_modes_are_drawn_at_their_own_size() -> None:
    first = Shot(Image.new("L", (40, 96)))
    (chain,) = refine(FakeModel(), Judge(a=[-1.0, 0.0]), ["a"], ["a"], [first], RefineConfig(), seed=0)
    assert len(chain.shots) == 2


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rvr") / "run"
    config = load_config(None, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", FakeModel.load)
        run_loop(config, folder)
    return Run(folder, config)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)


def test_the_table_shows_drawn_once_and_again(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    assert set(summary) == {"base", "rvr", "rvr-redrawn"}
    once, again = (
        {v.prompt_id: v for v in read_records(run.folder / "eval" / arm / "verdicts.jsonl", CheckedImage)}
        for arm in ("rvr", "rvr-redrawn")
    )
    for name, verdict in again.items():
        assert verdict.shots[0].correct == once[name].correct
        assert verdict.kept is not None and verdict.shots[verdict.kept].correct == verdict.correct


def test_the_report_shows_first_tries_and_what_came_after(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    assert "Drawn again: rvr-redrawn" in page and "<th>mended</th><th>broken</th>" in page
    assert page.count('alt="round 1"') >= 1


def test_examples_are_as_the_paper_draws_them(run: Run, fake: None) -> None:
    config = run.config
    assert isinstance(config, RvrConfig)
    first, t2i, _ = Rvr().examples(run, 0, config).parts
    pairs = {pair.id: pair for pair in read_records(run.round(0) / "pairs.jsonl", Pair)}
    for example in first.examples:
        pair = pairs[example.id]
        system, seen, user, noisy = example.segments
        assert (system.text, user.text) == ("Again.", f"Prompt: {pair.prompt}")
        assert seen.image == run.round(0) / f"images/{pair.misaligned}.png" and noisy.loss
        assert noisy.file == run.round(0) / f"latents/{pair.aligned}.safetensors"
        assert not any(segment.droppable for segment in example.segments)
    assert {example.id for example in t2i.examples} == {pair.aligned for pair in pairs.values()}
    assert first.per_step == t2i.per_step == 2


def test_no_pair_is_an_error_that_says_why(run: Run, fake: None, tmp_path: Path) -> None:
    config = load_config(None, [*SMALL, "pairs.select=threshold", "pairs.aligned=1.0", "pairs.misaligned=-1.0"])
    with pytest.raises(RunError, match=r"pairs: no prompt of 8 has one \(.*neither.*\); try pairs.select=relative"):
        run_loop(config, tmp_path / "run")
    assert (tmp_path / "run/round-000/rewards.jsonl").exists()  # nothing finished is lost


def test_refining_images_none_of_which_can_be_read_is_an_error(run: Run, fake: None, tmp_path: Path) -> None:
    """The records of a round without its images; nothing is finished, so that it can be tried again."""
    for name in ("candidates.jsonl", "prompts.jsonl"):
        shutil.copy(run.round(0) / name, tmp_path / name)
    with pytest.raises(RunError, match="none of its 24 images can be read"):
        refine_run(run, tmp_path, "srum-tiny", run.config)
    assert not (tmp_path / "refined/refined.jsonl").exists()


def test_refining_a_round_goes_on_where_it_was_interrupted(
    run: Run, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run.config.model_copy(update={"refine": RefineConfig(rounds=2, stop=None, batch_size=5)})
    calls = 0
    whole = FakeModel.draw

    def stumbling(self: FakeModel, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("interrupted")
        return whole(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="interrupted"):
        patch.setattr(FakeModel, "draw", stumbling)
        refine_run(run, run.round(0), "srum-tiny", config)
    assert len(list((run.round(0) / "refined/refined.parts").iterdir())) == 1
    made = refine_run(run, run.round(0), "srum-tiny", config)
    assert made == read_records(run.round(0) / "refined/refined.jsonl", Refinement)
    assert len(made) == 24 and all(len(one.turns) == 3 for one in made)
    with pytest.raises(RunError, match="holds work of other settings or weights"):
        refine_run(run, run.round(0), "srum-tiny", run.config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("candidates_per_prompt=1", "candidates_per_prompt: rvr pairs two candidates"),
        ("refine.way=edit", "refine.way: rvr is trained to draw again"),
        ("mix=[2,1,0]", "mix: train.batch_size=4 is no multiple of 3"),
        ("mix=[2,1,1]", "mix: nothing that reads and writes text"),
        ("refine.rounds=5", "refine.rounds"),
    ],
)
def test_contradictions(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(None, [*SMALL, override])


# --- the authors' parquet


def test_pairs_go_out_and_come_back(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    pairs = read_records(run.round(0) / "pairs.jsonl", Pair)
    assert write_pairs(open_run(run.folder), out) == len(pairs)
    rows, problems = read_rows(out)
    assert not problems and [row.prompt for row in rows.values()] == [pair.prompt for pair in pairs]
    assert json.loads((tmp_path / "parquet_info.json").read_text()) == {str(out): {"num_row_groups": 1}}
    count, problems = import_pairs(out, run.folder, FakeModel(), tmp_path / "round-000")
    assert (count, problems) == (len(pairs), [])
    for ours, theirs in zip(pairs, read_records(tmp_path / "round-000/pairs.jsonl", Pair), strict=True):
        for side in ("misaligned", "aligned"):
            before = Image.open(run.round(0) / f"images/{getattr(ours, side)}.png")
            after = Image.open(tmp_path / f"round-000/images/{getattr(theirs, side)}.png")
            assert np.array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"image_list": ["a", "b"], "user_prompt": "a red star"},
            "user_prompt: expected a list .* the text 'a red star'",
        ),
        ({"image_list": ["a", "b"], "user_prompt": []}, "user_prompt: expected a list"),
        ({"image_list": ["a", "b", "c"], "user_prompt": ["x"]}, "image_list: expected two images.*got 3"),
        ({"image_list": [], "user_prompt": ["x"]}, "image_list: expected two images.*got 0"),
        ({"image_list": "[1, 2]", "user_prompt": ["x"]}, "image_list: expected paths"),
        ({"image_list": "[a", "user_prompt": ["x"]}, "is no list"),
    ],
)
def test_rows_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_of(values)


def test_rows_in_all_their_forms() -> None:
    assert row_of({"image_list": "['a.png', 'b.png']", "user_prompt": ["x", "y"]}) == ("x", ("a.png", "b.png"))
    assert row_of({"cache_image": "a.png", "user_prompt": ["x"]}) == ("x", ("a.png",))


def test_unreadable_images_leave_their_row_out(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "a.png")
    Image.new("L", (64, 64)).save(tmp_path / "b.png")
    rows = [
        {"image_list": ["a.png", "b.png"], "user_prompt": ["red"]},
        {"image_list": ["a.png", "c.png"], "user_prompt": ["blue"]},
        {"image_list": ["../a.png", "b.png"], "user_prompt": ["up"]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    count, problems = import_pairs(tmp_path / "x.parquet", tmp_path, FakeModel(), tmp_path / "round-000")
    assert count == 1
    assert len(problems) == 2 and "c.png" in problems[0] and "'../a.png' is not in" in problems[1]
    assert import_pairs(tmp_path / "x.parquet", tmp_path, FakeModel(), tmp_path / "round-000") == (1, problems)


@pytest.mark.parametrize("added", ["a row", "a file"])
def test_other_pairs_do_not_join_a_round(tmp_path: Path, added: str) -> None:
    """The same folder of parquet files with a row or a file more: refused, and nothing in the round changes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def write(name: str, *prompts: str) -> None:
        rows = [{"image_list": ["a.png", "b.png"], "user_prompt": [prompt]} for prompt in prompts]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs" / name)

    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "pairs").mkdir()
    write("1.parquet", "red")
    round_ = tmp_path / "round-000"
    assert import_pairs(tmp_path / "pairs", tmp_path, FakeModel(), round_) == (1, [])
    before = {path: path.read_bytes() for path in round_.rglob("*.*")}
    write("0.parquet", "blue") if added == "a file" else write("1.parquet", "blue", "red")
    with pytest.raises(RunError, match="holds another round"):
        import_pairs(tmp_path / "pairs", tmp_path, FakeModel(), round_)
    assert {path: path.read_bytes() for path in round_.rglob("*.*")} == before


def test_a_blank_patch_changes_nothing_and_has_the_encoder_run() -> None:
    """What a process runs beside others whose packs hold images: the same predictions, gradients that are zero."""
    import torch

    from srum.flow import FlowNoise
    from srum.models.bagel import Bagel
    from srum.models.base import Segment
    from tests.train.recipe_runs import GOLDEN

    model = Bagel.load(GOLDEN)
    latent = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = [Segment("text", text="a star"), Segment("noisy", latent=latent, loss=True)]
    noise = [FlowNoise(torch.ones(4, 64), 0.5)]
    without, blank = (model.forward(model.pack([sample], noise, sees=sees)) for sees in (False, True))
    assert torch.equal(without.velocity, blank.velocity)
    blank.velocity.sum().backward()
    weight = model.network.vit_model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert weight.grad is not None and not weight.grad.any()

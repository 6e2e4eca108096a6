"""Rollout: prompts, seeds per record, what is written, resume. Accuracy: the checker, categories."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from srum.config import ConfigError, EvalConfig, RunConfig, load_config
from srum.drawing import contexts_of
from srum.evaluation.accuracy import evaluate
from srum.exchange.chat import ServerError
from srum.images import open_image
from srum.judging.self_judge import SelfJudge
from srum.models.base import Decoding, Generated, MissingAbility, Sampling, Written
from srum.records import Candidate, Prompt
from srum.run_dir import RunError, read_records
from srum.seeding import seed_for
from srum.shapes.prompts import from_metadata
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene
from srum.stages.rollout import choose_prompts, rollout
from tests.fakes import FakeModel, texts_of
from tests.servers import chat_server, serving

PROMPTS = [Prompt(id=f"p{number}", text=f"prompt {number}") for number in range(3)]


def config(*overrides: str) -> RunConfig:
    planned = ["rollout.plan=true", "rollout.planned_share=1.0"]
    return load_config(None, ["candidates_per_prompt=2", "rollout.batch_size=4", *planned, *overrides])


def test_candidates_are_in_order_and_their_files_are_there(tmp_path: Path) -> None:
    candidates = rollout(FakeModel(), PROMPTS, config(), 1, tmp_path)
    assert [c.id for c in candidates] == ["p0-0", "p0-1", "p1-0", "p1-1", "p2-0", "p2-1"]
    assert read_records(tmp_path / "candidates.jsonl", Candidate) == list(candidates)
    for c in candidates:
        assert c.seed == seed_for(0, 1, c.id, "rollout")
        assert c.plan == f"a plan of {c.prompt}" and c.size == (64, 64) and c.sampling["timesteps"] == 16
        assert open_image(tmp_path / c.image).size == (64, 64)
        assert load_file(tmp_path / c.latent)["latent"].shape == (3, 8, 8)


def test_files_of_many_candidates_are_in_sub_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srum.stages.rollout.CROWD", 4)
    candidates = rollout(FakeModel(), PROMPTS, config(), 0, tmp_path)
    assert [c.image for c in candidates][3:5] == ["images/0000/p1-1.png", "images/0001/p2-0.png"]
    assert all((tmp_path / name).exists() for c in candidates for name in c.files())


def test_a_share_of_a_prompts_candidates_plans(tmp_path: Path) -> None:
    """Those that do are the ones of a run in which all do; the others are those of a run in which none does."""
    runs = {"mixed": "rollout.planned_share=0.5", "planned": "rollout.plan=true", "bare": "rollout.plan=false"}
    made = {
        name: rollout(FakeModel(), PROMPTS, config(override), 0, tmp_path / name) for name, override in runs.items()
    }
    for index, candidate in enumerate(made["mixed"]):
        origin = "bare" if index % 2 else "planned"
        assert (candidate.plan is None) == (origin == "bare")
        assert candidate.model_copy(update={"sampling": {}}) == made[origin][index].model_copy(update={"sampling": {}})
        image = (tmp_path / "mixed" / candidate.image).read_bytes()
        assert image == (tmp_path / origin / candidate.image).read_bytes()


SETTINGS: dict[str, Any] = {  # no default of ours, nor the sampler's
    "size": (48, 32), "timesteps": 9, "timestep_shift": 2.0, "guidance": 1.5, "guidance_interval": (0.25, 0.75),
    "renorm": "channel", "plan_temperature": 0.125,
}  # fmt: skip


def seeded(candidate: Candidate) -> tuple[Sampling, list[int]]:
    return Sampling(**SETTINGS), [candidate.seed]


def test_the_latent_is_the_samplers_own(tmp_path: Path) -> None:
    own = config(*(f"rollout.{name}={list(v) if isinstance(v, tuple) else v}" for name, v in SETTINGS.items()))
    (candidate, *_) = rollout(FakeModel(), PROMPTS, own, 0, tmp_path)
    (again,) = FakeModel().draw(contexts_of(FakeModel(), [candidate.prompt], [candidate.plan]), *seeded(candidate))
    assert torch.equal(load_file(tmp_path / candidate.latent)["latent"], again.latent)
    assert open_image(tmp_path / candidate.image).tobytes() == again.image.tobytes()


def test_batch_size_and_company_change_no_candidate(tmp_path: Path) -> None:
    all_at_once = rollout(FakeModel(), PROMPTS, config("rollout.batch_size=64"), 0, tmp_path / "a")
    alone = rollout(FakeModel(), PROMPTS[2:], config("rollout.batch_size=1"), 0, tmp_path / "b")
    assert list(all_at_once)[4:] == list(alone)
    assert (tmp_path / "a" / alone[0].image).read_bytes() == (tmp_path / "b" / alone[0].image).read_bytes()


def test_rounds_and_run_seeds_draw_anew(tmp_path: Path) -> None:
    seeds = [
        rollout(FakeModel(), PROMPTS, config(f"seed={seed}"), k, tmp_path / f"{seed}-{k}")[0].seed
        for seed in (0, 1)
        for k in (0, 1)
    ]
    assert len(set(seeds)) == 4


class Dies(FakeModel):
    """Dies in its second batch."""

    calls = 0

    def draw(self, *arguments: Any, **options: Any) -> list[Generated]:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().draw(*arguments, **options)


def test_an_interrupted_rollout_ends_in_the_same_files(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        rollout(Dies(), PROMPTS, config(), 0, tmp_path / "a")
    rollout(FakeModel(), PROMPTS, config(), 0, tmp_path / "a")
    rollout(FakeModel(), PROMPTS, config(), 0, tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert len(files) == 1 + 6 + 6
    assert files == sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_prompts_are_drawn_from_a_set_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(50)))
    assert [p.text for p in choose_prompts(str(path), 100, 0)] == [f"prompt {number}" for number in range(50)]
    some = choose_prompts(str(path), 10, 0)
    assert len(some) == 10 and some == sorted(some, key=lambda p: p.id)
    assert some == choose_prompts(str(path), 10, 0) != choose_prompts(str(path), 10, 1)
    assert len(choose_prompts("development", 5, 3)) == 5
    for name in ("trian", "/data/prompts.csv", "prompts.TXT"):
        message = (
            f"prompts: '{name}' is neither a set (train, development, held_out, compositional) nor a .jsonl or .txt"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            choose_prompts(name, 5, 0)


class Painter(FakeModel):
    """Draws every other prompt of its list right, and nothing for the rest."""

    def __init__(self, prompts: list[Prompt]) -> None:
        super().__init__()
        self.specs = {prompt.text: from_metadata(prompt.metadata) for prompt in prompts[::2]}

    def draw(self, contexts, sampling, seeds, *, sizes=None, path=False):  # type: ignore[no-untyped-def, override]
        return [
            Generated(Image.fromarray(self._paint(texts_of(context)[0], seed)), torch.zeros(1))
            for context, seed in zip(contexts, seeds, strict=True)
        ]

    def _paint(self, prompt: str, seed: int) -> np.ndarray:
        if prompt not in self.specs:
            return np.zeros((64, 64, 3), np.uint8)
        return render(sample_scene(self.specs[prompt], np.random.default_rng(seed)))


def test_accuracy_is_what_the_model_drew(tmp_path: Path) -> None:
    prompts = choose_prompts("development", 21, 0)
    result = evaluate(Painter(prompts), prompts, EvalConfig(batch_size=8), tmp_path, seed=0)
    assert result.correct == [index % 2 == 0 for index in range(21)]
    assert result.overall.accuracy == pytest.approx(100 * 11 / 21) and result.overall.n == 21
    assert sum(a.n for a in result.per_category.values()) == 21 and len(result.per_category) == 7
    assert evaluate(FakeModel(), prompts, EvalConfig(batch_size=8), tmp_path, seed=0) == result  # kept, not done again
    assert len(list((tmp_path / "images").iterdir())) == 21


def test_an_evaluation_samples_as_its_config_says(tmp_path: Path) -> None:
    """With these settings and a plan, from noise of the seed and the prompt alone."""
    prompts = choose_prompts("development", 3, 0)
    drawn: list[tuple[Any, ...]] = []
    written: list[tuple[Any, ...]] = []

    class Asked(FakeModel):
        def draw(self, contexts: Any, *arguments: Any, **options: Any) -> list[Generated]:
            drawn.append(([texts_of(context) for context in contexts], *arguments))
            return super().draw(contexts, *arguments, **options)

        def write(self, contexts: Any, *arguments: Any) -> list[Written]:
            written.append(([texts_of(context) for context in contexts], *arguments))
            return super().write(contexts, *arguments)

    settings = SETTINGS | {"size": (64, 64)}  # what the checker reads
    for plan in (True, False):
        evaluate(Asked(), prompts, EvalConfig(**settings, plan=plan), tmp_path / str(plan), seed=5)
    noise, plans = ([seed_for(5, prompt.id, purpose) for prompt in prompts] for purpose in ("eval", "plan"))
    bare = [[prompt.text] for prompt in prompts]
    planned = [["Plan first.", prompt.text, f"a plan of {prompt.text}"] for prompt in prompts]
    assert drawn == [(texts, Sampling(**settings), noise) for texts in (planned, bare)]
    assert written == [([texts[:2] for texts in planned], Decoding(temperature=0.125), plans)]
    assert not set(noise) & set(plans)


def test_what_is_random_in_a_candidate_has_seeds_of_its_own(tmp_path: Path) -> None:
    """The noise and the plan of every candidate and the replies to it: no seed of one is that of another."""
    seeds: dict[str, list[int]] = {"draw": [], "write": []}

    class Watched(FakeModel):
        def draw(self, contexts: Any, sampling: Any, drawn_by: Any, **options: Any) -> list[Generated]:
            seeds["draw"] += drawn_by
            return super().draw(contexts, sampling, drawn_by, **options)

        def write(self, contexts: Any, decoding: Any, written_by: Any) -> list[Written]:
            seeds["write"] += written_by
            return super().write(contexts, decoding, written_by)

    made = rollout(Watched(), PROMPTS, config(), 0, tmp_path)
    assert seeds["draw"] == [seed_for(0, 0, c.id, "rollout") for c in made]
    assert seeds["write"] == [seed_for(0, 0, c.id, "plan") for c in made]
    images = [open_image(tmp_path / c.image) for c in made]
    decoding = Decoding(temperature=1.0)
    SelfJudge(Watched(), decoding=decoding, seed=seed_for(0, 0, "judge")).judge(
        images, [c.prompt for c in made], [[]] * 6
    )
    assert len(set(seeds["draw"] + seeds["write"])) == len(seeds["draw"] + seeds["write"]) > 12


def test_a_model_without_plans_is_refused(tmp_path: Path) -> None:
    class Bare(FakeModel):
        abilities = frozenset({"seen"})

    with pytest.raises(MissingAbility, match="drawing after a plan needs a model with the ability plan: Bare has none"):
        rollout(Bare(), PROMPTS, config(), 0, tmp_path)


def test_prompts_without_metadata_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt 'p0' .* not of the embedded world: include"):
        evaluate(FakeModel(), PROMPTS, EvalConfig(), tmp_path, seed=0)


# --- a server draws


def by_server(url: str, *overrides: str) -> RunConfig:
    named = [f"rollout.server.url={url}", "rollout.server.model=m", "rounds=1", "rollout.planned_share=0.5"]
    return config(*named, *overrides)


def test_a_server_draws_what_the_model_draws_in_process(tmp_path: Path) -> None:
    """The same records, seeds, plans and images; latents are what the run's own model encodes of these images."""
    here = rollout(FakeModel(), PROMPTS, config("rollout.planned_share=0.5"), 0, tmp_path / "here")
    with serving(FakeModel()) as url:
        there = rollout(FakeModel(), PROMPTS, by_server(url), 0, tmp_path / "there")
    assert [c.model_copy(update={"sampling": {}}) for c in here] == [
        c.model_copy(update={"sampling": {}}) for c in there
    ]
    assert {c.plan is None for c in there} == {True, False}
    assert there[0].sampling == here[0].sampling | {"server": {"url": url, "model": "m"}}
    for candidate in there:
        image = open_image(tmp_path / "there" / candidate.image)
        assert image.tobytes() == open_image(tmp_path / "here" / candidate.image).tobytes()
        (encoded,) = FakeModel().encode([image])
        assert torch.equal(load_file(tmp_path / "there" / candidate.latent)["latent"], encoded)
    counts = json.loads((tmp_path / "there/rollout_counts.json").read_text())
    assert counts == {"asked": 6, "drawn": 6, "not_drawn": {}}


def png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="png")
    return base64.b64encode(data.getvalue()).decode()


def test_images_that_a_server_does_not_draw_are_counted_and_no_candidates(tmp_path: Path) -> None:
    """One is refused, one is no image, one has an address in place of an image; a busy server is asked again, and
    another size is resized as the model encodes it."""
    bodies: list[dict[str, Any]] = []

    def behave(body: dict[str, Any]) -> Any:
        bodies.append(body)
        if len(bodies) == 1:
            return 429, {"Retry-After": "0"}, {}
        data = {
            "prompt 0": {"b64_json": png(Image.new("RGB", (100, 52)))},
            "prompt 1": {"b64_json": base64.b64encode(b"no image").decode()},
            "prompt 2": {"url": "http://example.com/a.png"},
        }
        if body["seed"] == seed_for(0, 0, "p0-1", "rollout"):
            return 400, {}, {"error": "not that one"}
        return 200, {}, {"data": [data[body["prompt"]]]}

    extra = ["rollout.server.extra={response_format: null, num_inference_steps: 9}", "rollout.server.concurrency=1"]
    with chat_server(behave) as url:
        made = rollout(FakeModel(), PROMPTS, by_server(url, *extra), 0, tmp_path)
    assert [(c.id, c.size) for c in made] == [("p0-0", (48, 96))]
    assert read_records(tmp_path / "candidates.jsonl", Candidate) == list(made) and made[0].plan is None
    counts = json.loads((tmp_path / "rollout_counts.json").read_text())
    kinds = {"HTTP 400": 1, "the reply is not a readable image": 2, "no image in base64": 2}
    assert counts == {"asked": 6, "drawn": 1, "not_drawn": kinds}
    assert len(bodies) == 7 and bodies[0] == bodies[1] and bodies[0]["size"] == "64x64" and bodies[0]["plan"] is True
    assert "response_format" not in bodies[0] and bodies[0]["num_inference_steps"] == 9
    assert "plan" not in bodies[2] and bodies[2]["seed"] == seed_for(0, 0, "p0-1", "rollout")


def test_a_server_that_draws_nothing_ends_the_stage(tmp_path: Path) -> None:
    with chat_server(lambda _: (200, {}, {"data": []})) as url, pytest.raises(RunError, match="drew none of 6 images"):
        rollout(FakeModel(), PROMPTS, by_server(url), 0, tmp_path)
    with chat_server(lambda _: (404, {}, {})) as url, pytest.raises(ServerError, match="HTTP 404 for model 'm'"):
        rollout(FakeModel(), PROMPTS, by_server(url), 0, tmp_path)
    assert not (tmp_path / "candidates.jsonl").exists()
    with serving(FakeModel()) as url:
        assert len(rollout(FakeModel(), PROMPTS, by_server(url), 0, tmp_path)) == 6


def test_a_server_draws_one_round() -> None:
    with pytest.raises(ConfigError, match=r"rounds: rollout\.server draws with the weights that it was started with"):
        by_server("http://localhost:1/v1", "rounds=2")

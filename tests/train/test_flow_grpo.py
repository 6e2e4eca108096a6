"""Policies of texts and images on the shipped network: what is trained is what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL.Image import Image

from srum import models
from srum.config import ConfigError, load_config
from srum.models.bagel import Bagel
from srum.models.base import Exploration, Sampling, Segment
from srum.models.blip3o import Blip3o
from srum.processes import Processes
from srum.records import Prompt
from srum.run import find_method
from srum.stages.rollout import choose_prompts
from srum.train.checkpoint import list_checkpoints
from srum.train.metrics import keep_rows
from srum.train.online import OnlineSource
from srum.train.packs import at_timestep, make_pack
from srum.train.reason import Reason, image_advantages
from srum.train.rewards import Value
from srum.train.trainer import Trainer, TrainResult, train
from srum.train.weights import trainable_parameters

SMALL = (
    "method=flow_grpo",
    "candidates_per_prompt=2",
    "train.batch_size=4",
    "rollout.timesteps=5",
    "rollout.plan=true",
    "text_limit=24",
)
PROMPTS = choose_prompts("train", 4, 0)
FORWARD = ("images_by=forward", "updates=2", "rollout.plan=false")
BLIP3O = Path(__file__).parents[1] / "golden" / "blip3o" / "checkpoint"


def brightness(images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
    """A value in [0, 1] that differs from image to image."""
    return [Value(sum(image.resize((1, 1)).getpixel((0, 0))) / 765) for image in images]  # type: ignore[arg-type]


def same(images: Sequence[Image], prompts: Sequence[Prompt]) -> list[Value]:
    return [Value(0.5) for _ in images]


def tiny() -> Bagel:
    return Bagel.load(models.find("srum-tiny"), "cpu", "fp32")


def source(config, reward=brightness) -> OnlineSource:  # type: ignore[no-untyped-def]
    return OnlineSource(
        lambda model: Reason(model, reward, PROMPTS, config, 3), PROMPTS, "", config.updates, config.minibatches
    )


def learn(folder: Path, *overrides: str, reward=brightness, steps: int = 3) -> tuple[Bagel, TrainResult]:  # type: ignore[no-untyped-def]
    config = load_config(None, [*SMALL, "train.precision=fp32", f"train.steps={steps}", *overrides])
    model = tiny()
    objective = find_method(config.method).objective(config)
    return model, train(model, source(config, reward), objective, config.train, folder, seed=5, progress=False)


def test_before_the_first_update_the_ratio_is_one_on_blip3o() -> None:
    """Two random steps of each image, learned from as latents of one example."""
    fields = {"plan": "false", "size": "[64, 64]", "timestep_shift": 1.0, "decoder_steps": 2}
    overrides = [f"rollout.{name}={value}" for name, value in fields.items()]
    config = load_config(None, [*SMALL, *overrides, f"model={BLIP3O}", "random_steps=2", "train.precision=fp32"])
    model = Blip3o.load(BLIP3O)
    with trainable_parameters(model, "generation") as names:
        feed = source(config).feed(model, config.train, 5, Processes())
        trainer = Trainer(model, feed, find_method("flow_grpo").objective(config), config.train, 5, list(names))
        row = trainer.step(0)
    assert row["image_log_ratio"] < 1e-5 and abs(row["parts"]["image_policy"]) < 1e-6 and row["grad_norm"] > 0


@pytest.mark.parametrize("plan", [True, False])
def test_before_the_first_update_the_ratio_is_one(plan: bool, tmp_path: Path) -> None:
    _, result = learn(tmp_path, f"rollout.plan={plan}", "train.memory.pack_tokens=400", steps=1)
    (row,) = keep_rows(tmp_path / "metrics.jsonl", 1)
    assert result.steps == 1 and row["image_log_ratio"] < 1e-5 and row["image_clipped"] == 0
    assert row.get("text_log_ratio", 0.0) < 1e-4 and ("text_log_ratio" in row) == plan
    assert row["zero_spread_groups"] == 0 and row["parts"]["image_kl"] == pytest.approx(0, abs=1e-9)


def test_drawing_without_noise_is_drawing_and_with_it_is_not() -> None:
    model, context = tiny(), [[Segment("text", text="a red circle", droppable=True)]]
    sampling = Sampling(size=(64, 64), timesteps=5, timestep_shift=5.0, guidance=1.0)
    plain = model.draw(context, sampling, [7])[0]
    silent, loud = (
        model.draw(context, sampling, [7], explore=Exploration("flow", level, [{1, 3}], [0]))[0] for level in (0.0, 0.5)
    )
    assert torch.equal(plain.latent, silent.latent) and not torch.equal(plain.latent, loud.latent)
    assert [step.t for step in loud.steps] == pytest.approx([0.9375, 0.625])
    step = loud.steps[0]
    torch.testing.assert_close(step.transition.mean(step.state, step.sought), step.reached, atol=1e-5, rtol=1e-4)


def test_what_is_explored_does_not_depend_on_the_batch() -> None:
    model = tiny()
    contexts = [[Segment("text", text=prompt.text)] for prompt in PROMPTS[:3]]
    sampling = Sampling(size=(64, 64), timesteps=5, timestep_shift=5.0, guidance=1.0)

    def drawn(some: slice) -> list[torch.Tensor]:
        explore = Exploration("flow", 0.7, [{0}, {1}, {0, 2}][some], [1, 2, 3][some])
        return [made.latent for made in model.draw(contexts[some], sampling, [4, 5, 6][some], explore=explore)]

    alone = [latent for place in range(3) for latent in drawn(slice(place, place + 1))]
    for one, other in zip(drawn(slice(0, 3)), alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overrides", [(), FORWARD])
def test_equal_rewards_change_no_weight(overrides: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="changed no weight"):
        learn(tmp_path, "kl=0", *overrides, reward=same, steps=1)


def test_an_update_makes_what_beat_its_group_likelier() -> None:
    """The same step learned from twice: its ratios have moved along with the advantages, so the loss is below its 0."""
    config = load_config(None, [*SMALL, "updates=2", "train.precision=fp32", "kl=0", "image_clip=1", "train.lr=1e-4"])
    model = tiny()
    feed = source(config).feed(model, config.train, 5, Processes())
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainer = Trainer(model, feed, find_method("flow_grpo").objective(config), config.train, 5, names)
    first, second = trainer.step(0), trainer.step(1)
    assert abs(first["parts"]["image_policy"]) < 1e-6
    assert second["parts"]["image_policy"] < -1e-6 and second["parts"]["text_policy"] < -1e-4


def test_what_beat_its_group_is_predicted_better_by_the_forward_process() -> None:
    """Two draws of two groups, each learned from twice, with other noise; v_old is what drew."""
    config = load_config(None, [*SMALL, *FORWARD, "train.precision=fp32", "train.lr=1e-4"])
    model = tiny()
    feed = source(config).feed(model, config.train, 5, Processes())
    names = [name for name, _ in model.generation_parameters()]
    trainer = Trainer(model, feed, find_method("flow_grpo").objective(config), config.train, 5, names)
    examples = feed.player.play(0).examples
    samples = [at_timestep(model, example, config.train, 7, number) for example in examples for number in (1, 2, 3)]
    advantages = torch.cat([example.credit[0] for example in examples for _ in range(3)])
    pack = make_pack(model, samples)

    @torch.no_grad()
    def errors() -> torch.Tensor:
        """Of noise that is not trained on."""
        forward = trainer.forward(pack.packed)
        return torch.stack([forward.image_error[forward.image_segment == n].mean() for n in range(len(samples))])

    before = errors()
    rows = [trainer.step(0), trainer.step(1)]
    gained = before - errors()
    rows.append(trainer.step(2))
    assert advantages.abs().max() <= 1 and (advantages * gained).sum() > 1e-5
    parts = [row["parts"] for row in rows]
    assert parts[0]["trust"] == parts[2]["trust"] == 0 < parts[1]["trust"] and parts[1]["push"] < 0
    assert len({one["error"] for one in parts}) == 3 and rows[0]["value"] == rows[1]["value"] != rows[2]["value"]


def test_minibatches_are_all_of_what_was_drawn_each_time_round() -> None:
    config = load_config(
        None, [*SMALL, *FORWARD, "updates=4", "minibatches=2", "train.batch_size=2", "train.checkpoint_every=4"]
    )
    feed = source(config).feed(tiny(), config.train, 5, Processes())
    ids = [set(feed.step(number).ids) for number in range(5)]
    assert all(len(own) == 2 for own in ids)
    assert ids[0] | ids[1] == ids[2] | ids[3] == {f"0-{place}" for place in range(4)}
    assert all(name.startswith("1-") for name in ids[4])


def test_advantages_of_noised_images_are_those_of_region_nft() -> None:
    """Known rewards 1, 0, 0.5, 0.5 have a deviation of sqrt(1 / 8), and 0.5 / (2 sqrt(1 / 8)) = sqrt(1 / 2)."""
    config = load_config(None, [*SMALL, *FORWARD])
    advantages = image_advantages([None, 1.0, 0.0, 0.5, 0.5, None], [0, 0, 0, 1, 1, 1], config)  # type: ignore[arg-type]
    assert advantages == pytest.approx([0, 0.5**0.5, -(0.5**0.5), 0, 0, 0])
    assert image_advantages([None, None], [0, 0], config) == [0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("overrides", [("train.checkpoint_every=1",), (*FORWARD, "train.checkpoint_every=2")])
def test_killed_and_resumed_it_is_the_same(
    overrides: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the third step; of images that are noised, after what was learned from the first draw."""
    whole, _ = learn(tmp_path / "whole", *overrides, steps=3)
    step = Trainer.step

    def stumbling(self: Trainer, number: int) -> dict[str, object]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stumbling)
        learn(tmp_path / "killed", *overrides, steps=3)
    assert list_checkpoints(tmp_path / "killed" / "checkpoints")
    resumed, result = learn(tmp_path / "killed", *overrides, steps=3)
    assert result.start == 2
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.guidance=2.5", "unguided"),
        ("rollout.velocity_every=2", "network's own"),
        ("rollout.plan_temperature=0.5", "temperature 1"),
        ("candidates_per_prompt=1", "at least 2"),
        ("candidates_per_prompt=3", "whole number of groups"),
        ("updates=3", "multiple of updates"),
        ("advantage=group_std", "region"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*SMALL, "credit=region", override])

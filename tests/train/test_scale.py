"""What lets training fit, and what watches over it: LoRA, bfloat16, recomputation, averages, validation, probes."""

from __future__ import annotations

import importlib.util
import io
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from srum.config import ConfigError, RolloutConfig, RunConfig, load_config, parse_config
from srum.drawing import draw_prompts
from srum.errors import TrainingError
from srum.images import open_image
from srum.models.bagel import Bagel
from srum.models.bagel.sequence import Split
from srum.models.base import Decoding, Sampling, Segment, Written
from srum.processes import Processes
from srum.records import Judgement
from srum.run_dir import read_records
from srum.train import probes, tracking, trainer, weights
from srum.train.checkpoint import CheckpointMismatch
from srum.train.data import TrainingRecord, load_replies
from srum.train.examples import Example
from srum.train.metrics import keep_rows
from srum.train.packs import make_pack
from srum.train.probes import check_reproduction
from srum.train.trainer import Losses, NonFiniteError, Trainer, TrainResult
from tests.fakes import FakeModel, run_on_fakes
from tests.train.ranks import CHECKPOINT, SMOOTH, config_of, interrupted, learn, learned, records, replies

LORA = {"rank": 4, "alpha": 8}


def settings(**values: Any) -> RunConfig:
    return config_of(**SMOOTH | values)


def run(folder: Path, model: Bagel | None = None, of: list[TrainingRecord] | None = None, **values: Any) -> TrainResult:
    model = model or Bagel.load(CHECKPOINT)
    return learn(model, of or records(model), settings(**values), folder)


def published(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "ema.safetensors")


def losses(model: Bagel, trained: list[str], **values: Any) -> Losses:
    """Of the first four candidates, in one pack."""
    config = settings(**values)
    mix, objective = learned(records(model), config, 0)
    feed = mix.feed(model, config.train, 0, Processes())
    pack = make_pack(model, [feed.draw(0, example) for example in mix.parts[0].examples[:4]])
    return Trainer(model, feed, objective, config.train, 0, trained).losses(pack)


@torch.no_grad()
def velocity(model: Bagel) -> Tensor:
    return losses(model, [model.generation_parameters()[0][0]], method="sft").forward.velocity


# --- LoRA


@pytest.mark.parametrize("target", ["all", "attention"])
def test_lora_trains_updates_and_publishes_them_merged(tmp_path: Path, target: str) -> None:
    """Nothing but the generation expert's linear layers changes, by updates of rank 4, and the names are official."""
    model, before = Bagel.load(CHECKPOINT), load_file(CHECKPOINT / "ema.safetensors")
    run(tmp_path, model, lora=LORA | {"target": target})
    after = published(tmp_path)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    linear = {n for n in after if "_moe_gen" in n and ".layers." in n and n.endswith("weight") and "norm" not in n}
    assert changed == {n for n in linear if target == "all" or "attn" in n}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    weights = dict(model.named_parameters())
    assert weights.keys() | set(before) == set(before)  # nothing of peft is left
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(parameter.requires_grad for parameter in weights.values())


def test_lora_starts_where_full_training_starts(tmp_path: Path) -> None:
    """Updates begin at zero, and v_old is the network without them: the first loss of region_nft is that of v_old."""
    assert run(tmp_path / "lora", lora=LORA).losses[0] == pytest.approx(run(tmp_path / "full").losses[0], rel=1e-6)


def test_v_old_stays_the_model_that_entered(tmp_path: Path) -> None:
    model = Bagel.load(CHECKPOINT)
    entered = velocity(model)
    trained = run(tmp_path, model, lora=LORA)
    assert trained.steps == 4 and not torch.equal(velocity(model), entered)
    with (
        trainer.trainable_parameters(model, "generation") as chosen,
        trainer.lora.adapted(model, chosen, settings(lora=LORA).train.lora) as names,
    ):
        for name, parameter in model.network.named_parameters():
            if name in names:
                torch.nn.init.normal_(parameter.data)
        with trainer.lora.disabled(model.network):
            inside = velocity(model)
        assert not torch.allclose(velocity(model), inside)
    with trainer.trainable_parameters(model, "generation"):  # what understands is frozen, as above: the same pass
        assert torch.equal(velocity(model), inside)


def test_the_adapter_is_one_of_peft(tmp_path: Path) -> None:
    run(tmp_path, lora=LORA)
    model = Bagel.load(CHECKPOINT)
    peft.PeftModel.from_pretrained(model.network, str(tmp_path / "adapter"))
    torch.testing.assert_close(velocity(model), velocity(Bagel.load(tmp_path / "model")), rtol=1e-4, atol=1e-5)


def test_lora_resumes_bit_for_bit(tmp_path: Path) -> None:
    values = {"lora": LORA, "ema": 0.9, "old_decay": 0.5, "validation": {"share": 0.4, "every": 2}}
    run(tmp_path / "whole", **values)
    with interrupted(at=3):
        run(tmp_path / "cut", **values)
    assert run(tmp_path / "cut", **values).start == 2
    for file in ("model/ema.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl", "validation.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_lora_without_a_layer_is_refused(tmp_path: Path) -> None:
    model = Bagel.load(CHECKPOINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match=r"lora\.target: no linear layer"):
        patch.setattr(Bagel, "layers", lambda self: [])
        run(tmp_path, model, lora=LORA)


# --- v_old


@pytest.mark.parametrize("lora", [{}, LORA])
def test_v_old_that_does_not_move_is_what_entered(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Under LoRA, a second set of updates that stay at zero against the network without any: the same bits."""
    run(tmp_path / "entered", lora=lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.Copy, "follow", lambda self, decay: None)
        run(tmp_path / "still", lora=lora, old_decay=0.5)
    for file in ("model/ema.safetensors", "metrics.jsonl"):
        assert (tmp_path / "still" / file).read_bytes() == (tmp_path / "entered" / file).read_bytes()


@pytest.mark.parametrize("lora", [{}, LORA])
def test_v_old_follows_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]) -> None:
    """o <- 0.75 o + 0.25 w after every step, from the weights that entered, across an interruption."""
    old: dict[str, Tensor] = {}
    step = Trainer.step

    def following(self: Trainer, number: int) -> dict[str, Any]:
        if number == 0:
            old.update({name: parameter.detach().clone() for name, parameter in self.parameters.items()})
        row = step(self, number)
        for name, parameter in self.parameters.items():
            old[name].lerp_(parameter.detach(), 0.25)
            assert self.old is not None and torch.equal(self.old.values[name], old[name])
        return row

    monkeypatch.setattr(Trainer, "step", following)
    run(tmp_path / "whole", lora=lora, old_decay=0.75)
    with interrupted(at=2):
        run(tmp_path / "cut", lora=lora, old_decay=0.75)
    assert run(tmp_path / "cut", lora=lora, old_decay=0.75).start == 2
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_v_old_that_keeps_up_leaves_the_weighted_error(tmp_path: Path) -> None:
    """At decay 0 every step begins with v = v_old: d = 0, so nothing is pushed yet and nothing holds back."""
    run(tmp_path / "keeps up", old_decay=0.0)
    run(tmp_path / "stays")
    ours, others = (keep_rows(tmp_path / name / "metrics.jsonl", 4) for name in ("keeps up", "stays"))
    for row in ours:
        assert row["parts"]["trust"] == pytest.approx(0, abs=1e-9) == row["parts"]["push"]
        assert row["loss"] == pytest.approx(row["parts"]["error"])
    assert all(row["parts"]["trust"] > 1e-6 for row in others[1:])


# --- memory


@pytest.mark.parametrize("lora", [{}, LORA])
def test_a_network_loaded_empty_is_filled_in_the_types_it_needs(lora: dict[str, Any]) -> None:
    """What is trained has the file's own float32, what is not was rounded once; updates start as in a loaded one."""
    saved, config = load_file(CHECKPOINT / "ema.safetensors"), settings(lora=lora, precision="bf16")
    started = []
    for empty in (True, False):
        model = Bagel.load(CHECKPOINT, dtype=torch.bfloat16, empty=empty)
        with trainer.trainable_parameters(model, "generation") as chosen, ExitStack() as stack:
            adapted = trainer.lora.adapted(model, chosen, config.train.lora)
            names = list(stack.enter_context(adapted) if lora else chosen)
            mix, objective = learned(records(model), config, 0)
            feed = mix.feed(model, config.train, 0, Processes())
            parameters = Trainer(model, feed, objective, config.train, 0, names).parameters
            started.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
            for name, parameter in trainer.lora.beneath(model.network).items() if empty else ():
                exact = name in chosen and not lora
                assert torch.equal(parameter, saved[name] if exact else saved[name].bfloat16())
    if lora:
        assert started[0].keys() == started[1].keys()
        assert all(torch.equal(started[0][name], started[1][name]) for name in started[0])
        assert all(bool(x.any()) == ("lora_A" in name) for name, x in started[0].items())


@pytest.mark.parametrize("lora", [{}, LORA])
def test_a_frozen_base_in_bfloat16_has_float32_masters(tmp_path: Path, lora: dict[str, Any]) -> None:
    model = Bagel.load(CHECKPOINT, dtype=torch.bfloat16)
    with interrupted(at=3):
        run(tmp_path, model, precision="bf16", memory={"frozen": "bf16"}, lora=lora)
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    kinds = torch.distributed.checkpoint.FileSystemReader(saved).read_metadata().state_dict_metadata
    assert {kinds[name].properties.dtype for name in kinds if name.startswith("weights")} == {torch.float32}
    run(tmp_path, Bagel.load(CHECKPOINT, dtype=torch.bfloat16), precision="bf16", memory={"frozen": "bf16"}, lora=lora)
    assert {tensor.dtype for tensor in published(tmp_path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("trainable", ["generation", "all"])
def test_recomputed_activations_change_nothing(tmp_path: Path, trainable: str) -> None:
    run(tmp_path / "kept", trainable=trainable)
    model = Bagel.load(CHECKPOINT)
    run(tmp_path / "again", model, trainable=trainable, memory={"checkpoint_activations": True})
    a, b = published(tmp_path / "kept"), published(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all("forward" not in vars(layer) for layer in model.layers())


def test_recomputation_saves_memory() -> None:
    """Bytes that the backward pass keeps, in one pack."""
    model, kept = Bagel.load(CHECKPOINT), {True: 0, False: 0}
    trained = [name for name, _ in model.generation_parameters()]
    for again in kept:

        def pack(tensor: Tensor, again: bool = again) -> Tensor:
            kept[again] += tensor.nbytes
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with trainer.recomputed(model.layers() if again else []), hooks:
            losses(model, trained, method="sft")
    assert kept[True] < 0.5 * kept[False]


def test_averages_of_8_bits_need_torchao(tmp_path: Path) -> None:
    values: dict[str, Any] = {"memory": {"optimizer": "int8"}}
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(TrainingError, match="needs torchao"):
            run(tmp_path, **values)
    else:
        full, small = run(tmp_path / "full"), run(tmp_path / "small", **values)
        assert small.losses == pytest.approx(full.losses, rel=0.02)
        with interrupted(at=3):
            run(tmp_path / "cut", **values)
        assert run(tmp_path / "cut", **values).losses == small.losses


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.memory.frozen=bf16", "train.memory.frozen: bf16 weights need precision=bf16, got auto"),
        ("train={precision: bf16, trainable: all, memory: {frozen: bf16}}", "train.memory.frozen: nothing is frozen"),
        ("train.memory.optimizer=int8", "train.eps: 1e-15 is below"),
        ("train.replies=1", "train.replies: nothing that reads and writes text is trained"),
        ("{train: {trainable: all, replies: 1}, judge: {think: true}}", "train.replies: replies are"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(yaml.safe_load(override)) if override[0] == "{" else load_config(None, [override])


# --- averages, failures


def test_what_is_published_is_the_running_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a <- 0.75 a + 0.25 w after every step, from the weights that entered."""
    name, step = "llm2vae.weight", Trainer.step
    average = load_file(CHECKPOINT / "ema.safetensors")[name].clone()

    def following(self: Trainer, number: int) -> dict[str, Any]:
        row = step(self, number)
        average.lerp_(self.parameters[name].detach(), 0.25)
        return row

    monkeypatch.setattr(Trainer, "step", following)
    model = Bagel.load(CHECKPOINT)
    run(tmp_path, model, ema=0.75)
    assert torch.equal(published(tmp_path)[name], average)
    assert torch.equal(model.network.llm2vae.weight, average)


def test_steps_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """Candidate c4 is not a number: the steps that draw it change nothing, and say so."""
    model = Bagel.load(CHECKPOINT)
    bad = [replace(r, latent=r.latent * (math.nan if r.candidate.id == "c4" else 1)) for r in records(model)]
    with pytest.raises(NonFiniteError, match="c4"):
        run(tmp_path / "stop", of=bad, batch_size=2, steps=6)
    result = run(tmp_path / "skip", of=bad, batch_size=2, steps=6, on_nonfinite="skip")
    rows = keep_rows(tmp_path / "skip" / "metrics.jsonl", 6)
    left_out = [row for row in rows if row["loss"] is None]
    assert [row["examples"] for row in left_out] == [["c4"], ["c4"]]  # once in either epoch
    assert [loss is None for loss in result.losses] == [row["loss"] is None for row in rows]
    assert all(tensor.isfinite().all() for tensor in published(tmp_path / "skip").values())


# --- validation


def test_validation_is_on_prompts_that_are_not_trained_on(tmp_path: Path) -> None:
    model = Bagel.load(CHECKPOINT)
    values: dict[str, Any] = {"method": "sft", "validation": {"share": 0.4, "every": 2}}
    mix, _ = learned(records(model), settings(**values), seed=3)
    assert {e.group for e in mix.held_out} & {e.group for e in mix.parts[0].examples} == set()
    assert (len(mix.held_out), len(mix.parts[0].examples)) == (2, 4)
    run(tmp_path / "one", **values)
    run(tmp_path / "packs", **values, memory={"pack_tokens": 60})
    one, packs = (keep_rows(tmp_path / name / "validation.jsonl", 9) for name in ("one", "packs"))
    assert [row["step"] for row in one] == [0, 2, 4]
    for a, b in zip(one, packs, strict=True):
        assert a["loss_by_timestep"] == pytest.approx(b["loss_by_timestep"], rel=1e-4)
        assert len(a["loss_by_timestep"]) == 4 and a["loss"] > 0
    seen = {example.id for step in range(4) for _, example in mix.at(step, seed=3)}
    assert seen == {example.id for example in mix.parts[0].examples}


def test_the_first_validation_is_the_loss_of_the_model_that_entered(tmp_path: Path) -> None:
    """With the same noise every time, so that a learning rate of almost nothing leaves it as it is."""
    run(tmp_path, method="sft", lr=1e-12, validation={"share": 0.4, "every": 1})
    losses = [row["loss"] for row in keep_rows(tmp_path / "validation.jsonl", 9)]
    assert len(losses) == 5 and losses == pytest.approx([losses[0]] * 5, rel=1e-5)


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4]), (3, [0, 3, 4])])
def test_a_kill_before_the_weights_are_published_costs_no_validation(
    tmp_path: Path, every: int, steps: list[int]
) -> None:
    """Between the last checkpoint and ``model/``: what goes on has no step to do, and keeps the row after the last."""
    values: dict[str, Any] = {"method": "sft", "validation": {"share": 0.4, "every": every}}
    run(tmp_path, **values)
    shutil.rmtree(tmp_path / "model")
    run(tmp_path, **values)
    assert [row["step"] for row in keep_rows(tmp_path / "validation.jsonl", 9)] == steps


# --- replies


def parts_of(reply: Example) -> tuple[Path, str, str]:
    """Image, question and text of a reply."""
    seen, question, text = reply.segments
    assert isinstance(seen.image, Path) and question.text and text.text and text.loss and not question.loss
    return seen.image, question.text, text.text


def test_replies_are_learned_beside_the_images(tmp_path: Path) -> None:
    """The first cross-entropy is that of the model that entered, by its own log-probabilities; then it falls."""
    model, spoken = Bagel.load(CHECKPOINT), replies(tmp_path / "images")
    expected, count = 0.0, 0
    for image, question, text in map(parts_of, spoken):
        ids = [*model._ids(text), model.eos]
        seen = Segment("seen", image=open_image(image))
        with torch.no_grad():
            context = model.contexts([[seen, Segment("text", text=question)]])
        states = model._extend(context, [[Split(kind="text", ids=[model.bos, *ids[:-1]])]])
        log_p = model._log_softmax(states)
        expected -= log_p[torch.arange(len(ids)), ids].sum().item()
        count += len(ids)
    values: dict[str, Any] = {"trainable": "all", "steps": 8, "text_weight": 0.5, "replies": 3}
    entropies = []
    for pack_tokens in (None, 80):
        config = settings(**values, memory={"pack_tokens": pack_tokens})
        folder = tmp_path / str(pack_tokens)
        learn(Bagel.load(CHECKPOINT), records(model), config, folder, replies=spoken)
        rows = keep_rows(folder / "metrics.jsonl", 8)
        assert all(row["loss"] == pytest.approx(sum(row["parts"].values())) for row in rows)
        entropies.append([row["parts"]["cross_entropy"] / 0.5 for row in rows])
    assert entropies[0][0] == pytest.approx(expected / count, rel=1e-4)
    assert entropies[0][-1] < 0.9 * entropies[0][0]
    assert entropies[1][:5] == pytest.approx(entropies[0][:5], rel=1e-3)
    with pytest.raises(TrainingError, match="there is nothing to train on: no replies"):
        learn(model, records(model), settings(**values), tmp_path / "none")


def test_replies_count_by_their_weight_and_are_part_of_the_run(tmp_path: Path) -> None:
    spoken = replies(tmp_path / "images")

    def published_by(name: str, weight: float, *of: Example) -> dict[str, Tensor]:
        config = settings(trainable="all", steps=1, text_weight=weight, replies=3)
        model = Bagel.load(CHECKPOINT)
        learn(model, records(model), config, tmp_path / name, replies=of)
        return published(tmp_path / name)

    light, heavy = published_by("light", 0.5, *spoken), published_by("heavy", 5.0, *spoken)
    assert any(not torch.equal(light[name], heavy[name]) for name in light)
    *asked, text = spoken[0].segments
    other = replace(spoken[0], segments=[*asked, replace(text, text="Score: 1")])
    with pytest.raises(CheckpointMismatch, match="different: examples"):
        published_by("light", 0.5, other, *spoken[1:])


@pytest.mark.parametrize(("instructions", "mode"), [("compact", "free"), ("paper", "free"), ("compact", "constrained")])
def test_replies_are_those_that_the_judge_gave(tmp_path: Path, instructions: str, mode: str) -> None:
    """One for every question that was answered readably at once, in the words in which it was asked; no forced line."""
    asked: dict[tuple[bytes, str], str] = {}

    class Listening(FakeModel):
        def write(self, contexts: Any, decoding: Decoding, seeds: Any) -> list[Written]:
            if decoding.temperature:  # else a further attempt fails as the first
                drawn_by = [
                    replace(c[-1], text=f"{c[-1].text} {seed}") for c, seed in zip(contexts, seeds, strict=True)
                ]
                written = super().write(
                    [[*c[:-1], s] for c, s in zip(contexts, drawn_by, strict=True)], decoding, seeds
                )
            else:
                written = super().write(contexts, decoding, seeds)
            for context, reply in zip(contexts, written, strict=True):
                if context[0].kind == "seen":
                    asked.setdefault((context[0].image.tobytes(), context[1].text), reply.text)
            return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fakes.FakeModel", Listening)
        asking = [f"judge.instructions={instructions}", f"judge.reply={mode}", "judge.retries=1"]
        run_on_fakes(tmp_path / "run", "rounds=1", *asking)
    judgements = read_records(tmp_path / "run" / "round-000" / "judgements.jsonl", Judgement)
    assert any(said.attempts == 2 and said.failure is None for j in judgements for said in (*j.regions, j.layout))
    spoken = load_replies(tmp_path / "run" / "round-000", instructions)
    assert spoken
    for image, question, text in map(parts_of, spoken):
        assert asked[open_image(image).tobytes(), question] == text
    assert {"I cannot tell."}.isdisjoint(text for _, _, text in map(parts_of, spoken))


# --- probes


def test_samples_change_nothing_and_are_those_of_the_weights(tmp_path: Path) -> None:
    """A candidate of each of the first two prompts, before the first step, every second, and after the last."""
    made = rolled_out(Bagel.load(CHECKPOINT))
    run(tmp_path / "without", of=made, steps=3)
    run(tmp_path / "with", of=made, steps=3, samples={"count": 2, "every": 2})
    for file in ("model/ema.safetensors", "metrics.jsonl"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    folders = sorted((tmp_path / "with" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-00000000", "step-00000002", "step-00000003"]
    chosen = [made[0], made[2]]
    for folder, source in ((folders[0], CHECKPOINT), (folders[-1], tmp_path / "with" / "model")):
        again = probes.sample_again(Bagel.load(source), chosen)
        assert sorted(file.name for file in folder.iterdir()) == ["c0.png", "c2.png"]
        for record, expected in zip(chosen, again, strict=True):
            assert open_image(folder / f"{record.candidate.id}.png").tobytes() == expected.image.tobytes()


def test_a_tracker_is_told_of_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, made = Bagel.load(CHECKPOINT), rolled_out(Bagel.load(CHECKPOINT))
    wanted = settings(validation={"share": 0.4, "every": 2}, samples={"count": 1, "every": 4})
    subject = tracking.Subject("runs", "round-000-region_nft", tmp_path / "tracker", {"train": {"lr": 0.5}})
    with tracking.tracked("tensorboard", subject) as tracker:
        learn(model, made, wanted, tmp_path, tracker=tracker)
    events = EventAccumulator(str(tmp_path / "tracker" / "round-000-region_nft"))
    events.Reload()
    (config,) = events.Tensors("config/text_summary")
    assert b"lr: 0.5" in config.tensor_proto.string_val[0]
    shown = events.Images(f"samples/{made[0].candidate.id}")
    assert [image.step for image in shown] == [0, 4]
    first = Image.open(io.BytesIO(shown[0].encoded_image_string))
    sample = open_image(tmp_path / "samples/step-00000000" / f"{made[0].candidate.id}.png")
    assert first.convert("RGB").tobytes() == sample.tobytes()
    for name in ("metrics", "validation"):
        rows = keep_rows(tmp_path / f"{name}.jsonl", 9)
        for field in ("loss", "parts/error", "loss_by_timestep/2"):
            told = [(scalar.step, scalar.value) for scalar in events.Scalars(f"{name}/{field}")]
            known = [(row["step"], tracking.numbers(row, name).get(f"{name}/{field}")) for row in rows]
            assert told == [(step, pytest.approx(value, rel=1e-6)) for step, value in known if value is not None]
    monkeypatch.setattr(tracking, "filter_trackers", lambda names, folder: [])
    with pytest.raises(TrainingError, match=r"train\.tracker: wandb is not installed \(pip install wandb\)"):
        tracking.require_tracker("wandb")


def test_the_numbers_of_a_row_by_their_place() -> None:
    row = {"step": 3, "loss": None, "parts": {"push": 0.5}, "by_timestep": [None, 2.0], "non_finite": "loss"}
    assert tracking.numbers(row, "metrics") == {
        "metrics/step": 3, "metrics/parts/push": 0.5, "metrics/by_timestep/1": 2.0,
    }  # fmt: skip


def rolled_out(model: Bagel) -> list[TrainingRecord]:
    """The records as a rollout of ``model`` would have made them."""
    facts = RolloutConfig(size=(32, 48), timesteps=4, plan=False).model_dump(mode="json", exclude={"batch_size"})
    sampling = Sampling(**RolloutConfig.model_validate(facts).sampling())
    return [
        replace(
            record,
            candidate=record.candidate.model_copy(update={"sampling": facts}),
            latent=draw_prompts(model, [record.candidate.prompt], sampling, [record.candidate.seed])[0].latent,
            reward_map=torch.linspace(-1, 1, 6).view(2, 3),
        )
        for record in records(model, 4)
    ]


def test_a_model_that_did_not_make_the_candidates_is_found_out(tmp_path: Path) -> None:
    model = Bagel.load(CHECKPOINT)
    made = rolled_out(model)
    assert max(check_reproduction(made[:2], probes.sample_again(model, made[:2]))) < 1e-4
    assert probes.probed(records(model), 2) == []  # nothing says how those were made
    torch.nn.init.normal_(model.network.llm2vae.weight)
    with pytest.raises(TrainingError, match=r"this model did not make the candidates: .* c0 "):
        learn(model, made, settings(probes=2), tmp_path, reproduces=True)


def test_training_that_changes_nothing_sampled_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bagel.load(CHECKPOINT)
    made = rolled_out(model)
    run(tmp_path / "changed", of=made, probes=1)
    same = probes.sample_again(Bagel.load(CHECKPOINT), made[:1])
    monkeypatch.setattr(trainer, "sample_again", lambda model, records: same)
    with pytest.raises(TrainingError, match="nothing that is sampled"):
        run(tmp_path / "same", of=made, probes=1)
    assert not (tmp_path / "same" / "model").exists()

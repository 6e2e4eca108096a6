"""A tiny BLIP3-o of random weights that has learned one thing, to name boxes when it is asked for objects."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from srum.config import RunConfig, load_config
from srum.grounding.native import QUESTION, format_boxes
from srum.loop import run_loop
from srum.models.base import Segment
from srum.models.blip3o import Blip3o, chat
from srum.models.blip3o.checkpoint import QWEN, official_name
from srum.models.queries.language import Rows, joined

CHECKPOINT = Path(__file__).parent / "golden" / "blip3o" / "checkpoint"
BOXES = [("circle", (20, 16, 80, 90)), ("square", (64, 64, 140, 126))]  # of the seen frame; the last reaches beyond it
STEPS, RATE = 60, 3e-3


def teach_boxes(folder: Path) -> Path:
    """``folder`` with the golden checkpoint, whose language model replies with ``BOXES`` to the grounder's question."""
    shutil.copytree(CHECKPOINT, folder)
    model = Blip3o.load(CHECKPOINT)
    language = model.language
    images = [Image.effect_noise((128, 128), 64).convert("RGB"), Image.new("RGB", (128, 128), "grey")]
    parts = chat.asked([Segment("seen", image=images[0]), Segment("text", text=QUESTION)], lambda s: s.text or "")
    before, after = model.ids(str(parts[0])), model.ids(str(parts[-1]))
    reply = [*model.ids(format_boxes(BOXES)), model.stop]
    with torch.no_grad():
        seen = language.images(images)
    text = language.text.requires_grad_(True)
    learned = [*text.parameters(), language.network.lm_head.weight.requires_grad_(True)]
    optimizer = torch.optim.Adam(learned, RATE)
    for _ in range(STEPS):
        rows = [joined([language.tokens(before), run, language.tokens([*after, *reply[:-1]])]) for run in seen]
        states = language.extend(language.empty(len(rows)), Rows.of(rows))[:, -len(reply) :]
        loss = cross_entropy(language.logits(states).flatten(0, 1), torch.tensor(reply * len(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {official_name(n, QWEN): p.detach().contiguous() for n, p in language.network.named_parameters()}
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors")
    return folder


def small(model: Path, **more: object) -> RunConfig:
    """A run of a round on two prompts, with every arm: the whole loop but for the exact checker."""
    fields = {"size": "[128, 128]", "timesteps": 4, "timestep_shift": 1.0, "decoder_steps": 2, "plan": "false"}
    overrides = [f"rollout.{name}={value}" for name, value in fields.items()]
    overrides += [f"model={model}", "rounds=1", "prompt_count=2", "candidates_per_prompt=2", "rollout.batch_size=2"]
    overrides += ["ground.grounder=native", "ground.batch_size=2", "judge.reply=none", "judge.batch_size=2"]
    overrides += ["train.steps=3", "train.batch_size=2", "train.checkpoint_every=1", "train.timestep_shift=1.0"]
    overrides += ["compare=[srum]", "eval.count=0", "train.eps=1e-6", "train.precision=fp32", "train.samples.count=1"]
    return load_config(None, [*overrides, *(f"{name}={value}" for name, value in more.items())])


def whole_run(folder: Path, model: Path) -> None:
    """What each of several processes does."""
    run_loop(small(model), folder)

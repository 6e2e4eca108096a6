"""What the methods learn from in a dry run: their own examples, of a round that has one image and one latent.

Every picture, candidate and pair of the round is that image, so that each example is as long as a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from srum.config import RunConfig, TrainConfig
from srum.errors import ModelError
from srum.flow import transition
from srum.models.base import Generated, RandomStep, Segment, UnifiedModel, Written
from srum.records import Candidate, Pair, Picture, Prompt
from srum.run import Run
from srum.train.data import TrainingRecord, candidate_mix
from srum.train.examples import Example
from srum.train.feed import Mix, Part
from srum.train.methods.base import CandidateMethod, Method
from srum.train.methods.reca import layout, read_templates
from srum.train.methods.rvr import refinement, text_to_image
from srum.train.reason import Drawn, Reason
from srum.train.rewards import Value

PROMPT = "two red cups on a wooden table beside a window, in the morning light"
QUESTION, REPLY = "Is the red cup right? " * 30, "Region ID: 1\nScore: 0.5\nReason: it is there, as was asked. " * 4
IMAGE, LATENT = "image.png", "latent.safetensors"
SCORES = (1.0, -1.0)  # in turn, so that there is something to prefer


def examples_of(method: Method, model: Any, run: RunConfig, train: TrainConfig, folder: Path) -> Mix:
    """A batch of what ``method`` learns from, its files in ``folder``.

    Raises ModelError for a method of one's own that does not learn from judged candidates.
    """
    opened = Run(folder, run)
    latent = _write(model, run.rollout.size, opened.round(0))
    if isinstance(method, CandidateMethod):
        records = [_record(model, number, run.rollout.size, latent) for number in range(train.batch_size)]
        return candidate_mix(records, method.credits(records, run), train, 0)
    makers: dict[str, Callable[..., Mix]] = {
        "reca": _reconstructions,
        "rvr": _refinements,
        "flow_grpo": _drawn,
        "r3": _drawn,
    }
    if method.name not in makers:
        raise ModelError(f"--dry-run: what {method.name} learns from is not known here")
    return makers[method.name](model, opened, run, train)


def _write(model: UnifiedModel, size: tuple[int, int], folder: Path) -> torch.Tensor:
    """The one image and its latent."""
    config: Any = getattr(model, "config")  # noqa: B009 (BAGEL's own)
    scale = config.autoencoder.downsample
    latent = torch.zeros(config.autoencoder.z_channels, size[0] // scale, size[1] // scale)
    folder.mkdir(parents=True)
    save_file({"latent": latent}, folder / LATENT)
    Image.new("RGB", size[::-1]).save(folder / IMAGE)
    return latent


def _candidate(number: int, size: tuple[int, int]) -> Candidate:
    name = str(number)
    return Candidate(
        id=name, prompt_id=str(number // 2), prompt=PROMPT, index=number % 2, seed=number, image=IMAGE, latent=LATENT,
        size=size,
    )  # fmt: skip


def _record(model: UnifiedModel, number: int, size: tuple[int, int], latent: torch.Tensor) -> TrainingRecord:
    score = SCORES[number % 2]
    values = torch.full(model.latent_grid(size), score)
    return TrainingRecord(_candidate(number, size), latent, values, mapping="signed", alpha=1.0, sample_score=score)


def _reconstructions(model: UnifiedModel, opened: Run, run: Any, train: TrainConfig) -> Mix:
    """As RecA has them, without what is mixed in."""
    templates = read_templates(run.templates)[: run.template_count]
    pictures = [
        Picture(id=str(n), source="blank", image=IMAGE, seen=IMAGE, latent=LATENT, size=run.rollout.size)
        for n in range(train.batch_size)
    ]
    segments = [layout(opened.round(0), picture, templates, run) for picture in pictures]
    return Mix([Part("", [Example(id=str(n), segments=s) for n, s in enumerate(segments)], train.batch_size)])


def _refinements(model: Any, opened: Run, run: Any, train: TrainConfig) -> Mix:
    """As RvR has them, with what is mixed in."""
    texts = (run.refine.system or model.refine_texts[0], model.refine_texts[1])
    found = [_candidate(number, run.rollout.size) for number in range(2 * train.batch_size)]
    candidates = {candidate.id: candidate for candidate in found}
    pairs = [
        Pair(
            id=bad.id, prompt_id=bad.prompt_id, prompt=PROMPT, misaligned=bad.id, aligned=good.id,
            misaligned_score=-1.0, aligned_score=1.0,
        )
        for good, bad in zip(found[::2], found[1::2], strict=True)
    ]  # fmt: skip
    seen = Segment("seen", image=opened.round(0) / IMAGE)
    reply = [seen, Segment("text", text=QUESTION), Segment("text", text=REPLY, loss=True)]
    kinds: dict[str, Sequence[Example]] = {
        "": [refinement(opened, 0, pair, candidates, texts, run) for pair in pairs],
        "t2i": text_to_image(opened, 0, pairs, candidates),
        "replies": [Example(id=f"reply-{n}", segments=reply) for n in range(train.batch_size)],
    }
    return Mix.of_shares(kinds, dict(zip(kinds, run.mix, strict=True)), train.batch_size)


def _drawn(model: Any, opened: Run, run: Any, train: TrainConfig) -> Mix:
    """What a step of a policy draws first: plans and the random steps to images. Of R3 this is one of its turns."""
    z, (height, width) = model.config.autoencoder.z_channels, run.rollout.size
    x = torch.zeros(z, height // model.config.autoencoder.downsample, width // model.config.autoencoder.downsample)
    step = RandomStep(x, 0.9, x, x, transition(0.9, 0.8, run.noise_rule, run.noise_level))
    made = Generated(Image.new("RGB", (width, height)), x, steps=(step,) * run.random_steps)
    ids = list(range(run.text_limit - 2))
    plan = Written("a plan", ids, torch.zeros(len(ids) + 1), ended=True) if run.rollout.plan else None
    count = train.batch_size
    player = Reason(model, lambda *_: [], [], run, 0)
    drawn = Drawn(
        [Prompt(id="0", text=PROMPT)] * count,
        [plan] * count,
        [made] * count,
        [Value(float(n % 2)) for n in range(count)],
    )
    return Mix([Part("", player.compared(0, drawn).examples, count)])

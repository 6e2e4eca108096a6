"""A unified model of a few lines, for tests of the stages: it draws at random, judges at random, and can be trained."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srum import models
from srum.config import load_config
from srum.flow import FlowNoise, interpolate, sample_timesteps, schedule
from srum.judging.instructions import layout_reply, region_reply
from srum.loop import run_loop
from srum.models.bagel.config import BagelConfig
from srum.models.base import Ability, Decoding, FlowForward, Generated, SampledPath, Sampling, Segment, Written
from srum.seeding import seed_for
from srum.shapes.render import render
from srum.shapes.scenes import random_scene

CHANNELS, PATCH = 3, 8  # latent channels; pixels per latent token and side
LETTERS = 32  # that texts are made of


class FakeModel(nn.Module):
    """Images are scenes of the embedded world, drawn by the seed, the weights, the prompt and the settings alike.

    Replies are scores drawn by image and question; about one in eight cannot be parsed. Latents (3, H / 8, W / 8).
    """

    device = torch.device("cpu")
    abilities: frozenset[Ability] = frozenset({"seen", "clean", "edit", "plan", "path", "train", "velocity"})
    plan_instruction = "Plan first."
    refine_texts = ("Again.", "Prompt: {prompt}")
    reflect_question, reflect_stop = "What must change for {prompt}?", "Nothing."

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.understanding = nn.ModuleDict({"down_proj": nn.Linear(2, 2)})  # a neuron that answers, one that draws
        self.generation = nn.Linear(CHANNELS + 1, CHANNELS)
        self.letters = nn.Embedding(LETTERS, LETTERS)  # logits of the letter that follows

    @classmethod
    def load(
        cls, name_or_path: str, device: str = "auto", dtype: torch.dtype = torch.float32, empty: bool = False
    ) -> FakeModel:
        """``srum-tiny`` is the untrained model; anything else is a folder that ``save`` wrote. Never empty."""
        model = cls()
        if name_or_path != "srum-tiny":
            model.load_state_dict(load_file(Path(name_or_path) / "ema.safetensors"))
        return model

    @property
    def network(self) -> nn.Module:
        return self

    def layers(self) -> list[nn.Module]:
        return [self.generation]

    def save(self, folder: Path, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "ema.safetensors")

    def draw(
        self,
        contexts: Sequence[Sequence[Segment]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        path: bool = False,
    ) -> list[Generated]:
        self.understanding["down_proj"](torch.tensor([[0.0, 1.0]]))
        weights = hashlib.sha256(self.generation.weight.detach().numpy().tobytes()).hexdigest()
        return [
            self._draw(seed_for(seed, weights, *prompts_of(context), _settings(sampling)), sampling, size, path)
            for context, seed, size in zip(contexts, seeds, sizes or [sampling.size] * len(contexts), strict=True)
        ]

    def _draw(self, seed: int, sampling: Sampling, size: tuple[int, int], path: bool) -> Generated:
        scene = random_scene(1 + seed % 2, np.random.default_rng(seed))
        latent = torch.randn(CHANNELS, *self.latent_grid(size), generator=torch.Generator().manual_seed(seed))
        timesteps = schedule(sampling.timesteps, sampling.timestep_shift)[:-1]
        states = torch.stack([latent * t for t in timesteps.tolist()])
        way = SampledPath(states, timesteps, states.sub(latent) / timesteps[:, None, None, None]) if path else None
        return Generated(Image.fromarray(render(scene)), latent, way)

    def write(self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        self.understanding["down_proj"](torch.tensor([[1.0, 0.0]]))
        texts = [
            _reply(_drawn_by(c), texts_of(c)[-1]) if _seen(c) else f"a plan of {texts_of(c)[-1]}" for c in contexts
        ]
        return [Written(text, (), torch.zeros(0), ended=True) for text in texts]

    def score(self, contexts: Sequence[Sequence[Segment]], continuations: Sequence[str]) -> list[Tensor]:
        return [_logprobs(_drawn_by(context), len(continuations)) for context in contexts]

    def resized(self, image: Image.Image) -> Image.Image:
        return image.resize([max(PATCH, side // PATCH * PATCH) for side in image.size])

    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        pooled = [np.asarray(image.convert("RGB").reduce(PATCH), dtype=np.float32) for image in images]
        return [torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1) for pixels in pooled]

    def decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        grey = [np.asarray(latent.mean(dim=0).sigmoid() * 255, dtype=np.uint8) for latent in latents]
        return [Image.fromarray(pixels).convert("RGB").resize((64, 64)) for pixels in grey]

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        if size[0] % PATCH or size[1] % PATCH:
            raise ValueError(f"image size {size} is not a multiple of {PATCH} pixels")
        return size[0] // PATCH, size[1] // PATCH

    def tokens(self, latent: Tensor) -> Tensor:
        return latent.flatten(1).T

    def corrupt(
        self, latent: Tensor, generator: torch.Generator, timestep_shift: float, t: float | None = None
    ) -> FlowNoise:
        if t is None:
            t = sample_timesteps(1, timestep_shift, generator).item()
        return FlowNoise(torch.randn(self.tokens(latent).shape, generator=generator), t)

    def targets(self, segments: Sequence[Segment], corruptions: Sequence[Any]) -> tuple[int, int]:
        image, text = (
            [s for s in segments if s.loss and not s.dropped and s.kind == kind] for kind in ("noisy", "text")
        )
        return self.length(image), self.length(text)

    def length(self, segments: Sequence[Segment]) -> int:
        return sum(
            len(self.tokens(s.latent)) if s.latent is not None else len(s.text or "") for s in segments if not s.dropped
        )

    def pack(
        self, samples: Sequence[Sequence[Segment]], corruptions: Sequence[FlowNoise], *, sees: bool = False
    ) -> dict[str, Any]:
        kept = [segment for sample in samples for segment in sample if segment.loss and not segment.dropped]
        clean = [self.tokens(segment.latent) for segment in kept if segment.latent is not None]
        texts = [torch.tensor([ord(c) % LETTERS for c in segment.text]) for segment in kept if segment.text]
        counts, letters = ([len(x) for x in own] for own in (clean, texts))
        times = [torch.full((len(x), 1), own.t) for x, own in zip(clean, corruptions, strict=True)]
        x_t = [interpolate(x, own.noise, own.t) for x, own in zip(clean, corruptions, strict=True)]
        none = torch.zeros(0, dtype=torch.long)
        return {
            "x_t": torch.cat([*x_t, torch.zeros(0, CHANNELS)]),
            "target": torch.cat([*(e.noise - x for x, e in zip(clean, corruptions, strict=True)), torch.zeros(0, 3)]),
            "timestep": torch.cat([*times, torch.zeros(0, 1)])[:, 0],
            "image_segment": torch.arange(len(clean)).repeat_interleave(torch.tensor(counts, dtype=torch.long)),
            "cell": torch.cat([*(torch.arange(n) for n in counts), none]),
            "labels": torch.cat([*texts, none]),
            "text_segment": torch.arange(len(texts)).repeat_interleave(torch.tensor(letters, dtype=torch.long)),
        }

    def forward(self, batch: Any) -> FlowForward:
        x_t, rest = batch["x_t"], {name: value for name, value in batch.items() if name != "x_t"}
        velocity = self.generation(torch.cat([x_t, batch["timestep"][:, None]], dim=1))
        return FlowForward(velocity=velocity, logits=self.letters(batch["labels"].roll(1)), **rest)

    def generation_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"generation.{name}", parameter) for name, parameter in self.generation.named_parameters()]


def run_on_fakes(folder: Path, *overrides: str) -> Path:
    """A whole run with ``FakeModel``: 2 rounds of 6 prompts with 2 candidates each, and every arm on 12 prompts."""
    small = ["rounds=2", "prompt_count=6", "candidates_per_prompt=2", "reward.on_failure=keep", "train.steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", FakeModel.load)
        run_loop(load_config(None, [*small, "train.batch_size=4", "eval.count=12", *overrides]), folder)
    return folder


def released_config(folder: Path) -> BagelConfig:
    """BAGEL-7B-MoT's config, read from its two files, which are written into ``folder`` (docs/specs/bagel.md, 1)."""
    llm = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    llm |= {"num_key_value_heads": 4, "vocab_size": 152064}
    vit = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    (folder / "llm_config.json").write_text(json.dumps(llm))
    (folder / "vit_config.json").write_text(json.dumps(vit | {"patch_size": 14, "image_size": 980}))
    return BagelConfig.from_folder(folder)


def texts_of(context: Sequence[Segment]) -> list[str]:
    """The closed texts of a context."""
    return [segment.text for segment in context if segment.text is not None and not segment.open]


def prompts_of(context: Sequence[Segment]) -> list[str]:
    """The texts of a context that guidance drops, but for what the model wrote."""
    return [s.text for s in context if s.text is not None and s.droppable and not s.written]


def _seen(context: Sequence[Segment]) -> list[bytes]:
    """What the images look like that a context shows."""
    return [segment.image.tobytes() for segment in context if isinstance(segment.image, Image.Image)]


def _settings(sampling: Sampling) -> str:
    """What decides an image: all but how often a network is run, since here is none."""
    often = f", guidance_every={sampling.guidance_every}, velocity_every={sampling.velocity_every}"
    return repr(sampling).replace(often, "")


def _drawn_by(context: Sequence[Segment]) -> int:
    """A seed of the image that a context shows and of what is asked about it."""
    return seed_for(hashlib.sha256(_seen(context)[0]).hexdigest(), texts_of(context)[-1])


def _reply(draw: int, question: str) -> str:
    score = draw % 21 / 10 - 1
    region = re.search(r"Region ID: (\d+)", question)
    if draw // 21 % 8 == 0:
        return "I cannot tell."
    return region_reply(int(region[1]), "thing", score, "so drawn") if region else layout_reply(score, "so drawn")


def _logprobs(draw: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(draw)).log_softmax(0)

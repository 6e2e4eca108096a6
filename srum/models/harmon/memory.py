"""How much memory a stage takes, from shapes alone: what ``srum doctor`` prints before any weight is read. All results
in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srum.models.checkpoints import Headers
from srum.models.harmon.checkpoint import GENERATION, HEAD, UNREAD
from srum.models.harmon.config import HarmonConfig
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe

TEXT = 64  # tokens of a request, a question or a reply
QUESTIONS = 6  # about one image
LIVE = (6, 3)  # tensors of width H and of width I that a layer of the language model holds at once
SAVED = (14, 4)  # the same that it keeps for its backward pass
BLOCK = 24  # tensors of its width that a block of MAR keeps for its backward pass
PIXELS = 6 * 128  # numbers per pixel that the autoencoder's decoder holds at once


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, read off the headers."""

    language: int
    encoder: int
    generation: int
    autoencoder: int

    @classmethod
    def of(cls, headers: Headers) -> Sizes:
        counts = dict.fromkeys(cls.__dataclass_fields__, 0)
        for name, shape in headers.shapes.items():
            if name not in (HEAD, UNREAD):
                counts[_part(name)] += math.prod(shape)
        return cls(**counts)

    @property
    def network(self) -> int:
        """All that may be trained."""
        return self.language + self.encoder + self.generation


def _part(name: str) -> str:
    if name.startswith(GENERATION):
        return "generation"
    return {"llm": "language", "vae": "autoencoder"}.get(name.partition(".")[0], "encoder")


def stage_needs(config: HarmonConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """What rollout, judging and training need for images of (H, W) pixels."""
    compute, text = BFLOAT if bfloat16 else FLOAT, config.qwen
    cached = compute * 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cached *= text.num_hidden_layers
    live = compute * (LIVE[0] * text.hidden_size + LIVE[1] * text.intermediate_size)
    drawn, seen = _tokens(config, size), _tokens(config, (config.side, config.side))
    pixels = FLOAT * PIXELS * math.prod(size)
    once = compute * sizes.network + FLOAT * sizes.autoencoder
    asking = QUESTIONS * (seen + 3 * TEXT) * cached + (seen + QUESTIONS * TEXT) * live
    return {
        "rollout": Need(once, 2 * (TEXT + drawn) * cached + 2 * drawn * live + pixels),
        "judging": Need(once, asking),
        "training, generation expert": training_need(config, sizes, size, bfloat16, Recipe()),
        "training, all weights": training_need(config, sizes, size, bfloat16, Recipe(everything=True)),
    }


def _tokens(config: HarmonConfig, size: tuple[int, int]) -> int:
    """Of an image of (H, W) pixels, with its buffers."""
    return config.mar.buffers + math.prod(side // config.autoencoder.stride for side in size)


def training_need(config: HarmonConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """What each process of a training needs: once, and for every image of a pack, all of whose tokens are counted."""
    compute, text, mar = BFLOAT if bfloat16 else FLOAT, config.qwen, config.mar
    scope = sizes.network if recipe.everything else sizes.generation
    widths = mar.decoder_width * mar.decoder_depth + mar.head_width * mar.head_depth
    widths += (mar.width * mar.depth + text.hidden_size * text.num_hidden_layers) * recipe.everything
    trained = 20 * widths * recipe.lora_rank if recipe.lora_rank else scope
    entered = FLOAT if recipe.compares and not recipe.lora_rank else 0
    frozen = recipe.frozen * (sizes.network - (0 if recipe.lora_rank else scope))
    shared = frozen + (2 * FLOAT + recipe.averages + entered) * trained
    gathered = compute * 2 * sizes.language // text.num_hidden_layers if recipe.processes > 1 else 0
    kept = BLOCK * mar.decoder_width * (1 if recipe.recompute else mar.decoder_depth)
    kept += config.repeats * 8 * mar.head_width * (1 if recipe.recompute else mar.head_depth)
    if recipe.everything:
        layers = 1 if recipe.recompute else text.num_hidden_layers
        kept += (SAVED[0] * text.hidden_size + SAVED[1] * text.intermediate_size) * layers
        kept += BLOCK * mar.width * (1 if recipe.recompute else mar.depth)
    once = shared // recipe.processes + gathered + FLOAT * sizes.autoencoder
    return Need(once, compute * kept * _tokens(config, size))

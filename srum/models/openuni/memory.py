"""How much memory a stage takes, from shapes alone: what ``srum doctor`` prints before any weight is read.

A stage holds the parts that it uses: rollout the language model, the generator and the autoencoder, judging the
language model, training the generator, once the conditions of its prompts are kept. All results in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from srum.models.checkpoints import Headers
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe
from srum.models.openuni.checkpoint import AUTOENCODER, LANGUAGE, TRANSFORMER
from srum.models.openuni.config import OpenUniConfig

TEXT = 64  # tokens of a request, a question or a reply
QUESTIONS = 6  # about one image
LIVE = (6, 3)  # tensors of width H and of width I that a layer of the language model holds at once
SAVED = 56  # tensors of its width that a layer of the transformer keeps for its backward pass, convolutions included
PIXELS = 6 * 128  # numbers per pixel that the autoencoder's decoder holds at once


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, read off the headers."""

    language: int
    transformer: int
    conditioner: int
    autoencoder: int

    @classmethod
    def of(cls, headers: Headers) -> Sizes:
        def total(*beginnings: str) -> int:
            return sum(math.prod(shape) for name, shape in headers.shapes.items() if name.startswith(beginnings))

        return cls(
            language=total(LANGUAGE),
            transformer=total(TRANSFORMER),
            conditioner=total("connector.", "projector.", "meta_queries"),
            autoencoder=total(AUTOENCODER),
        )

    @property
    def generator(self) -> int:
        """All that may be trained."""
        return self.transformer + self.conditioner


def stage_needs(config: OpenUniConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """What rollout, judging and training need for images of (H, W) pixels."""
    compute, text = BFLOAT if bfloat16 else FLOAT, config.internvl.text_config
    cached = compute * 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cached *= text.num_hidden_layers
    live = compute * (LIVE[0] * text.hidden_size + LIVE[1] * text.intermediate_size)
    asking = QUESTIONS * (config.seen_tokens + 3 * TEXT) * cached + (config.seen_tokens + QUESTIONS * TEXT) * live
    reading = (TEXT + config.queries) * (cached + live)
    decoding = compute * PIXELS * math.prod(size)
    language, autoencoder = compute * sizes.language, compute * sizes.autoencoder
    return {
        "rollout": Need(language + FLOAT * sizes.generator + autoencoder, max(reading, decoding)),
        "judging": Need(language, asking),
        "training, generation expert": training_need(config, sizes, size, bfloat16, Recipe()),
        "training, all weights": training_need(config, sizes, size, bfloat16, Recipe(everything=True)),
    }


def training_need(config: OpenUniConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """What each process of a training needs: once, and for every image of a pack. With trained queries it also holds
    the language model, whole, and its activations."""
    compute, text = BFLOAT if bfloat16 else FLOAT, config.internvl.text_config
    layers = int(config.transformer["num_layers"])
    width = int(config.transformer["num_attention_heads"]) * int(config.transformer["attention_head_dim"])
    scope = sizes.generator if recipe.everything else sizes.transformer
    trained = 16 * width * recipe.lora_rank * layers if recipe.lora_rank else scope
    entered = FLOAT if recipe.compares and not recipe.lora_rank else 0
    frozen = recipe.frozen * (sizes.generator - (0 if recipe.lora_rank else scope))
    shared = frozen + (2 * FLOAT + recipe.averages + entered) * trained
    gathered = compute * 2 * sizes.transformer // layers
    once = shared // recipe.processes + (gathered if recipe.processes > 1 else 0)
    kept = compute * SAVED * width
    per_cell = kept + 2 * compute * width * layers if recipe.recompute else kept * layers
    per_image = per_cell * math.prod(side // config.shrinks for side in size)
    if recipe.everything and not recipe.lora_rank:
        once += compute * sizes.language
        read = compute * (14 * text.hidden_size + 4 * text.intermediate_size) * text.num_hidden_layers
        per_image += read * (TEXT + config.queries) + kept_by_connector(config, compute)
    return Need(once, per_image)


def kept_by_connector(config: OpenUniConfig, compute: int) -> int:
    """Of an image, for the backward pass."""
    sizes = config.connector
    return compute * sizes.layers * (8 * sizes.width + 2 * sizes.inner) * config.queries

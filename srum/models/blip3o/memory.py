"""How much memory a stage takes, from shapes alone: what ``srum doctor`` prints before any weight is read.

A stage holds the parts that it uses: rollout the language model, the generator and the decoder, judging the language
model, training the generator, once the conditions of its prompts are kept. All results in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from srum.models.blip3o.config import DECODER, Blip3oConfig
from srum.models.checkpoints import Headers
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe

TEXT = 64  # tokens of a request, a question or a reply
QUESTIONS = 6  # about one image
LIVE = (6, 3)  # tensors of width H and of width I that a layer of the language model holds at once
SAVED = 40  # tensors of its width that a layer of the transformer keeps for its backward pass, FFN of 2.7 included
UNET = 24  # tensors of the size of its first level that the decoder's UNet holds at once, both branches
PIXELS = 6 * 128  # numbers per pixel that the autoencoder's decoder holds at once


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, read off the headers."""

    language: int
    generator: int
    queries: int
    tower: int

    @classmethod
    def of(cls, headers: Headers) -> Sizes:
        def total(*beginnings: str) -> int:
            return sum(math.prod(shape) for name, shape in headers.shapes.items() if name.startswith(beginnings))

        return cls(
            language=total("visual.", "model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
            generator=total("model.dit."),
            queries=total("model.latent_queries"),
            tower=total("model.gen_vision_tower."),
        )

    def decoder(self, folder: Path) -> int:
        """Bytes of the decoder's files, of which each has a tensor for two bytes."""
        return sum(path.stat().st_size for path in (folder / DECODER).rglob("*.safetensors"))


def stage_needs(
    config: Blip3oConfig, sizes: Sizes, folder: Path, size: tuple[int, int], bfloat16: bool
) -> dict[str, Need]:
    """What rollout, judging and training need for images of (H, W) pixels."""
    compute, text = BFLOAT if bfloat16 else FLOAT, config.qwen.text_config
    vision = config.qwen.vision_config
    seen = math.prod(-(-side // (vision.patch_size * vision.spatial_merge_size)) for side in size)
    cached = compute * 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cached *= text.num_hidden_layers
    live = compute * (LIVE[0] * text.hidden_size + LIVE[1] * text.intermediate_size)
    asking = QUESTIONS * (seen + 3 * TEXT) * cached + (seen + QUESTIONS * TEXT) * live
    decoding = 2 * UNET * compute * 320 * math.prod(size) // 64 + compute * PIXELS * math.prod(size)
    language, generator = compute * sizes.language, FLOAT * sizes.generator
    return {
        "rollout": Need(language + generator + sizes.decoder(folder) * compute // BFLOAT, decoding),
        "judging": Need(language, asking),
        "training, generation expert": training_need(config, sizes, bfloat16, Recipe()),
        "training, all weights": training_need(config, sizes, bfloat16, Recipe(everything=True)),
    }


def training_need(config: Blip3oConfig, sizes: Sizes, bfloat16: bool, recipe: Recipe) -> Need:
    """What each process of a training needs: once, and for every image of a pack. With trained queries it also holds
    the language model, whole, and its activations."""
    compute, text, width = BFLOAT if bfloat16 else FLOAT, config.qwen.text_config, config.transformer.width
    scope = sizes.generator + (sizes.queries if recipe.everything else 0)
    lora = 40 * width * recipe.lora_rank * config.transformer.layers
    trained = lora if recipe.lora_rank else scope
    entered = FLOAT if recipe.compares and not recipe.lora_rank else 0
    shared = recipe.frozen * (scope if recipe.lora_rank else 0) + (2 * FLOAT + recipe.averages + entered) * trained
    gathered = compute * 2 * sizes.generator // config.transformer.layers
    once = shared // recipe.processes + (gathered if recipe.processes > 1 else 0)
    kept = compute * SAVED * width
    layers = config.transformer.layers
    per_cell = kept + 2 * compute * width * layers if recipe.recompute else kept * layers
    per_image = per_cell * config.grid**2
    if recipe.everything:
        once += compute * sizes.language
        read = compute * (14 * text.hidden_size + 4 * text.intermediate_size) * text.num_hidden_layers
        per_image += read * (TEXT + config.queries)
    return Need(once, per_image)

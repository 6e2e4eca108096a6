"""How much memory a stage takes, from shapes alone: what ``srum doctor`` prints before any weight is read. In bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srum.models.needs import BFLOAT, FLOAT, Need, Recipe
from srum.models.showo.config import ShowoConfig
from srum.models.showo.magvit import MagvitSizes

TEXT = 128  # tokens of a prompt, a question or a reply
QUESTIONS = 6  # about one image
LIVE = (8, 3)  # tensors of width H and of width I that a layer holds at once
SAVED = (12, 2)  # that a layer keeps for its backward pass


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, of the network, MAGVIT-v2 and CLIP's tower, and the sizes of MAGVIT-v2; features that CLIP
    makes of an image."""

    network: int
    magvit: int
    tower: int
    tokenizer: MagvitSizes
    features: int


def stage_needs(config: ShowoConfig, sizes: Sizes, bfloat16: bool) -> dict[str, Need]:
    """What rollout, judging and training need. An image is drawn with and without its text side by side; numbers of its
    draws are float32, one for each cell and image id."""
    compute, phi = BFLOAT if bfloat16 else FLOAT, config.phi
    live = compute * (LIVE[0] * phi.hidden_size + LIVE[1] * phi.intermediate_size)
    row = config.cells + TEXT
    numbers = 4 * FLOAT * config.cells * config.codes
    pixels = 6 * FLOAT * sizes.tokenizer.up[0][0] * config.side**2
    seen = sizes.features or config.cells
    cached = 2 * compute * phi.hidden_size * phi.num_hidden_layers
    asking = QUESTIONS * (seen + 2 * TEXT) * cached + (seen + QUESTIONS * TEXT) * live
    held, eyes = compute * sizes.network, compute * sizes.tower + FLOAT * sizes.magvit
    return {
        "rollout": Need(held + FLOAT * sizes.magvit, max(2 * row * live + numbers, pixels)),
        "judging": Need(held + eyes, asking),
        "training, all weights": training_need(config, sizes, bfloat16, Recipe(everything=True)),
    }


def training_need(config: ShowoConfig, sizes: Sizes, bfloat16: bool, recipe: Recipe) -> Need:
    """What each process of a training needs: once, and for every image of a pack. All weights are trained, since what
    draws is what reads."""
    compute, phi = BFLOAT if bfloat16 else FLOAT, config.phi
    lora = 2 * (5 * phi.hidden_size + phi.intermediate_size) * recipe.lora_rank * phi.num_hidden_layers
    trained = lora if recipe.lora_rank else sizes.network
    entered = FLOAT if recipe.compares and not recipe.lora_rank else 0
    shared = recipe.frozen * (sizes.network if recipe.lora_rank else 0)
    shared += (2 * FLOAT + recipe.averages + entered) * trained
    gathered = compute * 2 * sizes.network // phi.num_hidden_layers
    once = shared // recipe.processes + (gathered if recipe.processes > 1 else 0)
    row = config.cells + (sizes.features or config.cells // 4) + TEXT
    kept = compute * (SAVED[0] * phi.hidden_size + SAVED[1] * phi.intermediate_size)
    layers = phi.num_hidden_layers
    per_token = kept + 2 * compute * phi.hidden_size * layers if recipe.recompute else kept * layers
    logits = 3 * FLOAT * phi.vocab_size * config.cells
    return Need(once + compute * sizes.tower + FLOAT * sizes.magvit, math.ceil(per_token * row) + logits)

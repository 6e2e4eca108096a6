"""How much memory a stage takes, from shapes alone: what ``srum doctor`` prints before any weight is read.

Counted are weights, gradients, optimiser state, keys and values, and the activations that live at the same time;
``benchmarks/memory.py`` compares the sums with what processes took. Weights are float32 as the stages load them; under
bfloat16 autocast a bfloat16 copy stands beside each that may learn and is in use.

H hidden width, I feed-forward width, L tokens of an image with its two markers; all results in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from srum.models.bagel.autoencoder import build_autoencoder
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork
from srum.models.needs import BFLOAT, FLOAT, Need, Recipe

TEXT = 48  # tokens of a prompt, a question or a reply
QUESTIONS = 6  # about one image
BRANCHES = 2  # of guided sampling: with the prompt and without
LIVE = (6, 3)  # tensors of width H and of width I that a layer holds at once
DECODED = 6  # tensors of full resolution that the autoencoder's decoder holds at once
SAVED = (14, 4)  # tensors of width H and of width I that a layer keeps for its backward pass


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    network: int
    generation: int
    layers: int
    autoencoder: int

    @classmethod
    def of(cls, config: BagelConfig) -> Sizes:
        """Counted on the meta device: nothing is allocated."""
        with torch.device("meta"):
            network, autoencoder = BagelNetwork(config), build_autoencoder(config.autoencoder)
        return cls(
            network=sum(p.numel() for p in network.parameters()),
            generation=sum(p.numel() for _, p in network.generation_parameters()),
            layers=sum(p.numel() for p in network.decoder.layers.parameters()),
            autoencoder=sum(p.numel() for p in autoencoder.parameters()),
        )


def stage_needs(config: BagelConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool) -> dict[str, Need]:
    """What rollout, judging and training (the generation expert, all weights) need for images of (H, W) pixels."""
    llm = config.llm
    compute = BFLOAT if bfloat16 else FLOAT
    latent = _latent_tokens(config, size)
    seen = (size[0] // config.vit.patch_size) * (size[1] // config.vit.patch_size) + 2
    live = compute * (LIVE[0] * llm.hidden_size + LIVE[1] * llm.intermediate_size)
    cached = compute * 2 * llm.num_key_value_heads * llm.head_dim * llm.num_hidden_layers
    copies = BFLOAT if bfloat16 else 0
    weights = FLOAT * (sizes.network + sizes.autoencoder)

    denoising = BRANCHES * latent * live + BRANCHES * (latent + TEXT) * cached
    decoding = DECODED * FLOAT * config.autoencoder.ch * size[0] * size[1]
    asking = QUESTIONS * (seen + 3 * TEXT) * cached + (seen + QUESTIONS * TEXT) * live
    return {
        "rollout": Need(weights + copies * sizes.network, max(denoising, decoding)),
        "judging": Need(weights + copies * (sizes.network - sizes.generation), asking),
        "training, generation expert": training_need(config, sizes, size, bfloat16, Recipe()),
        "training, all weights": training_need(config, sizes, size, bfloat16, Recipe(everything=True)),
    }


def training_need(config: BagelConfig, sizes: Sizes, size: tuple[int, int], bfloat16: bool, recipe: Recipe) -> Need:
    """What each process of a training needs: once, and for every image of a pack.

    Sharded, a process holds its share of all weights, of which it alone reads its part, and whole, in the type that it
    computes in, those of two layers and of what is outside the layers.
    """
    llm = config.llm
    compute = BFLOAT if bfloat16 else FLOAT
    scope = sizes.network if recipe.everything else sizes.generation
    trained = recipe.lora_rank * _lora_width(config) * (2 if recipe.everything else 1) if recipe.lora_rank else scope
    frozen = sizes.network - (0 if recipe.lora_rank else scope)
    entered = FLOAT if recipe.compares and not recipe.lora_rank else 0
    shared = recipe.frozen * frozen + (2 * FLOAT + recipe.averages + entered) * trained
    layer = sizes.layers // llm.num_hidden_layers
    gathered = compute * (2 * layer + sizes.network - sizes.layers)
    copies = BFLOAT * trained if bfloat16 else 0
    once = shared // recipe.processes + (gathered if recipe.processes > 1 else copies) + FLOAT * sizes.autoencoder
    kept = compute * (SAVED[0] * llm.hidden_size + SAVED[1] * llm.intermediate_size)
    inputs = compute * 2 * llm.hidden_size  # of a layer, with the residual stream's gradient
    per_token = kept + inputs * llm.num_hidden_layers if recipe.recompute else kept * llm.num_hidden_layers
    return Need(once, per_token * (_latent_tokens(config, size) + TEXT))


def _latent_tokens(config: BagelConfig, size: tuple[int, int]) -> int:
    return (size[0] // config.pixels_per_token) * (size[1] // config.pixels_per_token) + 2


def _lora_width(config: BagelConfig) -> int:
    """Numbers of an update of rank 1 of every linear layer of one expert."""
    llm = config.llm
    hidden, inner, kv = llm.hidden_size, llm.intermediate_size, llm.num_key_value_heads * llm.head_dim
    return llm.num_hidden_layers * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))

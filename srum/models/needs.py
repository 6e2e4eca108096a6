"""How memory is counted: what an architecture answers when ``srum doctor`` asks what fits on a machine."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, BFLOAT = 4, 2  # bytes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a training is done, as far as memory goes (``srum.config.TrainConfig``)."""

    everything: bool = False  # else the generation expert
    lora_rank: int = 0
    frozen: int = FLOAT  # bytes of a weight that is not trained
    recompute: bool = False  # of the layers' activations
    averages: int = 2 * FLOAT  # bytes of AdamW's two, for each weight
    compares: bool = True  # with the weights that entered, as region_nft does
    processes: int = 1  # that share the network


@dataclass(frozen=True)
class Need:
    """Memory of a stage: once, and for every image of a call."""

    once: int
    per_image: int

    def images(self, available: int) -> int:
        """How many images a call may hold; 0 where the stage does not fit at all."""
        return max(0, available - self.once) // self.per_image

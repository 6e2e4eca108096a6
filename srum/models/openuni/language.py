"""Stock InternVL3, with what it sees of an image (docs/specs/openuni.md, 5 and 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from srum.models.queries.language import Language, Run

AT_ONCE = 16  # images per pass of the vision tower


class InternVL(Language):
    """InternVL3, frozen."""

    def images(self, pixels: Tensor) -> list[Run]:
        """Images of normalised pixels (B, 3, S, S) as runs."""
        features = [self.features(some) for some in pixels.split(AT_ONCE)]
        return [self.inputs(one) for one in torch.cat(features)] if features else []

    def features(self, pixels: Tensor) -> Tensor:
        """What the language model reads of images, (B, N, H)."""
        seen = self.network.model.get_image_features(
            pixel_values=pixels.to(self.device),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            return_dict=True,
        )
        features: Tensor = seen.pooler_output
        return features

"""Open-vocabulary detectors of transformers, asked for the things that the prompt names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from pydantic import validate_call
from safetensors import SafetensorError
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from srum.config import Fraction
from srum.geometry import clip_box
from srum.grounding.base import cannot_load
from srum.grounding.filtering import without_overlaps
from srum.grounding.phrases import noun_phrases
from srum.records import Region


class DetectorGrounder:
    """OWL-ViT, OWLv2 or Grounding DINO from ``checkpoint``, a folder that transformers wrote or a name on the hub.

    ``min_score``: detections stay above this confidence, which means different things to different detectors: 0.2 suits
    OWLv2, 0.3 Grounding DINO. ``max_overlap``: IoU of boxes above which the detection of lower confidence goes.
    ``device``: where it runs. Raises GrounderError for a checkpoint that cannot be used.
    """

    @validate_call
    def __init__(
        self,
        checkpoint: str = "google/owlv2-base-patch16-ensemble",
        min_score: Fraction = 0.2,
        max_overlap: Fraction = 0.5,
        device: str = "cpu",
    ) -> None:
        self.model, self.processor = _load(checkpoint, device)
        self.min_score = min_score
        self.max_overlap = max_overlap

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions per RGB image, boxes without masks, by falling confidence, labelled with the phrase they answer."""
        return [self._regions(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    @torch.inference_mode()
    def _regions(self, image: Image, prompt: str) -> list[Region]:
        phrases = [noun_phrases(prompt) or [prompt]]
        inputs = self.processor(images=image, text=phrases, truncation=True, return_tensors="pt").to(self.model.device)
        size = (image.height, image.width)
        (found,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=self.min_score, target_sizes=[size], text_labels=phrases
        )
        best_first = found["scores"].argsort(descending=True, stable=True).tolist()
        boxes, labels = found["boxes"].tolist(), found["text_labels"]
        # Detectors see a padded image: what they find in the padding is cut off.
        cut = [(clip_box(boxes[index], size), labels[index]) for index in best_first]
        regions = [
            Region(id=1, box=box, area=(box[2] - box[0]) * (box[3] - box[1]), source="detector", label=label or None)
            for box, label in cut
            if box[0] < box[2] and box[1] < box[3]
        ]
        return without_overlaps(regions, self.max_overlap)


def _load(checkpoint: str, device: str) -> tuple[Any, Any]:
    """The model, in float32 on ``device``, and its processor."""
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
        model = AutoModelForZeroShotObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ValueError: another kind of model
        raise cannot_load("detector", checkpoint, error) from error
    return model.to(device).eval(), processor

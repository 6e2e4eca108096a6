"""Yes or no about an image, by a network of transformers."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from srum.models import find_device

CHECKPOINT = "Salesforce/blip-vqa-capfilt-large"


class BlipVqa:
    """BLIP's answers to questions (evaluator ``vqa``); not the mPLUG of DPG's published rows."""

    concurrency = 1

    def __init__(self, device: str = "auto", checkpoint: str = CHECKPOINT) -> None:
        from transformers import AutoProcessor, BlipForQuestionAnswering

        self.name = f"BLIP-VQA ({checkpoint})"
        self.device = find_device(device)
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.network: Any = BlipForQuestionAnswering.from_pretrained(checkpoint).eval().to(self.device)

    @torch.inference_mode()
    def holds(self, image: Image.Image, question: str) -> bool:
        """Whether its answer is yes."""
        inputs = self.processor(image, question, return_tensors="pt").to(self.device)
        answer = self.processor.decode(self.network.generate(**inputs)[0], skip_special_tokens=True)
        return bool(answer.strip().lower() == "yes")

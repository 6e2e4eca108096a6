"""Objects in images, as GenEval's scorer finds them: Mask2Former by mmdetection's rules, colours by CLIP.

The networks are transformers', so that nothing else has to be installed; their weights are another training of
Mask2Former than mmdetection's, so results are ours, not official, until compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from srum.models import find_device
from srum.records import Box

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
SHORT, LONG, DIVISOR = 800, 1333, 32  # pixels
MOST = 100  # pairs of a query and a class that are looked at
LEAST = 0.3  # below this score nothing is used
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = "#999999"  # what is put around an object whose colour is asked for
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Detection:
    """An object: its number in COCO's order, score, box (x0, y0, x1, y1) and mask (H, W) in pixels of the image."""

    label: int
    score: float
    box: Box
    mask: np.ndarray | None = None


class Mask2FormerClip:
    """Finds objects and tells their colours. GenEval's evaluator."""

    name, concurrency = "Mask2Former Swin-S + CLIP ViT-L/14 (transformers)", 1

    def __init__(self, device: str = "auto", detector: str = DETECTOR, clip: str = CLIP) -> None:
        from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        self.device = find_device(device)
        self.detector: Any = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval().to(self.device)
        self.clip: Any = CLIPModel.from_pretrained(clip).eval().to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(clip)
        self._colours_of = lru_cache(None)(self._text_features)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects of an RGB image with scores above ``LEAST``, best first."""
        pixels, resized = prepared(image)
        found = self.detector(pixel_values=pixels.to(self.device))
        classes, masks = found.class_queries_logits[0].float(), found.masks_queries_logits[0].float()
        return detections(classes, masks, tuple(pixels.shape[2:]), resized, image.size[::-1])  # type: ignore[arg-type]

    @torch.inference_mode()
    def colours(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object, which is called ``name``."""
        crops = torch.stack([_clip_pixels(_alone(image, thing)) for thing in objects]).to(self.device)
        seen = self.clip.visual_projection(self.clip.vision_model(pixel_values=crops).pooler_output)
        best = (normalize(seen, dim=-1) @ self._colours_of(name).T).argmax(dim=-1)
        return [COLOURS[index] for index in best.tolist()]

    def _text_features(self, name: str) -> Tensor:
        """(colours, features): averaged over the templates."""
        rows = []
        for colour in COLOURS:
            texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            features = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
            rows.append(normalize(normalize(features, dim=-1).mean(dim=0), dim=0))
        return torch.stack(rows)


def prepared(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """The image as Mask2Former takes it, (1, 3, H, W), and its size (H, W) without the padding: the short side 800, the
    long one at most 1333, padded to multiples of 32."""
    width, height = image.size
    scale = min(LONG / max(width, height), SHORT / min(width, height))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = cv2.resize(np.asarray(image, dtype=np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) / 255
    return pad(_normed(pixels, MEAN, DEVIATION), (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR))[None], size


def detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> list[Detection]:
    """Objects of logits (queries, classes + 1) and (queries, h, w), by mmdetection's rules; sizes are (H, W).

    A score is the probability of the class times the mean of the mask's within it, so that no pair whose class is below
    ``LEAST`` needs a mask.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    scores, places = scores[scores > LEAST], places[scores > LEAST]
    objects = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, probabilities.shape[1])
        logits = _enlarged(mask_logits[query], padded)[: resized[0], : resized[1]]
        logits = _enlarged(logits, original)
        mask = logits > 0
        score *= float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
        if score > LEAST:
            objects.append(Detection(label, score, _box(mask), mask.cpu().numpy()))
    return sorted(objects, key=lambda thing: -thing.score)


def _enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _box(mask: Tensor) -> Box:
    rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def by_name(objects: Sequence[Detection], names: Sequence[str]) -> dict[str, list[Detection]]:
    """The objects by what they are called, in their order."""
    named: dict[str, list[Detection]] = defaultdict(list)
    for thing in objects:
        named[names[thing.label]].append(thing)
    return named


def _alone(image: Image.Image, thing: Detection) -> Image.Image:
    """The object's box, with what is outside its mask grey."""
    grey = Image.new("RGB", image.size, GREY)
    masked = image if thing.mask is None else Image.composite(image, grey, Image.fromarray(thing.mask))
    x0, y0, x1, y1 = map(round, thing.box)
    return masked.crop((x0, y0, x1, y1))


def _clip_pixels(image: Image.Image, side: int = 224) -> Tensor:
    """The image as CLIP takes it: the short side resized, the middle, normalized."""
    scale = side / min(image.size)
    resized = image.resize([max(side, int(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return _normed(pixels, CLIP_MEAN, CLIP_DEVIATION)


def _normed(pixels: np.ndarray, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """(3, H, W) of pixels (H, W, 3)."""
    channels = torch.from_numpy(pixels).permute(2, 0, 1)
    return (channels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


Named = Mapping[str, Sequence[Detection]]

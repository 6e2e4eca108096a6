"""Regions without a network: connected components of like colour that stand out from the background.

Made for flat shapes on a plain ground; on photographs it gives the larger areas of like colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL.Image import Image
from pydantic import validate_call

from srum.config import Fraction
from srum.grounding.base import masked_region
from srum.records import Region

WORKING_SIDE = 256  # larger images are segmented at this length of their longer side
COLOUR_RADIUS = 25.0  # distance in CIELAB up to which two pixels are of one colour
MAX_COLOURS = 12
PURITY = 0.9  # of the largest contrast with the background among a pixel and its neighbours
PURE_PART = 0.3  # of the pixels of a small shape
SQUARE = np.ones((3, 3), np.uint8)
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


class ClassicalGrounder:
    """``min_area``: regions smaller than this fraction of the image, or nowhere 3 px wide, are specks."""

    @validate_call
    def __init__(self, min_area: Fraction = 0.003) -> None:
        self.min_area = min_area

    def propose(self, images: Sequence[Image], prompts: Sequence[str]) -> list[list[Region]]:
        """Regions with masks per image, in no particular order; the prompts are not used."""
        return [self._regions(np.asarray(image.convert("RGB"))) for image in images]

    def _regions(self, rgb: np.ndarray) -> list[Region]:
        labels = segment(_shrink(rgb), self.min_area)
        labels = cv2.resize(labels, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_NEAREST)
        masks = (labels == label for label in np.unique(labels[labels > 0]))
        return [masked_region(index, mask, "classical") for index, mask in enumerate(masks, start=1)]


def segment(rgb: np.ndarray, min_area: float) -> np.ndarray:
    """Labels (H, W) uint16 of an RGB image (H, W, 3) uint8: 0 is background, components count from 1.

    The background is the median colour of the border. Every pixel takes the nearest of the image's main colours, so
    that touching shapes of different colour come apart; what is too small or too thin to be a component (such as the
    mixed colours of an edge) joins the component beside it, or goes.
    """
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    border = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    colours = _main_colours(lab, np.median(border, axis=0), min_area)
    distances = _distances(lab, colours)
    components = _components(distances.argmin(axis=-1).astype(np.uint8))
    return _joined(components, _solid(components, min_area), foreground=distances[..., 0] > COLOUR_RADIUS)


def _main_colours(lab: np.ndarray, background: np.ndarray, min_area: float) -> np.ndarray:
    """The background's colour and then the most frequent others (K, 3), none of a mere speck.

    Greedy: the fullest cell of a coarse histogram, moved to the mean of its neighbourhood, takes all pixels near it.
    Only pure pixels count, no neighbour of which stands out much more: the edges of shapes have mixed colours.
    """
    contrast = _distances(lab, background[None])[..., 0]
    pure = lab[(contrast > COLOUR_RADIUS) & (contrast >= PURITY * cv2.dilate(contrast, SQUARE))]
    fewest = min_area * contrast.size * PURE_PART
    colours = [background]
    while len(pure) >= fewest and len(colours) <= MAX_COLOURS:
        cells = (pure // COLOUR_RADIUS + 8).astype(np.int64) @ np.array([256, 16, 1])
        seed = pure[cells == np.bincount(cells).argmax()].mean(axis=0)
        centre = pure[_distances(pure, seed[None])[:, 0] <= COLOUR_RADIUS].mean(axis=0)
        near = _distances(pure, np.stack([seed, centre])).min(axis=-1) <= COLOUR_RADIUS
        if near.sum() >= fewest:
            colours.append(centre)
        pure = pure[~near]
    return np.stack(colours)


def _distances(lab: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Distances (..., K) in CIELAB of pixels (..., 3) to colours (K, 3)."""
    return np.linalg.norm(lab[..., None, :] - colours, axis=-1)


def _components(colour_index: np.ndarray) -> np.ndarray:
    """Connected components (H, W) float32 of equal colour, counted from 1; 0 where the colour is 0."""
    components = np.zeros(colour_index.shape, np.float32)
    for colour in range(1, int(colour_index.max()) + 1):
        _, labels = cv2.connectedComponents((colour_index == colour).astype(np.uint8), connectivity=4)
        components[labels > 0] = labels[labels > 0] + components.max()
    return components


def _solid(components: np.ndarray, min_area: float) -> np.ndarray:
    """Where (H, W) the component is large enough and somewhere 3 px wide."""
    label = components.astype(np.int64)
    large = np.bincount(label.ravel()) >= min_area * label.size
    core = cv2.erode(components, CROSS) == cv2.dilate(components, CROSS)
    wide = np.zeros_like(large)
    wide[label[core]] = True
    return (components > 0) & (large & wide)[label]


def _joined(components: np.ndarray, solid: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Labels (H, W) uint16 of the solid components, counted from 1; foreground beside one (1.5 px) belongs to it."""
    values, labels = np.unique(np.where(solid, components, 0), return_inverse=True)
    labels = labels.reshape(components.shape).astype(np.uint16)
    if len(values) == 1:
        return labels
    distance, places = cv2.distanceTransformWithLabels(
        (~solid).astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
    )
    label_of_place = np.zeros(places.max() + 1, np.uint16)
    label_of_place[places[solid]] = labels[solid]
    return np.where(foreground & (distance < 1.5), label_of_place[places], labels)


def _shrink(rgb: np.ndarray) -> np.ndarray:
    """The image at ``WORKING_SIDE`` on its longer side, where it is larger."""
    height, width = rgb.shape[:2]
    scale = WORKING_SIDE / max(height, width)
    if scale >= 1:
        return rgb
    return cv2.resize(rgb, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)

"""A model of this project as lmms-eval's ``srum``: its runner, its tasks (MME, MMBench, MMMU, POPE, ...), our weights.

    lmms-eval --model srum --model_args pretrained=DIR --tasks mme,pope,gqa

lmms-eval (``pip install 'srum[understanding]'``) finds it by the entry point of the group ``lmms_eval.models``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from srum import models
from srum.images import open_image, to_rgb
from srum.models.base import Decoding, Segment
from srum.processes import Processes
from srum.seeding import seed_for

MARK = "<image>"  # in a context: here goes the next image
MAX_TOKENS = 1024  # of a reply where the task does not say

manifest = ModelManifest(model_id="srum", simple_class_path="srum.evaluation.lmms.Lmms")


class Lmms(lmms):
    """Answers questions about images. ``pretrained``: a folder, a hub id or a shipped name."""

    is_simple = True

    def __init__(
        self, pretrained: str, device: str = "auto", batch_size: int | str = 8, seed: int | str = 0, **_: Any
    ) -> None:
        super().__init__()
        self.model = models.load(pretrained, device)
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._rank, self._world_size = Processes.here().rank, Processes.here().count

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self._world_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A reply to each request, cut off where the task says; those that decode alike go together."""
        replies: dict[int, str] = {}
        for decoding, numbers in _alike(requests):
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                contexts = [self._context(requests[number].args) for number in batch]
                seeds = [seed_for(self.seed, *map(str, requests[number].args[3:6])) for number in batch]
                for number, written in zip(batch, self.model.write(contexts, decoding, seeds), strict=True):
                    replies[number] = _until(written.text, requests[number].args[1])
        return [replies[number] for number in range(len(requests))]

    def _context(self, arguments: Sequence[Any]) -> list[Segment]:
        """Texts and images in the order that the marks give; images without a mark come first."""
        text, _, visuals, doc_id, task, split = arguments
        images = [_image(visual) for visual in visuals(self.task_dict[task][split][doc_id]) or ()]
        parts = text.split(MARK)
        if len(parts) - 1 not in (0, len(images)):
            raise ValueError(f"{task}: {len(parts) - 1} marks {MARK} for {len(images)} images")
        seen = [Segment("seen", image=image) for image in images]
        if len(parts) == 1:
            return [*seen, Segment("text", text=text)]
        ordered = [Segment("text", text=parts[0])]
        for segment, part in zip(seen, parts[1:], strict=True):
            ordered += [segment, Segment("text", text=part)]
        return [segment for segment in ordered if segment.kind == "seen" or (segment.text or "").strip()]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not given: the benchmarks that this is for ask for replies."""
        raise NotImplementedError("srum answers in words; choose a task that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not given."""
        raise NotImplementedError("srum answers once; choose a task of one round")


def _alike(requests: Sequence[Any]) -> Iterator[tuple[Decoding, list[int]]]:
    groups: dict[Decoding, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(_decoding(request.args[1]), []).append(number)
    yield from groups.items()


def _decoding(wanted: Mapping[str, Any]) -> Decoding:
    temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample", True) else 0.0
    return Decoding(max_tokens=int(wanted.get("max_new_tokens") or MAX_TOKENS), temperature=temperature)


def _until(text: str, wanted: Mapping[str, Any]) -> str:
    """The text up to the first of the ends that the task names."""
    ends = wanted.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0]
    return text


def _image(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return to_rgb(visual)
    if isinstance(visual, str):
        return open_image(Path(visual))
    raise ValueError(f"srum sees images, not {type(visual).__name__}")

"""From a judge's reply to a reward map as the released SRUM code goes, to compare ours with (docs/specs/bagel.md, 12).

Its defects are kept (docs/specs/srum.md, section 3): over a canvas of 0.5, the maximum loses all criticism of a region;
blank lines and markdown lose scores, unfinished thoughts and numbers outside [-1, 1] give some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from srum.records import Box
from srum.stages.reward_map import reference_pixels

GLOBAL_ENTRY = "global_layout_reward"
SCORE = r"score:\s*(-?\d+\.?\d*)"

Fields = dict[str, Any]


def reference_regions(reply: str) -> dict[int, Fields]:
    """Region id -> ``identified_object``, ``score`` and ``reason``, as far as found, of blocks between blank lines."""
    regions = {}
    for block in _answer(reply).split("\n\n"):
        if index := _find(r"region id:\s*(\d+)", block):
            regions[int(index)] = _fields(r"identified object:(.*)", block)
    return regions


def reference_layout(reply: str) -> Fields:
    """``global_layout_score``, ``reason`` and, where there is one, ``layout_analysis``; empty without a score."""
    text = _answer(reply)
    score = re.search(SCORE, text, re.I)
    if score is None:
        return {}
    reason = re.sub(r"^reason:", "", text[score.end() :].strip(), flags=re.I).strip()
    analysis = _find(r"composition analysis:((?s:.*))", text)
    fields: Fields = {} if analysis is None else {"layout_analysis": analysis}
    return fields | {"global_layout_score": float(score[1]), "reason": reason}


def reference_sample(reply: str) -> Fields:
    """``identified_object``, ``score`` and ``reason``, as far as found, of a reply about the whole image."""
    return _fields(r"overall impression:(.*)", _answer(reply))


def reference_record(judged: Mapping[str, Any], prompts: Mapping[str, str]) -> Fields | None:
    """The training record of a judged image, its prompt looked up by file name; None where the image is dropped.

    A layout score of 0, which stands for a failed judgement, drops the image, and so do honest zeros.
    """
    name, layout = judged.get("image_file", ""), judged.get("global_layout_reward") or {}
    score = layout.get("global_layout_score")
    if name not in prompts or score == 0:
        return None
    entries = [
        {"object": region["identified_object"], "bbox": region["bbox"], "score": region["score"]}
        for region in judged["vlm_rewards"]
        if all(region.get(key) is not None for key in ("identified_object", "bbox", "score"))
    ]
    if score is not None:
        box, reason = layout.get("bbox", [0, 0, 0, 0]), layout.get("reason", "")
        entries.insert(0, {"object": GLOBAL_ENTRY, "bbox": box, "score": score, "reason": reason})
    if not entries:
        return None
    return {"bad_image_file": name, "good_image_file": name, "prompt": prompts[name], "vlm_rewards": entries}


def reference_map(entries: Sequence[Mapping[str, Any]], layout: float | None, size_wh: tuple[int, int]) -> Tensor:
    """The pixel map (H, W) float32 of ``vlm_rewards`` entries for an image of ``size_wh`` (W, H).

    ``layout`` None counts as 0. Scores are not checked, boxes index the image as they are, invalid ones are skipped.
    """
    width, height = size_wh
    found = [(_box(e.get("bbox")), e.get("score", 0.0)) for e in entries if e.get("object") != GLOBAL_ENTRY]
    boxed = [(box, score) for box, score in found if box is not None]
    values = reference_pixels([box for box, _ in boxed], [score for _, score in boxed], (height, width))
    return values * ((layout or 0.0) + 1) / 2


def _answer(reply: str) -> str:
    return reply.rsplit("</think>", 1)[-1].strip()


def _fields(label: str, text: str) -> Fields:
    found = {
        "identified_object": _find(label, text),
        "score": _find(SCORE, text),
        "reason": _find(r"reason:((?s:.*))", text),
    }
    return {key: float(value) if key == "score" else value for key, value in found.items() if value is not None}


def _find(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.I)
    return match[1].strip() if match else None


def _box(value: object) -> Box | None:
    if not (isinstance(value, list | tuple) and len(value) == 4):
        return None
    try:
        x0, y0, x1, y1 = (int(number) for number in value)
    except (TypeError, ValueError):
        return None
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

"""What ``srum-tiny`` is pretrained on: a plain list of tasks, each a function from a random generator to one sample.

Images are uint8 arrays here; the pretraining loop turns them into pixels and latents. Generation learns from captions
that are wrong in one fact at the rate ``WRONG_CAPTIONS``, as web captions are; understanding, the planning pass and
edits learn from the truth. That is where the gap comes from on which the method lives.

Every prompt, after corruption too, is of the training split, and no text and no image has a pair of shape and colour
that is held out.
"""

from __future__ import annotations

from srum.shapes.wording import PLAN_INSTRUCTION, plan_text
from srum.train.tasks.base import Drawing, Part, Sample, Task
from srum.train.tasks.editing import WRONG_REPLIES, edit, reflect, reflect_own
from srum.train.tasks.generation import (
    WRONG_CAPTIONS,
    caption_to_image,
    composed_caption_to_image,
    plan_then_image,
    reconstruct,
    regenerate,
)
from srum.train.tasks.judging import judge, judge_own
from srum.train.tasks.process import stroke_draft, stroke_inspect, stroke_plan
from srum.train.tasks.understanding import find_all, question_answering

TASKS = (
    Task("caption_to_image", 0.16, caption_to_image),
    Task("composed_caption_to_image", 0.06, composed_caption_to_image),
    Task("plan_then_image", 0.15, plan_then_image),
    Task("question_answering", 0.07, question_answering),
    Task("find_all", 0.05, find_all),
    Task("judge", 0.16, judge),
    Task("judge_own", 0.0, own=judge_own),
    Task("edit", 0.10, edit),
    Task("reflect", 0.10, reflect),
    Task("reflect_own", 0.0, own=reflect_own),
    Task("reconstruct", 0.03, reconstruct),
    Task("regenerate", 0.04, regenerate),
    Task("stroke_plan", 0.03, stroke_plan),
    Task("stroke_draft", 0.03, stroke_draft),
    Task("stroke_inspect", 0.02, stroke_inspect),
)

__all__ = [
    "PLAN_INSTRUCTION",
    "TASKS",
    "WRONG_CAPTIONS",
    "WRONG_REPLIES",
    "Drawing",
    "Part",
    "Sample",
    "Task",
    "plan_text",
]

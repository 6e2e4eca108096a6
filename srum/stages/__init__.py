"""The stages of a round: their names, also those of their commands, the files that they write, and where they are done.

A table without imports of weight, so that the command line and the folder of a run can ask it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage ``name`` that writes the files NAME.jsonl of ``writes`` into the round's folder.

    ``perform`` is the ``module:function`` that does it, called with the run and the number of the round; what is
    finished it does not do again. ``summary`` is what its command says of it.
    """

    name: str
    writes: tuple[str, ...]
    perform: str
    summary: str


ROLLOUT = Stage(
    "rollout", ("prompts", "candidates"), "srum.stages.rollout:rollout_stage", "Generate the candidates of a round."
)
IMAGES = Stage(
    "images",
    ("pictures",),
    "srum.stages.pictures:images_stage",
    "Read the images that are reconstructed, and encode them.",
)
GROUND = Stage("ground", ("regions",), "srum.grounding.stage:ground_stage", "Propose the regions of every candidate.")
JUDGE = Stage(
    "judge",
    ("judgements",),
    "srum.judging.stage:judge_stage",
    "Let the model score regions and layout of each.",
)
RASTERIZE = Stage(
    "rasterize",
    ("rewards",),
    "srum.stages.rasterize:rasterize_stage",
    "Turn judgements into reward maps on the latent grid.",
)
PAIR = Stage(
    "pair", ("pairs",), "srum.stages.pairs:pair_stage", "Pair the candidates that miss their prompt with good ones."
)
TRAIN = Stage("train", (), "srum.train.stage:train_stage", "Train every arm on the candidates of a round.")

SHIPPED = (ROLLOUT, GROUND, JUDGE, RASTERIZE, IMAGES, PAIR, TRAIN)
STAGE_OF = {name: stage.name for stage in SHIPPED for name in stage.writes} | {"verdicts": "eval"}
# the command that writes a file of this name

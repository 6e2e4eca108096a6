"""Reading a run: its candidates with all that is known of each, their images and arrays, and the checker's verdicts.

    run = srum.open_run("runs/demo")
    wrong = run.candidates(round=0).filter(lambda c: c.score is not None and c.score < -0.5)
    for candidate in wrong:
        candidate.judgement, candidate.image(), candidate.reward_map()
    wrong.table()

In a notebook a candidate shows its picture and a collection its gallery. Nothing is written. Records are read round by
round, when an iteration comes to them; images and arrays when they are asked for. Of a run that is still going on there
is what its stages have finished.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from srum.config import load_config
from srum.evaluation.accuracy import CheckedImage
from srum.images import open_image
from srum.lazy import Lazy
from srum.records import Candidate, Grounding, Judgement, Prompt, Record, Region, RewardMap
from srum.run import find_method
from srum.run_dir import CONFIG, RunError, read_by_id, read_records, read_so_far, round_dir, round_dirs
from srum.tensors import read_tensor
from srum.views import plots

if TYPE_CHECKING:
    import pandas

    from srum.train.methods.base import Method

R = TypeVar("R", bound=Record)

GALLERY = 24  # images of a collection's picture


@dataclass(frozen=True, repr=False)
class CandidateView:
    """A candidate of ``round`` with all that is known of it; what no stage has said yet is None.

    ``folder`` is that of the round. A candidate whose judgement failed is judged, but has no ``reward``.
    """

    round: int
    folder: Path
    record: Candidate
    prompt: Prompt
    grounding: Grounding | None
    judgement: Judgement | None
    reward: RewardMap | None

    @property
    def id(self) -> str:
        """The id of the candidate, unique within its round."""
        return self.record.id

    @property
    def category(self) -> str | None:
        """GenEval's category of the prompt (its ``tag``), where it has one."""
        return self.prompt.metadata.get("tag")

    @property
    def regions(self) -> list[Region]:
        """The region proposals, boxes in pixels of the image; none where there is no grounding."""
        return self.grounding.regions if self.grounding else []

    @property
    def score(self) -> float | None:
        """The candidate's one score in [-1, 1] (``RewardMap.sample_score``)."""
        return self.reward.sample_score if self.reward else None

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words: ``region 2: no_score``."""
        failed = [f"grounding: {self.grounding.error}"] if self.grounding and self.grounding.error else []
        if self.judgement:
            failed += [f"region {said.region_id}: {said.failure}" for said in self.judgement.regions if said.failure]
            failed += [f"layout: {self.judgement.layout.failure}"] if self.judgement.layout.failure else []
        return failed

    def image(self) -> Image:
        """The image, RGB, of ``record.size`` (H, W)."""
        return open_image(self.folder / self.record.image)

    def latent(self) -> Tensor:
        """The sampler's own clean latent (C, h, w), float32, in the model's scaled latent space."""
        return read_tensor(self.folder / self.record.latent)

    def reward_map(self) -> Tensor | None:
        """The reward map (h, w), float32, in [-1, 1] or (mapping ``unit``) in [0, 1]; None where there is none."""
        return read_tensor(self.folder / self.reward.values) if self.reward else None

    def figure(self, *, masks: bool = False, grid: bool = False) -> Figure:
        """The image with its regions and what was said of them, and its reward map (``plots.candidate_figure``)."""
        reward = self.reward_map()
        values = None if reward is None else reward.numpy()
        return plots.candidate_figure(self.image(), self.regions, self.judgement, values, masks=masks, grid=grid)

    def row(self) -> dict[str, Any]:
        """The candidate as a row of ``Candidates.table``: plain values, None where there is nothing."""
        said = self.judgement.regions if self.judgement else []
        scores = [region.score for region in said if region.score is not None]
        return {
            "round": self.round,
            "id": self.id,
            "prompt_id": self.prompt.id,
            "prompt": self.prompt.text,
            "category": self.category,
            "index": self.record.index,
            "score": self.score,
            "alpha": self.reward.alpha if self.reward else None,
            "layout": self.judgement.layout.score if self.judgement else None,
            "lowest_region": min(scores, default=None),
            "regions": sum(region.id != 0 for region in self.regions),
            "failures": "; ".join(self.failures),
        }

    def __repr__(self) -> str:
        score = "no score" if self.score is None else f"score {self.score:+.2f}"
        return f"<candidate {self.id} of round {self.round}, {score}: {self.prompt.text!r}>"

    def _repr_png_(self) -> bytes:
        return _png(self.figure())


class Candidates:
    """Candidates in the order of the run. Lazy: every iteration calls ``read`` and reads the run's files anew."""

    def __init__(self, read: Callable[[], Iterator[CandidateView]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[CandidateView]:
        return self._read()

    def filter(self, keep: Callable[[CandidateView], bool]) -> Candidates:
        """Those of which ``keep`` is true."""
        return Candidates(lambda: (candidate for candidate in self if keep(candidate)))

    def table(self) -> pandas.DataFrame:
        """A pandas table with a row per candidate (``CandidateView.row``). Needs pandas, ``srum[notebooks]``."""
        import pandas

        return pandas.DataFrame([candidate.row() for candidate in self])

    def gallery(self, limit: int = GALLERY) -> Figure:
        """The images sorted by score, best first; of more than ``limit`` that many, evenly spaced between the ends."""
        ranked = sorted(self, key=lambda c: -2 if c.score is None else c.score, reverse=True)
        step = max(1.0, (len(ranked) - 1) / max(1, limit - 1))
        shown = [ranked[round(place * step)] for place in range(min(limit, len(ranked)))]
        return plots.gallery_figure([plots.Scored(c.image(), c.score, c.prompt.text) for c in shown])

    def __repr__(self) -> str:
        return f"<{sum(1 for _ in self)} candidates>"

    def _repr_png_(self) -> bytes:
        return _png(self.gallery())


class RunView:
    """The run in ``folder``, read only; ``config`` is what it was made with. Raises RunError where there is no run."""

    def __init__(self, folder: Path) -> None:
        if not (folder / CONFIG).exists():
            raise RunError(f"{folder} is not the folder of a run: it has no {CONFIG}")
        self.folder = folder
        self.config = load_config(folder / CONFIG)

    @property
    def method(self) -> Method:
        """What was trained."""
        return find_method(self.config.method)

    @property
    def rounds(self) -> list[int]:
        """The rounds whose rollout has finished, counted from 0."""
        files = [path for round in round_dirs(self.folder) if (path := round / "candidates.jsonl").exists()]
        return sorted(int(path.parent.name.removeprefix("round-")) for path in files)

    def candidates(self, round: int | None = None) -> Candidates:
        """The candidates of a round, or of all. Raises RunError, on iteration, for a round that has none."""
        return Candidates(lambda: (view for folder in self._round_dirs(round) for view in read_round(folder)))

    def candidate(self, id: str, round: int | None = None) -> CandidateView:
        """The candidate of that id, from the newest round that has it. Raises RunError where there is none."""
        for views in map(read_round, reversed(self._round_dirs(round))):
            if id in views.places:
                return views.make(id)
        where = "" if round is None else f" in round {round}"
        raise RunError(f"{self.folder} has no candidate {id!r}{where}; the ids are in round-*/candidates.jsonl")

    def verdicts(self, round: int | None = None) -> dict[str, list[CheckedImage]]:
        """The exact checker's verdicts by arm, after the last round or, where it was evaluated, after ``round``."""
        folder = self.folder if round is None else round_dir(self.folder, round)
        files = sorted(folder.glob("eval/*/verdicts.jsonl"))
        return {path.parent.name: read_records(path, CheckedImage) for path in files}

    def checked_image(self, arm: str, prompt_id: str) -> Image:
        """The image of a verdict after the last round."""
        return open_image(self.folder / "eval" / arm / "images" / f"{prompt_id}.png")

    def overview(self) -> list[dict[str, Any]]:
        """A row per round: how many candidates, how many of them have a reward map, and the mean of their scores."""
        rows = []
        for k in self.rounds:
            scores = [view.score for view in self.candidates(k)]
            known = [score for score in scores if score is not None]
            mean = fmean(known) if known else None
            rows.append({"round": k, "candidates": len(scores), "reward maps": len(known), "mean score": mean})
        return rows

    def _round_dirs(self, round: int | None) -> list[Path]:
        return [round_dir(self.folder, k) for k in (self.rounds if round is None else [round])]

    def __repr__(self) -> str:
        return f"<run {self.folder}, {len(self.rounds)} rounds>"

    def _repr_html_(self) -> str:
        rows = self.overview()
        head = "".join(f"<th>{name}</th>" for name in rows[0]) if rows else "<th>no candidates yet</th>"
        body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row.values())}</tr>" for row in rows)
        return f"<b>{html.escape(str(self.folder))}</b><table><tr>{head}</tr>{body}</table>"


def read_round(folder: Path, so_far: bool = False) -> Lazy[CandidateView]:
    """The candidates in the folder of a round, in order, by their ids (``places``). Raises RunError without any.

    A candidate that ``prompts.jsonl`` does not know has a prompt without metadata. ``so_far``: of a rollout that goes
    on in this process those that are drawn.
    """
    candidates = (read_so_far if so_far else read_by_id)(folder / "candidates.jsonl", Candidate)
    prompts = _by_id(folder / "prompts.jsonl", Prompt)
    groundings = _by_id(folder / "regions.jsonl", Grounding)
    judgements = _by_id(folder / "judgements.jsonl", Judgement)
    rewards = _by_id(folder / "rewards.jsonl", RewardMap)

    def view(name: str) -> CandidateView:
        record = candidates[name]
        return CandidateView(
            round=int(folder.name.removeprefix("round-")),
            folder=folder,
            record=record,
            prompt=prompts.get(record.prompt_id) or Prompt(id=record.prompt_id, text=record.prompt),
            grounding=groundings.get(name),
            judgement=judgements.get(name),
            reward=rewards.get(name),
        )

    return Lazy(list(candidates), view)


def _by_id(path: Path, kind: type[R]) -> Mapping[str, R]:
    """The records of a stage by the id of what they are about; none where the stage has not finished."""
    return read_by_id(path, kind) if path.exists() else {}


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}" if isinstance(value, float) else str(value)

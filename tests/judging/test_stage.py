"""The stage that judges, with a server that refuses: what is kept, what is asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from srum import models
from srum.config import load_config
from srum.judging import stage
from srum.judging.base import NoReply
from srum.judging.drift import judge_again
from srum.judging.self_judge import SelfJudge
from srum.loop import perform
from srum.models.base import Decoding, Segment, Written
from srum.processes import Processes
from srum.records import Failure, Judgement
from srum.run import Run
from srum.run_dir import RunError, read_records
from tests.fakes import FakeModel

SERVER = ["judge.soft=false", "judge.server={url: http://localhost:1/v1, model: m}", "judge.batch_size=2"]
HALF = "\ud83d"  # of a surrogate pair


class Busy:
    """Refuses the questions whose seed is among ``refused`` parts of seven; ``asked`` counts all."""

    def __init__(self, refused: Sequence[int], reply: str = "Score: 0.5\nReason: fine") -> None:
        self.refused, self.reply, self.asked = refused, reply, 0

    def write(
        self, contexts: Sequence[Sequence[Segment]], decoding: Decoding, seeds: Sequence[int]
    ) -> list[Written | NoReply]:
        self.asked += len(seeds)
        fine = Written(self.reply, (), torch.zeros(0), ended=True)
        return [NoReply("HTTP 400: no room") if seed % 7 in self.refused else fine for seed in seeds]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A round of eight candidates on the fake model, up to its regions."""
    monkeypatch.setattr(models, "load", FakeModel.load)
    run = Run(tmp_path, load_config(None, ["prompt_count=4", "candidates_per_prompt=2", *SERVER]))
    for name in ("rollout", "ground"):
        perform(run, name, 0)
    return run


def judge_by(run: Run, writer: Busy, monkeypatch: pytest.MonkeyPatch) -> list[Judgement]:
    monkeypatch.setattr(stage, "load_judge", lambda *_: SelfJudge(writer, soft=False, retries=0))
    perform(run, "judge", 0)
    return read_records(run.round(0) / "judgements.jsonl", Judgement)


def unanswered(judgements: Sequence[Judgement]) -> int:
    return sum(said.failure == Failure.NO_REPLY for j in judgements for said in (*j.regions, j.layout))


def test_a_server_that_refuses_everything_ends_the_stage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="answered no question; to the first: HTTP 400: no room"):
        judge_by(run, Busy(range(7)), monkeypatch)
    assert not [*run.round(0).glob("judgements*")]
    assert unanswered(judge_by(run, Busy([]), monkeypatch)) == 0


def test_what_was_left_without_a_reply_is_asked_again_until_something_is_made_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = judge_by(run, Busy([0, 1]), monkeypatch)
    answered = {j.candidate_id: j for j in first if not unanswered([j])}
    assert 0 < len(answered) < len(first)
    later = Busy([])
    second = judge_by(run, later, monkeypatch)
    assert unanswered(second) == 0 and [j.candidate_id for j in second] == [j.candidate_id for j in first]
    assert {j.candidate_id: j for j in second if j.candidate_id in answered} == answered
    assert later.asked == sum(len(j.regions) + 1 for j in second if j.candidate_id not in answered)


def test_a_judgement_that_the_rewards_were_made_of_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judge_by(run, Busy([0, 1]), monkeypatch)
    perform(run, "rasterize", 0)
    assert judge_by(run, Busy([]), monkeypatch) == first and unanswered(first)


def test_one_process_says_whether_the_judge_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go by that, whatever their own disk shows yet."""
    monkeypatch.setattr(Processes, "here", lambda: Mock(once=lambda _: True))
    with pytest.raises(RunError, match=r"prompts\.jsonl is missing"):
        judge_again(Run(tmp_path, load_config()))


def test_half_a_surrogate_pair_in_a_reply_is_a_replacement_character(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for judgement in judge_by(run, Busy([], f"Score: 0.5\nReason: nice {HALF}"), monkeypatch):
        assert (judgement.layout.score, judgement.layout.reason) == (0.5, "nice \N{REPLACEMENT CHARACTER}")

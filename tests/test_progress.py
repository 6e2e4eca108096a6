"""How far a run is: labels, lines without a terminal, the time that is left."""

from __future__ import annotations

import pytest

from srum import progress
from srum.progress import Outlook, Timed, counting, expecting, in_words, part, timing


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """120 steps of 10 s each: a line at every third; steps, loss, and 10 s for each that is left."""
    with part("round 1/4 - train region_nft"), counting("train", 120) as advance:
        for step in range(120):
            clock.now += 10
            advance(1, f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 39  # the 40th would be the end
    assert lines[0] == "round 1/4 - train region_nft: 3 of 120, loss 2, 20 min left"
    assert lines[-1] == "round 1/4 - train region_nft: 117 of 120, loss 116, 30 s left"


def test_the_time_left_in_all_counts_what_is_still_to_come(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The first rollout takes twice as long as expected, so the second will, too; judging is as expected."""
    expected = {"round 1/2 - rollout": 50.0, "round 1/2 - judge": 100.0, "round 2/2 - rollout": 50.0}
    with expecting(expected):
        with part("round 1/2 - rollout"), counting("candidates", 2) as advance:
            clock.now += 50
            advance(1, "")
            clock.now += 50
            advance(1, "")
        with part("round 1/2 - judge"), counting("judgements", 4) as advance:
            clock.now += 40
            advance(1, "")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "round 1/2 - rollout: 1 of 2, 50 s left, 3 min left in all"  # 50 + 100 + 50
    assert second == "round 1/2 - judge: 1 of 4, 2 min left, 4 min left in all"  # 120 + 100


def test_another_process_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with counting("candidates", 3, told=False) as advance:
        clock.now += 100
        advance(1, "")
    assert capsys.readouterr().out == ""


def test_times_are_parted_into_what_grows_and_what_does_not(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """5 s to load, a first step of 90 s, two of 2 s: each 2 s, and once the rest. Nothing is told."""
    with timing() as times, part("round 1/1 - train sft"):
        clock.now += 5
        with counting("train", 3) as advance:
            for seconds in (90, 2, 2):
                clock.now += seconds
                advance(1, "")
    timed = times["round 1/1 - train sft"]
    assert (timed.items, timed.each, timed.once) == (3, 2.0, 93.0) and capsys.readouterr().out == ""
    assert (Timed(3.0).items, Timed(3.0, [(0, 0.0), (6, 3.0)]).each) == (0, 0.5)


def test_a_part_that_was_not_expected_changes_nothing() -> None:
    outlook = Outlook({"a - eval base": 10.0})
    outlook.finish("b - other", 5.0)
    assert outlook.left("a - eval base", 0.05, 4.0) == 6.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (99, "99 s"), (120, "2 min"), (5940, "99 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words

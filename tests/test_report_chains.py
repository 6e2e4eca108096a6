"""Chains in the report: without a judge the last image counts, and what was said last is shown."""

from __future__ import annotations

from srum.evaluation.accuracy import CheckedImage, CheckedShot
from srum.views.report import _rounds_of


def verdict(name: str, *shots: tuple[bool, float | None]) -> CheckedImage:
    made = [CheckedShot(image=f"shots/{n}.png", correct=right, score=score) for n, (right, score) in enumerate(shots)]
    return CheckedImage(
        prompt_id=name, prompt="a", category="colors", correct=True, reasons=[], shots=made, kept=len(made) - 1
    )


def test_without_scores_the_last_image_counts_and_with_them_the_best() -> None:
    """Of three chains one was mended by its second image, one by its third; a judge may trust the first more."""
    chains = [
        verdict("a", (False, None), (True, None)),
        verdict("b", (False, None), (False, None), (True, None)),
        verdict("c", (True, None)),
    ]
    assert [row["right"] for row in _rounds_of(chains)] == [1, 2, 3]
    assert [row["mended"] for row in _rounds_of(chains)] == [0, 1, 2]
    assert [row["again"] for row in _rounds_of(chains)] == [0, 2, 1]
    judged = [verdict("a", (False, 0.9), (True, 0.1))]
    assert [row["right"] for row in _rounds_of(judged)] == [0, 0]

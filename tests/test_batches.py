"""What a batch may change: how far images, texts and scores of the shipped model depend on their company; and that an
interruption and the number of processes change no batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srum import models
from srum.drawing import draw_prompts
from srum.models.bagel import Bagel
from srum.models.base import Decoding, Generated, Sampling, Segment
from srum.models.precision import Precision
from srum.records import Prompt
from srum.run_dir import run_stage, write_records
from srum.shapes.prompts import prompt_set

PROMPTS = [prompt.text for prompt in prompt_set("development", 8)]
SAMPLING = Sampling(size=(64, 64), timesteps=16, timestep_shift=5.0, guidance=2.5, guidance_interval=(0.0, 1.0))
REPLY = Decoding(max_tokens=32, temperature=0.5)
LEVELS = [f" {tenths / 10:.1f}" for tenths in range(-10, 11)]


def shipped(precision: Precision) -> Bagel:
    return Bagel.load(models.EMBEDDED["srum-tiny"], precision=precision)


def questions(drawn: list[Generated]) -> list[list[Segment]]:
    return [
        [Segment("seen", image=made.image), Segment("text", text=f"Prompt: {prompt}\nScore the layout.")]
        for made, prompt in zip(drawn, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_batch_has_the_same_bits(precision: Precision) -> None:
    model = shipped(precision)
    once, again = (draw_prompts(model, PROMPTS, SAMPLING, range(8)) for _ in range(2))
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(once, again, strict=True))
    (written, scores), same = (
        (model.write(questions(once), REPLY, range(8)), model.score(questions(once), LEVELS)) for _ in range(2)
    )
    assert all(a.ids == b.ids and torch.equal(a.logprobs, b.logprobs) for a, b in zip(written, same[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(scores, same[1], strict=True))


def test_in_float32_company_changes_rounding_alone() -> None:
    """Eight at a time or one: latents, of up to 8, to 1e-3, pixels to 2 of 255, the same texts, scores to 1e-3."""
    model = shipped("fp32")
    together = draw_prompts(model, PROMPTS, SAMPLING, range(8))
    alone = [draw_prompts(model, [prompt], SAMPLING, [seed])[0] for seed, prompt in enumerate(PROMPTS)]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a.latent, b.latent, rtol=0, atol=1e-3)
        assert np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)).max() <= 2
    asked = questions(together)
    written, scores = model.write(asked, REPLY, range(8)), model.score(asked, LEVELS)
    for seed, context in enumerate(asked):
        assert model.write([context], REPLY, [seed])[0].text == written[seed].text
        assert torch.allclose(model.score([context], LEVELS)[0], scores[seed], rtol=0, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 12), size=st.integers(1, 5), done=st.sets(st.integers(0, 11)))
def test_an_interrupted_stage_has_the_batches_that_it_began_with(count: int, size: int, done: set[int]) -> None:
    """Whichever batches the processes had finished: those that are left hold the items that they always would."""
    items = {f"p{number:02d}": number for number in range(count)}
    names = list(items)
    batches = [names[first : first + size] for first in range(0, count, size)]
    made: list[list[str]] = []

    def work(batch: Mapping[str, int]) -> list[Prompt]:
        made.append(list(batch))
        return [Prompt(id=name, text="a") for name in batch]

    with TemporaryDirectory() as folder:
        for number in sorted(done & set(range(len(batches)))):
            shard = Path(folder) / "things.parts" / f"{number:05d}.jsonl"
            write_records(shard, [Prompt(id=name, text="a") for name in batches[number]])
        records = list(run_stage(Path(folder), "things", Prompt, items, size, work))
    assert made == [batch for number, batch in enumerate(batches) if number not in done]
    assert [record.id for record in records] == names

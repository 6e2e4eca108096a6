"""Laws of the BAGEL adapter at toy size: batching, sharing and caching change nothing; files come back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from srum import flow
from srum.drawing import contexts_of, draw_prompts
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.models.bagel import Bagel, checkpoint, network
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.contexts import levels
from srum.models.bagel.network import BagelNetwork, additive, attend
from srum.models.bagel.sampler import guide, sample
from srum.models.bagel.sequence import Split
from srum.models.base import Decoding, Sampling, Segment, branch_counts, to_edit, without_images, without_text
from srum.models.texts import beginnings_of
from tests.fakes import released_config

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"
OFFICIAL_FILES = {"llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors"} | {
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip
HOST = torch.device("cpu")
SAMPLING = Sampling(size=(64, 96), timesteps=4, guidance=3.0, guidance_interval=(0.0, 1.0))
EDITING = Sampling(timesteps=4, image_guidance=2.0, guidance_interval=(0.0, 1.0), renorm="text_channel")


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(CHECKPOINT)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_renormalisation_shrinks_and_never_stretches(renorm: Any) -> None:
    """Two images of a token each, v = (3, 4), guidance 2. With u = 0, g = u + 2 (v - u) = (6, 8) is twice as long as v
    and shrinks to (3, 4); with u = (3, 5), g = (3, 3) is shorter, and stays."""
    v, u = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 5.0]])
    found = guide(torch.stack([v, u]), torch.tensor([0, 1]), Sampling(guidance=2.0, renorm=renorm))
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0], [3.0, 3.0]]))


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A random image of (width, height)."""
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def texts(*texts: str) -> list[list[Segment]]:
    """A context of each text, which guidance drops."""
    return [[Segment("text", text=text, droppable=True)] for text in texts]


def edits(model: Bagel, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
    """What ``draw`` takes to change each image as its prompt says."""
    shown = [to_edit(model, image) for image in images]
    asked = texts(*prompts)
    return {
        "contexts": [[*seen, *prompt] for (seen, _), prompt in zip(shown, asked, strict=True)],
        "sizes": [size for _, size in shown],
    }


@torch.no_grad()
def piecewise(model: Bagel, segments: Sequence[Segment]) -> Cache:
    """A context to which the segments are written one by one."""
    context = model.empty_context(1)
    for segment in segments:
        model._extend(context, [[model._split(segment, iter(()))]])
    return context


def test_a_batch_of_images_is_its_images_one_by_one(model: Bagel) -> None:
    contexts = texts("a red fox", "two blue cups on a wooden table, morning light", "")
    together = model.draw(contexts, SAMPLING, [1, 2, 3])
    for context, seed, generated in zip(contexts, [1, 2, 3], together, strict=True):
        (alone,) = model.draw([context], SAMPLING, [seed])
        assert torch.allclose(alone.latent, generated.latent, atol=1e-4)


@pytest.mark.parametrize("planned", [False, True])
def test_a_path_leads_from_the_noise_to_the_image(model: Bagel, planned: bool) -> None:
    """Each state is the Euler step of the one before; the last step heads for the very latent of the image."""
    prompts, seeds = ["a red fox", "two blue cups"], [1, 2]
    plans = ["it is red", None] if planned else [None, None]
    noises = model.noise(seeds, [SAMPLING.size] * 2)
    made = model.draw(contexts_of(model, prompts, plans), SAMPLING, seeds, path=True)
    assert all(image.path is None for image in model.draw(texts(*prompts), SAMPLING, seeds))
    for noise, image in zip(noises, made, strict=True):
        path = image.path
        assert path is not None and path.states.shape == (3, *image.latent.shape)
        assert torch.equal(model.tokens(path.states[0]), noise) and path.timesteps[0] == 1
        steps = zip(path.states, path.velocities, path.timesteps.diff(append=torch.zeros(1)), strict=True)
        following = [flow.euler_step(x, v, dt) for x, v, dt in steps]
        assert torch.allclose(torch.stack(following), torch.stack([*path.states[1:], image.latent]), atol=1e-5)
        assert torch.equal(path.predictions[-1], image.latent)
        assert not torch.allclose(path.predictions[0], image.latent, atol=1e-2)


def test_a_stored_path_is_trained_on(model: Bagel) -> None:
    """A state of an unguided path, packed for training, has the velocity that the sampler went with."""
    (context,), sampling = texts("a red fox"), replace(SAMPLING, guidance=1.0)
    (made,) = model.draw([context], sampling, [1], path=True)
    assert made.path is not None
    for state, t, v in zip(made.path.states, made.path.timesteps.tolist(), made.path.velocities, strict=True):
        noisy = Segment("noisy", state=(model.tokens(state), t), grid=model.latent_grid(sampling.size), loss=True)
        with torch.no_grad():
            out = model.forward(model.pack([[*context, noisy]], []))
        assert torch.allclose(out.velocity, model.tokens(v), atol=1e-4)


def test_a_batch_of_edits_is_its_edits_one_by_one(model: Bagel) -> None:
    """Images of three sizes: each result has the size of its own source after the autoencoder's resize."""
    images = [picture(0, (80, 60)), picture(1, (64, 96)), picture(2, (131, 57))]
    prompts = ["make it purple", "", "two blue cups on a wooden table, morning light"]
    together = model.draw(sampling=EDITING, seeds=[1, 2, 3], **edits(model, images, prompts))
    assert [edited.image.size for edited in together] == [(80, 64), (64, 96), (96, 48)]
    for image, prompt, seed, edited in zip(images, prompts, [1, 2, 3], together, strict=True):
        (alone,) = model.draw(sampling=EDITING, seeds=[seed], **edits(model, [image], [prompt]))
        assert torch.allclose(alone.latent, edited.latent, atol=1e-4)


def test_an_edit_depends_on_its_images_in_their_order_and_on_its_prompt(model: Bagel) -> None:
    """With one noise for all: only the same sources, prompt and scales give the same result."""
    (a, size), (b, _) = (to_edit(model, picture(seed, (64, 96))) for seed in (0, 1))
    purple, boat = (Segment("text", text=text, droppable=True) for text in ("make it purple", "add a boat"))
    contexts = [[*a, purple], [*b, purple], [*a, boat], [*a, purple], [*a, *b, purple], [*b, *a, purple]]
    made = [x.latent for x in model.draw(contexts, EDITING, [1] * 6, sizes=[size] * 6)]
    assert torch.allclose(made[0], made[3], atol=1e-4)
    assert all(not torch.allclose(made[0], other, atol=1e-2) for other in (made[1], made[2], made[4]))
    assert not torch.allclose(made[4], made[5], atol=1e-2)
    (plain,) = model.draw(contexts[:1], replace(EDITING, image_guidance=1.0), [1], sizes=[size])
    assert not torch.allclose(made[0], plain.latent, atol=1e-2)


def test_guidance_compares_with_what_the_flags_leave() -> None:
    """The plan was written in view of all the rest, so that no branch has it; the instruction stays."""
    instruction, image = Segment("text", text="plan"), Segment("seen", image=picture(0, (8, 8)))
    prompt = Segment("text", text="a fox", droppable=True)
    plan = Segment("text", text="red", droppable=True, written=True)
    context = [instruction, image, prompt, plan]
    assert without_text(context) == [instruction, image]
    assert without_images(context) == [instruction, prompt]


@torch.no_grad()
def test_contexts_that_begin_alike_are_written_once(model: Bagel) -> None:
    """Whatever is shared, keys, values and positions are those of each context written alone, piece by piece."""
    image, other = (Segment("seen", image=picture(seed, (80, 60))) for seed in (0, 1))
    told, a, b, c = (Segment("text", text=text) for text in ("look", "What is it?", "Why?", "So?"))
    contexts = [[told, image, a], [told, image, b, c], [], [told, image], [told, other, a], [a], [told, image, b]]
    encoder, seen = model.network.vit_model.vision_model, []
    hook = encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    joined = model.contexts(contexts)
    hook.remove()
    assert seen == [2]  # each image once, both in one pass
    for row, segments in enumerate(contexts):
        alone, there = piecewise(model, segments), joined.valid[row, : joined.used]
        assert joined.position[row] == alone.position[0] and int(there.sum()) == alone.used
        for ours, theirs in zip(joined.keys + joined.values, alone.keys + alone.values, strict=True):
            assert torch.allclose(ours[row, :, : joined.used][:, there], theirs[0, :, : alone.used], atol=1e-4)


@torch.no_grad()
def test_images_are_seen_once_while_they_are_remembered(model: Bagel) -> None:
    """In all calls of the block, and what comes out is what comes out without it."""
    first, second, third = (Segment("seen", image=picture(seed, (80, 60))) for seed in range(3))
    a, b = Segment("text", text="What?"), Segment("text", text="Why is it?")
    begun = Segment("text", text="So", open=True)
    calls = [[[first, a], [first, b], [second, a]], [[second, b, begun], [first, a]], [[second, a], [third, b]], [[a]]]
    plain = [model.score(contexts, [" 1.0", " -1.0"]) for contexts in calls]
    encoder, seen = model.network.vit_model.vision_model, []
    hook = encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    with model.remembering():
        found = [model.score(contexts, [" 1.0", " -1.0"]) for contexts in calls]
    model.score(calls[0], ["so"])
    hook.remove()
    assert [count for count in seen if count] == [2, 2, 2]  # both; another one beside one of them; after the block
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-4)


def test_passes_over_contexts_that_begin_alike() -> None:
    """One row for what all have, then one for each way to go on; what is the same text twice is shared only as one."""
    a, b, c, a_again = (Segment("text", text=text) for text in "abca")
    passes, rows = levels([[a, b], [a, b, c], [a, c], [a_again, b]], [0] * 4)
    assert passes == [([0, 0], [[a], [a_again, b]]), ([0, 0, 1], [[b], [c], []]), ([0, 0, 1, 2], [[], [c], [], []])]
    assert rows == [0, 1, 2, 3]
    assert levels([[], []], [0, 0]) == ([], [0, 0]) and levels([], []) == ([], [])
    assert levels([[a], [], [a]], [2, 0, 2]) == ([([0, 2], [[], [a]])], [1, 0, 1])  # some begun already, row 1 by none


def test_there_are_as_many_sizes_and_seeds_as_contexts(model: Bagel) -> None:
    with pytest.raises(ValueError, match="2 contexts, 1 sizes and 2 seeds"):
        model.draw(texts("a", "b"), EDITING, [1, 2], sizes=[(64, 64)])
    with pytest.raises(ValueError, match="1 contexts and 2 seeds"):
        model.write(texts("a"), Decoding(), [1, 2])
    assert model.draw([], SAMPLING, []) == model.write([], Decoding(), []) == model.score([], ["a"]) == []


def test_a_timestep_at_the_border_of_the_guidance_interval() -> None:
    """12 points with shift 3 pass through t = 0.4 in float32, and 0.4 < t <= 1 leaves it out, as in the reference."""
    branches: list[int] = []

    def velocity(x: torch.Tensor, t: float, count: int) -> torch.Tensor:
        branches.append(count)
        return torch.zeros(count * len(x), x.shape[1])

    sampling = Sampling(timesteps=12, timestep_shift=3.0, guidance=4.0, guidance_interval=(0.4, 1.0))
    sample(velocity, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), sampling)
    assert branches == [2] * 9 + [1, 1]


def test_steps_that_reuse_run_fewer_branches() -> None:
    """By hand: 8 steps from t = 1, of which the first six are guided; differences are kept, velocities go on straight.

    On a velocity that is linear in t and does not depend on x, with differences that stay, nothing changes.
    """
    plain = Sampling(timesteps=9, timestep_shift=1.0, guidance=3.0, guidance_interval=(0.25, 1.0), renorm_min=1.0)
    assert branch_counts(plain) == [2] * 6 + [1, 1]
    assert branch_counts(replace(plain, guidance_every=2)) == [2, 1, 2, 1, 2, 1, 1, 1]
    assert branch_counts(replace(plain, velocity_every=3)) == [2, 2, 0, 2, 0, 0, 1, 1]
    assert branch_counts(replace(plain, velocity_every=2, guidance_every=2)) == [2, 1, 2, 0, 1, 0, 1, 1]
    line = torch.randn(2, 4, 3)

    def velocity(x: torch.Tensor, t: float, count: int) -> torch.Tensor:
        branches = torch.stack([line[0] + t * line[1], line[0] + t * line[1] - 1])
        return branches[:count].flatten(0, 1)

    guided, owner = replace(plain, guidance_interval=(0.0, 1.0)), torch.zeros(4, dtype=torch.long)
    expected = sample(velocity, torch.zeros(4, 3), owner, guided)
    for fewer in ({"guidance_every": 3}, {"velocity_every": 3}, {"guidance_every": 2, "velocity_every": 2}):
        found = sample(velocity, torch.zeros(4, 3), owner, replace(guided, **fewer))
        assert torch.allclose(found, expected, atol=1e-5)


def test_questions_share_an_image_and_are_answered_as_if_alone(model: Bagel) -> None:
    """Of several lengths, with several images or none, and where the reply is begun."""
    first, second = Segment("seen", image=picture(0, (80, 60))), Segment("seen", image=picture(1, (131, 57)))
    told, begun = Segment("text", text=model.config.think_instruction), Segment("text", text="Because", open=True)
    asked = [Segment("text", text=text) for text in ("What is it?", "How many?", "Why?", "Where is the house?")]
    contexts = [
        [first, asked[0]], [first, asked[1]], [first, asked[2], begun], [second, asked[3]], [first, second, asked[0]],
        [told, second, asked[0]], [asked[0]], [],
    ]  # fmt: skip
    decoding, seeds = Decoding(max_tokens=8, temperature=1.0), range(len(contexts))
    together = model.write(contexts, decoding, seeds)
    for context, seed, written in zip(contexts, seeds, together, strict=True):
        (alone,) = model.write([context], decoding, [seed])
        assert (alone.text, alone.ids, alone.ended) == (written.text, written.ids, written.ended)
        assert torch.allclose(alone.logprobs, written.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_of_a_text_are_those_of_training(model: Bagel, temperature: float) -> None:
    """What ``write`` says of its tokens is what a pack of them has; a text that was cut off has no end."""
    context = [Segment("seen", image=picture(0, (80, 60))), Segment("text", text="What is it?")]
    (text,) = model.write([context], Decoding(max_tokens=9, temperature=temperature), [3])
    assert not text.ended and len(text.logprobs) == len(text.ids) == 8
    with torch.no_grad():
        out = model.forward(model.pack([[*context, Segment("text", ids=text.ids, loss=True)]], []))
    expected = (out.logits / (temperature or 1.0)).log_softmax(-1).gather(1, out.labels[:, None])[:8, 0]
    assert torch.allclose(text.logprobs, expected, atol=1e-4)


def test_the_end_of_a_text_has_a_log_probability_too(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another token as the end of all texts, of which one, the first that is sampled, ends by itself."""
    context, decoding = [Segment("text", text="What is it?")], Decoding(max_tokens=30, temperature=0.7)
    for end in range(260, 400):
        monkeypatch.setattr(model, "eos", end)
        (text,) = model.write([context], decoding, [3])
        if text.ended and text.ids:
            break
    assert text.ended and len(text.logprobs) == len(text.ids) + 1
    with torch.no_grad():
        out = model.forward(model.pack([[*context, Segment("text", ids=text.ids, loss=True)]], []))
    expected = (out.logits / 0.7).log_softmax(-1).gather(1, out.labels[:, None])[:, 0]
    assert torch.allclose(text.logprobs, expected, atol=1e-4)


def test_images_of_one_call_may_differ_in_size(model: Bagel) -> None:
    sizes, contexts = [(64, 96), (32, 32)], texts("a red fox", "a boat")
    together = model.draw(contexts, SAMPLING, [1, 2], sizes=sizes)
    for context, seed, size, made in zip(contexts, [1, 2], sizes, together, strict=True):
        (alone,) = model.draw([context], replace(SAMPLING, size=size), [seed])
        assert made.image.size == size[::-1] and torch.allclose(alone.latent, made.latent, atol=1e-4)


def test_branches_have_the_probabilities_of_whole_texts(model: Bagel) -> None:
    """log p of a continuation, read off one tree, equals that of the text forced token by token."""
    seen, question = Segment("seen", image=picture(2, (80, 60))), Segment("text", text="Score it.")
    begun, continuations = Segment("text", text="Score:", open=True), [" 1.0", " -1.0", " -0.5", "!"]
    (tree,) = model.score([[seen, question, begun]], continuations)
    for text, score in zip(continuations, tree, strict=True):
        context = piecewise(model, [seen, question])
        with torch.no_grad():
            ids = [model.bos, *model._ids("Score:"), *model._ids(text)]
            log_p = model._log_softmax(model._extend(context, [[Split(kind="text", ids=ids[:-1])]]))
        length = len(model._ids(text))
        expected = log_p[range(len(ids) - 1 - length, len(ids) - 1), ids[-length:]].sum()
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_tree_has_every_beginning_once() -> None:
    """What goes on from a beginning follows it; what nothing goes on from is not there."""
    assert beginnings_of([[1, 2, 3], [1, 2, 4], [1, 5], [6]]) == {(1,): 1, (1, 2): 2}
    assert beginnings_of([[2, 1], [1, 3, 1], [1, 2, 1]]) == {(1,): 1, (1, 2): 2, (1, 3): 3, (2,): 4}


def test_branches_of_a_sample_are_samples_of_their_own(model: Bagel) -> None:
    """Two questions about one image in one row have the logits that each has alone behind that image."""
    image = Segment("seen", image=picture(3, (80, 60)))
    asked = [
        [Segment("text", text=text, branch=branch), Segment("text", text=reply, loss=True, branch=branch)]
        for branch, (text, reply) in enumerate([("Score it.", "Score: 1.0"), ("What is it, then?", "A cat.")], 1)
    ]
    together = model.forward(model.pack([[image, *asked[0], *asked[1]]], []))
    alone = [model.forward(model.pack([[image, *own]], [])) for own in asked]
    assert together.labels.tolist() == [label for one in alone for label in one.labels.tolist()]
    assert torch.allclose(together.logits, torch.cat([one.logits for one in alone]), atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_blocks_are_the_bias(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention, forward, not compiled: padded rows, a tree, an image to be edited, noise between texts."""
    latent, edited = torch.randn(16, 8, 12), torch.randn(16, 4, 6)
    image = Segment("seen", image=picture(3, (80, 60)))
    samples = [
        [Segment("text", text="a red fox"), Segment("noisy", latent=latent), Segment("text", text="b", loss=True)],
        [Segment("clean", latent=edited), image, Segment("text", text="more"), Segment("noisy", latent=edited)],
        [
            image,
            *(Segment("text", text=text, branch=n, loss=True) for n, text in enumerate(["Why?", "Where is it?"], 1)),
        ],
    ]
    batch = model.pack(samples, [FlowNoise(torch.randn(24, 64), 0.3), FlowNoise(torch.randn(6, 64), 0.9)])
    with torch.no_grad():
        expected = model._forward(batch, None)
        monkeypatch.setattr(network, "takes_blocks", lambda layout, cache: True)
        monkeypatch.setattr(network, "flex", lambda: flex_attention)
        found = model._forward(batch, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_a_norm_has_the_gradients_of_its_formula(dtype: torch.dtype, tolerance: float) -> None:
    """Against autograd through x / rms(x) * weight in float64, relative to the largest."""
    norm = network.RMSNorm(48, 1e-6)
    norm.weight.data.uniform_(0.5, 2)
    x, grad = torch.randn(64, 3, 48).to(dtype).requires_grad_(), torch.randn(64, 3, 48).to(dtype)
    norm(x).backward(grad)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    (exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).backward(grad.double())
    for ours, truth in ((x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert ours is not None and truth is not None
        assert (ours - truth).abs().max() < tolerance * truth.abs().max()


@pytest.mark.gpu
def test_a_long_row_trains_without_a_dense_mask(model: Bagel) -> None:
    """One row of 32,000 tokens: scores of one head alone would take 4 GB in float32."""
    on_gpu = Bagel.load(CHECKPOINT, "cuda")
    parts = [Segment("text", text="a red fox " * 40), Segment("seen", image=picture(3, (80, 60)))]
    samples = [[*parts * 220, Segment("noisy", latent=torch.randn(16, 8, 12), loss=True)]]
    batch = on_gpu.pack(samples, [FlowNoise(torch.randn(24, 64), 0.3)])
    assert len(batch.row) > 32_000
    torch.cuda.reset_peak_memory_stats()
    on_gpu.forward(batch).velocity.square().mean().backward()
    assert torch.cuda.max_memory_allocated() < 4e9


def test_several_predicted_segments_have_owners_and_cells(model: Bagel) -> None:
    """Two samples, three noisy segments with a loss and one without, two such texts: each token says whose it is."""
    latents = [torch.randn(16, 2 * h, 2 * w) for h, w in ((1, 2), (2, 2), (1, 1), (2, 1))]
    drawn = [model.corrupt(x, torch.Generator().manual_seed(i), 4.0) for i, x in enumerate(latents)]
    noisy = [Segment("noisy", latent=x, loss=i != 1) for i, x in enumerate(latents)]
    learned, told = Segment("text", text="a fox", loss=True), Segment("text", text="a boat")
    samples = [[told, noisy[0], noisy[1], learned, noisy[2]], [learned, noisy[3]]]
    with torch.no_grad():
        out = model.forward(model.pack(samples, drawn))
    assert out.image_segment.tolist() == [0, 0, 1, 2, 2] and out.cell.tolist() == [0, 1, 0, 0, 1]
    words = len(model._ids("a fox")) + 1
    assert out.text_segment.tolist() == [0] * words + [1] * words
    assert [model.targets(sample, drawn) for sample in samples] == [(3, words), (2, words)]
    assert [model.length(sample) for sample in samples] == model.pack(samples, drawn).layout.present.sum(1).tolist()
    kept = [0, 2, 3]
    expected = torch.cat([drawn[i].noise - model.tokens(latents[i]) for i in kept])
    assert torch.equal(out.target, expected)
    assert out.timestep.tolist() == pytest.approx([drawn[i].t for i in (0, 0, 2, 3, 3)])
    assert torch.allclose(out.image_error, (out.velocity - expected).square().mean(1))


def test_a_stored_state_is_the_noise_it_came_from(model: Bagel) -> None:
    """(x_t, t) in place of noise: the same prediction and target; without the latent there is no target."""
    latent, told = torch.randn(16, 4, 6), Segment("text", text="a fox")
    drawn = model.corrupt(latent, torch.Generator().manual_seed(0), 1.0)
    state = (flow.interpolate(model.tokens(latent), drawn.noise, drawn.t), drawn.t)
    with torch.no_grad():
        fresh = model.forward(model.pack([[told, Segment("noisy", latent=latent, loss=True)]], [drawn]))
        stored, alone = (
            model.forward(model.pack([[told, Segment("noisy", loss=True, state=state, **more)]], []))
            for more in ({"latent": latent}, {"grid": (2, 3)})
        )
    assert torch.equal(fresh.velocity, stored.velocity) and torch.equal(fresh.velocity, alone.velocity)
    assert torch.allclose(fresh.target, stored.target, atol=1e-4) and alone.target.isnan().all()
    with pytest.raises(ValueError, match="a noisy segment needs a latent, or with its state a grid"):
        model.pack([[Segment("noisy", loss=True, state=state)]], [])


def test_what_is_drawn_for_an_example_is_drawn_in_order(model: Bagel) -> None:
    """First the timestep, then the noise; a timestep that is given is not drawn."""
    latent = torch.zeros(16, 4, 6)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = model.corrupt(latent, first, 4.0)
    assert drawn.t == flow.sample_timesteps(1, 4.0, second).item()
    assert torch.equal(drawn.noise, torch.randn(6, 64, generator=second))
    fixed = model.corrupt(latent, torch.Generator().manual_seed(5), 4.0, t=0.25)
    assert fixed.t == 0.25
    assert torch.equal(fixed.noise, torch.randn(6, 64, generator=torch.Generator().manual_seed(5)))


def test_a_text_may_come_as_its_tokens(model: Bagel) -> None:
    texts = (
        Segment("text", text="two blue cups", loss=True),
        Segment("text", ids=model._ids("two blue cups"), loss=True),
    )
    by_text, by_ids = (model.forward(model.pack([[one]], [])) for one in texts)
    assert torch.equal(by_text.logits, by_ids.logits) and torch.equal(by_text.labels, by_ids.labels)


def test_what_is_dropped_is_not_there(model: Bagel) -> None:
    """A dropped text leaves no trace; a dropped image takes no tokens and keeps its position, as in the reference."""
    image, text = Segment("seen", image=picture(3, (80, 60))), Segment("text", text="a red fox", loss=True)
    gone = [replace(Segment("text", text="told"), dropped=True), replace(image, dropped=True)]
    alone, without_text, without_image = (model.pack([[*before, text]], []) for before in ([], gone[:1], gone[1:]))
    length = model.length([text])
    assert length == model.length([*gone, text]) == len(without_image.row)
    assert torch.equal(without_text.layout.positions, alone.layout.positions)
    assert torch.equal(without_image.layout.positions, alone.layout.positions + 1)
    assert model.targets([replace(text, dropped=True)], []) == (0, 0)


def test_corruptions_and_noisy_segments_are_as_many(model: Bagel) -> None:
    noisy = Segment("noisy", latent=torch.zeros(16, 2, 2))
    drawn = model.corrupt(torch.zeros(16, 2, 2), torch.Generator(), 1.0)
    with pytest.raises(ValueError, match="a noisy segment needs a corruption or a state"):
        model.pack([[noisy]], [])
    with pytest.raises(ValueError, match="1 of 2 corruptions have no noisy segment"):
        model.pack([[noisy]], [drawn, drawn])


def test_the_trunk_comes_first(model: Bagel) -> None:
    with pytest.raises(ValueError, match="row 0: a segment of the trunk after branch 1"):
        model.pack([[Segment("text", text="a", branch=1), Segment("text", text="b")]], [])


def test_training_and_sampling_predict_the_same_velocity(model: Bagel) -> None:
    """A packed sample [text, noisy latent] and a denoising step over the cached text are one function."""
    latent, noise, t = torch.randn(16, 8, 12), torch.randn(24, 64), 0.7
    sample = [Segment("text", text="a red fox"), Segment("noisy", latent=latent, loss=True)]
    with torch.no_grad():
        trained = model.forward(model.pack([sample], [FlowNoise(noise, t)])).velocity
        context = piecewise(model, sample[:1])
        x_t = (1 - t) * model.tokens(latent) + t * noise
        batch = model._lay_out([[replace(model._clean(latent), kind="noisy", tokens=x_t, t=t)]], context)
        _, gen = model._forward(batch, context)
        assert torch.allclose(trained, model.network.llm2vae(gen), atol=1e-5)


def test_a_saved_checkpoint_comes_back_bit_for_bit(model: Bagel, tmp_path: Path) -> None:
    model.save(tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        saved, official = load_file(tmp_path / name), load_file(CHECKPOINT / name)
        assert saved.keys() == official.keys()
        assert all(torch.equal(saved[key], official[key]) for key in official)
    assert Bagel.load(tmp_path).config == model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_has_the_official_layout(model: Bagel, tmp_path: Path, dtype: torch.dtype) -> None:
    """Exactly the official files, configs, names and shapes; the network in the type asked for, the rest float32."""
    model.save(tmp_path, dtype)
    assert {path.name for path in tmp_path.iterdir()} == OFFICIAL_FILES | {"fixture_config.json"}
    for path in CHECKPOINT.glob("*.json"):
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())
    saved = load_file(tmp_path / "ema.safetensors")
    shapes = json.loads((CHECKPOINT.parent / "checkpoint_shapes.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == shapes
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    files = (load_file(folder / "ae.safetensors") for folder in (tmp_path, CHECKPOINT))
    autoencoder, official = ({name: (x.shape, x.dtype) for name, x in file.items()} for file in files)
    assert autoencoder == official


def test_the_official_sizes_give_the_official_network(tmp_path: Path) -> None:
    """The counts of docs/specs/bagel.md, 1, from a folder without any file but the official configs."""
    config = released_config(tmp_path)
    with torch.device("meta"):
        state = BagelNetwork(config).state_dict()
    counts = {name: tensor.numel() for name, tensor in state.items()}
    assert (len(counts), sum(counts.values())) == (1223, 14_607_260_128)
    parts = {"language_model": 14_141_252_608, "_moe_gen": 6_525_628_928, "vit_model": 402_552_736}
    assert {part: sum(n for name, n in counts.items() if part in name) for part in parts} == parts
    (tmp_path / "saved").mkdir()
    config.write(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"llm_config.json", "vit_config.json"}


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path, model: Bagel) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ModelError, match=r"llm_config\.json"):
        Bagel.load(tmp_path)
    model.save(tmp_path)
    state = load_file(tmp_path / "ema.safetensors")
    del state["llm2vae.bias"]
    save_file(state, tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"llm2vae\.bias"):
        Bagel.load(tmp_path)


def test_shards_are_the_one_file_in_pieces(model: Bagel, tmp_path: Path) -> None:
    """Saved in shards and loaded again, bit for bit; one of them lost is named."""
    model.save(tmp_path, max_shard_size=200_000)
    shards = sorted(tmp_path.glob("ema-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "ema.safetensors").exists()
    again, before = Bagel.load(tmp_path).network.state_dict(), model.network.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        Bagel.load(tmp_path)


def test_weights_take_the_type_that_is_asked_for(model: Bagel) -> None:
    loaded = Bagel.load(CHECKPOINT, dtype=torch.bfloat16).network
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, p in model.network.named_parameters() if not p.requires_grad
    ]


@pytest.mark.parametrize("queries", [1, 200])
def test_bfloat16_attention_on_a_cpu_is_attention(queries: int) -> None:
    """Few and many queries over 170 keys, one row with padding: what the fused kernel makes of the same numbers."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, 16).bfloat16() for heads, n in ((4, queries), (2, 170), (2, 170)))
    visible = torch.ones(3, 1, queries, 170, dtype=torch.bool)
    visible[1, :, :, 100:] = False
    bias = additive(visible, q.dtype)
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float(), bias.float(), enable_gqa=True)
    assert torch.allclose(attend(q, k, v, bias).float(), exact, atol=1e-2)
    assert not torch.allclose(attend(q, k, v, None).float(), exact, atol=1e-2)


@pytest.mark.parametrize("layers", ["auto", ["cpu", "disk", "cpu"], ["disk"] * 3])
def test_where_the_layers_are_changes_nothing(model: Bagel, layers: Any) -> None:
    """Some on disk, from where accelerate brings them one by one; "auto" finds that all fit the host."""
    spread = Bagel.load(CHECKPOINT, layers=layers)
    on_disk = [all(p.is_meta for p in layer.parameters()) for layer in spread.network.decoder.layers]
    assert on_disk == ([False] * 3 if layers == "auto" else [place == "disk" for place in layers])
    for ours, theirs in zip(
        *(draw_prompts(one, ["a red fox", ""], SAMPLING, [1, 2], [3, 4]) for one in (spread, model)), strict=True
    ):
        assert torch.equal(ours.latent, theirs.latent)


@pytest.mark.parametrize("layers", [["cpu", "disk", "cpu"], ["disk"] * 3])
def test_layers_on_disk_are_saved(model: Bagel, tmp_path: Path, layers: Any) -> None:
    """The file is that of the whole model, in shards of any size; the layers stay on disk, and are drawn with."""
    spread = Bagel.load(CHECKPOINT, layers=layers)
    (drawn,) = draw_prompts(spread, ["a red fox"], SAMPLING, [1])
    spread.save(tmp_path / "whole")
    spread.save(tmp_path / "shards", max_shard_size=200_000)
    official = load_file(CHECKPOINT / "ema.safetensors")
    saved = load_file(tmp_path / "whole" / "ema.safetensors")
    assert saved.keys() == official.keys() and all(torch.equal(saved[name], official[name]) for name in official)
    again = Bagel.load(tmp_path / "shards").network.state_dict()
    assert all(torch.equal(again[name], official[name]) for name in official)
    assert [all(p.is_meta for p in layer.parameters()) for layer in spread.network.decoder.layers] == [
        place == "disk" for place in layers
    ]
    assert torch.equal(draw_prompts(spread, ["a red fox"], SAMPLING, [1])[0].latent, drawn.latent)


def test_layers_on_disk_are_not_written_over(model: Bagel, tmp_path: Path) -> None:
    model.save(tmp_path)
    before = (tmp_path / "ema.safetensors").read_bytes()
    spread = Bagel.load(tmp_path, layers=["cpu", "disk", "cpu"])
    with pytest.raises(ValueError, match=r"is where the layers on disk are read from: save to another folder"):
        spread.save(tmp_path)
    assert (tmp_path / "ema.safetensors").read_bytes() == before


def test_adapters_of_layers_on_disk_cannot_be_merged(tmp_path: Path) -> None:
    spread = Bagel.load(CHECKPOINT, layers=["cpu", "disk", "cpu"])
    inject_adapter_in_model(LoraConfig(target_modules=r".*layers\.1\..*q_proj_moe_gen"), spread.network)
    with pytest.raises(ValueError, match=r"layers\.1\..*q_proj_moe_gen is on disk, where no adapter can be merged"):
        spread.save(tmp_path, merge=True)


@pytest.mark.parametrize(("host", "place"), [(2, "cpu"), (0, "disk")])
def test_what_a_gpu_cannot_hold(monkeypatch: pytest.MonkeyPatch, host: int, place: str) -> None:
    """Beside all else one layer, and one that passes; the host takes the other two, or, without memory, the disk."""
    with torch.device("meta"):
        network = BagelNetwork(BagelConfig.from_folder(CHECKPOINT))
    whole, layers = (4 * sum(p.numel() for p in part.parameters()) for part in (network, network.decoder.layers))
    memory = {0: whole - layers + 2 * layers // 3 + 1000, "cpu": host * layers // 3 + 1000}
    monkeypatch.setattr(checkpoint, "get_max_memory", lambda: memory)
    monkeypatch.setattr(checkpoint, "get_balanced_memory", lambda layers, memory, *_: memory)
    assert checkpoint.spread(network, torch.float32) == [torch.device("cuda", 0), place, place]


def test_adapters_are_merged_on_request(tmp_path: Path) -> None:
    """Official names and shapes; the saved model computes what the one with adapters does, which stays as it was."""
    adapted = Bagel.load(CHECKPOINT)
    inject_adapter_in_model(
        LoraConfig(target_modules=r".*(q_proj|down_proj)_moe_gen|.*moe_gen.*up_proj"), adapted.network
    )
    before = [name for name, _ in adapted.network.named_parameters()]
    torch.manual_seed(0)
    for name, parameter in adapted.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(
        ValueError, match="layers have adapters, which the official layout cannot hold: save with merge"
    ):
        adapted.save(tmp_path)
    (made,) = draw_prompts(adapted, ["a red fox"], SAMPLING, [1])
    adapted.save(tmp_path, merge=True)
    merged = Bagel.load(tmp_path)
    assert merged.network.state_dict().keys() == Bagel.load(CHECKPOINT).network.state_dict().keys()
    assert torch.allclose(draw_prompts(merged, ["a red fox"], SAMPLING, [1])[0].latent, made.latent, atol=1e-4)
    assert [name for name, _ in adapted.network.named_parameters()] == before
    assert torch.equal(draw_prompts(adapted, ["a red fox"], SAMPLING, [1])[0].latent, made.latent)
    (plain,) = draw_prompts(Bagel.load(CHECKPOINT), ["a red fox"], SAMPLING, [1])
    assert not torch.allclose(plain.latent, made.latent, atol=1e-2)


def test_selected_rows_go_on_by_themselves() -> None:
    """Rows of a cache are copied by ``select``: lengths and positions go with them."""
    cache = Cache([HOST], rows=2, kv_heads=1, head_dim=4, device=HOST, dtype=torch.float32)
    cache.reserve(3)
    cache.memories(torch.arange(3), 3)[0].write(torch.arange(24.0).view(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    cache.keep(torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([3, 1]))
    twice = cache.select([1, 1, 0])
    assert twice.lengths.tolist() == [1, 1, 3] and twice.position.tolist() == [1, 1, 3]
    assert torch.equal(twice.keys[0][2], cache.keys[0][0, :, :3])
    assert cache.rearranged([0, 1]) is cache and cache.rearranged([1]).lengths.tolist() == [1]

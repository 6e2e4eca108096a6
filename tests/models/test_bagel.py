"""Laws of the BAGEL adapter at toy size: batching, sharing and caching change nothing; files come back bit for bit."""

from __future__ import annotations

import json
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
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.models.bagel import Bagel, checkpoint, network
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import BagelConfig
from srum.models.bagel.network import BagelNetwork, additive, attend
from srum.models.bagel.sampler import guide, sample
from srum.models.bagel.sequence import Split
from srum.models.base import Decoding, Question, Sampling, Segment
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


def test_a_batch_of_images_is_its_images_one_by_one(model: Bagel) -> None:
    prompts = ["a red fox", "two blue cups on a wooden table, morning light", ""]
    together = model.generate(prompts, SAMPLING, [1, 2, 3])
    for prompt, seed, generated in zip(prompts, [1, 2, 3], together, strict=True):
        (alone,) = model.generate([prompt], SAMPLING, [seed])
        assert torch.allclose(alone.latent, generated.latent, atol=1e-4)


@pytest.mark.parametrize("plan", [False, True])
def test_predictions_lie_on_the_way_to_the_image(model: Bagel, plan: bool) -> None:
    """x_t and its prediction x_t - t v give v, and so the next x_t: from the noise to the very latent of the image."""
    prompts, seeds = ["a red fox", "two blue cups"], [1, 2]
    predicted = model.predictions(prompts, SAMPLING, seeds, plan)
    timesteps = flow.schedule(SAMPLING.timesteps, SAMPLING.timestep_shift).tolist()
    noises = model.noise(seeds, [SAMPLING.size] * 2)
    for own, x, made in zip(predicted, noises, model.generate(prompts, SAMPLING, seeds, plan), strict=True):
        assert own.shape == (3, *made.latent.shape) and torch.equal(own[-1], made.latent)
        for clean, t, following in zip(own, timesteps[:-1], timesteps[1:], strict=True):
            v = (x - model.tokens(clean)) / t
            x = flow.euler_step(x, v, following - t)
        assert torch.allclose(x, model.tokens(made.latent), atol=1e-4)
        assert not torch.allclose(own[0], own[-1], atol=1e-2)


def test_a_batch_of_edits_is_its_edits_one_by_one(model: Bagel) -> None:
    """Images of three sizes: each result has the size of its own source after the autoencoder's resize."""
    images = [picture(0, (80, 60)), picture(1, (64, 96)), picture(2, (131, 57))]
    prompts = ["make it purple", "", "two blue cups on a wooden table, morning light"]
    for plan in (False, True):
        together = model.edit(images, prompts, EDITING, [1, 2, 3], plan)
        assert [edited.image.size for edited in together] == [(80, 64), (64, 96), (96, 48)]
        for image, prompt, seed, edited in zip(images, prompts, [1, 2, 3], together, strict=True):
            (alone,) = model.edit([image], [prompt], EDITING, [seed], plan)
            assert torch.allclose(alone.latent, edited.latent, atol=1e-4)
            assert alone.plan == edited.plan and (edited.plan is not None) == plan


def test_an_edit_of_several_images(model: Bagel) -> None:
    """One context of both images in order; the last gives the size. It depends on both, and on their order."""
    a, b = picture(0, (64, 96)), picture(1, (96, 64))
    made = model.edit([[a, b], b, [b, a]], ["join them"] * 3, EDITING, [1] * 3)
    assert [edited.image.size for edited in made] == [(96, 64), (96, 64), (64, 96)]
    assert not torch.allclose(made[0].latent, made[1].latent, atol=1e-2)
    context, _ = model.generation_contexts(["join them"], None, [0], [[a, b]])
    piecewise = model.empty_context(1)
    with torch.no_grad():
        for image in (a, b):
            model.add_clean(piecewise, model.encode([image]))
            model.add_seen(piecewise, [image])
        model.add_text(piecewise, ["join them"])
    assert torch.equal(context[0].position, piecewise.position)
    for ours, theirs in zip(context[0].keys, piecewise.keys, strict=True):
        assert torch.allclose(ours[:, :, : piecewise.used], theirs[:, :, : piecewise.used], atol=1e-4)


def test_an_edit_depends_on_its_image_and_its_prompt(model: Bagel) -> None:
    """With one noise for all: only the same source, prompt and scales give the same result."""
    images = [picture(0, (64, 64)), picture(1, (64, 64)), picture(0, (64, 64)), picture(0, (64, 64))]
    prompts = ["make it purple", "make it purple", "add a boat", "make it purple"]
    first, other_image, other_prompt, same = (x.latent for x in model.edit(images, prompts, EDITING, [1] * 4))
    assert torch.allclose(first, same, atol=1e-4)
    assert not torch.allclose(first, other_image, atol=1e-2)
    assert not torch.allclose(first, other_prompt, atol=1e-2)
    (plain,) = model.edit(images[:1], prompts[:1], replace(EDITING, image_guidance=1.0), [1])
    assert not torch.allclose(first, plain.latent, atol=1e-2)


def test_edits_come_as_many_as_their_images_prompts_and_seeds(model: Bagel) -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 images and 2 seeds"):
        model.edit([picture(0, (64, 64))], ["a", "b"], EDITING, [1, 2])


def test_a_timestep_at_the_border_of_the_guidance_interval() -> None:
    """12 points with shift 3 pass through t = 0.4 in float32, and 0.4 < t <= 1 leaves it out, as in the reference."""
    branches: list[int] = []

    def velocity(x: torch.Tensor, t: float, count: int) -> torch.Tensor:
        branches.append(count)
        return torch.zeros(count * len(x), x.shape[1])

    sampling = Sampling(timesteps=12, timestep_shift=3.0, guidance=4.0, guidance_interval=(0.4, 1.0))
    sample(velocity, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), sampling)
    assert branches == [2] * 9 + [1, 1]


def test_sampled_plans_belong_to_their_seeds(model: Bagel) -> None:
    sampling = replace(SAMPLING, plan_temperature=1.0)
    first = model.generate(["a red fox"] * 2, sampling, [5, 6], plan=True)
    turned = model.generate(["a red fox"] * 2, sampling, [6, 5], plan=True)
    assert [g.plan for g in first] == [g.plan for g in reversed(turned)]
    assert first[0].plan != first[1].plan


def test_questions_share_an_image_and_answer_as_if_alone(model: Bagel) -> None:
    images = [picture(0, (80, 60)), picture(1, (131, 57))]
    questions = [[Question("What is it?"), Question("How many?"), Question("Why?", reply_prefix="Because")],
                 [Question("Where is the house?")]]  # fmt: skip
    decoding = Decoding(max_tokens=8)
    together = model.answer(images, questions, decoding)
    alone = [
        [model.answer([i], [[q]], decoding)[0][0] for q in asked] for i, asked in zip(images, questions, strict=True)
    ]
    assert together == alone
    assert model.answer(images, [[], []], decoding) == [[], []]


@pytest.mark.parametrize("think", [False, True])
def test_a_context_may_hold_several_images_or_none(model: Bagel, think: bool) -> None:
    """In one batch: two images, none, one; each reply is that of its context written piece by piece."""
    first, second = picture(0, (80, 60)), picture(1, (131, 57))
    shown, question = [[first, second], None, second], Question("What is it?")
    together = model.answer(shown, [[question]] * 3, Decoding(max_tokens=8), think)
    for images, (reply,) in zip(([first, second], [], [second]), together, strict=True):
        context = model.empty_context(1)
        with torch.no_grad():
            for text in [model.config.think_instruction] * think:
                model.add_text(context, [text])
            for image in images:
                model.add_seen(context, [model.resized(image)])
            model.add_text(context, [question.text])
            assert model.decode_text(context, Decoding(max_tokens=8)) == [reply]


def test_images_of_one_call_may_differ_in_size(model: Bagel) -> None:
    sizes = [(64, 96), (32, 32)]
    together = model.generate(["a red fox", "a boat"], SAMPLING, [1, 2], sizes=sizes)
    for prompt, seed, size, made in zip(["a red fox", "a boat"], [1, 2], sizes, together, strict=True):
        (alone,) = model.generate([prompt], replace(SAMPLING, size=size), [seed])
        assert made.image.size == size[::-1] and torch.allclose(alone.latent, made.latent, atol=1e-4)


def test_branches_have_the_probabilities_of_whole_texts(model: Bagel) -> None:
    """log p of a continuation, read off one tree, equals that of the text forced token by token."""
    image, question = picture(2, (80, 60)), Question("Score it.", reply_prefix="Score:")
    continuations = [" 1.0", " -1.0", " -0.5", "!"]
    tree = model.continuation_logprobs([image], [[question]], continuations)[0][0]
    for text, found in zip(continuations, tree, strict=True):
        context = model.empty_context(1)
        with torch.no_grad():
            model.add_seen(context, [model.resized(image)])
            model.add_text(context, [question.text])
            ids = [model.bos, *model._ids(question.reply_prefix), *model._ids(text)]
            log_p = model._log_softmax(model._extend(context, [[Split(kind="text", ids=ids[:-1])]]))
        own = len(model._ids(text))
        expected = log_p[range(len(ids) - 1 - own, len(ids) - 1), ids[-own:]].sum()
        assert found.item() == pytest.approx(expected.item(), abs=1e-4)


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
        context = model.empty_context(1)
        model.add_text(context, ["a red fox"])
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
        *(own.generate(["a red fox", ""], SAMPLING, [1, 2], True) for own in (spread, model)), strict=True
    ):
        assert torch.equal(ours.latent, theirs.latent) and ours.plan == theirs.plan


@pytest.mark.parametrize("layers", [["cpu", "disk", "cpu"], ["disk"] * 3])
def test_layers_on_disk_are_saved(model: Bagel, tmp_path: Path, layers: Any) -> None:
    """The file is that of the whole model, in shards of any size; the layers stay on disk, and are drawn with."""
    spread = Bagel.load(CHECKPOINT, layers=layers)
    (drawn,) = spread.generate(["a red fox"], SAMPLING, [1])
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
    assert torch.equal(spread.generate(["a red fox"], SAMPLING, [1])[0].latent, drawn.latent)


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
    (made,) = adapted.generate(["a red fox"], SAMPLING, [1])
    adapted.save(tmp_path, merge=True)
    merged = Bagel.load(tmp_path)
    assert merged.network.state_dict().keys() == Bagel.load(CHECKPOINT).network.state_dict().keys()
    assert torch.allclose(merged.generate(["a red fox"], SAMPLING, [1])[0].latent, made.latent, atol=1e-4)
    assert [name for name, _ in adapted.network.named_parameters()] == before
    assert torch.equal(adapted.generate(["a red fox"], SAMPLING, [1])[0].latent, made.latent)
    (plain,) = Bagel.load(CHECKPOINT).generate(["a red fox"], SAMPLING, [1])
    assert not torch.allclose(plain.latent, made.latent, atol=1e-2)


def test_selected_rows_go_on_by_themselves() -> None:
    """Rows of a cache are copied by ``select`` and joined by ``stack``: lengths and positions go with them."""
    cache = Cache([HOST], rows=2, kv_heads=1, head_dim=4, device=HOST, dtype=torch.float32)
    cache.reserve(3)
    cache.memories(torch.arange(3), 3)[0].write(torch.arange(24.0).view(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    cache.keep(torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([3, 1]))
    twice = cache.select([1, 1, 0])
    assert twice.lengths.tolist() == [1, 1, 3] and twice.position.tolist() == [1, 1, 3]
    assert torch.equal(twice.keys[0][2], cache.keys[0][0, :, :3])
    joined = Cache.stack([cache.select([0]), cache.select([1])])
    assert joined.lengths.tolist() == cache.lengths.tolist()

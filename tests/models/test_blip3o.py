"""BLIP3-o at toy size: batches and seeds, what an image costs its questions, conditions, frames, the file layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from srum import models
from srum.config import ConfigError, load_config
from srum.doctor import self_check
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.grounding.native import NativeGrounder
from srum.judging.self_judge import SelfJudge
from srum.models.bagel import Bagel
from srum.models.base import Decoding, Exploration, Generated, Sampling, Segment, Written, box_frame, crop_box
from srum.models.blip3o import Blip3o, chat
from srum.models.blip3o.images import LEAST, MOST, seen_size
from srum.models.pixels import cropped
from srum.records import Region
from srum.train.weights import trainable_parameters

CHECKPOINT = Path(__file__).parents[1] / "golden" / "blip3o" / "checkpoint"
QUICK = Sampling(size=(64, 64), timesteps=4, timestep_shift=1.0, guidance=3.0, decoder_steps=2)
PROMPTS = ["a cat", "three small green apples on a wooden table", ""]


@pytest.fixture(scope="module")
def model() -> Blip3o:
    return Blip3o.load(CHECKPOINT)


def texts(*prompts: str) -> list[list[Segment]]:
    return [[Segment("text", text=prompt, droppable=True)] for prompt in prompts]


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# --- drawing


def test_a_prompt_is_drawn_the_same_alone_and_among_others(model: Blip3o) -> None:
    together = model.draw(texts(*PROMPTS), QUICK, [3, 4, 5])
    for prompt, seed, made in zip(PROMPTS, [3, 4, 5], together, strict=True):
        (alone,) = model.draw(texts(prompt), QUICK, [seed])
        torch.testing.assert_close(alone.latent, made.latent, rtol=0, atol=1e-3)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(made.image, int)).max() <= 1


def test_images_follow_from_their_seeds(model: Blip3o) -> None:
    first, again, other = model.draw(texts("a cat", "a cat", "a cat"), QUICK, [1, 1, 2])
    pixels, again_pixels = (np.asarray(drawing.image, dtype=int) for drawing in (first, again))
    assert torch.allclose(first.latent, again.latent, atol=1e-4)
    assert np.abs(pixels - again_pixels).max() <= 1  # on some processors the rows of a batch round differently
    assert not torch.allclose(first.latent, other.latent, atol=1e-1)
    repeated = model.draw(texts("a cat", "a cat", "a cat"), QUICK, [1, 1, 2])
    assert [drawing.image.tobytes() for drawing in repeated] == [
        drawing.image.tobytes() for drawing in (first, again, other)
    ]


def test_images_of_several_sizes_in_one_call(model: Blip3o) -> None:
    sizes = [(64, 64), (32, 64), (32, 64)]
    made = model.draw(texts(*PROMPTS), QUICK, [0, 1, 2], sizes=sizes)
    assert [image.image.size[::-1] for image in made] == sizes
    assert {tuple(image.latent.shape) for image in made} == {(32, 8, 8)}


def test_the_way_to_an_image_ends_in_its_features(model: Blip3o) -> None:
    (made,) = model.draw(texts("a cat"), QUICK, [1], path=True)
    assert made.path is not None and made.path.timesteps.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    torch.testing.assert_close(made.path.predictions[-1], made.latent, rtol=0, atol=1e-5)


def test_random_steps_lead_where_they_say_and_each_image_has_its_own(model: Blip3o) -> None:
    unguided = replace(QUICK, guidance=1.0, timesteps=5, decoder_guidance=1.0)

    def drawn(level: float, some: slice = slice(None)) -> list[Generated]:
        explore = Exploration("flow", level, [{0}, {1}, {0, 2}][some], [1, 2, 3][some])
        return model.draw(texts(*PROMPTS)[some], unguided, [4, 5, 6][some], explore=explore)

    plain, silent, loud = model.draw(texts(*PROMPTS), unguided, [4, 5, 6]), drawn(0.0), drawn(0.7)
    assert [len(made.steps) for made in loud] == [1, 1, 2]
    for number, (straight, quiet, made) in enumerate(zip(plain, silent, loud, strict=True)):
        assert torch.equal(straight.latent, quiet.latent) and not torch.allclose(straight.latent, made.latent, atol=0.1)
        (alone,) = drawn(0.7, slice(number, number + 1))
        torch.testing.assert_close(alone.latent, made.latent, rtol=0, atol=1e-3)
        for step in made.steps:
            expected = step.transition.mean(step.state, step.sought)
            torch.testing.assert_close(expected, step.reached, rtol=1e-4, atol=1e-4)


def test_without_its_text_a_prompt_is_a_condition_of_zeros(model: Blip3o) -> None:
    dropped, whole = model.conditions([[], *texts("a cat")])
    assert not dropped.any() and whole.any()


def test_the_training_pass_gives_the_velocity_of_the_sampler(model: Blip3o) -> None:
    deviation, tolerance = self_check(model, (64, 64), bfloat16=False)
    assert deviation <= tolerance


def test_long_prompts_and_none_are_drawn(model: Blip3o) -> None:
    """2,000 words are not cut off: the last one counts."""
    long = "apple " * 1999
    a, b = model.conditions(texts(long + "red", long + "blue"))
    assert torch.isfinite(a).all() and not torch.equal(a, b)
    assert torch.isfinite(model.conditions(texts(""))).all()


# --- reading and writing


def questions(image: Image.Image, *asked: str) -> list[list[Segment]]:
    seen = Segment("seen", image=image)
    return [[seen, Segment("text", text=text)] for text in asked]


def test_replies_do_not_depend_on_the_batch_and_score_knows_their_probability(model: Blip3o) -> None:
    contexts = questions(noise_image((90, 110)), "What is it?", "Where is the house, then?") + texts("Hello")
    together = model.write(contexts, Decoding(max_tokens=8), [0] * 3)
    for context, reply in zip(contexts, together, strict=True):
        (alone,) = model.write([context], Decoding(max_tokens=8), [0])
        assert alone.ids == reply.ids
        (scores,) = model.score([context], [reply.text, "no"])
        if model.ids(reply.text) == tuple(reply.ids):  # random bytes may be no text
            assert scores[0].item() == pytest.approx(reply.logprobs[: len(reply.ids)].sum().item(), abs=1e-3)


def test_scores_are_those_of_each_continuation_alone(model: Blip3o) -> None:
    (context,) = questions(noise_image((60, 60)), "How good?")
    begun = [*context, Segment("text", text="Score:", open=True)]
    several = [" -1.0", " 0.5", "x"]
    (together,) = model.score([begun], several)
    alone = torch.cat([model.score([begun], [text])[0] for text in several])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_an_image_is_looked_at_once(model: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    see = model.language.images
    monkeypatch.setattr(
        model.language, "images", lambda images, sizes=None: looked.append(len(images)) or see(images, sizes)
    )
    model.score(questions(noise_image((60, 60)), *"abcdefgh"), ["yes"])
    assert sum(looked) == 1


def test_a_sampled_reply_follows_from_its_seed(model: Blip3o) -> None:
    contexts = texts("Hello", "Hello", "Hello")
    a, b, c = model.write(contexts, Decoding(max_tokens=12, temperature=1.0), [1, 1, 2])
    assert a.ids == b.ids != c.ids


# --- frames


@pytest.mark.parametrize(
    ("size", "frame"),
    [((1024, 1024), (1036, 1036)), ((512, 512), (504, 504)), ((640, 480), (644, 476)), ((37, 301), (28, 308))],
)
@pytest.mark.parametrize("kind", ["model", "pixels", "thousand"])
def test_native_boxes_are_those_of_the_frame(
    model: Blip3o, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], frame: tuple[int, int], kind: str
) -> None:
    """The right half of the image, named in each of the three frames, is the right half."""
    named = {"model": frame, "pixels": size, "thousand": (1000, 1000)}[kind]
    reply = json.dumps([{"label": "half", "bbox_2d": [named[1] / 2, 0, named[1], named[0]]}])
    monkeypatch.setattr(model, "write", lambda *_: [Written(reply, (), torch.zeros(0), ended=True)])
    ((region,),) = NativeGrounder(model, frame=kind).propose([Image.new("RGB", size[::-1])], [""])  # type: ignore[arg-type,misc]
    assert region.box == pytest.approx((size[1] / 2, 0, size[1], size[0]))


def test_the_judge_names_boxes_where_the_model_reads_them(model: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def write(contexts: list[list[Segment]], *_: object) -> list[Written]:
        asked.extend(context[1].text or "" for context in contexts)
        return [Written("", (), torch.zeros(0), ended=True) for _ in contexts]

    monkeypatch.setattr(model, "write", write)
    region = Region(id=1, box=(256, 512, 768, 1024), area=1, source="native")
    SelfJudge(model, soft=False, retries=0).judge([Image.new("RGB", (1024, 1024))], ["a cat"], [[region]])
    assert "[259, 518, 777, 1036]" in asked[0]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_seen_sizes_are_whole_patches_within_the_limits(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ModelError, match="200 times"):
            seen_size((height, width), 28)
        return
    h, w = seen_size((height, width), 28)
    assert h % 28 == w % 28 == 0 and LEAST <= h * w <= MOST


@given(st.integers(20, 400), st.integers(20, 400))
def test_the_crop_box_is_what_the_crop_shows(height: int, width: int) -> None:
    """A gradient along the longer side comes out as the gradient over the box, up to the rounding of the crop."""
    box = crop_box(Framed(), (height, width))  # type: ignore[arg-type]
    assert box[2] - box[0] == box[3] - box[1] == min(height, width)
    along = np.broadcast_to((np.arange(width) + 0.5) * 255 / width, (height, width))
    crop = np.asarray(cropped(Image.fromarray(along.astype(np.uint8)).convert("RGB"), 64), dtype=float)[..., 0]
    expected = (box[0] + (box[2] - box[0]) * (np.arange(64) + 0.5) / 64) * 255 / width
    assert np.abs(crop[32, 8:56] - expected[8:56]).max() <= 255 / 64 * 1.5 + 2


class Framed:
    """The frames of BLIP3-o without its weights."""

    abilities = frozenset({"frames"})
    crop_box = Blip3o.crop_box


def test_models_without_frames_name_boxes_in_the_image() -> None:
    assert box_frame(object(), (10, 20)) == (10, 20)


# --- conditions and training


def example(model: Blip3o, prompt: str, seed: int = 0) -> list[Segment]:
    latent = torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [Segment("text", text=prompt, droppable=True), Segment("noisy", latent=latent, loss=True)]


def test_prepared_conditions_are_the_same_and_need_no_language_model() -> None:
    model = Blip3o.load(CHECKPOINT)
    examples = [example(model, prompt) for prompt in PROMPTS[:2]]
    noise = [model.corrupt(torch.zeros(32, 8, 8), torch.Generator().manual_seed(5), 1.0) for _ in examples]
    with trainable_parameters(model, "generation"), torch.no_grad():
        plain = model.forward(model.pack(examples, noise)).velocity
        model.prepare(examples)
        assert "language" not in vars(model)
        prepared = model.forward(model.pack(examples, noise)).velocity
        model.draw(texts(PROMPTS[0]), QUICK, [0])
        assert "language" not in vars(model)
    torch.testing.assert_close(prepared, plain, rtol=0, atol=1e-4)


def test_trained_queries_get_gradients_through_a_language_model_that_gets_none() -> None:
    model = Blip3o.load(CHECKPOINT)
    examples = [example(model, prompt) for prompt in PROMPTS[:2]]
    with trainable_parameters(model, "all"):
        model.prepare(examples)
        assert model.known == {}
        noise = [FlowNoise(torch.zeros(64, 32), 0.5)] * 2
        model.forward(model.pack(examples, noise)).image_error.mean().backward()
        assert model.network.latent_queries.grad is not None and model.network.latent_queries.grad.any()
        assert all(parameter.grad is None for parameter in model.language.network.parameters())


def test_timesteps_are_even_thousandths(model: Blip3o) -> None:
    """u uniform on [0, 1) gives t uniform on {0.001, ..., 1.000}: mean 0.5005, none beyond."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([model.corrupt(torch.zeros(1, 1, 1), generator, 1.0).t for _ in range(4000)])
    assert torch.equal((drawn * 1000).round() / 1000, drawn.float())
    assert drawn.min() >= 0.001 and drawn.max() <= 1.0 and abs(drawn.mean() - 0.5005) < 4 * 0.289 / 4000**0.5


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("text", text="a", loss=True)], "does not learn texts"),
        (
            [Segment("clean", latent=torch.zeros(32, 8, 8)), Segment("noisy", latent=torch.zeros(32, 8, 8))],
            "clean image",
        ),
        ([Segment("text", text="a")], "no noisy segment"),
    ],
)
def test_examples_that_it_cannot_learn(model: Blip3o, segments: list[Segment], message: str) -> None:
    noise = [FlowNoise(torch.zeros(64, 32), 0.5) for segment in segments if segment.kind == "noisy"]
    with pytest.raises(ModelError, match=message):
        model.targets(segments, noise)
        model.pack([segments], noise)


def test_each_noisy_latent_of_an_example_is_learned_behind_what_is_before_it(model: Blip3o) -> None:
    """As each alone behind its own context; a text with branches of its own is not read by another's latent."""
    first, second = example(model, "a cat", 1), example(model, "and a dog", 2)
    branched = [replace(segment, branch=number) for number, pair in ((1, first), (2, second)) for segment in pair]
    chained = [*first, *second]
    both = [Segment("text", text="a cat"), *second]
    noise = [FlowNoise(torch.randn(64, 32, generator=torch.Generator().manual_seed(n)), 0.5) for n in range(2)]
    with torch.no_grad():
        alone = model.forward(model.pack([first, second], noise))
        apart = model.forward(model.pack([branched], noise))
        after = model.forward(model.pack([first, both], noise))
        together = model.forward(model.pack([chained], noise))
    torch.testing.assert_close(apart.velocity, alone.velocity, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.velocity, after.velocity, rtol=0, atol=1e-4)
    assert not torch.allclose(together.velocity, alone.velocity, atol=1e-3)
    assert together.image_segment.tolist() == [0] * 64 + [1] * 64 and model.targets(chained, noise) == (128, 0)


# --- the file layout


def test_a_saved_checkpoint_is_the_same_with_its_decoder(model: Blip3o, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = Blip3o.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), again.network.parameters(), strict=True))
    assert (tmp_path / "saved" / "diffusion-decoder" / "unet" / "config.json").is_file()
    with pytest.raises(ModelError, match="save to another folder"):
        again.save(tmp_path / "saved")


def test_shards_without_trained_weights_are_the_same_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "sharded")
    Blip3o.load(folder).save(tmp_path / "saved")
    same = {
        path.name: path.stat().st_ino == (tmp_path / "saved" / path.name).stat().st_ino
        for path in folder.glob("model-*.safetensors")
    }
    assert same == {"model-1.safetensors": True, "model-2.safetensors": False}
    a, b = (Blip3o.load(path).headers.shapes for path in (folder, tmp_path / "saved"))
    assert a == b


def sharded(folder: Path) -> Path:
    """The checkpoint with what is trained in a shard of its own."""
    shutil.copytree(CHECKPOINT, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + name.startswith(('model.dit.', 'model.latent'))}.safetensors" for name in weights}
    for file in set(files.values()):
        save_file({name: x for name, x in weights.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = changed(tmp_path, {"tie_word_embeddings": True}, lambda weights: weights.pop("lm_head.weight"))
    language = Blip3o.load(folder).language
    assert language.network.lm_head.weight is language.text.embed_tokens.weight
    with pytest.raises(ModelError, match=r"1 missing: lm_head\.weight"):
        Blip3o.load(changed(tmp_path / "b", {}, lambda weights: weights.pop("lm_head.weight")))


def changed(folder: Path, fields: dict[str, object], change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the checkpoint with other fields and weights."""
    folder = folder / "changed"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(prefix)]


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"image_start_tag_id": 7}, without("none"), "BLIP3o-NEXT"),
        ({"mm_use_im_start_end": True}, without("none"), "mm_use_im_start_end"),
        ({}, without("model.dit."), "a Qwen2.5-VL alone"),
        ({}, without("model.gen_vision_tower.vision_tower.model.cls_token"), "1 missing: .*cls_token"),
        ({}, lambda weights: weights.update({"model.other": torch.zeros(1)}), "1 unexpected: model.other"),
        ({}, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight: \(3,\)"),
    ],
)
def test_checkpoints_that_do_not_fit(
    tmp_path: Path, fields: dict[str, object], change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        models.load(changed(tmp_path, fields, change), "cpu")


def test_a_checkpoint_without_decoder_says_where_it_is(tmp_path: Path) -> None:
    folder = changed(tmp_path, {}, without("none"))
    shutil.rmtree(folder / "diffusion-decoder")
    with pytest.raises(ModelError, match=r"no diffusion-decoder/.*copy the published model's"):
        Blip3o.load(folder)


def test_without_its_tower_it_draws_and_cannot_encode(tmp_path: Path) -> None:
    model = Blip3o.load(changed(tmp_path, {}, without("model.gen_vision_tower.")))
    assert model.draw(texts("a cat"), QUICK, [0])[0].latent.shape == (32, 8, 8)
    with pytest.raises(ModelError, match="jiuhai/eva_clip_vision_tower"):
        model.encode([noise_image((30, 40))])


@pytest.mark.parametrize("size", [(30, 40), (1, 100), (448, 448), (600, 33)])
def test_images_of_odd_sizes_are_encoded(model: Blip3o, size: tuple[int, int]) -> None:
    (latent,) = model.encode([noise_image(size)])
    assert latent.shape == (32, 8, 8) and torch.isfinite(latent).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.plan=true", "rollout.plan: BLIP3-o writes no plan"),
        ("rollout.renorm=channel", "rollout.renorm"),
        ("eval.guidance_interval=[0.4, 1.0]", "eval.guidance_interval"),
        ("compile=true", "compile"),
        ("device=spread", "device: BLIP3-o's layers are not spread"),
    ],
)
def test_settings_that_do_not_apply(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.settled(load_config(None, [f"model={CHECKPOINT}", "rollout.plan=false", override]))
    models.settled(load_config(None, [f"model={CHECKPOINT}", "rollout.plan=false"]))


def test_the_abilities_in_the_readme_are_true() -> None:
    rows = re.findall(r"^\| (.*?) \| ([a-z, ]+) \|.*$", (Path(__file__).parents[2] / "README.md").read_text(), re.M)
    told = {name: frozenset(abilities.split(", ")) for name, abilities in rows if "BAGEL" in name or "BLIP3-o" in name}
    assert told == {"`srum-tiny`, BAGEL": Bagel.abilities, "BLIP3-o 8B, 4B": Blip3o.abilities}


def test_in_bfloat16_it_stays_near(model: Blip3o) -> None:
    """States and a velocity of size 1 to 10 with 8 significant bits; float32 weights under autocast, as in training."""
    rounded = Blip3o.load(CHECKPOINT, precision="bf16")
    contexts = texts(*PROMPTS)
    states, exact = rounded.conditions(contexts), model.conditions(contexts)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), exact, rtol=0, atol=0.1)
    x, t = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5, 0.1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = rounded.network.dit(x, t, exact)
    with torch.no_grad():
        torch.testing.assert_close(ours.float(), model.network.dit(x, t, exact), rtol=0, atol=0.4)
    made = rounded.draw(contexts, QUICK, [1, 2, 3])
    assert all(torch.isfinite(one.latent).all() and one.latent.dtype == torch.float32 for one in made)
    assert len(rounded.write(questions(noise_image((60, 60)), "What?"), Decoding(max_tokens=4), [0])) == 1


def test_an_image_is_drawn_and_learned_after_another(model: Blip3o) -> None:
    """Reconstruction: seen image and text -> the image's features, the condition as it is drawn after."""
    seen, text = Segment("seen", image=noise_image((448, 448))), Segment("text", text="Please reconstruct the image.")
    (made,) = model.draw([[seen, text]], QUICK, [0])
    noisy = Segment("noisy", latent=made.latent, loss=True)
    with trainable_parameters(model, "generation"):
        batch = model.pack([[seen, text, noisy], [text, noisy]], [FlowNoise(torch.zeros(64, 32), 0.5)] * 2)
        assert batch.conditions is not None
        torch.testing.assert_close(batch.conditions[:1], model.conditions([[seen, text]]), rtol=0, atol=1e-4)
        assert not torch.equal(batch.conditions[0], batch.conditions[1])
    with trainable_parameters(model, "all"):
        assert model.length([seen, text, noisy]) - model.length([text, noisy]) >= 256 - len(chat.CAPTION)

"""Show-o behind the protocol: laws on the network of random weights, bad input (the reference's numbers:
test_showo_golden)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from srum import models
from srum.config import ConfigError, RefineConfig, load_config
from srum.drawing import Shot
from srum.drawing.refining import refine
from srum.errors import ModelError, SrumError
from srum.loop import require_abilities
from srum.models.base import Decoding, DiscreteForward, Sampling, Segment
from srum.models.showo import Showo
from srum.models.showo.sampler import Masks
from srum.run import find_method
from srum.train.objective import Tokens
from tests.showo_tiny import CLIP, VQ, small
from tests.train.ranks import config_of

QUICK = Sampling(size=(64, 64), timesteps=6, guidance=3.0)
PROMPTS = ["a red ball", "two green birds on a wire", ""]


@pytest.fixture(scope="module")
def model() -> Showo:
    return Showo.load(VQ)


@pytest.fixture(scope="module")
def clip() -> Showo:
    return Showo.load(CLIP)


def texts(*prompts: str) -> list[list[Segment]]:
    return [[Segment("text", text=prompt, droppable=True)] for prompt in prompts]


def noise_image(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def latent(seed: int = 0) -> Tensor:
    return torch.randint(64, (1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


def example(prompt: str, seed: int = 0) -> list[Segment]:
    return [*texts(prompt)[0], Segment("noisy", latent=latent(seed), loss=True)]


def masks(seed: int, t: float = 0.6) -> Masks:
    return Masks(torch.rand(16, generator=torch.Generator().manual_seed(seed)), t)


# --- drawing


def test_a_prompt_is_drawn_the_same_alone_and_among_others(model: Showo) -> None:
    together = model.draw(texts(*PROMPTS), QUICK, [3, 4, 5])
    for prompt, seed, made in zip(PROMPTS, [3, 4, 5], together, strict=True):
        (alone,) = model.draw(texts(prompt), QUICK, [seed])
        assert torch.equal(alone.latent, made.latent) and made.latent.dtype == torch.int16
        assert np.abs(np.asarray(alone.image, int) - np.asarray(made.image, int)).max() <= 1
    first, again, other = model.draw(texts("a", "a", "a"), QUICK, [1, 1, 2])
    assert torch.equal(first.latent, again.latent) and not torch.equal(first.latent, other.latent)


def test_infilling_keeps_what_is_good_and_draws_what_is_not(model: Showo) -> None:
    """All of an image is what ``draw`` draws; none of it is the image; a hole of five cells changes these alone."""
    (drawn,) = model.draw(texts("a red ball"), QUICK, [3])
    hole = torch.zeros(4, 4, dtype=torch.bool)
    hole[1:3, 1:3] = hole[0, 0] = True
    everything, nothing = torch.ones_like(hole), torch.zeros_like(hole)
    context = texts("a red ball")
    (whole,) = model.infill(context, [latent()], [everything], QUICK, [3])
    assert torch.equal(whole.latent, drawn.latent)
    both = model.infill(context * 2, [latent()] * 2, [nothing, hole], QUICK, [4, 5])
    assert torch.equal(both[0].latent, latent())
    changed = both[1].latent[0] != latent()[0]
    assert changed.any() and not (changed & ~hole).any()
    pixels = np.asarray(model.decode([latent()])[0])
    assert np.abs(np.asarray(both[0].image, int) - pixels).max() <= 1


def test_more_is_masked_the_further_from_clean() -> None:
    """N = 16: sin(pi t / 2) of them, rounded, at least one; what is masked early is masked later, too."""
    order = torch.rand(16, generator=torch.Generator().manual_seed(0))
    counts = [Masks(order, t).count for t in (0.0, 1 / 3, 0.5, 1.0)]
    assert counts == [1, 8, 11, 16]  # 16 / 2, 16 / sqrt(2) = 11.3
    for less, more in ((0.1, 0.4), (0.4, 0.9)):
        assert not (Masks(order, less).hidden & ~Masks(order, more).hidden).any()
    assert Masks(order, 0.4).hidden.sum() == Masks(order, 0.4).count


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(model: Showo) -> None:
    long = "a very long prompt about a garden with many flowers and three wooden chairs"
    with pytest.warns(UserWarning, match="Show-o reads 32 tokens of a prompt; the rest of 'a very long"):
        model.draw(texts(long), replace(QUICK, timesteps=2), [0])


def test_refinement_draws_again_what_is_blamed_alone(model: Showo) -> None:
    """Blame on the upper left quarter; on nothing, after which all is drawn again; and none known."""
    quarter = torch.ones(4, 4)
    quarter[:2, :2] = -0.5
    maps = [quarter, torch.ones(4, 4), None]
    firsts = [Shot(image, score=-1.0, latent=ids) for ids in map(latent, range(3)) for image in model.decode([ids])]
    config = RefineConfig(way="infill", timesteps=6, guidance=3.0, size=(64, 64))
    names = ["a red ball", "two birds", "a box"]
    chains = refine(model, lambda images, _: [1.0] * len(images), names, names, firsts, config, 0, lambda *_: maps)
    assert [chain.kept for chain in chains] == [1, 1, 1]
    for chain, rewards, first in zip(chains, maps, firsts, strict=True):
        made = chain.shots[1].latent
        assert made is not None and first.latent is not None
        changed = made[0] != first.latent[0]
        assert changed.any() and (rewards is not quarter or not (changed & (quarter > 0)).any())
    config = config.model_copy(update={"way": "regenerate_clean"})
    with pytest.raises(ModelError, match="not after a clean image"):
        refine(model, lambda *_: [None], names[:1], names[:1], [replace(firsts[0], score=None)], config, 0)


# --- reading and writing


def questions(image: Image.Image, *asked: str) -> list[list[Segment]]:
    seen = Segment("seen", image=image)
    return [[seen, Segment("text", text=text)] for text in asked]


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_what_is_written_has_the_probability_that_training_and_scoring_give_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Of questions about one image and one without: alone and in a batch; the training pass over the reply; scores."""
    own: Showo = request.getfixturevalue(kind)
    contexts = questions(noise_image(1), "How many balls are there?", "Is it?") + texts("Hello")
    together = own.write(contexts, Decoding(max_tokens=7), [0] * 3)
    for context, reply in zip(contexts, together, strict=True):
        (alone,) = own.write([context], Decoding(max_tokens=7), [0])
        assert alone.ids == reply.ids
        learned = [*context, Segment("text", ids=reply.ids, loss=True)]
        assert own.targets(learned, []) == (0, len(reply.ids) + 1)
        with torch.no_grad():
            errors = own.forward(own.pack([learned], [])).text_error
        torch.testing.assert_close(-errors[: len(reply.ids)], reply.logprobs[: len(reply.ids)], rtol=0, atol=1e-4)
    begun = [*contexts[0], Segment("text", text="Yes", open=True)]
    (whole,) = own.score([contexts[0]], ["Yes", "Yes there are"])
    (rest,) = own.score([begun], [" there are", "x"])
    if own.ids("Yes there are") == (*own.ids("Yes"), *own.ids(" there are")):
        assert (whole[0] + rest[0]).item() == pytest.approx(whole[1].item(), abs=1e-3)


def test_an_image_is_looked_at_once(clip: Showo, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    see = clip.features
    monkeypatch.setattr(clip, "features", lambda pixels: looked.append(len(pixels)) or see(pixels))
    clip.score(questions(noise_image(), *"abcdefgh"), ["yes"])
    assert looked == [1]


# --- training


def test_the_log_probability_of_an_id_depends_on_neither_its_pack_nor_what_is_masked_beside_it(model: Showo) -> None:
    examples, drawn = [example("a red ball", 1), example("two green birds on a wire", 2)], [masks(1), masks(2)]
    with torch.no_grad():
        both = model.forward(model.pack(examples, drawn))
        alone = [model.forward(model.pack([one], [own])) for one, own in zip(examples, drawn, strict=True)]
    assert model.targets(examples[0], drawn[:1]) == (drawn[0].count, 0) and len(both.cell) == 2 * drawn[0].count
    torch.testing.assert_close(both.logprob, torch.cat([own.logprob for own in alone]), rtol=0, atol=1e-4)
    assert both.cell.tolist() == [int(i) for own in drawn for i in own.hidden.nonzero()]
    assert model.length(examples[0]) == model.pack(examples[:1], drawn[:1]).rows.ids.shape[1]


def test_a_dropped_text_is_the_context_that_guidance_compares_with(model: Showo) -> None:
    dropped = [replace(example("a red ball")[0], dropped=True), example("")[1]]
    with torch.no_grad():
        without, empty = (model.forward(model.pack([one], [masks(1)])).logprob for one in (dropped, example("")))
    assert torch.equal(without, empty)


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_what_is_seen_and_said_of_it_changes_what_is_drawn_after_it(kind: str, request: pytest.FixtureRequest) -> None:
    """RecA's row, in a pack with a prompt's; what is drawn for it and what is drawn from it have one layout."""
    own: Showo = request.getfixturevalue(kind)

    def seeing(seed: int, text: str) -> list[Segment]:
        return [Segment("seen", image=noise_image(seed)), *example(text)]

    several = [seeing(0, "Describe it."), seeing(1, "Describe it."), seeing(0, "What is it?"), example("Describe it.")]
    with torch.no_grad():
        out = own.forward(own.pack(several, [masks(1)] * 4))
        (alone,) = (own.forward(own.pack(several[:1], [masks(1)])),)
    a, b, c, d = out.logprob.view(4, -1)
    torch.testing.assert_close(alone.logprob, a, rtol=0, atol=1e-4)
    assert min((a - other).abs().max().item() for other in (b, c, d)) > 1e-3
    assert own.length(several[0]) == own.pack(several[:1], [masks(1)]).rows.ids.shape[1]
    (drawn,) = own.draw([several[0][:2]], QUICK, [0])
    assert drawn.latent.shape == (1, 4, 4)


def test_a_pack_without_images_has_gradients_of_zero_where_others_see(clip: Showo) -> None:
    for sees in (False, True):
        clip.network.zero_grad()
        out = clip.forward(clip.pack([example("a red ball")], [masks(1)], sees=sees))
        out.image_error.mean().backward()
        (gradient,) = {None if p.grad is None else p.grad.any().item() for p in clip.network.mm_projector.parameters()}
        assert gradient is (False if sees else None)
    clip.network.zero_grad()


def gradient(model: Showo, method: str, credit: float, old: DiscreteForward | None, **values: Any) -> Tensor:
    """Of a method's objective with one credit for all masked ids of an image."""
    out = model.forward(model.pack([example("a red ball")], [masks(1)]))
    apart = () if old is None else (old.image_error, *out.distance(old))
    tokens = Tokens("image", out.image_error, torch.full_like(out.logprob, credit), *apart)
    parts = find_method(method).terms(tokens, config_of(method=method, **values))
    weight = model.network.showo.model.layers[0].mlp.fc1.weight
    return torch.autograd.grad(torch.stack(list(parts.values())).sum(), weight)[0]


def test_a_reward_of_one_everywhere_is_sft(model: Showo) -> None:
    """SRUM with R = 1 and lambda_c = 0; region-NFT with A = 1 at the old weights, whatever beta; with A = 0 none."""
    with torch.no_grad():
        old = model.forward(model.pack([example("a red ball")], [masks(1)]))
    sft = gradient(model, "sft", 1.0, None)
    torch.testing.assert_close(gradient(model, "srum", 1.0, None, constraint_weight=0.0), sft)
    for beta in (0.1, 1.0):
        torch.testing.assert_close(gradient(model, "region_nft", 1.0, old, beta=beta), sft)
        torch.testing.assert_close(gradient(model, "region_nft", -1.0, old, beta=beta), -sft)
        assert not gradient(model, "region_nft", 0.0, old, beta=beta).any()


# --- bad input


def copied(folder: Path, checkpoint: Path = VQ) -> Path:
    """The checkpoint beside its parts, to be damaged."""
    shutil.copytree(checkpoint.parent, folder)
    return folder / checkpoint.name


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(path: Path, name: str) -> None:
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != name}, path)


DAMAGES: dict[str, tuple[Path, Callable[[Path], object], str]] = {
    "Show-o2": (VQ, lambda f: edited(f / "config.json", _class_name="Showo2Qwen2_5"), "is a Showo2Qwen2_5, another"),
    "a pickle": (
        VQ,
        lambda f: (f / "pytorch_model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin, a pickle.*convert",
    ),
    "a pickled tokenizer": (
        VQ,
        lambda f: (f.parent / "magvitv2" / "pytorch_model.safetensors").rename(f.parent / "magvitv2" / "a.bin"),
        "magvitv2 has its weights as a.bin, a pickle",
    ),
    "no tokenizer of images": (VQ, lambda f: shutil.rmtree(f.parent / "magvitv2"), "no magvitv2/ in it or beside it"),
    "no language": (VQ, lambda f: shutil.rmtree(f.parent / "phi"), "hf download microsoft/phi-1_5"),
    "no tokenizer": (VQ, lambda f: (f.parent / "phi" / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
    "no tower": (CLIP, lambda f: shutil.rmtree(f.parent / "clip"), "no clip-vit-large-patch14-336/ in it or beside it"),
    "another tokenizer": (
        VQ,
        lambda f: edited(f / "config.json", llm_vocab_size=351, vocab_size=426, mask_token_id=425),
        "its tensors do not fit its config",
    ),
    "a mask elsewhere": (VQ, lambda f: edited(f / "config.json", mask_token_id=5), "vocab_size: expected 350 texts"),
    "no square": (VQ, lambda f: edited(f / "config.json", num_vq_tokens=15), "15 image tokens are no square"),
    "a word for a number": (
        VQ,
        lambda f: edited(f / "config.json", codebook_size="8"),
        "codebook_size: expected",
    ),
    "another language model": (VQ, lambda f: edited(f.parent / "phi" / "config.json", model_type="llama"), "'phi'"),
    "no projector": (
        CLIP,
        lambda f: without(f / "pytorch_model.safetensors", "mm_projector.2.bias"),
        "1 missing: mm_projector.2.bias",
    ),
    "a projector too many": (VQ, lambda f: shutil.copy(CLIP / "pytorch_model.safetensors", f), "4 unexpected: mm_proj"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_cannot_be_loaded(tmp_path: Path, damage: str) -> None:
    checkpoint, spoil, message = DAMAGES[damage]
    spoil(folder := copied(tmp_path / "models", checkpoint))
    with pytest.raises(SrumError, match=message) as raised:
        models.load(folder, "cpu", empty=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("clean", latent=latent()), *example("a")], "not after a clean image"),
        ([Segment("seen", image=noise_image()), Segment("seen", image=noise_image()), *example("a")], "sees one image"),
        ([*example("a"), *example("b")], "draws one, not 0 and 2"),
        ([Segment("text", text="a")], "an example has neither"),
        ([Segment("noisy", state=(torch.zeros(16, 1), 0.5), grid=(4, 4), loss=True)], "a noisy segment has none"),
        ([Segment("text", text="a", loss=True), *example("b")], "the one answer at the end"),
        ([Segment("seen", image=noise_image(), side=30), *example("a")], "seen_size: 30 is no multiple of 16"),
    ],
)
def test_examples_that_it_cannot_learn(model: Showo, segments: list[Segment], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.pack([segments], [masks(n) for n, s in enumerate(segments) if s.kind == "noisy"])


def test_what_it_cannot_draw(model: Showo, clip: Showo) -> None:
    seen = Segment("seen", image=noise_image())
    for own, contexts, settings, message in (
        (model, texts("a"), replace(QUICK, size=(64, 128)), "draws 64x64 pixels alone"),
        (model, texts("a"), replace(QUICK, image_guidance=2.0), "image_guidance: Show-o is guided by texts alone"),
        (clip, [[seen, Segment("text", text="word " * 40)]], QUICK, "tokens beside an image, 61 have room: 'word"),
        (clip, [[replace(seen, side=32), *texts("a")[0]]], QUICK, "seen_size: CLIP sees images of 56 pixels"),
        (model, [[seen, Segment("text", text="word " * 2500)]], QUICK, "Show-o's context has 2048"),
    ):
        with pytest.raises(ModelError, match=message):
            own.draw(contexts, settings, [0])
    with pytest.raises(ModelError, match="tells no way"):
        model.draw(texts("a"), QUICK, [0], path=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.trainable=generation", "train.trainable: Show-o draws and reads with the same weights"),
        ("rollout.plan=true", "rollout.plan: Show-o writes no plan"),
        ("rollout.timestep_shift=3", "rollout.timestep_shift: Show-o masks by its own schedule; set it to 1"),
        ("eval.guidance_interval=[0.4,1.0]", "eval.guidance_interval: Show-o is guided in every step"),
        ("eval.renorm=channel", "eval.renorm: Show-o's guided logits are not renormalised"),
        ("device=spread", "device: Show-o's layers are not spread"),
        ("compile=true", "compile: Show-o does not run through torch.compile"),
        ("refine.image_guidance=1.5", "refine.image_guidance: Show-o is guided by texts alone"),
    ],
)
def test_settings_that_it_cannot_follow(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.settled(small(VQ, override))


@pytest.mark.parametrize("method", ["flow_grpo", "r3", "process"])
def test_methods_that_need_more_are_refused_by_what_it_lacks(model: Showo, method: str) -> None:
    with pytest.raises(SrumError, match=f"method {method} needs a model with the ability .*: Showo has none"):
        require_abilities(load_config(None, [f"method={method}", "compare=[]"]), model)


def test_the_judge_keeps_the_weights_that_entered() -> None:
    assert models.settled(small(VQ)).judge.model == "start"
    assert models.settled(small(VQ, "judge.model=models/other")).judge.model == "models/other"

"""Laws of Harmon on a tiny checkpoint: what a batch may not change, what is kept, what is learned, what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from srum import models
from srum.config import ConfigError
from srum.errors import ModelError, SrumError
from srum.models.base import Decoding, Sampling, Segment
from srum.models.harmon import TERMS, Harmon, describe, memory, refuse
from srum.models.harmon.head import diffusion, variational_bound
from srum.models.harmon.sampler import left_after
from srum.models.harmon.training import HarmonForward, masking
from srum.models.needs import Recipe
from tests.harmon_tiny import CHECKPOINT, small

HOST = torch.device("cpu")
QUICK = Sampling(size=(24, 24), timesteps=4, decoder_steps=20, guidance=3.0)
PROMPTS = [[Segment("text", text=text, droppable=True)] for text in ("a red circle", "two small blue squares, left")]


@pytest.fixture(scope="module")
def model() -> Harmon:
    return Harmon.load(CHECKPOINT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "harmon"))


def picture(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


# --- drawing


def test_what_else_is_drawn_changes_no_image(model: Harmon) -> None:
    """Batched, of several sizes, in another order, behind an image that is seen: each as by itself."""
    contexts = [*PROMPTS, [Segment("seen", image=picture(0)), PROMPTS[0][0]]]
    sizes = [(24, 24), (16, 24), (24, 24)]
    together = model.draw(contexts, QUICK, [3, 4, 5], sizes=sizes)
    for number in (2, 1):
        (alone,) = model.draw([contexts[number]], QUICK, [3 + number], sizes=[sizes[number]])
        torch.testing.assert_close(together[number].latent, alone.latent, rtol=0, atol=1e-3)
        assert alone.image.size == sizes[number][::-1]
    assert together[0].latent.shape == (4, 6, 6)


def test_infilling_keeps_what_is_no_hole(model: Harmon) -> None:
    (first,) = model.draw(PROMPTS[:1], QUICK, [1])
    hole = torch.zeros(6, 6, dtype=torch.bool)
    hole[1:3, 2:5] = True
    holes = [hole, ~torch.zeros_like(hole), torch.zeros_like(hole)]
    part, whole, none = model.infill(PROMPTS[:1] * 3, [first.latent] * 3, holes, QUICK, [2, 1, 2])
    assert torch.equal(part.latent[:, ~hole], first.latent[:, ~hole])
    assert not torch.isclose(part.latent[:, hole], first.latent[:, hole]).any()
    torch.testing.assert_close(whole.latent, first.latent, rtol=0, atol=1e-3)
    assert torch.equal(none.latent, first.latent)


@given(count=st.integers(1, 1100), iterations=st.integers(1, 128))
def test_every_token_is_drawn_once(count: int, iterations: int) -> None:
    left = left_after(count, iterations)
    assert len(left) == iterations and left[-1] == 0
    drawn = [before - after for before, after in zip([count, *left], left, strict=False)]
    assert sum(drawn) == count and min(drawn) >= 0
    assert all(now or before == 1 for now, before in zip(drawn, [count, *left], strict=False))


# --- reading and writing


def test_questions_about_an_image_share_it(model: Harmon, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Segment("seen", image=picture(1, (40, 24)))
    contexts = [[image, Segment("text", text=text)] for text in ("Is there a circle?", "What is left of it?")]
    yes = [[*context, Segment("text", text="The answer:", open=True)] for context in contexts]
    alone = [model.score([one], [" yes", " no, it is not"])[0] for one in yes]
    looked: list[int] = []
    encode = model.network.mar.encode
    monkeypatch.setattr(model.network.mar, "encode", lambda images: (looked.append(len(images)), encode(images))[1])
    torch.testing.assert_close(torch.stack(model.score(yes, [" yes", " no, it is not"])), torch.stack(alone))
    assert looked == [1]
    replies = model.write(contexts, Decoding(max_tokens=6), [0, 1])
    for context, reply in zip(contexts, replies, strict=True):
        begun = [*context, Segment("text", ids=reply.ids[:2], open=True)]
        (going_on,) = model.write([begun], Decoding(max_tokens=4), [0])
        assert list(going_on.ids) == list(reply.ids[2:5])


# --- training


def test_shares_of_hidden_tokens() -> None:
    """A normal distribution of mean 1 and deviation 0.25 between 0.7 and 1, whose mean is 0.867; rounded up."""
    draws = [masking(1000, 1, 1, 0.7, torch.Generator().manual_seed(seed), None) for seed in range(400)]
    shares = [draw.t for draw in draws]
    assert min(shares) >= 0.7 and max(shares) <= 1.0
    assert fmean(shares) == pytest.approx(0.867, abs=0.02)  # five times the deviation of such a mean
    given_share = masking(36, 4, 4, 0.7, torch.Generator().manual_seed(0), 0.375)
    assert int(given_share.hidden.sum()) == math.ceil(0.375 * 36) and given_share.noise.shape == (4, 14, 4)


def test_the_bound_is_least_where_mean_and_variance_are_true() -> None:
    """With the true noise and v = -1, the lower bound of the variance, both distributions are one."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 50, 4, generator=generator).clamp(-0.9, 0.9)
    t = torch.randint(1, 60, (50,), generator=generator)  # where the bounds of the variance differ
    x = diffusion().noised(clean, noise, t)
    true = variational_bound(clean, x, noise, -torch.ones_like(x), t)
    torch.testing.assert_close(true, torch.zeros(50), rtol=0, atol=1e-4)
    assert (variational_bound(clean, x, noise, torch.zeros_like(x), t) > true).all()


def test_change_and_drift_are_those_of_an_error_that_is_a_square() -> None:
    """2 e.d and |d|^2 of e = old - noise and d = new - old, means over draws and channels."""
    generator = torch.Generator().manual_seed(0)
    noise, new, old = torch.randn(3, 7, 4, 2, generator=generator).double()
    forwards = [forward_of(predicted, noise) for predicted in (new, old)]
    change, drift = forwards[0].distance(forwards[1])
    torch.testing.assert_close(change, (2 * (old - noise) * (new - old)).mean((1, 2)))
    torch.testing.assert_close(drift, (new - old).square().mean((1, 2)))
    assert forwards[0].extra.keys() == {"variance"}


def forward_of(predicted: Tensor, noise: Tensor) -> HarmonForward:
    none = torch.zeros(0)
    return HarmonForward(none, none, none, none, none, none, predicted, noise, none)


def test_a_row_beside_changes_no_error_and_its_parts_are_run(model: Harmon) -> None:
    """An image, a reconstruction and a reply in one pack, with a row so that all processes run the same."""
    latent = model.encode([picture(2)])[0]
    noisy, reply = Segment("noisy", latent=latent, loss=True), Segment("text", text="a square", loss=True)
    image = Segment("seen", image=picture(3))
    samples = [[*PROMPTS[0], noisy], [image, *PROMPTS[1], noisy], [image, Segment("text", text="What?"), reply]]
    hows = [model.corrupt(latent, torch.Generator().manual_seed(seed), 1.0) for seed in (0, 1)]
    whole = model.forward(model.pack(samples, hows))
    assert model.targets(samples[1], hows[1:]) == (int(hows[1].hidden.sum()), 0)
    assert model.targets(samples[2], []) == (0, len(model.ids("a square")) + 1)
    counts = torch.bincount(whole.image_segment)
    assert counts.tolist() == [int(how.hidden.sum()) for how in hows]
    alone = model.forward(model.pack(samples[:1], hows[:1], sees=True))
    torch.testing.assert_close(alone.image_error, whole.image_error[: counts[0]], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.cell, hows[0].hidden.nonzero()[:, 0])
    told = model.forward(model.pack(samples[2:], [], sees=True))
    torch.testing.assert_close(told.text_error, whole.text_error, rtol=1e-4, atol=1e-5)
    told.text_error.sum().backward()
    grad = model.network.mar.decoder_norm.weight.grad
    assert grad is not None and not grad.any()
    model.network.zero_grad()
    rows = model.pack(samples, hows)
    assert [model.length(one) for one in samples] == [
        sum(part.hidden.numel() + 6 if hasattr(part, "hidden") else len(part) for part in row.parts) + end
        for row, end in zip(rows, [42, 42, len(model.ids("a square")) + 1], strict=True)
    ]


# --- what is refused


def spoil(folder: Path, name: str, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "harmon.safetensors")
    match name:
        case "pickled":
            (folder / "kl16.safetensors").rename(folder / "kl16.ckpt")
            (folder / "harmon.safetensors").rename(folder / "harmon.pth")
        case "no autoencoder":
            (folder / "kl16.safetensors").unlink()
            (folder / "config.json").write_text(json.dumps({"model_type": "harmon"}))
        case "two":
            shutil.copy(folder / "harmon.safetensors", folder / "harmon_1.5b-o.safetensors")
        case "heads":
            (folder / "harmon_config.json").unlink()
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
        case "head":
            weights["llm.lm_head.weight"] = weights["llm.lm_head.weight"] + 1
            save_file(weights, folder / "harmon.safetensors")
        case "tensor":
            save_file({key: x for key, x in weights.items() if key != how}, folder / "harmon.safetensors")
        case "qwen alone":
            own = {key: x for key, x in weights.items() if key.startswith("llm.")}
            save_file(own, folder / "harmon.safetensors")
        case _:
            (folder / "config.json").write_text(json.dumps(config | {name: json.loads(how)}))


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("pickled", "", "srum convert"),
        ("no autoencoder", "", "the autoencoder is missing"),
        ("two", "", "harmon.safetensors, harmon_1.5b-o.safetensors"),
        ("heads", "", "encoder_num_heads"),
        ("tokenizer", "", "tokenizer.json"),
        ("head", "", "which it has to equal"),
        ("tensor", "mar.mask_token", "1 missing: mar.mask_token"),
        ("qwen alone", "", "mar.z_proj.weight is missing"),
        ("hidden_act", '"gelu"', "hidden_act"),
        ("tie_word_embeddings", "false", "tie_word_embeddings"),
        ("rope_scaling", '{"type": "yarn"}', "rope that is not scaled"),
        ("num_attention_heads", "5", "do not divide"),
        ("hidden_size", '"48"', "hidden_size: expected a whole number"),
        ("num_hidden_layers", "2", "unexpected"),
    ],
)
def test_a_folder_that_is_none_is_named_in_one_line(folder: Path, name: str, how: str, said: str) -> None:
    spoil(folder, name, how)
    with pytest.raises(SrumError) as raised:
        models.load(folder, "cpu")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_fields_that_contradict_the_tensors_are_refused(folder: Path) -> None:
    overrides: dict[str, Any] = json.loads((folder / "harmon_config.json").read_text())
    for name, value in {"buffer_size": 64, "vae_embed_dim": 16, "patch_size": 2, "mask_ratio_min": "half"}.items():
        changed = overrides | {"mar": overrides["mar"] | {name: value}}
        (folder / "harmon_config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=name):
            Harmon.load(folder, empty=True)


def test_what_it_cannot_do_is_said(model: Harmon) -> None:
    long = [[Segment("text", text="a " * 40000)]]
    clean = [[Segment("clean", latent=torch.zeros(4, 6, 6)), *PROMPTS[0]]]
    with pytest.raises(ModelError, match="beyond the 32768"):
        model.draw(long, QUICK, [0])
    with pytest.raises(ModelError, match="not after a clean image"):
        model.draw(clean, QUICK, [0])
    with pytest.raises(ModelError, match="multiple of 4 pixels"):
        model.draw(PROMPTS[:1], QUICK, [0], sizes=[(24, 25)])
    with pytest.raises(SrumError, match="ability path"):
        model.draw(PROMPTS[:1], QUICK, [0], path=True)
    noisy = Segment("noisy", latent=torch.zeros(4, 6, 6), loss=True)
    for example in ([*PROMPTS[0], noisy, noisy], [*PROMPTS[0]], [Segment("text", text="a", loss=True), noisy]):
        with pytest.raises(ModelError, match="Harmon learns"):
            model.length(example)
    for name, value in {"rollout.plan": "true", "train.timestep_shift": "4", "compile": "true"}.items():
        with pytest.raises(ConfigError, match=name):
            refuse(small(**{name: value}))


def test_the_licence_is_said_before_anything_is_loaded(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.say.cache_clear()
    models.load(folder, "cpu", empty=True)
    assert f"{folder}: {TERMS}" in capfd.readouterr().err and "nothing commercial" in TERMS
    assert describe(folder, HOST, False).rows["licence"] == TERMS


def test_the_abilities_in_the_readme_are_true() -> None:
    rows = re.findall(r"^\| (.*?) \| ([a-z, ]+) \|.*$", (Path(__file__).parents[2] / "README.md").read_text(), re.M)
    assert [frozenset(told.split(", ")) for name, told in rows if "Harmon" in name] == [Harmon.abilities]


def test_the_doctor_says_what_fits() -> None:
    needs = memory(CHECKPOINT, (24, 24), False)
    assert needs.keys() == {"rollout", "judging", "training, generation expert", "training, all weights"}
    module: Any = models.architecture(CHECKPOINT)
    one, two = (module.training_memory(CHECKPOINT, (24, 24), False, Recipe(processes=n)).once for n in (1, 2))
    assert two < one

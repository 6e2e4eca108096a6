"""OpenUni at toy size: its sampler, sizes and seeds, conditions, frames, the file layout, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from srum import models
from srum.config import ConfigError, load_config
from srum.doctor import self_check
from srum.errors import ModelError, SrumError
from srum.flow import FlowNoise
from srum.grounding.native import NativeGrounder
from srum.models.base import Decoding, Exploration, Generated, Sampling, Segment, Written
from srum.models.openuni import TERMS, OpenUni, describe
from srum.models.openuni.checkpoint import WEIGHTS
from srum.models.openuni.config import ConnectorSizes
from srum.models.openuni.generator import Conditioner, DiffusionTransformer
from srum.models.openuni.solver import Multistep, schedule
from srum.models.queries.generator import ticks
from srum.train.weights import trainable_parameters
from tests.openuni_tiny import CHECKPOINT, tiny

QUICK = Sampling(size=(64, 64), timesteps=4, timestep_shift=3.0, guidance=4.5)
PROMPTS = ["a cat", "three small green apples on a wooden table", ""]
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("openuni"))


@pytest.fixture(scope="module")
def model(folder: Path) -> OpenUni:
    return OpenUni.load(folder)


def texts(*prompts: str) -> list[list[Segment]]:
    return [[Segment("text", text=prompt, droppable=True)] for prompt in prompts]


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# --- the sampler


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 3.0), (7, 1.0), (20, 3.0), (33, 5.5)])
def test_the_solver_is_that_of_diffusers(folder: Path, steps: int, shift: float) -> None:
    """Also where the library's own timesteps lie, which are truncated."""
    fields = json.loads((folder / "sana" / "scheduler" / "scheduler_config.json").read_text())
    library = DPMSolverMultistepScheduler.from_config(fields | {"flow_shift": shift})
    library.set_timesteps(steps)
    timesteps = schedule(Sampling(timesteps=steps + 1, timestep_shift=shift))
    torch.testing.assert_close(timesteps.float(), library.sigmas, rtol=0, atol=1e-6)
    assert torch.equal(ticks(timesteps[:-1]), library.timesteps.double())
    generator = torch.Generator().manual_seed(0)
    x = ours = torch.randn(2, 8, 4, 4, generator=generator)
    ahead, solver = torch.randn(2, 8, 4, 4, generator=generator), Multistep()
    for number, t in enumerate(library.timesteps):
        v = ours * 0.5 - ahead * (1 + number / steps)  # some velocity that changes on the way
        x = library.step(v, t, x).prev_sample
        ours = solver.step(ours, v, timesteps[number].item(), timesteps[number + 1].item())
        torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)
        ours = x


def test_of_one_image_alone_it_finds_it_in_any_number_of_steps() -> None:
    """Where all paths lead to one latent, the velocity at (x, t) is (x - latent) / t."""
    generator = torch.Generator().manual_seed(0)
    latent, x = (torch.randn(1, 8, 4, 4, generator=generator) for _ in range(2))
    solver = Multistep()
    for t, following in pairwise(schedule(Sampling(timesteps=6, timestep_shift=3.0)).tolist()):
        x = solver.step(x, (x - latent) / t, t, following)
    torch.testing.assert_close(x, latent, rtol=0, atol=1e-5)


# --- drawing


def test_images_of_several_sizes_are_drawn_the_same_alone(model: OpenUni) -> None:
    sizes = [(64, 64), (32, 64), (64, 64)]
    together = model.draw(texts(*PROMPTS), QUICK, [3, 4, 5], sizes=sizes)
    assert [made.image.size[::-1] for made in together] == sizes
    for context, seed, size, made in zip(texts(*PROMPTS), [3, 4, 5], sizes, together, strict=True):
        (alone,) = model.draw([context], QUICK, [seed], sizes=[size])
        torch.testing.assert_close(alone.latent, made.latent, rtol=0, atol=1e-3)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(made.image, int)).max() <= 1
    again = model.draw(texts(*PROMPTS), QUICK, [3, 4, 6], sizes=sizes)
    assert [made.image.tobytes() for made in again[:2]] == [made.image.tobytes() for made in together[:2]]
    assert not torch.allclose(again[2].latent, together[2].latent, atol=1e-1)


def test_the_way_to_an_image_ends_in_its_latent(model: OpenUni) -> None:
    (made,) = model.draw(texts("a cat"), QUICK, [1], path=True)
    assert made.path is not None and len(made.path.timesteps) == 3
    torch.testing.assert_close(made.path.predictions[-1], made.latent, rtol=0, atol=1e-5)
    assert model.decode([made.latent])[0].tobytes() == made.image.tobytes()


def test_guidance_compares_with_the_request_for_just_any_image(model: OpenUni) -> None:
    """So without a text it changes nothing but rounding."""
    guided, plain = (model.draw([[]], replace(QUICK, guidance=g), [1])[0].latent for g in (4.5, 1.0))
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-3)
    assert not torch.allclose(model.draw(texts("a cat"), QUICK, [1])[0].latent, plain, atol=1e-2)


def test_random_steps_lead_where_they_say_and_each_image_has_its_own(model: OpenUni) -> None:
    """Of Euler's form, from noise: steps without noise are those of the flow."""
    unguided = replace(QUICK, guidance=1.0, timesteps=5)
    sizes = [(64, 64), (32, 64), (64, 64)]

    def drawn(level: float, some: slice = slice(None)) -> list[Generated]:
        explore = Exploration("flow", level, [{0}, {1}, {0, 2}][some], [1, 2, 3][some])
        contexts, seeds = texts(*PROMPTS)[some], [4, 5, 6][some]
        return model.draw(contexts, unguided, seeds, sizes=sizes[some], explore=explore)

    silent, loud = drawn(0.0), drawn(0.7)
    assert [len(made.steps) for made in loud] == [1, 1, 2]
    for number, (quiet, made) in enumerate(zip(silent, loud, strict=True)):
        assert not torch.allclose(quiet.latent, made.latent, atol=0.1)
        (alone,) = drawn(0.7, slice(number, number + 1))
        torch.testing.assert_close(alone.latent, made.latent, rtol=0, atol=1e-3)
        for step in made.steps:
            expected = step.transition.mean(step.state, step.sought)
            torch.testing.assert_close(expected, step.reached, rtol=1e-4, atol=1e-4)


def test_the_training_pass_gives_the_velocity_of_the_sampler(model: OpenUni) -> None:
    deviation, tolerance = self_check(model, (64, 64), bfloat16=False)
    assert deviation <= tolerance


@pytest.mark.parametrize("size", [(30, 40), (1, 100), (64, 64), (600, 33)])
def test_of_images_of_any_size_the_middle_square_is_encoded(model: OpenUni, size: tuple[int, int]) -> None:
    (latent,) = model.encode([noise_image(size)])
    assert latent.shape == model.latent_shape((64, 64)) and torch.isfinite(latent).all()
    x0, y0, x1, y1 = model.crop_box(size)
    assert x1 - x0 == y1 - y0 == min(size)


# --- reading and writing


def test_replies_do_not_depend_on_the_batch_and_score_knows_their_probability(model: OpenUni) -> None:
    seen = Segment("seen", image=noise_image((90, 110)))
    asked = [[seen, Segment("text", text=text)] for text in ("What is it?", "Where is the house, then?")]
    contexts = [*asked, *texts("Hello")]
    together = model.write(contexts, Decoding(max_tokens=8), [0] * 3)
    for context, reply in zip(contexts, together, strict=True):
        (alone,) = model.write([context], Decoding(max_tokens=8), [0])
        assert alone.ids == reply.ids
        (scores,) = model.score([context], [reply.text, "no"])
        if model.ids(reply.text) == tuple(reply.ids):  # random bytes may be no text
            assert scores[0].item() == pytest.approx(reply.logprobs[: len(reply.ids)].sum().item(), abs=1e-3)


def test_boxes_are_thousandths_of_the_image(model: OpenUni, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = "<ref>house</ref><box>[[500, 0, 1000, 250]]</box>"
    monkeypatch.setattr(model, "write", lambda *_: [Written(reply, (), torch.zeros(0), ended=True)])
    ((region,),) = NativeGrounder(model).propose([Image.new("RGB", (80, 40))], [""])  # type: ignore[misc]
    assert (region.label, region.box) == ("house", pytest.approx((40, 0, 80, 10)))


# --- conditions and training


def example(prompt: str, seed: int = 0, size: tuple[int, int] = (16, 16)) -> list[Segment]:
    latent = torch.randn(8, *size, generator=torch.Generator().manual_seed(seed))
    return [Segment("text", text=prompt, droppable=True), Segment("noisy", latent=latent, loss=True)]


def test_prepared_conditions_are_the_same_and_need_no_language_model(folder: Path) -> None:
    """Those of an empty network, as training prepares it, too."""
    model, empty = OpenUni.load(folder), OpenUni.load(folder, empty=True)
    examples = [example(prompt) for prompt in PROMPTS[:2]]
    noise = [model.corrupt(torch.zeros(8, 16, 16), torch.Generator().manual_seed(5), 1.0) for _ in examples]
    with trainable_parameters(model, "generation"), torch.no_grad():
        plain = model.forward(model.pack(examples, noise)).velocity
        model.prepare(examples)
        prepared = model.forward(model.pack(examples, noise)).velocity
        model.draw(texts(PROMPTS[0]), QUICK, [0])
        assert "language" not in vars(model)
    torch.testing.assert_close(prepared, plain, rtol=0, atol=1e-4)
    with trainable_parameters(empty, "generation"):
        empty.prepare(examples)
    assert empty.network.meta_queries.is_meta
    assert all(torch.equal(condition, model.known[key]) for key, condition in empty.known.items())


def test_all_but_the_language_model_is_trained_with_all(folder: Path) -> None:
    model = OpenUni.load(folder)
    examples = [example(prompt) for prompt in PROMPTS[:2]]
    with trainable_parameters(model, "all"):
        model.prepare(examples)
        assert model.known == {}
        noise = [FlowNoise(torch.zeros(256, 8), 0.5)] * 2
        model.forward(model.pack(examples, noise)).image_error.mean().backward()
        without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert without == set()
        assert all(parameter.grad is None for parameter in model.language.network.parameters())
        assert model.length(examples[0]) == 256 + len(model.ids(str(model.requested(examples[0][:1])[0]))) + 12
    assert model.length(examples[0]) > 256
    with trainable_parameters(model, "generation") as chosen:
        assert model.length(examples[0]) == 256 and all(name.startswith("transformer.") for name in chosen)


def test_a_batch_teaches_the_queries_the_mean_of_what_its_examples_teach(model: OpenUni) -> None:
    """Whatever stands before them: contexts of several lengths, an image among them."""
    seen = [Segment("seen", image=noise_image((64, 64))), *example("Describe the image in detail, please.", 1)]
    examples, parameters = [example("a cat"), seen], dict(model.named_parameters())
    noise = [model.corrupt(torch.zeros(8, 16, 16), torch.Generator().manual_seed(n), 1.0) for n in range(2)]

    def gradients(some: slice) -> tuple[Tensor, ...]:
        error = model.forward(model.pack(examples[some], noise[some])).image_error.mean()
        return torch.autograd.grad(error, list(parameters.values()))

    together, first, second = (gradients(some) for some in (slice(2), slice(1), slice(1, 2)))
    for name, a, b, c in zip(parameters, together, first, second, strict=True):
        torch.testing.assert_close(a, (b + c) / 2, rtol=1e-3, atol=1e-5, msg=name)


def test_an_image_is_learned_after_another_and_alone_it_is_a_request_for_any(model: OpenUni) -> None:
    """RecA's layout; with its text dropped the image stays, with both it is the unconditional request."""
    seen, text = Segment("seen", image=noise_image((64, 64))), Segment("text", text="Keep it.")
    noisy = example("")[1]
    with trainable_parameters(model, "generation"):
        samples = [[seen, text, noisy], [seen, replace(text, dropped=True), noisy]]
        samples += [[replace(s, dropped=True) for s in (seen, text)] + [noisy]]
        batch = model.pack(samples, [FlowNoise(torch.zeros(256, 8), 0.5)] * 3)
    assert batch.conditions is not None
    torch.testing.assert_close(batch.conditions[:1], model.conditions([[seen, text]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.conditions[2:], model.conditions([[]]), rtol=0, atol=1e-4)
    assert not torch.allclose(batch.conditions[0], batch.conditions[1], atol=1e-3)


def test_latents_of_two_sizes_in_a_batch_are_refused(model: OpenUni) -> None:
    noise = [FlowNoise(torch.zeros(256, 8), 0.5), FlowNoise(torch.zeros(128, 8), 0.5)]
    with pytest.raises(ModelError, match=r"OpenUni trains on latents of one size in a batch, not of \(16, 16\) and"):
        model.pack([example("a"), example("b", size=(8, 16))], noise)


def test_in_bfloat16_it_stays_near(folder: Path, model: OpenUni) -> None:
    rounded = OpenUni.load(folder, precision="bf16")
    contexts = texts(*PROMPTS)
    torch.testing.assert_close(rounded.conditions(contexts).float(), model.conditions(contexts), rtol=0, atol=0.15)
    made = rounded.draw(contexts, QUICK, [1, 2, 3])
    assert all(torch.isfinite(one.latent).all() and one.latent.dtype == torch.float32 for one in made)


# --- the file layout


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with other weights in its own file."""
    shutil.copytree(source, folder)
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    return folder


def test_the_transformer_may_be_in_its_own_folder_and_the_language_model_among_the_trained(
    folder: Path, model: OpenUni, tmp_path: Path
) -> None:
    """As a file of pretraining has it, and as a whole state dict has it; what is saved draws the same."""
    moved: dict[str, Tensor] = {}

    def move(weights: dict[str, Tensor]) -> None:
        moved.update({n[12:]: weights.pop(n) for n in list(weights) if n.startswith("transformer.")})
        language = load_file(folder / "internvl3" / "model.safetensors")
        weights.update({f"lmm.{name}": x for name, x in language.items()})

    other = changed(folder, tmp_path / "other", move)
    save_file(moved, other / "sana" / "transformer" / "diffusion_pytorch_model.safetensors")
    (other / "internvl3" / "model.safetensors").unlink()
    expected = model.draw(texts("a cat"), QUICK, [1])[0].latent
    assert torch.equal(OpenUni.load(other).draw(texts("a cat"), QUICK, [1])[0].latent, expected)
    OpenUni.load(other).save(tmp_path / "saved")
    assert torch.equal(OpenUni.load(tmp_path / "saved").draw(texts("a cat"), QUICK, [1])[0].latent, expected)
    with pytest.raises(ModelError, match="save to another folder"):
        OpenUni.load(other).save(other)


def test_a_tied_head_is_the_embedding(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "tied")
    path, config = (
        tmp_path / "tied" / "internvl3" / "model.safetensors",
        tmp_path / "tied" / "internvl3" / "config.json",
    )
    weights = load_file(path)
    del weights["language_model.lm_head.weight"]
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"1 missing: lmm\.language_model\.lm_head\.weight"):
        OpenUni.load(tmp_path / "tied")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    language = OpenUni.load(tmp_path / "tied").language
    assert language.network.lm_head.weight is language.text.embed_tokens.weight


def without(prefix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(prefix)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("projector.bias"), r"1 missing: projector\.bias"),
        (without("connector.layers.1.mlp.fc2"), "2 missing: connector"),
        (without("transformer.proj_out.bias"), r"1 missing: transformer\.proj_out\.bias"),
        (without("transformer."), r"sana/transformer has none of diffusion_pytorch_model\.safetensors"),
        (without("meta_queries"), "no meta_queries: it is no OpenUni"),
        (lambda weights: weights.update({"other": torch.zeros(1)}), "1 unexpected: other"),
        (lambda weights: weights.update({"vae.other": torch.zeros(1)}), r"missing: vae\..*1 unexpected: vae.other"),
        (lambda weights: weights.update({"projector.bias": torch.zeros(3)}), r"projector.bias: \(3,\), expected"),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        models.load(changed(folder, tmp_path / "changed", change), "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("internvl3/config.json", {"model_type": "internvl"}, "model_type: 'internvl', expected 'internvl_chat'"),
        ("internvl3/config.json", {"select_layer": -2}, "select_layer: -2"),
        ("internvl3/config.json", {"llm_config": []}, "expected objects"),
        ("internvl3/config.json", {"llm_config": {"model_type": "internlm2"}}, "model_type: 'internlm2'"),
        ("internvl3/config.json", {"llm_config": {"rope_scaling": {"type": "yarn"}}}, "rope_scaling.type: 'yarn'"),
        ("internvl3/config.json", {"vision_config": {"hidden_size": None}}, "vision_config.hidden_size: expected a w"),
        ("internvl3/config.json", {"vision_config": {"qk_normalization": True}}, "qk_normalization: True"),
        ("sana/transformer/config.json", {"interpolation_scale": 2}, "interpolation_scale: 2"),
        ("sana/transformer/config.json", {"_class_name": "LuminaNextDiT2DModel"}, "_class_name: 'LuminaNext"),
        ("sana/transformer/config.json", {"in_channels": 4}, "they are not of one Sana"),
        ("sana/transformer/config.json", {"made_up": 4}, "config.json: .*made_up"),
        ("sana/scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order: 3 is not supported, only 2"),
        ("dc-ae/config.json", {"_class_name": "AutoencoderKL"}, "_class_name: 'AutoencoderKL'"),
        ("fixture_config.json", {"connector": {"num_attention_heads": 5}}, "5 heads do not divide the connector's"),
    ],
)
def test_configs_that_change_numbers_are_refused(
    folder: Path, tmp_path: Path, file: str, values: dict[str, object], named: str
) -> None:
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / file
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {n: raw[n] | v if isinstance(v, dict) else v for n, v in values.items()}))
    with pytest.raises(ModelError, match=named) as raised:
        OpenUni.load(tmp_path / "changed")
    assert Path(file).name.removeprefix("fixture_") in str(raised.value) and "\n" not in str(raised.value)


def test_the_published_rope_is_plain_up_to_its_length(folder: Path, model: OpenUni, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dynamic")
    path = tmp_path / "dynamic" / "internvl3" / "config.json"
    raw = json.loads(path.read_text())
    raw["llm_config"]["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    path.write_text(json.dumps(raw))
    dynamic = OpenUni.load(tmp_path / "dynamic")
    assert torch.equal(dynamic.conditions(texts("a cat")), model.conditions(texts("a cat")))


@pytest.mark.parametrize(
    "file", ["tokenizer/tokenizer.json", "dc-ae/config.json", "internvl3/model.safetensors", WEIGHTS]
)
def test_a_file_that_is_missing_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(folder, tmp_path / "less")
    (tmp_path / "less" / file).unlink()
    with pytest.raises(SrumError) as raised:
        models.load(tmp_path / "less", "cpu")
    assert Path(file).name in str(raised.value) and "\n" not in str(raised.value)


def test_the_authors_pickle_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"openuni\.pth, a pickle, .* srum convert") as raised:
        models.load(CHECKPOINT, "cpu")
    assert "\n" not in str(raised.value)


COMMON = {"in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "caption_channels": 2304}
SANA = {
    "0.6B": {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
    | {"cross_attention_head_dim": 72, "cross_attention_dim": 1152},
    "1.6B": {"num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20}
    | {"cross_attention_head_dim": 112, "cross_attention_dim": 2240},
}


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (SANA["0.6B"], 591_747_872),
        (SANA["1.6B"], 1_604_462_752),
        (SANA["1.6B"] | {"qk_norm": "rms_norm_across_heads"}, 1_604_641_952),
    ],
)
def test_published_transformers_have_their_number_of_parameters(fields: dict[str, object], parameters: int) -> None:
    """docs/specs/openuni.md, 1 and 8."""
    with torch.device("meta"):
        assert sum(p.numel() for p in DiffusionTransformer(COMMON | fields).parameters()) == parameters


@pytest.mark.parametrize(
    ("width", "inner", "numbers"),
    [(896, 3072, [52_364_544, 2_066_688, 229_376]), (1536, 8960, [221_910_528, 3_541_248, 393_216])],
)
def test_published_connectors_have_their_number_of_parameters(width: int, inner: int, numbers: list[int]) -> None:
    config = SimpleNamespace(queries=256, connector=ConnectorSizes(width, inner, layers=6, heads=width // 64, out=2304))
    with torch.device("meta"):
        parts = Conditioner(config)  # type: ignore[arg-type]
    counted = [sum(p.numel() for p in part.parameters()) for part in (parts.connector, parts.projector)]
    assert [*counted, parts.meta_queries.numel()] == numbers


# --- what it says, and what it refuses


def test_its_terms_are_said_before_anything_is_read(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.say.cache_clear()
    models.load(folder, "cpu", empty=True)
    assert f"{folder}: {TERMS}" in capfd.readouterr().err and "nothing commercial" in TERMS
    rows = describe(folder, HOST, False).rows
    assert rows["licence"] == TERMS and rows["drawn with"].startswith("rollout.timestep_shift=3,")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.plan=true", "rollout.plan: OpenUni writes no plan"),
        ("rollout.renorm=channel", "rollout.renorm: OpenUni's"),
        ("device=spread", "device: OpenUni's layers are not spread"),
        ("refine.image_guidance=2", "refine.image_guidance: OpenUni has no guidance by images"),
        ("seen_size=224", "seen_size: OpenUni sees images at a size of its own"),
    ],
)
def test_settings_that_do_not_apply(folder: Path, override: str, message: str) -> None:
    given = [f"model={folder}", "rollout.plan=false", "method=reca"]
    with pytest.raises(ConfigError, match=message):
        models.settled(load_config(None, [*given, override]))
    models.settled(load_config(None, given))


def test_sizes_and_prompts_that_it_cannot_draw(model: OpenUni) -> None:
    with pytest.raises(ModelError, match=r"\(64, 30\) is not a multiple of 4 pixels"):
        model.draw(texts("a"), QUICK, [0], sizes=[(64, 30)])
    limit = model.language.text.config.max_position_embeddings
    with pytest.raises(ModelError, match=f"tokens are beyond the {limit} that OpenUni reads") as raised:
        model.conditions(texts("apple " * limit))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_the_abilities_in_the_readme_are_true() -> None:
    rows = re.findall(r"^\| (.*?) \| ([a-z, ]+) \|.*$", (Path(__file__).parents[2] / "README.md").read_text(), re.M)
    told = [frozenset(abilities.split(", ")) for name, abilities in rows if "OpenUni" in name]
    assert told == [OpenUni.abilities]

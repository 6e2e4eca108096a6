"""Checkpoints as others write them: what a config says is read or refused, wrappers' names load, damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srum import models
from srum.config import load_config
from srum.errors import ModelError, SrumError
from srum.loop import run_loop
from srum.models.bagel import Bagel, describe
from srum.models.bagel.config import BagelConfig
from srum.models.blip3o import Blip3o
from srum.models.blip3o import describe as describe_blip3o
from srum.models.blip3o.checkpoint import official_name
from srum.models.blip3o.config import DECODER
from srum.models.blip3o.decoder import CONFIGS
from srum.tensors import TensorError, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT, BLIP3O = GOLDEN / "bagel" / "checkpoint", GOLDEN / "blip3o" / "checkpoint"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HOST = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small checkpoint."""
    return copied(CHECKPOINT, tmp_path)


@pytest.fixture
def blip3o(tmp_path: Path) -> Path:
    """The same of the second architecture."""
    return copied(BLIP3O, tmp_path)


def copied(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder / "model", copy_function=shutil.copyfile)
    return folder / "model"


def change(path: Path, **values: Any) -> None:
    """Fields of a JSON file; None removes one."""
    merged = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))


# --- configs


def test_rope_as_newer_transformers_writes_it(folder: Path) -> None:
    path = folder / "llm_config.json"
    theta = json.loads(path.read_text())["rope_theta"]
    change(path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    assert BagelConfig.from_folder(folder).llm.rope_theta == 12345.0 != theta
    change(path, rope_theta=theta)
    with pytest.raises(ModelError, match=r"llm_config\.json: rope_theta is both"):
        BagelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("llm_config.json", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type: 'y"),
        ("llm_config.json", {"rope_parameters": {"factor": 4.0}}, "rope_parameters.factor: 4.0"),
        ("llm_config.json", {"rope_parameters": 3}, "rope_parameters: expected an object"),
        ("llm_config.json", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: 'linear'"),
        ("llm_config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("llm_config.json", {"head_dim": 7}, "head_dim: 7 is not supported, only hidden_size / heads"),
        ("llm_config.json", {"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide"),
        ("llm_config.json", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ("llm_config.json", {"use_sliding_window": True}, "use_sliding_window: True"),
        ("llm_config.json", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_att"),
        ("llm_config.json", {"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
        ("vit_config.json", {"hidden_size": None}, "hidden_size: Field required"),
        ("vit_config.json", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
        ("vit_config.json", {"rope": True}, "rope: True"),
    ],
)  # fmt: skip
def test_what_would_change_numbers_is_refused(folder: Path, file: str, values: dict[str, Any], named: str) -> None:
    values = {name: [] if value is None else value for name, value in values.items()}
    raw = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({name: value for name, value in raw.items() if value != []}))
    with pytest.raises(ModelError) as raised:
        BagelConfig.from_folder(folder)
    assert f"{file}: {named}" in str(raised.value) and "\n" not in str(raised.value)


def test_fields_without_effect_are_listed(folder: Path) -> None:
    change(folder / "llm_config.json", max_window_layers=28, head_dim=None)
    rows = describe(folder, HOST, False).rows
    assert "llm_config.json: " in rows["fields without effect"]
    assert "max_window_layers" in rows["fields without effect"] and "hidden_size" not in rows["fields without effect"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}}, "rope_scaling.type: 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters.factor: 4.0"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is both"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}, "mrope_section: expected three numbers"),
        ({"head_dim": 7}, "head_dim: 7 is not supported, only hidden_size / heads"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide"),
        ({"num_attention_heads": "4"}, "num_attention_heads: expected a whole number"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads"),
        ({"use_sliding_window": True}, "use_sliding_window: True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_att"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"gen_vision_tower": "siglip"}, "gen_vision_tower: 'siglip' is not supported, only 'eva-clip-E-14-plus'"),
        ({"gen_pooling": "early"}, "gen_pooling: 'early'"),
        ({"n_query": None}, "n_query: expected a whole number"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act: 'gelu'"),
        ({"vision_config": {"temporal_patch_size": 1}}, "temporal_patch_size: 1"),
        ({"vision_config": []}, "vision_config: expected objects"),
    ],
)
def test_what_would_change_numbers_of_the_second_is_refused(blip3o: Path, values: dict[str, Any], named: str) -> None:
    raw = json.loads((blip3o / "config.json").read_text())
    if isinstance(vision := values.get("vision_config"), dict):
        values = {"vision_config": raw["vision_config"] | vision}
    (blip3o / "config.json").write_text(json.dumps(raw | values))
    with pytest.raises(ModelError) as raised:
        Blip3o.load(blip3o)
    assert "config.json: " in str(raised.value) and named in str(raised.value) and "\n" not in str(raised.value)


def test_the_second_as_newer_transformers_writes_it(blip3o: Path) -> None:
    """The language model's fields apart, its rope's together, its weights under transformers' own names."""
    raw = json.loads((blip3o / "config.json").read_text())
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {name: raw.pop(name) for name in (*fields, "vocab_size", "rms_norm_eps", "hidden_act")}
    text["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    (blip3o / "config.json").write_text(json.dumps(raw | {"text_config": text, "of_somebody": 1}))
    weights = load_file(blip3o / "model.safetensors")
    qwen = {"visual.": "model.visual.", "model.layers.": "model.language_model.layers."}
    names = {name: official_name(name, qwen) if name.startswith(tuple(qwen)) else name for name in weights}
    assert sum(own != name for name, own in names.items()) > 10
    save_file({names[name]: x for name, x in weights.items()}, blip3o / "model.safetensors")
    assert "of_somebody" in describe_blip3o(blip3o, HOST, False).rows["fields without effect"]
    require_same(Blip3o.load(blip3o), Blip3o.load(BLIP3O))


def require_same(model: Blip3o, other: Blip3o) -> None:
    for ours, theirs in ((model.network, other.network), (model.language.network, other.language.network)):
        expected = theirs.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in ours.state_dict().items())


# --- weights


def renamed(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    match how:
        case "inside":
            return {name.replace("layers.", "layers._fsdp_wrapped_module.", 1): x for name, x in weights.items()}
        case "bare":
            return {name.removeprefix("language_model."): x for name, x in weights.items()}
        case "more":
            more = {"language_model.model.rotary_emb.inv_freq": torch.ones(4)}
            return weights | more | {"vit_model.vision_model.head.probe": torch.ones(1)}
        case prefix:
            return {prefix + name: x for name, x in weights.items()}


@pytest.mark.parametrize("how", ["module.", "_orig_mod.", "module._orig_mod.", "inside", "bare", "more"])
def test_weights_under_a_wrappers_names_are_the_same(folder: Path, how: str) -> None:
    weights = load_file(folder / "ema.safetensors")
    save_file(renamed(weights, how), folder / "ema.safetensors")
    ours = Bagel.load(folder).network.state_dict()
    expected = Bagel.load(CHECKPOINT).network.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("how", ["module.", "inside", "more"])
def test_those_of_the_second_are_too_and_are_saved_under_its_names(blip3o: Path, tmp_path: Path, how: str) -> None:
    weights = load_file(blip3o / "model.safetensors")
    more = {"model.rotary_emb.inv_freq": torch.ones(4), "model.vae.decoder.conv_in.weight": torch.ones(2)}
    changed = weights | more if how == "more" else renamed(weights, how)
    save_file(changed, blip3o / "model.safetensors")
    model = Blip3o.load(blip3o)
    require_same(model, Blip3o.load(BLIP3O))
    model.save(tmp_path / "saved")
    kept = {"model.vae.decoder.conv_in.weight"} if how == "more" else set()
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == weights.keys() | kept


def test_tensors_that_do_not_fit_are_counted_and_a_few_are_named(folder: Path) -> None:
    weights = load_file(folder / "ema.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("vit_model")}
    save_file(kept | {"adapter.a": torch.ones(1)}, folder / "ema.safetensors")
    with pytest.raises(ModelError) as raised:
        Bagel.load(folder)
    lost = len(weights) - len(kept)
    assert f"{lost} missing: vit_model" in str(raised.value) and "1 unexpected: adapter.a" in str(raised.value)
    assert len(str(raised.value)) < 500
    save_file(weights | {f"module.{name}": x.clone() for name, x in weights.items()}, folder / "ema.safetensors")
    with pytest.raises(ModelError, match=f"{len(weights)} twice"):
        Bagel.load(folder)


# --- damage


@pytest.mark.parametrize("content", [POINTER, "", "{", "[1]"], ids=["pointer", "empty", "cut", "list"])
@pytest.mark.parametrize(
    "file", ["llm_config.json", "vit_config.json", "tokenizer.json", "ema.safetensors", "ae.safetensors"]
)
def test_a_damaged_file_is_named_in_one_line(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(SrumError) as raised:
        Bagel.load(folder)
    assert file in str(raised.value) and "\n" not in str(raised.value)
    assert ("Git LFS pointer" in str(raised.value)) == (content == POINTER)
    assert ("empty" in str(raised.value)) == (content == "")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{"])
def test_an_index_that_lists_nothing_is_named(folder: Path, content: str) -> None:
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors.index.json").write_text(content)
    with pytest.raises(SrumError, match=r"ema\.safetensors\.index\.json"):
        Bagel.load(folder)


DECODER_FILES = [*CONFIGS, "unet/diffusion_pytorch_model.bf16.safetensors"]
FILES = ["config.json", "tokenizer.json", "model.safetensors", *(f"{DECODER}/{name}" for name in DECODER_FILES)]


@pytest.mark.parametrize("content", [POINTER, "", "{", "[1]"], ids=["pointer", "empty", "cut", "list"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_the_second_is_named_in_one_line(blip3o: Path, file: str, content: str) -> None:
    (blip3o / file).write_text(content)
    with pytest.raises(SrumError) as raised:
        models.load(blip3o, "cpu", empty=True)
    assert file in str(raised.value) and "\n" not in str(raised.value)
    assert ("Git LFS pointer" in str(raised.value)) == (content == POINTER)
    assert ("empty" in str(raised.value)) == (content == "")


def test_a_decoder_without_some_of_its_tensors_draws_nothing(blip3o: Path) -> None:
    """diffusers would draw them by chance, and go on."""
    (path,) = (blip3o / DECODER / "vae").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: x for name, x in weights.items() if "conv_out" not in name}, path)
    with pytest.raises(ModelError, match=r"vae does not fit its config: .*conv_out"):
        _ = Blip3o.load(blip3o).decoder


def test_an_autoencoder_of_another_size_is_named(folder: Path) -> None:
    weights = load_file(folder / "ae.safetensors")
    save_file({name: x for name, x in weights.items() if "conv_out" not in name}, folder / "ae.safetensors")
    with pytest.raises(ModelError, match=r"ae\.safetensors does not fit its config"):
        Bagel.load(folder)


def test_a_tensor_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="is missing"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (640, 640)])
def test_an_image_beyond_the_largest_is_refused(size: tuple[int, int]) -> None:
    model = Bagel.load(CHECKPOINT, empty=True)
    largest = model.config.pixels_per_token * model.config.max_latent_size
    assert model.latent_grid((largest, largest)) == (model.config.max_latent_size,) * 2
    if max(size) > largest:
        with pytest.raises(ModelError, match=f"beyond the largest that the model can draw, {largest}x{largest}"):
            model.latent_grid(size)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rollout.size", r"\(128, 128\) is beyond the largest .*, 64x64"),
        ("eval.size", "the exact checker reads images of 64x64, not 128x128"),
    ],
)
def test_a_run_names_the_size_before_it_writes_anything(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(SrumError, match=rf"{name}: .*{why}"):
        run_loop(load_config(None, ["method=sft", "compare=[]", f"{name}=[128,128]"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""The official layout: what the checkpoint and the parts that it names must hold, how they are filled, how a trained
model is written back (docs/specs/showo.md, 2)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiForCausalLM
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models import checkpoints
from srum.models.checkpoints import Headers, require_fit
from srum.models.showo.config import OVERRIDES, PARTS, ShowoConfig, part
from srum.models.showo.magvit import Magvit, MagvitSizes
from srum.tensors import fill, open_tensors, read_tensors

M = TypeVar("M", bound=nn.Module)
WEIGHTS = ["model.safetensors", "pytorch_model.safetensors"]
VISION = "vision_model."  # of a CLIP checkpoint, which may hold its text half, too


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's tensors. Raises ModelError where there are none, or pickles alone."""
    return checkpoints.weight_files(folder, WEIGHTS)


def read_headers(folder: Path) -> Headers:
    """Those of the language model and of what leads to it."""
    return Headers.of(weight_files(folder), str)


class Network(nn.Module):
    """What is trained, by its official names: Phi, and the projector of CLIP's features where there is one."""

    def __init__(self, config: ShowoConfig, feature_width: int | None) -> None:
        super().__init__()
        self.showo = PhiForCausalLM._from_config(config.phi, attn_implementation="sdpa")
        width = config.phi.hidden_size
        if feature_width is not None:
            self.mm_projector = nn.Sequential(nn.Linear(feature_width, width), nn.GELU(), nn.Linear(width, width))


def empty_network(config: ShowoConfig, headers: Headers) -> Network:
    """Without storage, but for the tables that are computed. Raises ModelError where the projector is missing."""
    width = headers.shapes.get("mm_projector.0.weight", (0, 0))[-1] if config.sees else None
    with init_empty_weights(include_buffers=False):
        return Network(config, width)


def check(folder: Path, config: ShowoConfig, headers: Headers) -> None:
    """Raises ModelError unless the tensors are those of the config, with a projector where it has CLIP's features."""
    require_fit(folder, headers, shapes_of(empty_network(config, headers)))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the parameters by name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@torch.no_grad()
def read_into(network: Network, headers: Headers) -> None:
    """Fill the network in its own types, tensor by tensor, and compute its tables.

    Of a tensor that processes share (``fully_shard``) each reads its own part alone. peft's adapters stay as they are.
    """
    named = {name.replace(".base_layer.", "."): tensor for name, tensor in network.named_parameters()}
    for name, tensor in named.items():
        if ".lora_" not in name:
            with open_tensors(headers.files[name], str(tensor.device)) as tensors:
                fill(tensor, tensors.get_slice(headers.stored[name]))
    rotary = network.showo.model.rotary_emb
    computed = PhiRotaryEmbedding(network.showo.config)
    rotary.inv_freq = computed.inv_freq.to(network.showo.device)
    rotary.original_inv_freq = rotary.inv_freq.clone()


def load_magvit(folder: Path, device: torch.device) -> Magvit:
    """The image tokenizer, frozen, in float32, since a bit hangs on the sign of a number. Raises ModelError."""
    headers = Headers.of(weight_files(folder), str)
    with torch.device("meta"):
        magvit = Magvit(sizes := MagvitSizes.of(headers))
    tables = {"quantize.embedding": (2**sizes.bits, sizes.bits), "quantize.power_vals": (sizes.bits,)}
    require_fit(folder, headers, shapes_of(magvit) | tables)
    return _filled(magvit, headers, device, torch.float32)


def load_tower(folder: Path, device: torch.device, dtype: torch.dtype) -> CLIPVisionModel:
    """CLIP's vision tower, frozen, with its config. Raises ModelError."""
    config = clip_config(folder)
    headers = Headers.of(
        weight_files(folder), lambda name: name.removeprefix(VISION) if name.startswith(VISION) else None
    )
    with init_empty_weights(include_buffers=False):
        tower = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
    require_fit(folder, headers, shapes_of(tower))
    return _filled(tower, headers, device, dtype)


def clip_config(folder: Path) -> CLIPVisionConfig:
    """That of the vision tower, which stands alone or in that of both towers. Raises ModelError."""
    path = folder / "config.json"
    raw = read_json(path)
    values = raw.get("vision_config", raw)
    if raw.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(values, dict):
        raise ModelError(f"{path}: model_type: expected 'clip', got {raw.get('model_type')!r}")
    return CLIPVisionConfig(**{name: value for name, value in values.items() if name in CLIPVisionConfig().to_dict()})


def _filled(module: M, headers: Headers, device: torch.device, dtype: torch.dtype) -> M:
    for name, _ in list(module.named_parameters()):
        with open_tensors(headers.files[name]) as tensors:
            set_module_tensor_to_device(module, name, device, tensors.get_tensor(headers.stored[name]), dtype)
    for name, _ in list(module.named_buffers()):
        set_module_tensor_to_device(module, name, device)
    return module.eval().requires_grad_(False)


def save_checkpoint(source: Path, folder: Path, headers: Headers, weights: Mapping[str, Tensor]) -> None:
    """Write the official layout with these ``weights``; the parts that it names are linked into it, so that it can be
    run where it stands. Raises ModelError for the folder that is read from."""
    if folder.resolve() == source.resolve():
        raise ModelError(f"{folder} is where the weights are read from: save to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(set(headers.files.values())):
        own = read_tensors(path)
        tensors = {name: weights.get(name, own[name]).contiguous() for name in own}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".md") and path.is_file():
            shutil.copyfile(path, folder / path.name)
    if (beside := source.parent / OVERRIDES).is_file() and not (folder / OVERRIDES).exists():
        shutil.copyfile(beside, folder / OVERRIDES)
    for name in PARTS if read_json(folder / "config.json")["w_clip_vit"] else ("magvitv2", "phi"):
        read = (".json", ".txt") if name == "phi" else (".json", ".safetensors")
        for path in part(source, name).iterdir():
            if path.suffix in read:
                checkpoints.link(path, folder / name / path.name)

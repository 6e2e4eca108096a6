"""The file layout: which tensors belong to which part, how a part is filled, how all is written back
(docs/specs/openuni.md, 2 and 3).

``openuni.safetensors`` holds what the authors train, under the names that their ``.pth`` has. What it does not hold of
the transformer, the language model (``lmm.``) and the autoencoder (``vae.``) is in the folders of those.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from srum.errors import ModelError
from srum.models.checkpoints import Headers, fill_frozen, link, require_fit, weight_files
from srum.models.openuni.config import DC_AE, INTERNVL, SANA, OpenUniConfig
from srum.models.openuni.generator import OpenUniGenerator

T = TypeVar("T")
WEIGHTS = "openuni.safetensors"
LANGUAGE, AUTOENCODER, TRANSFORMER = "lmm.", "vae.", "transformer."
DIFFUSERS = tuple(f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".bf16", ".fp16"))
# Of the parts: where their tensors are unless they are among the trained ones, and in which files.
ELSEWHERE = {
    LANGUAGE: (Path(INTERNVL), ("model.safetensors",)),
    TRANSFORMER: (Path(SANA, "transformer"), DIFFUSERS),
    AUTOENCODER: (Path(DC_AE), DIFFUSERS),
}
# transformers' names of InternVL3's tensors and its own, by their beginnings; of the first that fits.
NAMES = {
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection.": "vision_model.embeddings.patch_embedding.",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
IN_VISION_LAYER = {
    "attention.projection_layer.": "attn.proj.",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
}
THIRDS = re.compile(r"attention\.([qkv])_proj\.")  # of one matrix of queries, keys and values
HEAD = f"{LANGUAGE}language_model.lm_head.weight"


def read_headers(folder: Path) -> Headers:
    """Those of all parts. Raises ModelError where a file is missing, and for pickled weights."""
    headers = Headers.of(weight_files(folder, [WEIGHTS]), lambda name: name)
    for prefix, (place, names) in ELSEWHERE.items():
        if not any(name.startswith(prefix) for name in headers.shapes):
            headers.add(Headers.of(weight_files(folder / place, names), prefix.__add__))
    if "meta_queries" not in headers.shapes or len(headers.shapes["meta_queries"]) != 2:
        raise ModelError(f"{folder / WEIGHTS} has no meta_queries: it is no OpenUni, or not all of it")
    return headers


def official_name(name: str) -> tuple[str, int | None]:
    """What a tensor of InternVL is called in the files, and which third of that it is, None: all of it."""
    ours = next(ours for ours in NAMES if name.startswith(ours))
    stored = LANGUAGE + NAMES[ours] + name[len(ours) :]
    for part, its in IN_VISION_LAYER.items():
        stored = stored.replace(part, its)
    third = THIRDS.search(stored)
    return THIRDS.sub("attn.qkv.", stored), "qkv".index(third[1]) if third else None


def empty_internvl(config: OpenUniConfig) -> InternVLForConditionalGeneration:
    """InternVL3 without storage, but for the tables that are computed."""
    with init_empty_weights(include_buffers=False):
        return InternVLForConditionalGeneration._from_config(config.internvl, attn_implementation="sdpa")


def empty_generator(folder: Path, config: OpenUniConfig) -> OpenUniGenerator:
    """What draws, without storage. Raises ModelError for fields that make none."""
    return _empty(folder / SANA / "transformer", lambda: OpenUniGenerator(config))


def empty_autoencoder(folder: Path, config: OpenUniConfig) -> AutoencoderDC:
    """DC-AE without storage. Raises ModelError for fields that make none."""
    fields = {name: value for name, value in config.autoencoder.items() if not name.startswith("_")}
    return _empty(folder / DC_AE, lambda: AutoencoderDC(**fields))


def _empty(folder: Path, make: Callable[[], T]) -> T:
    try:
        with torch.device("meta"):
            return make()
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # diffusers has no type of its own
        raise ModelError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from None


def check(folder: Path, config: OpenUniConfig, headers: Headers) -> None:
    """Raises ModelError unless every tensor belongs to a part and has its shape, and every part is whole."""
    expected = {name: tuple(p.shape) for name, p in empty_generator(folder, config).named_parameters()}
    for name, p in empty_autoencoder(folder, config).named_parameters():
        expected[AUTOENCODER + name] = tuple(p.shape)
    for name, p in empty_internvl(config).named_parameters():
        stored, third = official_name(name)
        rows, *columns = p.shape
        expected[stored] = (rows if third is None else 3 * rows, *columns)
    if tied(config, headers):
        expected.pop(HEAD, None)
    require_fit(folder, headers, expected)


def tied(config: OpenUniConfig, headers: Headers) -> bool:
    """Whether the language model's head is its embedding: where the config allows it and the files have no other."""
    return bool(config.internvl.tie_word_embeddings) and HEAD not in headers.shapes


def load_internvl(
    config: OpenUniConfig, headers: Headers, device: torch.device, dtype: torch.dtype
) -> InternVLForConditionalGeneration:
    """InternVL3, frozen."""

    def read(name: str) -> Tensor | None:
        stored, third = official_name(name)
        if stored not in headers.files:  # a tied head
            return None
        return headers.read(stored) if third is None else headers.read(stored).chunk(3)[third]

    internvl = empty_internvl(config)
    fill_frozen(internvl, read, device, dtype)
    if tied(config, headers):
        internvl.lm_head.weight = internvl.model.language_model.embed_tokens.weight
    return internvl


def load_autoencoder(
    folder: Path, config: OpenUniConfig, headers: Headers, device: torch.device, dtype: torch.dtype
) -> AutoencoderDC:
    """DC-AE, frozen."""
    autoencoder: nn.Module = empty_autoencoder(folder, config)
    fill_frozen(autoencoder, lambda name: headers.read(AUTOENCODER + name), device, dtype)
    return autoencoder


def save_checkpoint(source: Path, folder: Path, headers: Headers, weights: Mapping[str, Tensor]) -> None:
    """Write the layout: ``weights`` of the generator in ``openuni.safetensors``, with what else that file of ``source``
    holds; all other files are the same files, linked where that is possible.

    Raises ModelError for the folder that is read from.
    """
    if folder.resolve() == source.resolve():
        raise ModelError(f"{folder} is where the weights are read from: save to another folder")
    own = set(weight_files(source, [WEIGHTS]))
    kept = {n: headers.read(n) for n, path in headers.files.items() if path in own and n not in weights}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in (kept | dict(weights)).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and path not in own and not relative.name.startswith((WEIGHTS, ".")):
            if path.suffix == ".safetensors":
                link(path, folder / relative)
            else:
                (folder / relative.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / relative)

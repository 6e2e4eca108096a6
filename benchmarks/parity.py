"""Our numbers against those that the reference left in a folder of fixtures.

    python -m benchmarks.parity --golden tests/golden/bagel [--device cuda] [--precision bf16]
    python -m benchmarks.parity --golden tests/golden/rvr [--checkpoint tests/golden/bagel/checkpoint]
    python -m benchmarks.parity --golden tests/golden/blip3o
    python -m benchmarks.parity --golden tests/golden/openuni
    python -m benchmarks.parity --golden tests/golden/harmon

Everything that the folder records is computed again with the model in its ``checkpoint`` (a folder without one: in that
of the folder ``bagel`` beside it), from the sizes, prompts,
settings and noise of its files: any folder of this layout will do (tests/golden/bagel/README.md), and so will one of
numbers without a network, of policy gradients (tests/golden/flow_grpo/README.md). Printed per quantity:
the largest deviation over its cases and the tolerance in float32. The exit status is 1 if a quantity misses, if a
fixture is missing, or if the folder holds something that nothing here compares.

On a GPU float32 is float32: TF32 is switched off. Under ``--precision bf16`` the network computes in bfloat16, and only
what it hands on in training and sampling is compared, to the tolerances of ``BFLOAT16``: greedy texts may part at any
token, and what does not pass through the network is the same as in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from srum import flow
from srum.evaluation.released import (
    reference_layout,
    reference_map,
    reference_record,
    reference_regions,
    reference_sample,
)
from srum.models.bagel import Bagel
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import BagelConfig, ResizeLimits
from srum.models.bagel.images import patchify, resize, resized_size, to_tensor
from srum.models.bagel.positions import grid_ids, interpolated_grid_ids, rotary, sincos_table, timestep_sinusoid
from srum.models.bagel.sequence import Batch, Span, Split, lay_out, sight_of
from srum.models.base import Decoding, FlowForward, Sampling, Segment, to_edit
from srum.models.precision import Precision
from srum.stages.reward_map import reference_grid
from srum.train.methods.srum import Srum, SrumConfig
from srum.train.objective import Terms, Tokens

Facts = Any  # the content of a fixture's JSON file
# About the recording, not recorded quantities; and what the checkpoint is loaded with.
UNCOMPARED = {"README.md", "sensitivity.json", "timings.json", "fixture_config.json"}
# In bfloat16, which has 8 significant bits: about twice what a CPU deviates, in quantities of size 1 to 10. States
# of sampling are compared along the way; final latents include those behind thoughts, which may be other thoughts.
BFLOAT16 = {
    "velocity": 0.1,
    "losses": 0.01,
    "total gradient norm": 0.03,
    "gradient norms": 0.05,
    "gradients": 0.05,
    "layer outputs": 0.3,
    "last_hidden_state": 0.15,
    "text logits": 0.3,
    "keys and values": 0.1,
    "x_t": 0.15,
    "v_t": 0.4,
}


@dataclass(frozen=True)
class Deviation:
    """How far one case of a quantity is from the recorded one. Tolerance 0: 1 where they are not equal."""

    quantity: str
    case: str
    value: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance


class Tensors(dict[str, Tensor]):
    """The tensors of a fixture by name; ``unread`` are those that nobody has asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(load_file(path))
        self.unread = set(self)

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return super().__getitem__(name)


def equal(quantity: str, ours: object, theirs: object, case: str = "") -> Deviation:
    """Ids, texts, sizes, masks: the same or not. Tensors are compared as lists."""
    a, b = (x.tolist() if isinstance(x, Tensor) else x for x in (ours, theirs))
    return Deviation(quantity, case, float(a != b), 0.0)


def all_equal(ours: Mapping[str, object], theirs: Mapping[str, Any], case: str = "") -> Iterator[Deviation]:
    """``equal`` for every quantity of ours."""
    return (equal(quantity, value, theirs[quantity], case) for quantity, value in ours.items())


def close(quantity: str, ours: Tensor | float, theirs: Tensor | float, tolerance: float, case: str = "") -> Deviation:
    """The largest absolute difference; infinite where the shapes differ or a number is not finite."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (ours, theirs))
    difference = (a - b).abs().nan_to_num(nan=math.inf) if a.shape == b.shape else torch.tensor(math.inf)
    return Deviation(quantity, case, max(difference.flatten().tolist(), default=0.0), tolerance)


def relative(quantity: str, ours: float, theirs: float, tolerance: float, case: str = "") -> Deviation:
    """The difference relative to the recorded value, or to 1e-3 where that is smaller."""
    return close(quantity, ours / max(abs(theirs), 1e-3), theirs / max(abs(theirs), 1e-3), tolerance, case)


# --- the checkpoint and what stands before the network


def checkpoint(model: Bagel, shapes: Facts, _: Tensors) -> Iterator[Deviation]:
    """The folder loads, and a saved one has the same files, keys, shapes and numbers."""
    state = model.network.state_dict()
    yield equal("names and shapes of the tensors", {name: list(x.shape) for name, x in state.items()}, shapes)
    fixed = model.config.raw["fixture_config.json"]
    ids = {"bos_token_id": model.bos, "eos_token_id": model.eos}
    ids |= {"start_of_image": model.markers.start, "end_of_image": model.markers.end}
    yield equal("special tokens", ids, fixed["special_token_ids"])
    yield equal("length of the tokenizer", len(model.tokenizer), fixed["len_tokenizer"])
    yield equal("number of parameters", sum(x.numel() for x in state.values()), fixed["parameter_count"])
    with TemporaryDirectory() as folder:
        model.save(folder)
        saved, official = ({path.name: path for path in Path(x).iterdir()} for x in (folder, model.folder))
        yield equal("files of a saved checkpoint", saved.keys(), official.keys())
        for name, path in official.items():
            if path.suffix == ".safetensors":
                ours, theirs = load_file(saved[name]), load_file(path)
                yield equal("saved tensors, their names", ours.keys(), theirs.keys(), name)
                same = (torch.equal(ours[key], value.float()) for key, value in theirs.items())
                yield equal("saved tensors, bit for bit", all(same), True, name)
            elif path.suffix == ".json":
                yield equal("saved configs", *(json.loads(x.read_text()) for x in (saved[name], path)), name)


def tokenizer(model: Bagel, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for case in facts:
        ids = model.tokenizer.encode(case["text"], add_special_tokens=False)
        yield equal("ids", ids, case["ids"], case["text"][:20])


def positions(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    config, width = model.config, model.config.llm.hidden_size
    sides = {"latent": config.max_latent_size, "vit": config.vit_max_num_patch_per_side}
    for name, side in sides.items():
        yield close("tables", sincos_table(side, width), numbers[f"{name}_pos_embed"], 1e-6, name)
    for name, side in re.findall(r"(official_\D+(\d+))_rows", "\n".join(numbers)):
        rows, values = numbers[f"{name}_rows"], numbers[f"{name}_values"]
        yield close("tables", sincos_table(int(side), values.shape[1])[rows], values, 1e-6, name)
    for case in facts:
        grid = (case["height"] // case["patch"], case["width"] // case["patch"])
        for rule, ids in (("extrapolate", grid_ids), ("interpolate", interpolated_grid_ids)):
            name = f"{rule}_{case['suffix']}"
            yield equal("position ids", ids(grid, case["max_per_side"]), numbers[name], name)
    t = numbers["timesteps"]
    yield close("timestep sinusoid", timestep_sinusoid(t), numbers["timestep_sinusoid"], 1e-6)
    yield close(
        "timestep embedding", model.network.time_embedder(t.to(model.device)), numbers["timestep_embedding"], 1e-5
    )
    angles = rotary(numbers["rope_positions"], config.llm.head_dim, config.llm.rope_theta)
    for name, ours in zip(("rope_cos", "rope_sin"), angles, strict=True):
        yield close("rope", ours, numbers[name], 1e-6, name)


def transform_sizes(model: Bagel, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    for preset in facts["configs"]:
        limits = ResizeLimits(max_image_size=preset["max"], min_image_size=preset["min"], image_stride=preset["stride"])
        rows = [row for row in facts["rows"] if row["transform"] == preset["name"]]
        ours = [resized_size(r["in_w"], r["in_h"], limits, preset["max_pixels"] / r["img_num"]) for r in rows]
        yield equal("sizes", ours, [(r["out_w"], r["out_h"]) for r in rows], preset["name"])


def transforms(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    config, patch = model.config, model.config.vit.patch_size
    images = recorded_images(numbers)
    for name, image in images.items():
        first = resize(image, config.vae_transform, config.transform_max_pixels)
        seen, again = (resize(x, config.vit_transform, config.transform_max_pixels) for x in (image, first))
        for kind, pixels in (("vae", first), ("vit", seen), ("vit_after_vae", again)):
            yield close("pixels", to_tensor(pixels), numbers[f"{kind}_{name}"], 1e-6, f"{kind}_{name}")
        yield close("patches", patchify(to_tensor(seen), patch), numbers[f"vit_patches_{name}"], 1e-6, name)
    official = {name: field.default for name, field in BagelConfig.model_fields.items()}
    for name, recorded in facts.items():
        _, kind, image_name = name.split("_")
        limits = official[f"{kind}_transform"]
        pixels = to_tensor(resize(images[image_name], limits, official["transform_max_pixels"]))
        yield equal("sizes at the official limits", list(pixels.shape), recorded["shape"], name)
        for statistic in ("mean", "std"):
            ours = getattr(pixels, statistic)()
            yield close("statistics at the official limits", ours, recorded[statistic], 1e-6, name)
        y0, y1, x0, x1 = map(int, re.findall(r"\d+", recorded["crop"]))
        crop = numbers[f"{name}_crop"]
        yield close("pixels at the official limits", pixels[:, y0:y1, x0:x1], crop, 1e-6, name)


def vae(model: Bagel, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    with torch.no_grad():
        image = numbers["image"].to(model.device)
        moments = model.autoencoder.encode(image).latent_dist.parameters
    yield close("moments", moments, numbers["encoder_moments"], 2e-5)
    latent = numbers["latent_mean_scaled"]
    yield close("scaled mean", encode_mean(model.autoencoder, image), latent, 2e-5)
    for source, target in ((latent, "decoded"), (numbers["latent_random"], "decoded_random")):
        yield close(
            "decoded", decode_latents(model.autoencoder, source.to(model.device)), numbers[target], 2e-5, target
        )


# --- sequences

KINDS: dict[str, Literal["text", "seen", "clean"]] = {"text": "text", "vit_image": "seen", "vae_image": "clean"}


def packing(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for case in facts["cases"]:
        name = case["name"]
        splits = [planned_split(model, plan, case["dropped_probabilities"]) for plan in case["plan"]]
        batch = packed_batch(model, [splits])
        grids = [list(s.grid) for s in splits if s.kind in ("clean", "noisy") and not s.dropped]
        noisy = [i for i, draw in enumerate(case["raw_timesteps"]) if draw != "-inf"]
        place = places(batch)
        ours = {
            "sample_len": len(batch.row),
            "position_ids": in_sequence(batch, batch.layout.positions),
            "text_ids": batch.text_ids,
            "text_indexes": place["text"],
            "vit_token_indexes": place["seen"],
            "vae_token_indexes": place["latent"],
            "vae_latent_shapes": grids,
            "mse_loss_indexes": place["latent"][batch.loss_tokens],
            "ce_loss_indexes": place["text"][batch.ce_tokens],
            "label_ids": batch.labels,
        }
        yield from all_equal(ours, case, name)
        yield equal("noisy tokens", batch.loss_tokens, noisy, name)
        yield close("ce_loss_weights", batch.ce_weights, torch.tensor(case["ce_loss_weights"]), 1e-6, name)
        yield equal("attention_allowed", allowed(batch), numbers[f"{name}/attention_allowed"].bool(), name)
    for case in facts["masks"]:
        spans = [Span(n, mode) for n, mode in zip(case["split_lens"], case["modes"], strict=True)]
        mask = sight_of([spans], sum(case["split_lens"])).dense()[0]
        yield equal("masks", mask, numbers[case["name"]].bool(), case["name"])


def planned_split(model: Bagel, plan: Mapping[str, Any], dropped: Mapping[str, float]) -> Split:
    """One entry of a packing plan, its pixels zero. Conditions are dropped with the probabilities 0 and 1 only."""
    config, kind = model.config, KINDS[plan["type"]]
    drop = bool(plan["enable_cfg"]) and dropped.get(plan["type"].removesuffix("_image"), 0) == 1.0
    if kind == "text":
        label = plan["special_token_label"] if plan["special_token_loss"] else None
        ids = (model.bos, *plan["ids"], model.eos)
        return Split(kind="text", ids=ids, loss=bool(plan["loss"]), dropped=drop, end_label=label)
    h, w = (x // (config.vit.patch_size if kind == "seen" else config.pixels_per_token) for x in plan["image_hw"])
    if kind == "seen":
        patches = torch.zeros(h * w, 3 * config.vit.patch_size**2)
        return Split(kind="seen", patches=patches, grid=(h, w), dropped=drop)
    return Split(
        kind="noisy" if plan["loss"] else "clean",
        tokens=torch.zeros(h * w, config.latent_dim),
        grid=(h, w),
        loss=bool(plan["loss"]),
        dropped=drop,
        frame_delta=plan.get("frame_delta", 0 if "split_start" in plan else None),
        continues=not plan.get("split_start", True),
    )


def packed_batch(model: Bagel, samples: Sequence[Sequence[Split]], cache: Cache | None = None) -> Batch:
    config = model.config
    return lay_out(
        samples,
        model.markers,
        patch_side=config.vit_max_num_patch_per_side,
        latent_side=config.max_latent_size,
        dims=(3 * config.vit.patch_size**2, config.latent_dim),
        begun=cache,
        device=model.device,
    )


def places(batch: Batch) -> dict[str, Tensor]:
    """Where the tokens of each stream stand in the one sequence that the reference makes of all samples."""
    lengths = batch.layout.present.sum(1)
    place = (lengths.cumsum(0) - lengths)[batch.row] + batch.column
    text, seen = len(batch.text_ids), int(batch.patch_present.sum())
    return {"text": place[:text], "seen": place[text : text + seen], "latent": place[text + seen :], "all": place}


def in_sequence(batch: Batch, *streams: Tensor) -> Tensor:
    """Values of all tokens, or of [und; gen], in the order of that sequence."""
    return torch.cat(streams)[places(batch)["all"].argsort()]


def allowed(batch: Batch) -> Tensor:
    """(T, T) bool: what each token of that sequence sees."""
    row, column = in_sequence(batch, batch.row), in_sequence(batch, batch.column)
    return batch.layout.visible[row[:, None], 0, column[:, None], column] & (row[:, None] == row)


def same_sequence(batch: Batch, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """The index lists and lengths that every recorded training batch has."""
    place = places(batch)
    ours = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": place["text"],
        "packed_vae_token_indexes": place["latent"],
        "packed_position_ids": in_sequence(batch, batch.layout.positions),
        "packed_latent_position_ids": batch.latent_ids,
        "mse_loss_indexes": place["latent"][batch.loss_tokens],
    }
    yield from all_equal(ours, numbers)
    lengths = {"sequence_length": len(batch.row), "sample_lens": batch.layout.present.sum(1)}
    yield from all_equal(lengths, facts)


# --- training


def train_forward(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """The losses and their gradients at every shift; at shift 1 also the sequence and what each part hands on."""
    for settings in (key for key in facts if key.startswith("shift_")):
        batch, target = training_batch(model, facts, numbers, float(settings.removeprefix("shift_")))
        out = model.forward(batch)
        squared, ce = errors(out, target)
        suffix = "" if settings == "shift_1" else "_" + settings.replace("_", "")
        yield close("velocity", out.velocity, numbers["predicted_velocity" + suffix], 1e-4, settings)
        yield close("squared errors", squared, numbers["mse_per_token" + suffix], 2e-4, settings)
        yield from same_losses(squared, ce, facts[settings], settings)
        yield from same_gradients(gradients_of(squared.mean() + ce.mean(), model.network), facts[settings], settings)

    batch, target = training_batch(model, facts, numbers, 1.0)
    yield from same_sequence(batch, facts, numbers)
    ours = {
        "packed_vit_token_indexes": places(batch)["seen"],
        "packed_vit_position_ids": batch.patch_ids[batch.patch_present],
        "packed_label_ids": batch.labels,
        "ce_loss_indexes": places(batch)["text"][batch.ce_tokens],
    }
    yield from all_equal(ours, numbers)
    yield from all_equal({"n_mse_tokens": len(batch.loss_tokens), "n_ce_tokens": len(batch.labels)}, facts)
    yield equal("attention_allowed", allowed(batch), numbers["attention_allowed"].bool())
    for name, pixels, recorded in seen_images(facts, numbers):
        yield close("patches", patchify(pixels, model.config.vit.patch_size), recorded, 1e-6, name)
    with observed(model, batch) as states:
        out = model.forward(batch)
    for name, state in states.items():
        yield close("layer outputs" if name.startswith("layer") else name, state, numbers[name], 1e-4, name)
    squared, ce = errors(out, target)
    yield close("text logits", out.logits, numbers["text_logits"], 1e-4)
    yield close("cross-entropies", ce, numbers["ce_per_token"], 2e-4)
    weights = batch.ce_weights
    yield close("ce_loss_weights", weights, numbers["ce_loss_weights"], 1e-6)
    yield close("losses", (ce * weights).sum() / weights.sum(), facts["ce_reweighted"], 1e-4, "ce_reweighted")
    yield from recorded_gradients(gradients_of(squared.mean() + ce.mean(), model.network), numbers)
    with constant_understanding(model):
        squared, ce = errors(model.forward(batch), target)
    yield from same_losses(squared, ce, facts["freeze_und"], "freeze_und")
    learns = {name for name, _ in model.generation_parameters()} | {"language_model.lm_head.weight"}
    gradients = gradients_of(squared.mean() + ce.mean(), model.network)
    gradients = {name: gradient for name, gradient in gradients.items() if name in learns}
    yield from same_gradients(gradients, facts["freeze_und"], "freeze_und")


def training_batch(model: Bagel, facts: Facts, numbers: Tensors, shift: float) -> tuple[Batch, Tensor]:
    """The recorded samples, and the velocity targets (N, D) of the latent tokens with a loss."""
    patch = model.config.latent_patch_size
    latents, used = iter(numbers["padded_latent"]), 0
    patches = (x for _, _, x in seen_images(facts, numbers))
    times, noise = flow.shift_timestep(numbers["packed_timesteps"].sigmoid(), shift), numbers["noise"]
    samples, targets = [], []
    for sample in facts["samples"]:
        splits = []
        for recorded in sample["splits"]:
            kind, loss = recorded["kind"], bool(recorded.get("loss"))
            if recorded.get("dropped"):
                splits.append(Split(kind=KINDS[kind], dropped=True))
                continue
            if kind == "text":
                splits.append(Split(kind="text", ids=(model.bos, *recorded["ids"], model.eos), loss=loss))
                continue
            h, w = recorded["grid"]
            if kind == "vit_image":
                splits.append(Split(kind="seen", patches=next(patches), grid=(h, w)))
                continue
            clean = model.tokens(next(latents)[:, : h * patch, : w * patch])
            eps, t = noise[used : used + h * w], times[used].item()
            used += h * w
            tokens = flow.interpolate(clean, eps, t)
            splits.append(Split(kind="noisy" if loss else "clean", tokens=tokens, grid=(h, w), t=t, loss=loss))
            targets += [flow.velocity_target(clean, eps)] if loss else []
        samples.append(splits)
    return packed_batch(model, samples), torch.cat(targets)


def seen_images(facts: Facts, numbers: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The seen image of each sample that has one: the sample's name, pixels (3, H, W), packed patches (P, 3 p p)."""
    patches = iter(numbers["packed_vit_tokens"].split(numbers["vit_token_seqlens"].tolist()))
    for sample in facts["samples"]:
        for split in sample["splits"]:
            if split["kind"] == "vit_image" and not split.get("dropped"):
                yield sample["name"], numbers[f"vit_image_{sample['name']}"], next(patches)


@contextmanager
def observed(model: Bagel, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """What a forward pass inside the block hands from part to part, under the names of the fixture."""
    states: dict[str, Tensor] = {}
    network, seen = model.network, batch.patch_present

    def decoder(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        states["lm_input"] = in_sequence(batch, *inputs[:2])
        states["last_hidden_state"] = in_sequence(batch, *outputs)

    hooks = [
        network.vit_model.vision_model.register_forward_hook(lambda _m, _i, x: states.update(vit_output=x[seen])),
        network.connector.register_forward_hook(lambda _m, _i, x: states.update(connector_output=x)),
        network.decoder.register_forward_hook(decoder),
    ]
    for index, layer in enumerate(network.decoder.layers):
        name = f"layer_{index}_output"
        hooks.append(layer.register_forward_hook(lambda _m, _i, x, n=name: states.update({n: in_sequence(batch, *x)})))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def constant_understanding(model: Bagel) -> Iterator[None]:
    """The reference's ``freeze_und``: inside the block no gradient passes through the und stream of a layer."""
    layers = model.network.decoder.layers
    hooks = [layer.register_forward_hook(lambda _m, _i, streams: (streams[0].detach(), streams[1])) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def errors(out: FlowForward, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors (N, D) of the velocities and cross-entropies (M,) of the text."""
    cross_entropies = cross_entropy(out.logits, out.labels, reduction="none")
    return (out.velocity - target.to(out.velocity.device)).square(), cross_entropies


def same_losses(squared: Tensor, ce: Tensor, recorded: Facts, case: str) -> Iterator[Deviation]:
    losses = {"ce": ce.mean(), "mse": squared.mean(), "total": ce.mean() + squared.mean()}
    for name, loss in losses.items():
        yield close("losses", loss, recorded[name], 1e-4, f"{case} {name}")


def gradients_of(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Gradients by name of the parameters that the loss reaches; the graph is kept.

    Left out are the key biases of the understanding encoder, whose true gradient is zero.
    """
    parameters = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and not is_vit_key_bias(name)
    }
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None and g.any()}


def is_vit_key_bias(name: str) -> bool:
    return "vision_model" in name and name.endswith("k_proj.bias")


def same_gradients(gradients: Mapping[str, Tensor], recorded: Facts, case: str) -> Iterator[Deviation]:
    """Norms in all and one by one, whichever the fixture has."""
    ours = {name: gradient.norm().item() for name, gradient in gradients.items()}
    if "total_grad_norm" in recorded:
        yield relative("total gradient norm", math.hypot(*ours.values()), recorded["total_grad_norm"], 1e-3, case)
    if "grad_norms" in recorded:
        norms = {name: norm for name, norm in recorded["grad_norms"].items() if norm and not is_vit_key_bias(name)}
        yield equal("parameters with a gradient", sorted(ours), sorted(norms), case)
        for name in norms.keys() & ours.keys():
            yield relative("gradient norms", ours[name], norms[name], 1e-3, f"{case} {name}")


def recorded_gradients(gradients: Mapping[str, Tensor], numbers: Tensors) -> Iterator[Deviation]:
    for key in numbers:
        if key.startswith("grad/"):
            name = key.removeprefix("grad/")
            yield close("gradients", gradients[name], numbers[key], 1e-4, name)


# --- images


def t2i(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    ids = model.tokenizer.encode(facts["prompt"], add_special_tokens=False)
    yield equal("prompt ids", ids, facts["prompt_ids"])
    yield from drawn(model, facts, numbers, tuple(facts["image_shape_hw"]), [])
    settings = next(s for s in (case["settings"] for case in facts["cases"].values()) if s.get("think"))
    context, _ = context_of(model, facts["prompt"], settings, [])
    with torch.no_grad():
        full = model.contexts([context])
    h, w = model.latent_grid(tuple(settings["image_shapes"]))
    split = Split(kind="noisy", tokens=torch.zeros(h * w, model.config.latent_dim), grid=(h, w))
    batch = packed_batch(model, [[split]], full)
    ours = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": places(batch)["text"],
        "packed_vae_position_ids": batch.latent_ids,
        "packed_vae_token_indexes": places(batch)["latent"],
        "packed_seqlens": batch.layout.present.sum(1),
        "packed_position_ids": batch.layout.positions,
        "key_values_lens": full.lengths,
        "packed_indexes": full.lengths + in_sequence(batch, batch.column),
        "packed_key_value_indexes": torch.arange(full.used),
    }
    yield from all_equal(ours, facts["prep"])


def t2i_batch(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    size = tuple(facts["image_shape_hw"])
    h, w = model.latent_grid(size)
    contexts = [[Segment("text", text=prompt, droppable=True)] for prompt in facts["prompts"]]
    for renorm in sorted({name.split("/")[0] for name in numbers if "/" in name}):
        sampling = sampling_of({"cfg_img_scale": 1.0, "cfg_renorm_min": 0.0, "cfg_renorm_type": renorm} | facts)
        with noise_of(model, numbers["initial_noise"].split(h * w)):
            made = model.draw(contexts, sampling, [0] * len(contexts), sizes=[size] * len(contexts))
        latents = [model.tokens(image.latent) for image in made]
        for index, latent in enumerate(latents):
            recorded = numbers[f"{renorm}/final_latent_{index}"]
            yield close("final latents", latent, recorded, 1e-4, f"{renorm}, image {index}")


def edit(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    config, source = model.config, recorded_images(numbers)["uint8"]
    shown, size = to_edit(model, source)
    image = model.resized(source)
    yield equal("output size", list(size), facts["output_hw"])
    yield equal("resized image", np.array(image).tolist(), numbers["image_resized_uint8"])
    yield close("clean latent", model.encode([image])[0][None], numbers["context_vae_latent"], 2e-5)
    seen = to_tensor(resize(image, config.vit_transform, config.transform_max_pixels))
    yield close("seen pixels", seen, numbers["context_vit_pixels"], 1e-6)
    yield from drawn(model, facts, numbers, size, shown)


def drawn(
    model: Bagel, facts: Facts, numbers: Tensors, size: tuple[int, int], shown: Sequence[Segment]
) -> Iterator[Deviation]:
    """The images of one prompt, or edits of the image that is ``shown``, under several settings."""
    for name, case in facts["cases"].items():
        sampling = sampling_of(case["settings"])
        context, thoughts = context_of(model, facts["prompt"], case["settings"], shown)
        with noise_of(model, [numbers["initial_noise"]]):
            (made,) = model.draw([context], sampling, [0], sizes=[size], path=True)
        if case["settings"].get("think"):
            yield equal("thoughts", thoughts, case["texts"], name)
            with torch.no_grad():
                asked = model.contexts([[segment for segment in context if not segment.written]])
            ids, logits = greedy(model, asked, case["settings"]["max_think_token_n"])
            yield equal("ids of thoughts", [ids], case["generated_token_ids"], name)
            yield close("smallest gap of logits", smallest_gap(logits), case["min_top2_margin"], 1e-4, name)
        assert made.path is not None
        yield close("timesteps", made.path.timesteps, torch.tensor(case["timesteps"]), 1e-6, name)
        for quantity, latents in (("x_t", made.path.states), ("v_t", made.path.velocities)):
            if f"{name}/{quantity}" in numbers:
                values = torch.stack([model.tokens(latent) for latent in latents])
                yield close(quantity, values, numbers[f"{name}/{quantity}"], 1e-4, name)
        yield close("final latents", model.tokens(made.latent), numbers[f"{name}/final_latent"], 1e-4, name)
        pixels = torch.from_numpy(np.array(made.image))
        yield close("pixels, in levels of 255", pixels, numbers[f"{name}/image_uint8"], 1.0, name)


def context_of(
    model: Bagel, prompt: str, settings: Mapping[str, Any], shown: Sequence[Segment]
) -> tuple[list[Segment], list[str]]:
    """What an image is drawn from, with the thought of the model where it is to think, which is then returned, too."""
    context = [*shown, Segment("text", text=prompt, droppable=True)]
    if not settings.get("think"):
        return context, []
    context = [Segment("text", text=model.plan_instruction), *context]
    (thought,) = model.write([context], Decoding(max_tokens=settings["max_think_token_n"]), [0])
    return [*context, Segment("text", text=thought.text, droppable=True, written=True)], [thought.text]


@contextmanager
def noise_of(model: Bagel, noise: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block images are drawn from this noise, (h w, D) each."""
    ours, model.noise = model.noise, lambda seeds, sizes: list(noise)  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.noise = ours  # type: ignore[method-assign]


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """The sampler's settings; the reference's ``global``, its default, takes one norm over the whole call."""
    renorm = settings.get("cfg_renorm_type", "global")
    return Sampling(
        timesteps=settings["num_timesteps"],
        timestep_shift=settings["timestep_shift"],
        guidance=settings["cfg_text_scale"],
        image_guidance=settings["cfg_img_scale"],
        guidance_interval=tuple(settings["cfg_interval"]),
        renorm="global_batch" if renorm == "global" else renorm,
        renorm_min=settings["cfg_renorm_min"],
    )


def recorded_images(numbers: Tensors) -> dict[str, Image.Image]:
    """The source images of a fixture by the rest of their name, in order."""
    names = re.findall(r"^image_([^_/]+)$", "\n".join(sorted(numbers)), re.M)
    return {name: Image.fromarray(numbers[f"image_{name}"].numpy()) for name in names}


# --- understanding


def understanding(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    images = list(recorded_images(numbers).values())
    for name, case in facts["cases"].items():
        settings = case["settings"]
        shown = [] if name.startswith("text_only") else images if name == "two_images" else images[:1]
        if "understanding_output" in settings:  # the top-level call, which resizes for the autoencoder first
            config = model.config
            shown = [resize(image, config.vae_transform, config.transform_max_pixels) for image in shown]
        told = [Segment("text", text=model.config.think_instruction)] if settings.get("think") else []
        segments = [*told, *(seen_alone(model, image) for image in shown), Segment("text", text=facts["question"])]
        with torch.no_grad():
            context = model.contexts([segments])
        if name == "image_question":
            yield from all_equal({"context_kv_len": int(context.lengths), "context_rope": int(context.position)}, facts)
            for index, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
                for kind, ours in (("key", keys), ("value", values)):
                    recorded = numbers[f"kv/layer_{index}_{kind}"]
                    yield close("keys and values", ours[0, :, : context.used].transpose(0, 1), recorded, 1e-4)
        limit = settings["max_think_token_n"] if "max_think_token_n" in settings else settings["max_length"]
        ids, logits = greedy(model, context, limit, settings.get("end_token_id"))
        yield equal("ids", ids, case["token_ids"], name)
        if "text" in case:
            (written,) = model.write([segments], Decoding(max_tokens=limit), [0])
            yield equal("texts", written.text, case["text"], name)
        if case.get("min_top2_margin") is not None:
            yield close("smallest gap of logits", smallest_gap(logits), case["min_top2_margin"], 1e-4, name)
        if f"{name}/logits" in numbers:
            yield close("logits", logits, numbers[f"{name}/logits"], 1e-4, name)


def seen_alone(model: Bagel, image: Image.Image) -> Segment:
    """An image resized for the understanding encoder alone."""
    config = model.config
    return Segment("seen", image=to_tensor(resize(image, config.vit_transform, config.transform_max_pixels)))


def greedy(model: Bagel, context: Cache, limit: int, stop: int | None = None) -> tuple[list[int], Tensor]:
    """Greedy ids after the context, bos included, and the logits (steps, V) that they were chosen from."""
    logits: list[Tensor] = []
    with torch.no_grad():
        (row,) = model.decode_tokens(context, Decoding(max_tokens=limit), [0], stop=stop, logits_out=logits)
    return row.ids, torch.cat(logits)


def smallest_gap(logits: Tensor) -> Tensor:
    """Between the best and the second logit of a step."""
    return -logits.topk(2).values.diff().max()


# --- SRUM


def srum_reward(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for case in facts:
        name = case["name"]
        pixels = reference_map(case["regional_rewards"], case["global_score"], (case["width"], case["height"]))
        yield close("means of maps", pixels.double().mean(), case["map_mean"], 1e-6, name)
        for key in (key for key in numbers if key.startswith(f"{name}/map")):
            stride = int(key.rsplit("_", 1)[1]) if "_every_" in key else 1
            yield close("maps", pixels[::stride, ::stride], numbers[key], 1e-6, name)
        grid = reference_grid(pixels, tuple(case["grid"]))
        yield close("maps on the latent grid", grid, numbers[f"{name}/latent_grid"], 1e-6, name)


def srum_loss(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    patch, grids = model.config.latent_patch_size, facts["patchified_vae_latent_shapes"]
    sizes = [h * w for h, w in grids]
    bad, good = (
        [x[:, : h * patch, : w * patch] for x, (h, w) in zip(numbers[f"padded_latent_{name}"], grids, strict=True)]
        for name in ("bad", "gt")
    )
    noise, times = numbers["noise"], numbers["packed_timesteps"].sigmoid().split(sizes)
    samples = [
        [Segment("text", text=sample["prompt"]), Segment("noisy", latent=latent, loss=True)]
        for sample, latent in zip(facts["samples"], bad, strict=True)
    ]
    drawn = zip(noise.split(sizes), times, strict=True)
    batch = model.pack(samples, [flow.FlowNoise(eps, t[0].item()) for eps, t in drawn])
    yield from same_sequence(batch, facts, numbers)
    tokens = {name: torch.cat([model.tokens(x) for x in latents]) for name, latents in (("bad", bad), ("gt", good))}
    for name, ours in tokens.items():
        yield close("clean tokens", ours, numbers[f"x0_{name}_tokens"], 1e-6, name)
    maps = zip(numbers["regional_reward_map"], grids, strict=True)
    rewards = torch.cat([reference_grid(pixels, grid).flatten() for pixels, grid in maps])
    yield close("rewards of tokens", rewards, numbers["reward_tokens"], 1e-6)
    v = model.forward(batch).velocity.cpu()
    yield close("velocity", v, numbers["predicted_velocity"], 1e-4)
    targets = {name: flow.velocity_target(x0, noise) for name, x0 in tokens.items()}
    for name, case in facts["cases"].items():
        good_target = targets["gt" if case["separate_good_image"] else "bad"]
        reference = error(v, good_target).mean()
        loss = reference
        if case["reward_map"]:
            weight = case["lambda_constraint"]
            reward = srum_terms(v, targets["bad"], rewards, weight)["reward"].mean()
            loss = reward + srum_terms(v, good_target, rewards, weight)["reference"].mean()
            yield close("losses", reward, case["reward_part"], 1e-4, f"{name} reward_part")
        yield close("losses", reference, case["constraint_part"], 1e-4, f"{name} constraint_part")
        yield close("losses", loss, case["total"], 1e-4, f"{name} total")
        gradients = gradients_of(loss, model.network)
        yield from same_gradients(gradients, case, name)
        if name == next(iter(facts["cases"])):
            yield from recorded_gradients(gradients, numbers)


def srum_loss_pure(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    v, noise, rewards = numbers["v"], numbers["noise"], numbers["reward"]
    bad, good = (flow.velocity_target(numbers[name], noise) for name in ("x0_bad", "x0_gt"))
    yield close("reward part", srum_terms(v, bad, rewards, 0.0)["reward"].mean(), facts["reward_part"], 1e-5)
    yield close("constraint part", error(v, good).mean(), facts["constraint_part"], 1e-5)
    for name in (name for name in facts if name.startswith("total_lambda_")):
        weight = float(name.removeprefix("total_lambda_").replace("p", "."))
        reward, reference = (srum_terms(v, target, rewards, weight) for target in (bad, good))
        yield close("totals", (reward["reward"] + reference["reference"]).mean(), facts[name], 1e-5, name)


def srum_terms(v: Tensor, target: Tensor, reward: Tensor, constraint_weight: float) -> Terms:
    """Eq. 3 by the method's page, of velocities (N, D) with rewards alpha R (N,)."""
    config = SrumConfig(constraint_weight=constraint_weight)
    return Srum().terms(Tokens("image", error(v, target), reward), config)


def error(v: Tensor, target: Tensor) -> Tensor:
    """Squared error of the velocity per token."""
    return (v - target).square().mean(dim=-1)


def srum_parser(model: Bagel, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """The released parsers; where ours reads more or less on purpose is listed in tests/judging/test_replies.py."""
    parsers = {"regions": reference_regions, "global_layout": reference_layout, "sample_level": reference_sample}
    for name, parse in parsers.items():
        for number, case in enumerate(facts[name]):
            fields = json.loads(json.dumps(parse(case["input"])))  # region ids as in the file, where keys are strings
            yield equal("fields of replies", fields, case["output"], f"{name} {number}")
    for number, case in enumerate(facts["convert"]):
        record = reference_record(case["record"], case["prompts"])
        yield equal("training records", record, case["output"], f"{number}")


# --- the folder


Check = Callable[[Any, Facts, Tensors], Iterable[Deviation]]
JSON, TENSORS, BOTH = (".json",), (".safetensors",), (".json", ".safetensors")
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "checkpoint_shapes": (checkpoint, JSON),
    "tokenizer": (tokenizer, JSON),
    "positions": (positions, BOTH),
    "transform_sizes": (transform_sizes, JSON),
    "transforms": (transforms, BOTH),
    "vae": (vae, TENSORS),
    "packing": (packing, BOTH),
    "train_forward": (train_forward, BOTH),
    "t2i": (t2i, BOTH),
    "t2i_batch": (t2i_batch, BOTH),
    "edit": (edit, BOTH),
    "understanding": (understanding, BOTH),
    "srum_reward": (srum_reward, BOTH),
    "srum_loss": (srum_loss, BOTH),
    "srum_loss_pure": (srum_loss_pure, BOTH),
    "srum_parser": (srum_parser, JSON),
}  # fmt: skip
ARCHITECTURES = {  # what a folder of its fixtures has -> the module that compares them; BAGEL's is this one
    "checkpoint/diffusion-decoder": "benchmarks.parity_blip3o",
    "checkpoint/internvl3": "benchmarks.parity_openuni",
    "checkpoint/magvitv2": "benchmarks.parity_showo",
    "checkpoint_hf": "benchmarks.parity_harmon",
}


def checks_of(folder: Path) -> dict[str, tuple[Check, tuple[str, ...]]]:
    """What a folder holds: the fixture of a recipe, which is named as its files are, or all of the architecture whose
    checkpoint it has."""
    from benchmarks import parity_recipes  # which compares as this module does

    recipes: dict[str, Check] = {"reca": parity_recipes.reca, "rvr": parity_recipes.rvr}
    if own := {name: (check, BOTH) for name, check in recipes.items() if (folder / f"{name}.json").exists()}:
        return own
    checks: dict[str, tuple[Check, tuple[str, ...]]] = architecture_of(folder).CHECKS
    return checks


def load(checkpoint: Path, device: str, precision: Precision) -> Bagel:
    """The model of a checkpoint."""
    return Bagel.load(checkpoint, device, precision)


def architecture_of(folder: Path) -> Any:
    """The module that compares what a folder holds of an architecture: its ``CHECKS``, and how it is ``load``ed."""
    marked = next((name for name in ARCHITECTURES if (folder / name).exists()), None)
    return sys.modules[__name__] if marked is None else import_module(ARCHITECTURES[marked])


def compare(folder: Path, fixture: str, model: Any) -> list[Deviation]:
    """All comparisons of a fixture, and a miss for each tensor of its file that none of them used."""
    check, suffixes = checks_of(folder)[fixture]
    facts = json.loads((folder / f"{fixture}.json").read_text()) if ".json" in suffixes else None
    numbers = Tensors(folder / f"{fixture}.safetensors") if ".safetensors" in suffixes else None
    bfloat16 = model.precision == "bf16"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        deviations = list(check(model, facts, numbers))
    if bfloat16:
        return [replace(d, tolerance=BFLOAT16[d.quantity]) for d in deviations if d.quantity in BFLOAT16]
    unread = sorted(numbers.unread) if numbers is not None else []
    return deviations + [Deviation("compared with nothing", name, math.inf, 0.0) for name in unread]


def worst_cases(deviations: Iterable[Deviation]) -> list[Deviation]:
    """The case of each quantity that deviates most."""
    worst: dict[str, Deviation] = {}
    for deviation in deviations:
        quantity = deviation.quantity
        worst[quantity] = max(worst.get(quantity, deviation), deviation, key=lambda d: d.value)
    return list(worst.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 on a miss and on missing and unknown files."""
    from benchmarks import policy_parity  # which is written with what stands here

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, help="the folder of fixtures")
    parser.add_argument("--checkpoint", type=Path, help="the model, where the folder has none and no bagel/ beside it")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="that the network computes in")
    args = parser.parse_args(argv)
    folder = args.golden
    torch.backends.cudnn.allow_tf32 = False  # as torch does by itself in matrix products, not in convolutions
    if not folder.is_dir():
        parser.error(f"{folder} is no folder")
    present = {path.name for path in folder.iterdir()}
    functions = "sde.json" in present  # of policies: numbers without a network
    checks: Mapping[str, tuple[Any, tuple[str, ...]]] = policy_parity.CHECKS if functions else checks_of(folder)
    files = {fixture: {fixture + suffix for suffix in suffixes} for fixture, (_, suffixes) in checks.items()}
    checkpoint = args.checkpoint or folder / "checkpoint"
    if not functions and not checkpoint.is_dir() and not checks.keys() & CHECKS.keys():
        checkpoint = folder.resolve().parent / "bagel" / "checkpoint"
    present |= {"checkpoint"} if checkpoint.is_dir() else set()
    present -= set(ARCHITECTURES)  # a second layout of the checkpoint, which its checks look into
    expected = set[str]().union(*files.values()) | (set() if functions else {"checkpoint"})
    missing, unknown = sorted(expected - present), sorted(present - expected - UNCOMPARED)
    rows: list[tuple[str, Deviation]] = []
    if functions:
        for fixture in checks:
            if files[fixture] <= present:
                rows += [(fixture, worst) for worst in worst_cases(policy_parity.compare(folder, fixture))]
    elif "checkpoint" in present:
        model = architecture_of(folder).load(checkpoint, args.device, args.precision)
        for fixture in checks:
            if files[fixture] <= present:
                rows += [(fixture, worst) for worst in worst_cases(compare(folder, fixture, model))]
    table = Table(
        "fixture",
        "quantity",
        "deviation",
        "tolerance",
        "",
        "largest at",
        title=f"parity with {folder}, {args.device}, {args.precision}",
    )
    for fixture, d in rows:
        numbers = (f"{d.value:.1e}", f"{d.tolerance:.0e}") if d.tolerance else ("equal" if d.passed else "differs", "")
        table.add_row(fixture, d.quantity, *numbers, "" if d.passed else "MISS", d.case if d.value else "")
    console = Console(width=150)
    console.print(table)
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            console.print(f"{what}: {', '.join(names)}")
    misses = sum(not d.passed for _, d in rows)
    console.print(f"{len(rows)} quantities, {misses} beyond their tolerance")
    sys.exit(1 if misses or missing or unknown else 0)


if __name__ == "__main__":
    main()

"""RecA's and RvR's training sequences, losses, gradients and trajectories against recorded ones (benchmarks/parity.py).

Samples and contexts are made as the methods make them: segments, ``Bagel.pack``, ``Bagel.draw``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.parity import (
    Deviation,
    Facts,
    Tensors,
    all_equal,
    allowed,
    close,
    constant_understanding,
    equal,
    errors,
    gradients_of,
    in_sequence,
    is_vit_key_bias,
    noise_of,
    places,
    recorded_gradients,
    relative,
    sampling_of,
)
from srum import flow
from srum.config import RefineConfig
from srum.drawing.refining import refine_context
from srum.models.bagel import Bagel
from srum.models.bagel.config import ResizeLimits
from srum.models.bagel.images import resize, to_tensor
from srum.models.bagel.sequence import Batch
from srum.models.base import (
    REFINE_SYSTEM,
    REFINE_SYSTEM_RELEASED,
    REFINE_USER,
    Sampling,
    Segment,
    without_images,
    without_text,
)

NORMS = 1e-5  # relative tolerance of gradient norms


def reca(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """RecA: [seen][template][noisy: the same image], two freezings, the ablation's layout, reconstructions."""
    side = facts["vit_transform"]["max_image_size"]
    limits = ResizeLimits(**facts["vit_transform"])
    samples = []
    for number, facts_of in enumerate(facts["samples"]):
        image, name = Image.fromarray(numbers[facts_of["image"]].numpy()), f"sample {number}"
        seen = resize(image, limits, model.config.transform_max_pixels)
        yield close("seen pixels", to_tensor(seen), numbers[f"vit_pixels_{number}"], 1e-6, name)
        yield close("clean latents", model.encode([image])[0], numbers[f"latent_{number}"], 2e-5, name)
        yield equal("template ids", model.tokenizer.encode(facts_of["text"]), facts_of["text_ids"], name)
        samples.append(
            [
                Segment("seen", image=image, side=side),
                Segment("text", text=facts_of["text"], droppable=True, dropped=facts_of["text_dropped"]),
                Segment("noisy", latent=numbers[f"latent_{number}"], loss=True),
            ]
        )
    yield from same_plans(model, samples, facts["samples"])
    batch, squared, _ = yield from training(model, samples, facts, numbers)
    yield close("losses", squared.mean(), facts["loss"], 1e-4)
    of_samples = squared.split([len(own) for own in loss_tokens_of(batch)])
    for number, own in enumerate(of_samples):
        yield close("losses", own.mean(), facts["loss_per_sample"][number], 1e-4, f"sample {number}")
    yield from freezings(model, batch, facts["cases"], numbers)
    first = facts["vae_condition"]
    image = Image.fromarray(numbers[first["image"]].numpy())
    clean = Segment("clean", latent=model.encode([image])[0])
    ablation = [[clean, Segment("text", text=first["text"]), samples[0][2]]]
    yield from same_layout(packed_with(model, ablation, numbers, "vae_condition/"), numbers, "vae_condition/")
    for name, case in facts["reconstruction"].items():
        source = model.resized(Image.fromarray(numbers[case["image"]].numpy()))
        context = [Segment("seen", image=source, side=side), Segment("text", text=case["text"], droppable=True)]
        seen = resize(source, limits, model.config.transform_max_pixels)
        yield from trajectory(model, context, case, seen, numbers, f"reconstruction/{name}")


def rvr(model: Bagel, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """RvR: [SYSTEM][seen][USER][noisy], conversations and text to image in one pack; its contexts and trajectories."""
    texts = facts["prompts"]
    ours = {"train_system": REFINE_SYSTEM, "inference_system": REFINE_SYSTEM_RELEASED}
    yield from all_equal(ours | {"train_user": REFINE_USER.format(prompt="{user_prompt}")}, texts)
    for name, ids in facts["prompt_ids"].items():
        yield equal("prompt ids", model.tokenizer.encode(texts[name]), ids, name)
    samples = [rvr_sample(model, facts, numbers, number) for number in range(len(facts["samples"]))]
    limits = ResizeLimits(**facts["vit_transform_train"])
    for number, facts_of in enumerate(facts["samples"]):
        for key, target in (("misaligned", "vit_pixels"), ("aligned", "latent"), ("image", "")):
            if key in facts_of:
                yield from same_source(model, numbers, limits, f"image_{facts_of[key]}", target, number)
    yield from same_plans(model, samples, facts["samples"])
    _, squared, ce = yield from training(model, samples, facts, numbers)
    loss = facts["ce_weight"] * ce.mean() + facts["mse_weight"] * squared.mean()
    for name, value in {"loss": loss, "mse": squared.mean(), "ce": ce.mean()}.items():
        yield close("losses", value, facts[name], 1e-4, name)
    gradients = gradients_of(loss, model.network)
    yield from same_norms(gradients, facts, "all weights")
    yield from recorded_gradients(gradients, numbers)
    first = samples[0]
    with_vae = [first[0], Segment("clean", latent=model.encode([of_first(facts, numbers)])[0]), *first[1:]]
    changes = {
        "with_vae": with_vae,
        "image_dropped": [first[0], replace(first[1], dropped=True), *first[2:]],
        "prompt_dropped": [*first[:2], replace(first[2], dropped=True), first[3]],
    }
    for name in facts["layouts"]["names"]:
        prefix = f"layout/{name}/"
        yield from same_layout(packed_with(model, [changes[name]], numbers, prefix), numbers, prefix)
    previous = ""
    for name, case in facts["inference"].items():
        source = f"inference/{previous}/image_uint8" if case["image"] == "previous" else case["image"]
        image = Image.fromarray(numbers[source].numpy())
        way = "regenerate_clean" if case["with_vae"] else "regenerate"
        config = RefineConfig(system=texts[case["system"]], way=way)
        context = refine_context(model, image, case["prompt"], config)
        yield equal("user texts", context[-1].text, case["user_text"], name)
        seen = resize(model.resized(image), model.config.vit_transform, model.config.transform_max_pixels)
        yield from trajectory(model, context, case, seen, numbers, f"inference/{name}")
        previous = name


def rvr_sample(model: Bagel, facts: Facts, numbers: Tensors, number: int) -> list[Segment]:
    """The segments of a sample of any of the three kinds."""
    case = facts["samples"][number]
    seen = Segment("seen", image=numbers[f"vit_pixels_{number}"]) if f"vit_pixels_{number}" in numbers else None
    noisy = Segment("noisy", latent=numbers[f"latent_{number}"], loss=True) if f"latent_{number}" in numbers else None
    if case["kind"] == "vlm":
        assert seen is not None
        return [seen, Segment("text", text=case["question"]), Segment("text", text=case["answer"], loss=True)]
    assert noisy is not None
    if case["kind"] == "t2i":
        return [Segment("text", text=case["prompt"], droppable=True), noisy]
    assert seen is not None
    user = facts["prompts"]["train_user"].format(user_prompt=case["prompt"])
    return [Segment("text", text=facts["prompts"]["train_system"]), seen, Segment("text", text=user), noisy]


def same_source(
    model: Bagel, numbers: Tensors, limits: ResizeLimits, image_name: str, target: str, number: int
) -> Iterator[Deviation]:
    """What is made of a source image: pixels that are seen, or the latent; of an unnamed target whichever there is."""
    image = Image.fromarray(numbers[image_name].numpy())
    if target in ("", "vit_pixels") and f"vit_pixels_{number}" in numbers:
        pixels = to_tensor(resize(image, limits, model.config.transform_max_pixels))
        yield close("seen pixels", pixels, numbers[f"vit_pixels_{number}"], 1e-6, image_name)
    if target in ("", "latent") and f"latent_{number}" in numbers:
        yield close("clean latents", model.encode([image])[0], numbers[f"latent_{number}"], 2e-5, image_name)


def of_first(facts: Facts, numbers: Tensors) -> Image.Image:
    """The misaligned image of the first sample."""
    return Image.fromarray(numbers[f"image_{facts['samples'][0]['misaligned']}"].numpy())


# --- training


def same_plans(model: Bagel, samples: Sequence[Sequence[Segment]], recorded: Sequence[Facts]) -> Iterator[Deviation]:
    """The segments of samples: kinds, flags, lengths, ids."""
    kinds = {"text": "text", "seen": "vit_image", "noisy": "vae_image", "clean": "vae_image"}
    for number, (sample, case) in enumerate(zip(samples, recorded, strict=True)):
        name = f"sample {number}"
        yield equal("lengths", model.length(sample), case["length"], name)
        plan = case.get("plan") or case["splits"]
        theirs = [(part.get("type", part.get("kind")), part["droppable"], part["loss"]) for part in plan]
        yield equal("plans", [(kinds[s.kind], s.droppable, s.loss) for s in sample], theirs, name)
        for segment, part in zip(sample, plan, strict=True):
            if "ids" in part:
                yield equal("text ids", model.tokenizer.encode(segment.text or ""), part["ids"], name)


def training(model: Bagel, samples: Sequence[Sequence[Segment]], facts: Facts, numbers: Tensors) -> Iterator[Any]:
    """The pack: its sequence, velocities and errors. Returns it, squared errors (N, D), cross-entropies (M,)."""
    times = flow.shift_timestep(numbers["packed_timesteps"].sigmoid(), facts["timestep_shift"])
    yield close("timesteps", times, numbers["timesteps"], 1e-6)
    batch = packed_with(model, samples, numbers, "", times)
    yield from same_layout(batch, numbers, "")
    yield equal("sample_lens", batch.layout.present.sum(1), facts["sample_lens"])
    counts = {"n_mse_tokens": len(batch.loss_tokens), "n_ce_tokens": len(batch.labels)}
    yield from all_equal({name: count for name, count in counts.items() if name in facts}, facts)
    out = model.forward(batch)
    squared, ce = errors(out, out.target)
    yield close("velocity", out.velocity, numbers["predicted_velocity"], 1e-4)
    yield close("squared errors", squared, numbers["mse_per_token"], 2e-4)
    if "ce_per_token" in numbers:
        yield close("cross-entropies", ce, numbers["ce_per_token"], 2e-4)
        yield close("weights of the cross-entropies", batch.ce_weights, numbers["ce_loss_weights"], 1e-6)
    return batch, squared, ce


def packed_with(
    model: Bagel, samples: Sequence[Sequence[Segment]], numbers: Tensors, prefix: str, times: Tensor | None = None
) -> Batch:
    """The samples as ``Bagel.pack`` packs them, with the recorded noise; a layout alone with none."""
    corruptions, used = [], 0
    if times is None:
        raw = numbers[f"{prefix}packed_timesteps"]
        times = torch.where(raw.isinf(), 0.0, raw.sigmoid())
    for segment in (s for sample in samples for s in sample if s.kind in ("clean", "noisy")):
        assert segment.latent is not None
        count = len(model.tokens(segment.latent))
        if segment.kind == "noisy":
            shape = (count, model.config.latent_dim)
            noise = torch.zeros(shape) if prefix else numbers["noise"][used : used + count]
            corruptions.append(flow.FlowNoise(noise, times[used].item()))
        used += count
    return model.pack(samples, corruptions)


def loss_tokens_of(batch: Batch) -> list[Tensor]:
    """The latent tokens with a loss, by segment."""
    return list(batch.loss_tokens.split(torch.bincount(batch.image_segment).tolist()))


def same_layout(batch: Batch, numbers: Tensors, prefix: str) -> Iterator[Deviation]:
    """The index lists and the mask, those that are recorded."""
    place, seen = places(batch), batch.patch_present
    ours = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": place["text"],
        "packed_vae_token_indexes": place["latent"],
        "packed_position_ids": in_sequence(batch, batch.layout.positions),
        "packed_latent_position_ids": batch.latent_ids,
        "mse_loss_indexes": place["latent"][batch.loss_tokens],
        "packed_vit_token_indexes": place["seen"],
        "packed_vit_position_ids": batch.patch_ids[seen],
        "vit_token_seqlens": seen.sum(1),
        "packed_label_ids": batch.labels,
        "ce_loss_indexes": place["text"][batch.ce_tokens],
        "attention_allowed": allowed(batch).long(),
    }
    for name, value in ours.items():
        if prefix + name in numbers:
            yield equal(name, value, numbers[prefix + name], prefix)
        else:
            yield equal("tokens of a kind that there is none of", len(value), 0, prefix + name)


def freezings(model: Bagel, batch: Batch, cases: Mapping[str, Facts], numbers: Tensors) -> Iterator[Deviation]:
    """Gradients of all weights; of the generation side, true as ours are, and cut as the released code cuts them."""
    own = {name for name, _ in model.generation_parameters()}

    def gradients() -> dict[str, Tensor]:
        out = model.forward(batch)
        return gradients_of(errors(out, out.target)[0].mean(), model.network)

    true = gradients()
    with constant_understanding(model):
        cut = gradients()
    of_generation = [{name: g for name, g in these.items() if name in own} for these in (true, cut)]
    named = {"all_weights": true, "generation_only_true_gradient": of_generation[0]}
    for name, these in (named | {"released_freeze_und": of_generation[1]}).items():
        yield from same_norms(these, cases[name], name)
    for prefix, these in zip(("grad_true/", "grad_detached/"), of_generation, strict=True):
        for key in (key for key in numbers if key.startswith(prefix)):
            yield close("gradients", these[key.removeprefix(prefix)], numbers[key], 1e-4, key)


def same_norms(gradients: Mapping[str, Tensor], recorded: Facts, case: str) -> Iterator[Deviation]:
    """The total norm, and those of single parameters where they are recorded."""
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    yield relative("total gradient norms", total, recorded["total_grad_norm"], NORMS, case)
    norms = {n: value for n, value in recorded.get("grad_norms", {}).items() if value and not is_vit_key_bias(n)}
    if norms:
        yield equal("parameters with a gradient", sorted(gradients), sorted(norms), case)
    for name in norms.keys() & gradients.keys():
        ours = gradients[name].double().norm().item()
        yield relative("gradient norms", ours, norms[name], 10 * NORMS, f"{case} {name}")


# --- drawing


def trajectory(
    model: Bagel, context: Sequence[Segment], case: Facts, seen: Image.Image, numbers: Tensors, prefix: str
) -> Iterator[Deviation]:
    """The three contexts, and the image with all that is recorded on the way."""
    h, w = case["size_hw"]
    branches = {"full": list(context), "no_text": without_text(context), "no_image": without_images(context)}
    sampling = sampling_of(case["settings"])
    for name, branch in branches.items():
        if name not in case["contexts"]:
            continue
        with torch.no_grad():
            cache = model.contexts([branch])
        ours = {"kv_len": int(cache.lengths), "next_position": int(cache.position)}
        yield from all_equal(ours, case["contexts"][name], f"{prefix} {name}")
        if f"{prefix}/first_velocity_{name}" in numbers:
            velocity = first_velocity(model, branch, numbers[f"{prefix}/initial_noise"], (h, w), sampling)
            yield close("first velocities", velocity, numbers[f"{prefix}/first_velocity_{name}"], 1e-4, prefix)
    if f"{prefix}/seen_pixels" in numbers:
        yield close("seen pixels", to_tensor(seen), numbers[f"{prefix}/seen_pixels"], 1e-6, prefix)
    with noise_of(model, [numbers[f"{prefix}/initial_noise"]]):
        (made,) = model.draw([context], sampling, [0], sizes=[(h, w)], path=True)
    assert made.path is not None
    yield close("timesteps", made.path.timesteps, torch.tensor(case["timesteps"]), 1e-6, prefix)
    for name, latents in (("x_t", made.path.states), ("v_t", made.path.velocities)):
        if f"{prefix}/{name}" in numbers:
            values = torch.stack([model.tokens(latent) for latent in latents])
            yield close(name, values, numbers[f"{prefix}/{name}"], 1e-4, prefix)
    yield close("final latents", model.tokens(made.latent), numbers[f"{prefix}/final_latent"], 1e-4, prefix)
    pixels = torch.from_numpy(np.array(made.image))
    yield close("pixels, in levels of 255", pixels, numbers[f"{prefix}/image_uint8"], 1.0, prefix)


def first_velocity(
    model: Bagel, context: Sequence[Segment], noise: Tensor, size: tuple[int, int], sampling: Sampling
) -> Tensor:
    """The velocity of the first step after one context, unguided."""
    alone = replace(sampling, guidance=1.0, image_guidance=1.0)
    with noise_of(model, [noise]):
        (made,) = model.draw([context], alone, [0], sizes=[size], path=True)
    assert made.path is not None
    return model.tokens(made.path.velocities[0])

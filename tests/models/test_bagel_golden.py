"""BAGEL against numbers recorded from the reference at toy size (tests/golden/bagel/README.md gives the tolerances)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from srum.models.bagel import Bagel
from srum.models.bagel import images as pictures
from srum.models.bagel.positions import grid_ids, interpolated_grid_ids, rotary, sincos_table, timestep_sinusoid
from srum.models.bagel.sequence import Batch, Span, Split, lay_out, visibility
from srum.models.base import Decoding, Sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "bagel"


def numbers(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def facts(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.load(GOLDEN / "checkpoint")


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs.float()).abs().max().item() <= tolerance


# -------------------------------------------------------------------- positions, transforms, tokenizer, autoencoder


def test_position_tables(model: Bagel) -> None:
    golden = numbers("positions")
    for name, side in (("latent_pos_embed", 8), ("vit_pos_embed", 8)):
        close(sincos_table(side, 64), golden[name], 1e-6)
    for name, side in (("official_latent64", 64), ("official_vit70", 70)):
        close(sincos_table(side, 3584)[golden[name + "_rows"]], golden[name + "_values"], 1e-6)
    for key in golden:
        if key.startswith(("extrapolate", "interpolate")):
            rule, size, patch, side = key.split("_")
            h, w = (int(x) // int(patch[1:]) for x in size.split("x"))
            ids = grid_ids if rule == "extrapolate" else interpolated_grid_ids
            assert ids((h, w), int(side[1:])).tolist() == golden[key].tolist(), key
    close(timestep_sinusoid(golden["timesteps"]), golden["timestep_sinusoid"], 1e-6)
    close(model.network.time_embedder(golden["timesteps"]), golden["timestep_embedding"], 1e-5)
    cos, sin = rotary(golden["rope_positions"], 16, 1e6)
    close(cos, golden["rope_cos"], 1e-6)
    close(sin, golden["rope_sin"], 1e-6)


def test_resized_pixels(model: Bagel) -> None:
    golden = numbers("transforms")
    limit = model.config.transform_max_pixels
    for name in "ab":
        image = Image.fromarray(golden[f"image_{name}"].numpy())
        seen = pictures.resize(image, model.config.vit_transform, limit)
        small = pictures.resize(image, model.config.vae_transform, limit)
        close(pictures.to_tensor(small), golden[f"vae_{name}"], 1e-6)
        close(pictures.to_tensor(seen), golden[f"vit_{name}"], 1e-6)
        close(pictures.patchify(pictures.to_tensor(seen), 14), golden[f"vit_patches_{name}"], 1e-6)
        again = pictures.to_tensor(pictures.resize(small, model.config.vit_transform, limit))
        close(again, golden[f"vit_after_vae_{name}"], 1e-6)


def test_tokenizer(model: Bagel) -> None:
    for case in facts("tokenizer"):
        assert model.tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]


def test_autoencoder(model: Bagel) -> None:
    golden = numbers("vae")
    moments = model.autoencoder.encode(golden["image"]).latent_dist.parameters
    close(moments, golden["encoder_moments"], 2e-5)
    from srum.models.bagel.autoencoder import decode_latents, encode_mean

    close(encode_mean(model.autoencoder, golden["image"]), golden["latent_mean_scaled"], 2e-5)
    close(decode_latents(model.autoencoder, golden["latent_mean_scaled"]), golden["decoded"], 2e-5)
    close(decode_latents(model.autoencoder, golden["latent_random"]), golden["decoded_random"], 2e-5)


# -------------------------------------------------------------------- packing


def packed(batch: Batch, stream: str) -> torch.Tensor:
    """Positions of a stream's tokens in the packed sequence."""
    lengths = batch.layout.present.sum(1)
    place = (lengths.cumsum(0) - lengths)[batch.row] + batch.column
    texts, seen = len(batch.text_ids), int(batch.patch_present.sum())
    parts = {"text": place[:texts], "seen": place[texts : texts + seen], "gen": place[texts + seen :], "all": place}
    return parts[stream]


def in_order(batch: Batch, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    """[und; gen] rows in packed order."""
    return torch.cat([und, gen])[packed(batch, "all").argsort()]


def golden_split(model: Bagel, plan: dict, dropped: dict) -> Split:
    """One entry of a packing plan."""
    kinds = {"text": "text", "vit_image": "vit", "vae_image": "vae"}
    kind = kinds[plan["type"]]
    drop = bool(plan["enable_cfg"]) and dropped.get(kind, 0) == 1.0
    if kind == "text":
        label = plan["special_token_label"] if plan["special_token_loss"] else None
        ids = (model.bos, *plan["ids"], model.eos)
        return Split(kind="text", ids=ids, loss=bool(plan["loss"]), dropped=drop, end_label=label)
    patch = 14 if kind == "vit" else 16
    h, w = (x // patch for x in plan["image_hw"])
    if kind == "vit":
        return Split(kind="seen", patches=torch.zeros(h * w, 588), grid=(h, w), dropped=drop)
    delta = plan.get("frame_delta", 0 if "split_start" in plan else None)
    return Split(
        kind="noisy" if plan["loss"] else "clean", tokens=torch.zeros(h * w, 64), grid=(h, w), dropped=drop,
        loss=bool(plan["loss"]), frame_delta=delta, continues=not plan.get("split_start", True),
    )  # fmt: skip


@pytest.mark.parametrize("case", facts("packing")["cases"], ids=lambda c: c["name"])
def test_packing(model: Bagel, case: dict) -> None:
    splits = [golden_split(model, plan, case["dropped_probabilities"]) for plan in case["plan"]]
    batch = lay_out([splits], model.markers, patch_side=8, latent_side=8, dims=(588, 64))
    assert batch.layout.present.shape[1] == case["sample_len"]
    order = packed(batch, "all").argsort()
    assert batch.layout.positions[order].tolist() == case["position_ids"]
    assert batch.text_ids.tolist() == case["text_ids"]
    assert packed(batch, "text").tolist() == case["text_indexes"]
    assert packed(batch, "seen").tolist() == case["vit_token_indexes"]
    assert packed(batch, "gen").tolist() == case["vae_token_indexes"]
    assert packed(batch, "gen")[batch.loss_tokens].tolist() == case["mse_loss_indexes"]
    assert packed(batch, "text")[batch.ce_tokens].tolist() == case["ce_loss_indexes"]
    assert batch.labels.tolist() == case["label_ids"]
    assert batch.ce_weights.tolist() == pytest.approx(case["ce_loss_weights"])
    allowed = numbers("packing")[case["name"] + "/attention_allowed"].bool()
    assert torch.equal(batch.layout.visible[0, 0], allowed)


@pytest.mark.parametrize("case", facts("packing")["masks"], ids=lambda c: c["name"])
def test_visibility(case: dict) -> None:
    spans = [[Span(n, mode) for n, mode in zip(case["split_lens"], case["modes"], strict=True)]]
    mask = visibility(spans, sum(case["split_lens"]))[0]
    assert torch.equal(mask, numbers("packing")[case["name"]].bool())


# -------------------------------------------------------------------- the training forward pass


def training_batch(model: Bagel, golden: dict, shift: float) -> tuple[Batch, torch.Tensor]:
    """The recorded batch of five samples, and the velocity targets of its loss tokens."""
    latents = iter(golden["padded_latent"])
    seen = iter([golden["vit_image_understanding"], golden["vit_image_edit"]])
    draws, noise = torch.sigmoid(golden["packed_timesteps"]), golden["noise"]
    draws = shift * draws / (1 + (shift - 1) * draws)
    samples, targets, used = [], [], 0
    for sample in facts("train_forward")["samples"]:
        splits = []
        for s in sample["splits"]:
            if s["kind"] == "text" and s.get("dropped"):
                continue
            if s["kind"] == "text":
                splits.append(Split(kind="text", ids=(model.bos, *s["ids"], model.eos), loss=bool(s["loss"])))
            elif s["kind"] == "vit_image":
                splits.append(model._seen(next(seen)))
            else:
                h, w = s["grid"]
                clean = model.tokens(next(latents)[:, : 2 * h, : 2 * w])
                e, t = noise[used : used + h * w], draws[used].item()
                used += h * w
                kind = "noisy" if s["loss"] else "clean"
                splits.append(Split(kind=kind, tokens=(1 - t) * clean + t * e, grid=(h, w), t=t, loss=bool(s["loss"])))
                targets += [e - clean] if s["loss"] else []
        samples.append(splits)
    return model._lay_out(samples, None), torch.cat(targets)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_train_forward(model: Bagel, shift: float) -> None:
    golden, expected = numbers("train_forward"), facts("train_forward")[f"shift_{shift:.0f}"]
    suffix = "" if shift == 1.0 else "_shift3"
    batch, target = training_batch(model, golden, shift)
    assert batch.text_ids.tolist() == golden["packed_text_ids"].tolist()
    order = packed(batch, "all").argsort()
    assert batch.layout.positions[order].tolist() == golden["packed_position_ids"].tolist()
    model.network.zero_grad()
    out = model.velocity(batch)
    close(out.velocity, golden["predicted_velocity" + suffix], 1e-4)
    squared = (out.velocity - target).square()
    close(squared, golden["mse_per_token" + suffix], 2e-4)
    ce = torch.nn.functional.cross_entropy(out.logits, out.labels, reduction="none")
    close(ce, golden["ce_per_token"], 2e-4)
    close(out.logits, golden["text_logits"], 1e-4)
    loss = squared.mean() + ce.mean()
    assert loss.item() == pytest.approx(expected["total"], abs=1e-4)
    loss.backward()
    if shift == 1.0:
        for name, norm in expected["grad_norms"].items():
            grad = model.network.get_parameter(name).grad
            if norm is None:
                assert grad is None, name
            elif not ("vision_model" in name and name.endswith("k_proj.bias")):
                assert grad is not None and grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
        for key in golden:
            if key.startswith("grad/"):
                close(model.network.get_parameter(key[5:]).grad, golden[key], 1e-4)


def test_layer_outputs(model: Bagel) -> None:
    golden = numbers("train_forward")
    batch, _ = training_batch(model, golden, 1.0)
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: states.append(in_order(batch, *out)))
        for layer in model.network.decoder.layers
    ]
    und, gen = model.embed(batch)
    close(in_order(batch, und, gen), golden["lm_input"], 1e-4)
    close(in_order(batch, *model.network.decoder(und, gen, batch.layout)), golden["last_hidden_state"], 1e-4)
    for i, state in enumerate(states):
        close(state, golden[f"layer_{i}_output"], 1e-4)
    for hook in hooks:
        hook.remove()


# -------------------------------------------------------------------- images


def sampling_of(settings: dict) -> Sampling:
    renorm = settings.get("cfg_renorm_type", "global")
    return Sampling(
        size=tuple(settings["image_shapes"]),
        timesteps=settings["num_timesteps"],
        timestep_shift=settings["timestep_shift"],
        guidance=settings["cfg_text_scale"],
        image_guidance=settings["cfg_img_scale"],
        guidance_interval=tuple(settings["cfg_interval"]),
        renorm="global_batch" if renorm == "global" else renorm,
        renorm_min=settings["cfg_renorm_min"],
    )


@pytest.mark.parametrize("name", list(facts("t2i")["cases"]))
def test_text_to_image(model: Bagel, name: str) -> None:
    golden, recorded = numbers("t2i"), facts("t2i")
    case = recorded["cases"][name]
    with torch.no_grad():
        contexts, _ = model.generation_contexts([recorded["prompt"]], None, [0])
        if case["settings"].get("think"):
            full = model.empty_context(1)
            model.add_text(full, [model.config.plan_instruction])
            contexts[1] = full.select([0])
            model.add_text(full, [recorded["prompt"]])
            ids = model.decode_ids(full, Decoding(max_tokens=case["settings"]["max_think_token_n"]))
            assert ids == case["generated_token_ids"]
            thought = model._reply(ids[0])
            assert [thought] == case["texts"]
            model.add_text(full, [thought])
            contexts[0] = full
        sampling = sampling_of(case["settings"])
        latent = model.denoise(contexts, [golden["initial_noise"]], [sampling.size], sampling)[0]
    close(latent, golden[f"{name}/final_latent"], 1e-4)
    image = model.decode([pictures.tokens_to_latent(latent, model.latent_grid(sampling.size), 2)])[0]
    difference = np.asarray(image).astype(int) - golden[f"{name}/image_uint8"].numpy().astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("renorm", ["channel", "global"])
def test_text_to_image_batch(model: Bagel, renorm: str) -> None:
    golden, recorded = numbers("t2i_batch"), facts("t2i_batch")
    sampling = Sampling(
        size=tuple(recorded["image_shape_hw"]),
        timesteps=recorded["num_timesteps"],
        timestep_shift=recorded["timestep_shift"],
        guidance=recorded["cfg_text_scale"],
        guidance_interval=tuple(recorded["cfg_interval"]),
        renorm="global_batch" if renorm == "global" else "channel",
    )
    with torch.no_grad():
        contexts, _ = model.generation_contexts(recorded["prompts"], None, [0, 0])
        noise = list(golden["initial_noise"].split(24))
        latents = model.denoise(contexts, noise, [sampling.size] * 2, sampling)
    for i, latent in enumerate(latents):
        close(latent, golden[f"{renorm}/final_latent_{i}"], 1e-4)


# -------------------------------------------------------------------- understanding


@pytest.mark.parametrize("name", list(facts("understanding")["cases"]))
def test_understanding(model: Bagel, name: str) -> None:
    golden, recorded = numbers("understanding"), facts("understanding")
    case = recorded["cases"][name]
    settings = case["settings"]
    images = [Image.fromarray(golden[f"image_{x}"].numpy()) for x in "ab"]
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        context = model.empty_context(1)
        if settings.get("think"):
            model.add_text(context, [model.config.think_instruction])
        if not name.startswith("text_only"):
            count = 2 if name == "two_images" else 1
            for image in images[:count]:
                model.add_seen(context, [image if name == "chat_path_no_vae_resize" else model._resized(image)])
        model.add_text(context, [recorded["question"]])
        if name == "image_question":
            assert context.lengths.tolist() == [recorded["context_kv_len"]]
            assert context.position.tolist() == [recorded["context_rope"]]
            for i, (k, v) in enumerate(zip(context.keys, context.values, strict=True)):
                used = context.used
                close(k[0, :, :used].transpose(0, 1), golden[f"kv/layer_{i}_key"], 1e-4)
                close(v[0, :, :used].transpose(0, 1), golden[f"kv/layer_{i}_value"], 1e-4)
        limit = settings.get("max_think_token_n") or settings["max_length"]
        decoding = Decoding(max_tokens=limit)
        ids = model.decode_ids(context, decoding, stop=settings.get("end_token_id"), logits_out=logits)
    assert ids == [case["token_ids"]]
    if "text" in case:
        assert model._reply(ids[0]) == case["text"]
    if f"{name}/logits" in golden:
        close(torch.cat(logits), golden[f"{name}/logits"][: len(logits)], 1e-4)

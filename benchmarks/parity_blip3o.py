"""BLIP3-o's part of ``benchmarks/parity.py``: every quantity of a folder of fixtures such as tests/golden/blip3o."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.parity import BOTH, JSON, TENSORS, Check, Deviation, Facts, Tensors, close, equal, relative
from srum.errors import ModelError
from srum.flow import FlowNoise
from srum.geometry import clip_box, coverage, scale_box
from srum.models.base import FlowForward, Sampling, Segment
from srum.models.blip3o import Blip3o, chat
from srum.models.blip3o.checkpoint import GENERATOR, check, official_name
from srum.models.blip3o.config import HEAD_WIDTH, Blip3oConfig, raw_overrides, read_sizes
from srum.models.blip3o.images import patches, seen_size
from srum.models.blip3o.model import DEFAULTS
from srum.models.checkpoints import Headers
from srum.models.pixels import cropped, normalised
from srum.models.precision import Precision
from srum.models.queries.generator import ticks, timestep
from srum.models.queries.language import Rows, flattened, joined
from srum.models.queries.sampler import even_schedule
from srum.train.methods.srum import Srum, SrumConfig
from srum.train.objective import Tokens

VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14}
PUBLISHED: dict[str, dict[str, Any]] = {  # docs/specs/blip3o.md, 1
    "8b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"intermediate_size": 18944, "tie_word_embeddings": False, "vision_config": VISION | {"out_hidden_size": 3584}},
    "4b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"intermediate_size": 11008, "tie_word_embeddings": True, "vision_config": VISION | {"out_hidden_size": 2048}},
}
COMMON = {"vocab_size": 151668, "n_query": 64, "gen_pooling": "early_pool2d_4"}
COMMON |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}


def load(checkpoint: Path, device: str, precision: Precision) -> Blip3o:
    """The model of a folder of fixtures."""
    return Blip3o.load(checkpoint, device, precision)


def prompt(text: str) -> list[Segment]:
    return [Segment("text", text=text, droppable=True)]


# --- the checkpoint and what stands before the networks


def checkpoint(model: Blip3o, shapes: Facts, _: Tensors) -> Iterator[Deviation]:
    """The folder loads by the strict rule, and a saved one has the same files, names, shapes and numbers."""
    here = {name: list(shape) for name, shape in model.headers.shapes.items()}
    yield equal("names and shapes of the tensors", here, shapes)
    fixed = raw_overrides(model.folder)
    ids = {token: model.tokenizer.convert_tokens_to_ids(token) for token in fixed["token_ids"]}
    yield equal("special tokens", ids, fixed["token_ids"])
    sizes = model.config.transformer
    ours = [sizes.channels, sizes.width, sizes.layers, sizes.heads, sizes.kv_heads, model.config.grid]
    names = ("in_channels", "dim", "n_layers", "n_heads", "n_kv_heads", "input_size")
    yield equal("sizes of the transformer", ours, [fixed["dit"][name] for name in names])
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        model.save(folder)
        saved, official = (
            {str(path.relative_to(x)): path for path in Path(x).rglob("*") if path.is_file()}
            for x in (folder, model.folder)
        )
        yield equal("files of a saved checkpoint", saved.keys(), official.keys())
        for name, path in official.items():
            if path.suffix == ".safetensors":
                ours_, theirs = load_file(saved[name]), load_file(path)
                yield equal("saved tensors, their names", ours_.keys(), theirs.keys(), name)
                same = (torch.equal(ours_[key], value) for key, value in theirs.items())
                yield equal("saved tensors, bit for bit", all(same), True, name)
            elif path.suffix == ".json":
                written, read = (json.loads(x.read_text()) for x in (saved[name], path))
                yield equal("saved configs", written, read, name)


def published(size: str) -> Check:
    """The tensors of the published sizes: that they, and no others, are what a config of that size asks for."""

    def shapes(model: Blip3o, facts: Facts, _: Tensors) -> Iterator[Deviation]:
        headers = Headers({}, {}, Counter())
        for name, entry in facts.items():
            for number in range(entry["count"]):
                headers.shapes[name.replace("{i}", str(number))] = tuple(entry["shape"])
        raw = COMMON | PUBLISHED[size]
        config = read_sizes(Path(size), raw, headers, HEAD_WIDTH)
        try:
            check(Path(size), config, headers)
            fault = ""
        except ModelError as error:
            fault = str(error)
        yield equal("strict load of the published names and shapes", fault, "")
        yield equal("what is refused without one of them", _refused(size, config, headers), True)

    return shapes


def _refused(size: str, config: Blip3oConfig, headers: Headers) -> bool:
    less = {name: shape for name, shape in headers.shapes.items() if name != "model.norm.weight"}
    try:
        check(Path(size), config, replace(headers, shapes=less))
    except ModelError as error:
        return "model.norm.weight" in str(error)
    return False


def tokens(model: Blip3o, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    ids = {token: model.tokenizer.convert_tokens_to_ids(token) for token in facts["special_ids"]}
    yield equal("special tokens", ids, facts["special_ids"])
    yield equal("size of the vocabulary", model.config.qwen.text_config.vocab_size, facts["vocab_size"])
    yield equal("ids of the blank prompt", list(model.ids(chat.BLANK)), facts["blank_ids"])
    for case in facts["cases"]:
        (text,) = chat.requested(prompt(case["prompt"]), lambda segment: segment.text or "")
        name = case["prompt"][:20]
        yield equal("text of a request", text, case["inference_text"] + chat.IMAGE, name)
        image = model.tokenizer.convert_tokens_to_ids(chat.IMAGE)
        yield equal("ids of a request", list(model.ids(str(text))), [*case["inference_ids"], image], name)
        (closed,) = chat.requested(prompt(case["prompt"]), lambda segment: segment.text or "", closed=True)
        whole = list(model.ids(str(closed)))
        yield equal("ids of a request in training", whole, [*case["training_ids"], image], name)
        yield equal("labels of a request in training", labelled(model, whole)[:-1], case["training_labels"], name)


def labelled(model: Blip3o, ids: Sequence[int]) -> list[int]:
    """The authors' labels, which their loss throws away: the ids from the assistant's turn on."""
    start = len(ids) - ids[::-1].index(model.tokenizer.convert_tokens_to_ids("<|im_start|>")) - 1
    return [-100] * start + list(ids[start:])


def resize(model: Blip3o, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """Sizes at which images are seen; the reference also refuses images of less than 28 pixels a side, which we see."""
    for case in facts:
        size = (case["height"], case["width"])
        if "resized" in case:
            yield equal("sizes", list(seen_size(size, 28)), case["resized"], str(size))
        elif max(size) > 200 * min(size):
            yield equal("images that are refused", _is_refused(size), True, str(size))


def _is_refused(size: tuple[int, int]) -> bool:
    try:
        seen_size(size, 28)
    except ModelError:
        return True
    return False


def grounding(model: Blip3o, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """Boxes of the frame that the model names them in: in the image, cut to it, over the cells of the reward map."""
    for case in facts:
        size, name = tuple(case["image_size"]), str(case["image_size"])
        seen = model.box_frame(size)
        yield equal("frames", list(seen), case["seen_size"], name)
        yield equal("grids", list(model.latent_grid(size)), case["grid"], name)
        for box in case["boxes"]:
            image_box = scale_box(box["bbox_2d"], seen, size)
            yield close("boxes", torch.tensor(image_box), torch.tensor(box["image_box"]), 1e-4, name)
            cut = clip_box(image_box, size)
            yield close("boxes that are cut", torch.tensor(cut), torch.tensor(box["cut_box"]), 1e-4, name)
            for key, some in (("coverage", cut), ("coverage_without_frame_change", clip_box(box["bbox_2d"], size))):
                cells = coverage(torch.tensor([some], dtype=torch.float64), size, model.latent_grid(size))[0]
                yield close(key, cells, torch.tensor(box[key], dtype=torch.float64), 1e-6, name)


# --- drawing


@torch.no_grad()
def conditioning(model: Blip3o, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    contexts = {name: prompt(text) for name, text in prompts(model).items()}
    together = model.queried(list(contexts.values()))
    for (name, context), batched in zip(contexts.items(), together, strict=True):
        recorded = numbers[f"{name}/query_hidden"]
        yield close("states of the queries", model.queried([context])[0], recorded, 1e-4, name)
        yield close("states of the queries, padded", batched, recorded, 1e-4, name)
    yield close("states of the queries", model.queried([None])[0], numbers["blank/query_hidden"], 1e-4, "blank")
    language = model.language
    (text,) = chat.requested(contexts["0"], lambda segment: segment.text or "")
    runs = [language.tokens(model.ids(str(text))), language.inputs(model.queries())]
    run = flattened(joined(runs))
    yield close("inputs", run.inputs, numbers["0/input_embeds"], 1e-6)
    with outputs(language.text.layers) as states:
        last = language.extend(language.empty(1), Rows.of([run]))
    for number, state in enumerate([run.inputs[None], *states[:-1], last]):
        yield close("states after each layer", state[0], numbers[f"0/hidden_{number}"], 1e-4, str(number))


@torch.no_grad()
def dit(model: Blip3o, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    network = model.network.dit
    parts = {
        "patch_embed": network.patch_embedder.proj,
        "caption_projection": network.caption_projection,
        "timestep_embed": network.time_caption_embed.timestep_embedder,
        "time_caption_embed": network.time_caption_embed,
        "layer_0_feed_forward": network.layers[0].feed_forward,
    }
    parts |= {f"layer_{number}": layer for number, layer in enumerate(network.layers)}
    x, t, z = numbers["x"], numbers["timestep"] / 1000, numbers["z"]
    yield equal("timesteps", ticks(t), numbers["timestep"])
    with outputs(list(parts.values())) as states, attended(network.layers[0]) as (to_self, to_caption):
        velocity = network(x.to(model.device), t.to(model.device), z.to(model.device))
    for name, state in zip(states_in_order(parts), states, strict=True):
        yield close(name, state.reshape(numbers[name].shape), numbers[name], 1e-4)
    sinusoid = network.time_caption_embed.time_proj(numbers["timestep"].to(model.device))
    yield close("timestep_sinusoid", sinusoid, numbers["timestep_sinusoid"], 1e-4)
    angles = torch.exp(1j * numbers["rope_angle"])
    yield close("rope", torch.view_as_real(network.rotary(model.device)), torch.view_as_real(angles), 1e-5)
    yield close("layer_0_self_attention", to_self[0], numbers["layer_0_self_attention"], 1e-4)
    yield close("layer_0_cross_attention", to_caption[0], numbers["layer_0_cross_attention"], 1e-4)
    yield close("velocity", velocity, numbers["velocity"], 1e-4)


@torch.no_grad()
def sampler(model: Blip3o, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for name, case in facts.items():
        number, _, settings = name.partition("/")
        sampling = Sampling(timesteps=case["steps"] + 1, timestep_shift=1.0, guidance=case["guidance"])
        timesteps = even_schedule(sampling)
        yield close("sigmas", timesteps, torch.tensor(case["sigmas"]), 1e-6, name)
        yield equal("timesteps", ticks(timesteps[:-1]).long(), case["dit_timesteps"], name)
        context = prompt(prompts(model)[number])
        noise = numbers[f"{number}/initial_noise"].to(model.device)
        steps: list[tuple[Tensor, Tensor]] = []
        made = model.sampled(noise, model.conditions([context]), sampling, steps)
        yield close("features", model.tokens(made[0]), numbers[f"{name}/features"], 1e-3, name)
        if settings == "short":
            x, v = (torch.cat(values) for values in zip(*steps, strict=True))
            yield close("x_t", x, numbers[f"{name}/x_t"], 1e-3)
            yield close("v_guided", v, numbers[f"{name}/v_guided"], 1e-3)
            yield close("x_next", torch.cat([x[1:], made]), numbers[f"{name}/x_next"], 1e-3)
            yield from _branches(model, numbers, name, context, timesteps)
    noise = numbers["blank/initial_noise"].to(model.device)
    blank = model.sampled(noise, model.conditions([None]), DEFAULTS)
    yield close("features", model.tokens(blank[0]), numbers["blank/default/features"], 1e-3, "blank")
    context = prompt(prompts(model)["0"])
    alone = Sampling(timesteps=7, timestep_shift=1.0, guidance=3.0)
    noise = torch.cat([numbers["0/initial_noise"], numbers["1/initial_noise"]]).to(model.device)
    both = model.sampled(noise, model.conditions([context, context]), alone)
    yield close("features, two at once", model.tokens(both[0]), numbers["0/short/features"], 1e-3)


def _branches(
    model: Blip3o, numbers: Tensors, name: str, context: Sequence[Segment] | None, timesteps: Tensor
) -> Iterator[Deviation]:
    """The velocities with and without the prompt at the recorded states."""
    x, given = numbers[f"{name}/x_t"].to(model.device), model.conditions([context])
    t = timesteps[:-1].float().to(model.device)
    for branch, condition in (("v_cond", given), ("v_uncond", torch.zeros_like(given))):
        ours = model.network.dit(x, t, condition.expand(len(x), -1, -1))
        yield close(branch, ours, numbers[f"{name}/{branch}"], 1e-3)


def features(model: Blip3o, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    images = recorded_images(numbers)
    side = model.config.tower.side * model.config.tower.patch if model.config.tower else 0
    pixels = torch.stack([normalised(cropped(image, side)) for image in images.values()])
    yield close("pixels", pixels[:, :, ::16, ::16], numbers["pixel_crop_every_16"], 1e-4)
    statistics = torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))])
    yield close("mean and deviation of the pixels", statistics, numbers["pixel_mean_std"], 1e-4)
    with torch.no_grad():
        tower = model.tower(pixels.to(model.device))
    yield close("tokens of the tower", tower[:, ::16], numbers["tokens_every_16"], 1e-4)
    yield close("features", torch.stack(model.encode(list(images.values()))), numbers["features"], 1e-4)


@torch.no_grad()
def decoder(model: Blip3o, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    given, blank = numbers["condition"].to(model.device)
    yield close("pooled features", torch.stack([given, blank]).mean(1), numbers["pooled"], 1e-4)
    for name, case in facts.items():
        size = (case["height"], case["width"])
        yield equal("sizes", [*size, *case["crop"], *size] * 2, numbers["time_ids"], name)
        steps: list[tuple[Tensor, Tensor]] = []
        noise = numbers["initial_noise"]
        made = model.decoder.latents(given[None], blank, noise, size, case["steps"], case["guidance"], steps)
        scheduler = model.decoder.scheduler
        yield close("timesteps", scheduler.timesteps, torch.tensor(case["timesteps"]), 1e-3, name)
        yield close("sigmas", scheduler.sigmas, torch.tensor(case["sigmas"]), 1e-5, name)
        yield close("scale of the noise", scheduler.init_noise_sigma, case["init_noise_sigma"], 1e-5, name)
        inputs, predicted = (torch.stack(values) for values in zip(*steps, strict=True))
        yield close("inputs of the UNet", inputs, numbers[f"{name}/unet_input"], 1e-3, name)
        recorded = numbers[f"{name}/unet_output"]  # the prompt's, then the blank one's
        yield close("outputs of the UNet", predicted.flip(1), recorded, 1e-3, name)
        yield close("latents", made, numbers[f"{name}/final_latent_unscaled"], 1e-3, name)
        (image,) = model.decoder.images(made)
        yield close("pixels", torch.from_numpy(np.array(image)), numbers[f"{name}/image_uint8"], 1.0, name)


# --- understanding


@torch.no_grad()
def understanding(model: Blip3o, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    language, image = model.language, Image.fromarray(numbers["image"].numpy())
    size = language.seen_size((image.height, image.width))
    yield close("pixels", patches(image, size, language.patch, language.merge), numbers["pixel_values"], 1e-4)
    grid = [1, size[0] // language.patch, size[1] // language.patch]
    yield equal("grids", [grid], numbers["grid_thw"])
    (run,) = language.images([image])
    yield close("output of the vision tower", run.inputs, numbers["visual_output"], 1e-4)
    seen = Segment("seen", image=image)
    for name in ("q0", "q1", "text_only"):
        case = facts[name]
        text = Segment("text", text=case["question"] or facts["q1"]["question"])
        context = [text] if name == "text_only" else [seen, text]
        parts = chat.asked(context, lambda segment: segment.text or "")
        row = joined([language.tokens(model.ids(p)) if isinstance(p, str) else run for p in parts])
        pad = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ids = [i for p in parts for i in (model.ids(p) if isinstance(p, str) else [pad] * len(run.inputs))]
        yield equal("ids", ids, case["ids"], name)
        yield equal("positions", row.positions, numbers[f"{name}/position_ids"], name)
        yield equal("next position", row.advance - len(row.inputs), case["rope_delta"], name)
        states = language.extend(language.empty(1), Rows.of([row]))[0]
        if name == "q0":
            yield close("last states", states, numbers["q0/last_hidden"], 1e-4)
        yield close("logits", language.logits(states), numbers[f"{name}/logits"], 1e-3, name)
        ids, logits = greedy(model, context, len(case["greedy_ids"]))
        yield equal("greedy ids", ids, case["greedy_ids"], name)
        yield close("greedy logits", logits, numbers[f"{name}/greedy_logits"], 1e-3, name)
    recorded = facts["reconstruct"]
    picture = neighbour_images(model)[recorded["image"].split()[-1]]
    again = [Segment("seen", image=picture), Segment("text", text=recorded["prompt"].partition("\n")[2])]
    ours = model.queried([again])[0]
    yield close("states of the queries behind an image", ours, numbers["reconstruct/query_hidden"], 1e-4)


def greedy(model: Blip3o, context: Sequence[Segment], count: int) -> tuple[list[int], Tensor]:
    """The likeliest tokens, and the logits that each was picked from."""
    state, last = model.read([context])
    ids, logits = [], []
    for _ in range(count):
        logits.append(model.language.logits(last)[0])
        ids.append(int(logits[-1].argmax()))
        last = model.language.step(state, torch.tensor([ids[-1]], device=model.device))[:, -1]
    return ids, torch.stack(logits)


# --- training


def training(model: Blip3o, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """One step of the reference: its layout has an empty, closed turn before the queries."""
    images = neighbour_images(model)
    latents = model.encode([images[name] for name in facts["images"]])
    yield close("x0", torch.stack(latents), numbers["x0"], 1e-4)
    times = [timestep(u) for u in numbers["u"]]
    yield equal("timesteps", ticks(torch.tensor(times)), numbers["timesteps"])
    yield equal("indices", [1000 - round(1000 * t) for t in times], facts["indices"])
    starts = []
    for number, (text, row) in enumerate(zip(facts["prompts"], numbers["input_ids"].tolist(), strict=True)):
        (request,) = chat.requested(prompt(text), lambda segment: segment.text or "", closed=True)
        ids = list(model.ids(str(request)))
        starts.append(len(ids))
        placeholder = model.tokenizer.convert_tokens_to_ids("<image>")
        whole = [*ids, *[placeholder] * model.config.queries]
        padding = len(row) - len(whole)
        end = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        yield equal("ids", [*whole, *[end] * padding], row, str(number))
        yield equal("masks", [1] * len(whole) + [0] * padding, numbers["attention_mask"][number].long(), str(number))
        yield equal("labels", [*labelled(model, whole), *[-100] * padding], numbers["labels"][number], str(number))
    yield equal("place of the queries", starts, facts["query_start"])
    contexts = [prompt(text) for text in facts["prompts"]]
    dropped = numbers["dropped"].bool()
    condition = model.queried(contexts, closed=True) * ~dropped[:, None, None].to(model.device)
    yield close("conditions", condition, numbers["condition"], 1e-4)
    out = forward_of(model, latents, numbers, times, condition)
    yield close("x_t", out.x_t, numbers["x_t"], 1e-4)
    yield close("velocity", untokened(out.forward.velocity, numbers), numbers["velocity"], 1e-4)
    errors = out.forward.image_error.unflatten(0, (len(latents), -1))
    yield close("squared errors", errors, numbers["squared_error_per_token"], 1e-4)
    yield close("loss", errors.mean(), facts["loss"], 1e-4)
    gradients = gradients_of(errors.mean(), model)
    yield equal("trained parameters", sorted(gradients), sorted(facts["grad_norms"]))
    yield equal("number of trained parameters", len(gradients), facts["trainable"])
    yield relative(
        "total gradient norm", math.hypot(*(x.norm().item() for x in gradients.values())), facts["total_norm"], 1e-3
    )
    for name, norm in facts["grad_norms"].items():
        if not name.endswith("attn2.norm_k.bias"):  # its true gradient is zero
            yield relative("gradient norms", gradients[name].norm().item(), norm, 1e-3, name)
    for key in [key for key in numbers if key.startswith("grad/")]:
        yield close("gradients", gradients[key.removeprefix("grad/")], numbers[key], 1e-4, key)
    yield from srum_losses(model, facts["srum"], numbers, latents, times, contexts)


def srum_losses(
    model: Blip3o,
    facts: Facts,
    numbers: Tensors,
    latents: Sequence[Tensor],
    times: Sequence[float],
    contexts: Sequence[Sequence[Segment]],
) -> Iterator[Deviation]:
    """Eq. 1-3 without dropout, through our objective and the trainer's packs."""
    condition = model.queried(contexts, closed=True)
    forward = forward_of(model, latents, numbers, times, condition).forward
    yield close("velocity without dropout", untokened(forward.velocity, numbers), numbers["srum/velocity"], 1e-4)
    reward, alpha = numbers["srum/R"].flatten(1), numbers["srum/alpha"]
    cases = {"signed_lambda_05": (alpha[:, None] * reward, 0.5), "uniform_lambda_0": (torch.ones_like(reward), 0.0)}
    for name, (credit, weight) in cases.items():
        tokens_ = Tokens("image", forward.image_error, credit.flatten().to(model.device))
        terms = Srum().terms(tokens_, SrumConfig(constraint_weight=weight))
        total = torch.stack(list(terms.values())).sum(0).mean()
        yield close("losses", terms["reward"].mean(), facts[name]["reward_part"], 1e-4, f"{name} reward")
        yield close("losses", forward.image_error.mean(), facts[name]["reference_part"], 1e-4, f"{name} reference")
        yield close("losses", total, facts[name]["total"], 1e-4, f"{name} total")
        norm = math.hypot(*(x.norm().item() for x in gradients_of(total, model).values()))
        yield relative("total gradient norm", norm, facts[name]["grad_norm"], 1e-3, name)


class Forwarded:
    """What goes into and comes out of the training forward pass."""

    def __init__(self, x_t: Tensor, forward: FlowForward) -> None:
        self.x_t, self.forward = x_t, forward


def forward_of(
    model: Blip3o, latents: Sequence[Tensor], numbers: Tensors, times: Sequence[float], condition: Tensor
) -> Forwarded:
    """The training forward pass of recorded noise behind these conditions."""
    noise = [FlowNoise(model.tokens(x), t) for x, t in zip(numbers["noise"], times, strict=True)]
    batch = model.pack([[Segment("noisy", latent=latent, loss=True)] for latent in latents], noise)
    return Forwarded(batch.x, model.forward(replace(batch, conditions=condition)))


def untokened(velocity: Tensor, numbers: Tensors) -> Tensor:
    """Velocities (B h w, C) as (B, C, h, w)."""
    shape = numbers["velocity"].shape
    return velocity.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape)


def gradients_of(loss: Tensor, model: Blip3o) -> dict[str, Tensor]:
    """Gradients of all that may be trained, by official names; the graph is kept."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return {official_name(name, GENERATOR): g for name, g in zip(named, gradients, strict=True)}


# --- looking inside


@contextmanager
def outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, what each of the modules returns, in the order in which they run."""
    states: list[Tensor] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def states_in_order(parts: Mapping[str, nn.Module]) -> list[str]:
    """The parts of the transformer in the order in which they run."""
    layers = [name for name in parts if name.startswith("layer_") and "_feed_forward" not in name]
    before = ["caption_projection", "patch_embed", "timestep_embed", "time_caption_embed", "layer_0_feed_forward"]
    return [*before, *layers]


@contextmanager
def attended(layer: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Within the block, what the two attentions of a layer return, (B, N, heads, head width) each."""
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    attentions: Any = (layer.attn1, layer.attn2)
    for attention, states in zip(attentions, kept, strict=True):
        attention.processor = Watched(states)
    try:
        yield kept
    finally:
        for attention in attentions:
            attention.processor = LuminaAttnProcessor2_0()


class Watched(LuminaAttnProcessor2_0):
    """Diffusers' attention, which keeps what it returns in ``states``."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self.states = states

    @wraps(LuminaAttnProcessor2_0.__call__)  # diffusers looks at the names of its arguments
    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.states.append(super().__call__(*args, **options))
        return self.states[-1]


def prompts(model: Blip3o) -> dict[str, str]:
    """The prompts of the folder by their numbers."""
    cases = json.loads((model.folder.parent / "tokens.json").read_text())["cases"]
    return {str(number): case["prompt"] for number, case in enumerate(cases)}


def neighbour_images(model: Blip3o) -> dict[str, Image.Image]:
    """The images of the fixture of features."""
    return recorded_images(load_file(model.folder.parent / "features.safetensors"))


def recorded_images(numbers: Mapping[str, Tensor]) -> dict[str, Image.Image]:
    return {name: Image.fromarray(numbers[name].numpy()) for name in numbers if name.startswith("image_")}


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "checkpoint_shapes": (checkpoint, JSON),
    "official_shapes_8b": (published("8b"), JSON),
    "official_shapes_4b": (published("4b"), JSON),
    "tokens": (tokens, JSON),
    "conditioning": (conditioning, TENSORS),
    "dit": (dit, TENSORS),
    "sampler": (sampler, BOTH),
    "features": (features, TENSORS),
    "decoder": (decoder, BOTH),
    "understanding": (understanding, BOTH),
    "resize": (resize, JSON),
    "grounding": (grounding, JSON),
    "training": (training, BOTH),
}  # fmt: skip

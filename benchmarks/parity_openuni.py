"""OpenUni's part of ``benchmarks/parity.py``: every quantity of a folder of fixtures such as tests/golden/openuni."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.parity import BOTH, JSON, TENSORS, Check, Deviation, Facts, Tensors, close, equal, relative
from benchmarks.parity_blip3o import outputs, untokened
from srum.flow import FlowNoise
from srum.models.base import FlowForward, Sampling, Segment
from srum.models.checkpoints import link
from srum.models.openuni import OpenUni, chat
from srum.models.openuni.checkpoint import AUTOENCODER, WEIGHTS
from srum.models.openuni.config import OVERRIDE_FILES, raw_overrides
from srum.models.openuni.images import pixels, seen_drawn
from srum.models.pickles import convert, pickled, read_pickle
from srum.models.precision import Precision
from srum.models.queries.chat import Part
from srum.models.queries.generator import ticks, timestep
from srum.models.queries.language import Rows, Run, joined
from srum.models.queries.sampler import Steps

BESIDE = ("tokens.json", "images.json", "images.safetensors")  # of the fixtures, which the others build on
PAD = "<IMG_CONTEXT>"


def load(checkpoint: Path, device: str, precision: Precision) -> OpenUni:
    """The model of a folder of fixtures, whose pickle is converted first; the copy goes when the model does."""
    temporary = TemporaryDirectory()
    model = OpenUni.load(converted(checkpoint, Path(temporary.name)), device, precision)
    model.temporary = temporary  # type: ignore[attr-defined]
    return model


def converted(checkpoint: Path, out: Path) -> Path:
    """``out``/checkpoint as it can be loaded, with the sizes that the published code has as literals, and beside it the
    fixtures that the others build on."""
    folder, golden = out / "checkpoint", checkpoint.resolve().parent
    if pickled(checkpoint):
        convert(checkpoint, folder)
    else:
        shutil.copytree(checkpoint, folder)
    if (golden / OVERRIDE_FILES[-1]).is_file():
        shutil.copyfile(golden / OVERRIDE_FILES[-1], folder / OVERRIDE_FILES[-1])
    for name in BESIDE:
        link(golden / name, out / name)
    return folder


# --- what the other fixtures build on


def recorded_tokens(model: OpenUni) -> Facts:
    return json.loads((model.folder.parent / "tokens.json").read_text())


def prompt(text: str) -> list[Segment]:
    return [Segment("text", text=text, droppable=True)]


def prompts(model: OpenUni) -> list[list[Segment]]:
    """Contexts of the prompts of the folder."""
    return [prompt(case["prompt"]) for case in recorded_tokens(model)["cases"]]


def images(model: OpenUni) -> list[Image.Image]:
    """The squares that were cut out of the images of the folder."""
    folder = model.folder.parent
    facts, numbers = json.loads((folder / "images.json").read_text()), load_file(folder / "images.safetensors")
    return [
        Image.fromarray(numbers[f"image_{number}"].numpy()).crop(case["crop_box_xyxy"])
        for number, case in enumerate(facts)
    ]


def reconstructions(model: OpenUni) -> list[list[Segment]]:
    """Contexts of an image and what is said of it."""
    squares = images(model)
    return [
        [Segment("seen", image=squares[case["image"]]), Segment("text", text=case["template"])]
        for case in recorded_tokens(model)["reconstruction"]
    ]


def ids_of(model: OpenUni, parts: Sequence[Part]) -> list[int]:
    """Ids of a conversation, images as the reference's placeholders."""
    pad = model.tokenizer.convert_tokens_to_ids(PAD)
    seen = [pad] * model.seen_tokens
    return [i for part in parts for i in (model.ids(part) if isinstance(part, str) else seen)]


# --- the checkpoint and what stands before the networks


def checkpoint(model: OpenUni, shapes: Facts, _: Tensors) -> Iterator[Deviation]:
    """The folder loads by the strict rule, and a saved one has the same files, names, shapes and numbers, also in the
    authors' form."""
    here = {name: list(x) for name, x in model.headers.shapes.items() if not name.startswith(AUTOENCODER)}
    yield equal("names and shapes of the tensors", here, shapes)
    fixed, config = raw_overrides(model.folder), model.config
    sizes = config.connector
    ours = [config.queries, sizes.width, sizes.inner, sizes.layers, sizes.heads, config.seen_side, config.side]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = [fixed["num_queries"], *(fixed["connector"][name] for name in names)]
    yield equal("sizes", ours, [*theirs, fixed["vit_input_size"], fixed["image_size"]])
    yield equal("seen tokens", model.seen_tokens, fixed["image_tokens"])
    yield equal("shift of drawing", config.scheduler["flow_shift"], fixed["flow_shift"])
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        model.save(folder)
        saved, official = (
            {str(path.relative_to(x)): path for path in x.rglob("*") if path.is_file()} for x in (folder, model.folder)
        )
        yield equal("files of a saved checkpoint", saved.keys(), official.keys())
        for name, path in official.items():
            if path.suffix == ".safetensors":
                yield from _same_tensors(load_file(saved[name]), load_file(path), name)
            else:
                yield equal("saved configs", saved[name].read_bytes(), path.read_bytes(), name)
        convert(folder / WEIGHTS, Path(temporary) / "openuni.pth")
        yield from _same_tensors(read_pickle(Path(temporary) / "openuni.pth"), load_file(official[WEIGHTS]), "pickle")


def _same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], name: str) -> Iterator[Deviation]:
    yield equal("saved tensors, their names", ours.keys(), theirs.keys(), name)
    same = all(torch.equal(ours[key], value) for key, value in theirs.items())
    yield equal("saved tensors, bit for bit", same, True, name)


def tokens(model: OpenUni, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    ids = {token: model.tokenizer.convert_tokens_to_ids(token) for token in facts["special_ids"]}
    yield equal("special tokens", ids, facts["special_ids"])
    yield equal("size of the vocabulary", model.config.vocabulary, facts["vocab_size"])
    for case in facts["cases"]:
        ids = ids_of(model, model.requested(prompt(case["prompt"])))
        yield equal("ids of a request", ids, case["ids"], case["prompt"][:20])
    yield equal("ids of a request", ids_of(model, model.requested([])), facts["cfg"]["ids"], "for just any image")
    for case, context in zip(facts["reconstruction"], reconstructions(model), strict=True):
        ids = ids_of(model, model.requested(context))
        yield equal("ids of a reconstruction", ids, case["ids"], case["template"])


@torch.no_grad()
def pictures(model: OpenUni, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    squares = images(model)
    made = model.encode(squares)
    for number, (case, square) in enumerate(zip(facts, squares, strict=True)):
        recorded = numbers[f"image_{number}"]
        yield equal("sizes", [recorded.shape[1], recorded.shape[0]], case["size_wh"], str(number))
        ours = pixels(model.resized(square))
        yield close("pixels", ours, numbers[f"{number}/pixels"], 1e-4, str(number))
        yield close("latents", made[number], numbers[f"{number}/latent"][0], 1e-3, str(number))
        seen = seen_drawn([ours], model.config.seen_side)
        yield close("seen features", model.language.features(seen)[0], numbers[f"{number}/seen"], 1e-4, str(number))
        if number == 0:
            yield close("pixels of the encoder", seen, numbers["0/vit_pixels"], 1e-4)
            tower = model.language.network.model.vision_tower
            states = tower(pixel_values=seen.to(model.device, tower.dtype)).last_hidden_state
            yield close("states of the encoder", states, numbers["0/vit_last_hidden"], 1e-4)
            yield close("decoded pixels", model.decoded(numbers["0/latent"]), numbers["0/decoded"], 1e-3)


# --- drawing


@torch.no_grad()
def conditioning(model: OpenUni, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    contexts: dict[str, Sequence[Segment]] = {str(n): context for n, context in enumerate(prompts(model))}
    contexts |= {"cfg": []} | {f"reconstruct_{n}": context for n, context in enumerate(reconstructions(model))}
    together = model.conditioned(list(contexts.values()))
    for (name, context), batched in zip(contexts.items(), together, strict=True):
        states = model.behind([model.requested(context)])
        yield close("states of the queries", states[0], numbers[f"{name}/query_hidden"], 1e-4, name)
        if f"{name}/connector" in numbers:
            ours = model.conditioner.connector(states)[0]
            yield close("states of the connector", ours, numbers[f"{name}/connector"], 1e-4, name)
        recorded = numbers[f"{name}/condition"]
        yield close("conditions", model.conditioner.condition(states)[0], recorded, 1e-4, name)
        yield close("conditions, padded", batched, recorded, 1e-4, name)


@torch.no_grad()
def transformer(model: OpenUni, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    network = model.network.transformer
    x, z, t = (numbers[name].to(model.device) for name in ("x", "z", "timestep"))
    with outputs(list(network.transformer_blocks)) as states:
        (velocity,) = SanaTransformer2DModel.forward(network, x, z, t, return_dict=False)
    for number, state in enumerate(states):
        yield close("states after each layer", state, numbers[f"block_{number}"], 1e-4, str(number))
    yield close("velocity", velocity, numbers["velocity"], 1e-4)
    whole = t == t.floor()  # all that we tell it
    ours = model.network(x[whole], t[whole] / 1000, z[whole])
    yield close("velocity at a tick", ours, numbers["velocity"][whole.cpu()], 1e-4)


@torch.no_grad()
def sampler(model: OpenUni, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    count = len(facts["train_timesteps"])
    times = [timestep(torch.tensor(number / count)) for number in range(count)]
    yield close("timesteps of training", ticks(torch.tensor(times)), torch.tensor(facts["train_timesteps"]), 0.0)
    yield close("sigmas of training", torch.tensor(times), torch.tensor(facts["train_sigmas"]), 1e-6)
    yield equal("shift of training", model.config.scheduler.get("shift", 1.0), facts["train_shift"])
    asked, seen = prompts(model), reconstructions(model)
    for name, case in facts["runs"].items():
        shift = model.config.scheduler["flow_shift"]
        sampling = Sampling(timesteps=case["steps"] + 1, timestep_shift=shift, guidance=case["guidance"])
        schedule = model.schedule(sampling, explored=False)
        yield close("sigmas", schedule, torch.tensor(case["sigmas"]), 1e-6, name)
        yield equal("timesteps", ticks(schedule[:-1]), case["timesteps"], name)
        noise = numbers[f"{name}/initial_noise"]
        yield equal("shapes", list(model.latent_shape(tuple(case["size"]))), list(noise.shape[1:]), name)
        context = {"non_square": asked[1], "reconstruct": seen[0]}.get(name, asked[0])
        given = model.conditions([context])
        without = {"negative": model.conditions([asked[1]]), "reconstruct": given}.get(name)
        steps: Steps = []
        made = model.sampled(noise.to(model.device), given, sampling, steps, without=without)
        yield close("latents", made, numbers[f"{name}/latent"], 1e-3, name)
        yield close("pixels", model.decoded(made), numbers[f"{name}/pixels"], 1e-3, name)
        (image,) = model.decode(list(made))
        yield close("images", torch.from_numpy(np.array(image)), numbers[f"{name}/image"][0], 1.0, name)
        if f"{name}/x_t" in numbers:
            x, v = (torch.cat(values) for values in zip(*steps, strict=True))
            yield close("x_t", x, numbers[f"{name}/x_t"], 1e-3, name)
            yield close("v_t", v, numbers[f"{name}/guided"], 1e-3, name)
            yield close("x_next", torch.cat([x[1:], made]), numbers[f"{name}/x_next"], 1e-3, name)


# --- understanding


@torch.no_grad()
def understanding(model: OpenUni, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """Questions about the first square, seen as it is where another is drawn after it."""
    square = images(model)[0]
    (seen,) = model.seen([square], drawn=True)
    for name, case in facts.items():
        yield equal("system turn", chat.INTRODUCTION, case["system_message"], name)
        parts = model.asked([Segment("seen", image=square), Segment("text", text=case["question"])])
        text = "".join(part if isinstance(part, str) else f"{PAD}*n" for part in parts)
        yield equal("text of a question", text, case["text"], name)
        yield equal("ids", ids_of(model, parts), case["ids"], name)
        row = joined([model.language.tokens(model.ids(part)) if isinstance(part, str) else seen for part in parts])
        ids, logits = greedy(model, row, len(case["greedy_ids"]))
        yield close("logits", logits, numbers[f"{name}/logits"], 1e-3, name)
        yield equal("greedy ids", ids, case["greedy_ids"], name)


def greedy(model: OpenUni, row: Run, count: int) -> tuple[list[int], Tensor]:
    """The likeliest tokens after a conversation, and the logits (L, V) at all of its places."""
    language = model.language
    context = language.empty(1)
    states = language.extend(context, Rows.of([row]))
    logits, ids = language.logits(states[0]), list[int]()
    for _ in range(count):
        ids.append(int(language.logits(states[:, -1])[0].argmax()))
        states = language.step(context, torch.tensor(ids[-1:], device=model.device))
    return ids, logits


# --- training


def training(model: OpenUni, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """A step of the reference on texts, the last without one, and on what is seen."""
    squares, asked, seen = images(model), prompts(model), reconstructions(model)
    latents, templates = model.encode(squares), [context[1] for context in seen]
    for name, case in facts.items():
        given = {key.partition("/")[2]: numbers[key] for key in list(numbers) if key.startswith(f"{name}/")}
        contexts: list[Sequence[Segment]] = [*asked[: len(squares) - 1], []]
        if name == "reconstruct":
            contexts = [
                [Segment("seen", image=square), templates[number % len(templates)]]
                for number, square in enumerate(squares)
            ]
        for number, context in enumerate(contexts):
            ids = ids_of(model, model.requested(context))
            mask = given["attention_mask"][number].bool()
            yield equal("ids", ids, given["input_ids"][number][mask], f"{name} {number}")
        times = [timestep(u) for u in given["u"]]
        yield equal("timesteps", ticks(torch.tensor(times)), given["timesteps"], name)
        x_t, condition, forward = forward_of(model, latents, contexts, given["noise"], times)
        yield close("x_t", x_t, given["x_t"], 1e-4, name)
        yield close("conditions", condition, given["condition"], 1e-4, name)
        yield close("velocity", untokened(forward.velocity, given), given["velocity"], 5e-4, name)
        loss = forward.image_error.mean()
        yield close("losses", loss, case["loss"], 1e-4, name)
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        yield equal("trained parameters", sorted(gradients), sorted(case["grad_norms"]), name)
        total = math.hypot(*(x.norm().item() for x in gradients.values()))
        yield relative("total gradient norm", total, case["total_grad_norm"], 1e-3, name)
        for own, norm in case["grad_norms"].items():
            yield relative("gradient norms", gradients[own].norm().item(), norm, 1e-3, own)
        for key in [key for key in given if key.startswith("grad/")]:
            own = key.removeprefix("grad/")
            scale = max(given[key].abs().max().item(), 1.0)
            yield close("gradients", gradients[own] / scale, given[key] / scale, 1e-3, own)


def forward_of(
    model: OpenUni,
    latents: Sequence[Tensor],
    contexts: Sequence[Sequence[Segment]],
    noise: Tensor,
    times: Sequence[float],
) -> tuple[Tensor, Tensor, FlowForward]:
    """x_t, conditions and the training forward pass of recorded noise behind these contexts."""
    corruptions = [FlowNoise(model.tokens(x), t) for x, t in zip(noise, times, strict=True)]
    examples = [
        [*context, Segment("noisy", latent=latent, loss=True)]
        for context, latent in zip(contexts, latents, strict=True)
    ]
    batch = model.pack(examples, corruptions)
    condition = model.conditions(batch.contexts)
    return batch.x, condition, model.forward(replace(batch, conditions=condition))


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "checkpoint_shapes": (checkpoint, JSON),
    "tokens": (tokens, JSON),
    "images": (pictures, BOTH),
    "conditioning": (conditioning, TENSORS),
    "transformer": (transformer, TENSORS),
    "sampler": (sampler, BOTH),
    "understanding": (understanding, BOTH),
    "training": (training, BOTH),
}  # fmt: skip

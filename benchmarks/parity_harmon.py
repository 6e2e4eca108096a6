"""Harmon's part of ``benchmarks/parity.py``: every quantity of a folder of fixtures such as tests/golden/harmon."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.parity import BOTH, JSON, TENSORS, Check, Deviation, Facts, Tensors, close, equal, relative
from benchmarks.parity_blip3o import outputs
from srum.errors import ModelError
from srum.models.base import Decoding, Sampling, Segment
from srum.models.checkpoints import Headers, link
from srum.models.harmon import Harmon, chat
from srum.models.harmon.autoencoder import decode_latents, encode_mean
from srum.models.harmon.checkpoint import HEAD, UNREAD, check
from srum.models.harmon.config import OVERRIDE_FILES, HarmonConfig, read_sizes
from srum.models.harmon.head import diffusion, respaced, variational_bound
from srum.models.harmon.images import padded, stretched, to_image, to_pixels
from srum.models.harmon.mar import Masked
from srum.models.harmon.sampler import guidance_at, guided, left_after, reverse_step
from srum.models.harmon.training import HarmonForward, Masking, TrainingRow
from srum.models.pickles import convert, pickled
from srum.models.precision import Precision
from srum.models.queries.chat import Part, asked
from srum.models.queries.language import Rows
from srum.train.methods.srum import Srum, SrumConfig
from srum.train.objective import Tokens

TOGETHER = "checkpoint_hf"  # the folder of the layout that is one file, of which some have the config alone
PUBLISHED = {  # docs/specs/harmon.md, 1
    "0_5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "1_5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
}
COMMON = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6}
HEADS = {"0_5b": ((6, 1024), 768), "1_5b": ((12, 1536), 1280)}  # depth and width of the head, width of MAR
TABLES = {
    "kept": "alphas_cumprod",
    "beta": "betas",
    "variance": "posterior_variance",
    "log_variance": "posterior_log_variance_clipped",
    "of_clean": "posterior_mean_coef1",
    "of_noisy": "posterior_mean_coef2",
}


def load(checkpoint: Path, device: str, precision: Precision) -> Harmon:
    """The model of a folder of fixtures, whose pickles are converted first; the copy goes when the model does."""
    if not pickled(checkpoint):
        return Harmon.load(checkpoint, device, precision)
    temporary = TemporaryDirectory()
    copy = Path(temporary.name)
    convert(checkpoint, copy / "checkpoint")
    link(checkpoint.parent / "fixture_config.json", copy / "checkpoint" / OVERRIDE_FILES[0])
    for path in checkpoint.parent.iterdir():
        if path.name != checkpoint.name:
            (copy / path.name).symlink_to(path.resolve())
    model = Harmon.load(copy / "checkpoint", device, precision)
    vars(model)["temporary"] = temporary
    return model


def golden(model: Harmon) -> Path:
    """The folder of fixtures that a model is part of."""
    return model.folder.parent


def prompt(text: str) -> list[Segment]:
    return [Segment("text", text=text, droppable=True)]


def words(segment: Segment) -> str:
    return segment.text or ""


# --- the checkpoint and what stands before the networks


def checkpoint(model: Harmon, shapes: Facts, _: Tensors) -> Iterator[Deviation]:
    """The folder loads by the strict rule, and a saved one has the same files, names, shapes and numbers, in the layout
    of several files and in that of one."""
    here = {name: list(shape) for name, shape in model.headers.shapes.items()}
    yield equal("names and shapes of the tensors", here, shapes)
    with TemporaryDirectory() as temporary:
        yield from saved_again(model, Path(temporary) / "several", "several files")
        together = Path(temporary) / "source"
        in_one_file(model, together)
        one = Harmon.load(together, model.device, model.precision)
        yield equal("config of both layouts", one.config == replace(model.config, raw=one.config.raw), True)
        yield from same_numbers(one, model, "written as one file")
        yield from saved_again(one, Path(temporary) / "one", "one file")
        if (recorded := golden(model) / TOGETHER / "model.safetensors").exists():
            yield equal("recorded layout of one file", same(recorded, together / "model.safetensors"), True)


def in_one_file(model: Harmon, folder: Path) -> None:
    """The same model in the layout that is one file."""
    folder.mkdir()
    tensors = {name: model.headers.files[name] for name in model.headers.files}
    files = {path: load_file(path) for path in set(tensors.values())}
    whole = {name: files[path][model.headers.stored[name]].clone() for name, path in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for source, name in ((golden(model) / TOGETHER, "config.json"), (model.folder, "tokenizer.json")):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / OVERRIDE_FILES[0]).write_bytes((model.folder / OVERRIDE_FILES[0]).read_bytes())


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_numbers(one: Harmon, other: Harmon, case: str) -> Iterator[Deviation]:
    for part in ("network", "autoencoder"):
        a, b = (getattr(x, part).state_dict() for x in (one, other))
        alike = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        yield equal("weights of both layouts, bit for bit", alike, True, f"{part} {case}")


def saved_again(model: Harmon, folder: Path, case: str) -> Iterator[Deviation]:
    model.save(folder)
    written, official = ({path.name: path for path in x.iterdir()} for x in (folder, model.folder))
    yield equal("files of a saved checkpoint", written.keys(), official.keys(), case)
    for name, path in official.items():
        if path.suffix == ".safetensors":
            yield equal("saved tensors, bit for bit", same(written[name], path), True, f"{name} of {case}")
        else:
            yield equal("saved configs", written[name].read_bytes(), path.read_bytes(), f"{name} of {case}")


def published(size: str) -> Check:
    """The tensors of the published sizes: that they, and no others, are what a config of that size asks for."""

    def shapes(model: Harmon, facts: Facts, _: Tensors) -> Iterator[Deviation]:
        headers = Headers({}, {}, Counter())
        for name, entry in facts.items():
            for number in range(entry["count"]):
                headers.shapes[name.replace("{i}", str(number))] = tuple(entry["shape"])
        config = read_sizes(Path(size), COMMON | PUBLISHED[size], headers, {})
        mar, (head, width) = config.mar, HEADS[size]
        ours = [(mar.head_depth, mar.head_width), mar.width, mar.buffers, mar.grid, config.side, config.repeats]
        yield equal("sizes that are read off the tensors", ours, [head, width, 64, 16, 512, 4])
        yield equal("strict load of the published names and shapes", fault(size, config, headers), "")
        for name in ("vae.quant_conv.bias", HEAD):
            less = {other: shape for other, shape in headers.shapes.items() if other != name}
            named = name in fault(size, config, replace(headers, shapes=less))
            yield equal("what is refused without one of them", named, name != HEAD, name)

    return shapes


def fault(size: str, config: HarmonConfig, headers: Headers) -> str:
    try:
        check(Path(size), config, headers)
    except ModelError as error:
        return str(error)
    return ""


def tokens(model: Harmon, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    ids = {token: model.tokenizer.convert_tokens_to_ids(token) for token in facts["special_ids"]}
    yield equal("special tokens", ids, facts["special_ids"])
    yield equal("size of the vocabulary", model.config.qwen.vocab_size, facts["vocab_size"])
    place = facts["image_token_index"]
    for case in facts["cases"]:
        for trained, kind in ((True, "training"), (False, "inference")):
            (text,) = chat.requested(prompt(case["prompt"]), words, trained)
            yield equal("texts of requests", text, case[f"text_{kind}"], f"{kind} {case['prompt'][:20]}")
            yield equal("ids", list(model.ids(str(text))), case[f"ids_{kind}"], f"{kind} {case['prompt'][:20]}")
    (blank,) = chat.requested([], words)
    yield equal("texts of requests", blank, facts["cfg"]["text"], "blank")
    yield equal("ids", list(model.ids(str(blank))), facts["cfg"]["ids"], "blank")
    for case in facts["reconstruction"]:
        name = f"{case['template']} {case['dropped']}"
        context = [Segment("seen"), *prompt(case["template"])]
        learned = context[:1] if case["dropped"] else context
        yield equal("ids", flat(model, chat.requested(learned, words, True), place), case["ids_training"], name)
        drawn = flat(model, chat.requested(context, words), place)
        yield equal("place of an image that is seen", drawn[3], place, name)
        yield equal("ids", drawn[:3] + drawn[4:], case["ids_sampling"], f"{name}, drawn")
    for case in facts["questions"]:
        said = flat(model, asked([Segment("seen"), Segment("text", text=case["question"])], words, chat.WORDS), place)
        reply = [*model.ids(case["answer"]), model.stop]
        (newline,) = model.ids("\n")
        yield equal("ids", [*said, *reply, newline], case["ids"], case["question"])
        yield equal("labels", [*[-100] * len(said), *reply, -100], case["labels"], case["question"])


def flat(model: Harmon, parts: Sequence[Part], place: int) -> list[int]:
    """Ids of a conversation, with ``place`` where an image stands."""
    return [i for part in parts for i in (model.ids(part) if isinstance(part, str) else [place])]


def fixture_config(model: Harmon, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    mar, autoencoder = model.config.mar, model.config.autoencoder
    ours = [mar.width, mar.depth, mar.heads, mar.decoder_width, mar.decoder_depth, mar.decoder_heads]
    names = ("embed_dim", "depth", "num_heads")
    recorded = [facts["mar_dims"][f"{part}_{name}"] for part in ("encoder", "decoder") for name in names]
    yield equal("sizes of MAR", ours, recorded)
    fields = facts["mar"]
    ours = [
        mar.channels,
        mar.buffers,
        mar.head_depth,
        mar.head_width,
        autoencoder.stride,
        mar.grid * autoencoder.stride,
    ]
    theirs = ("vae_embed_dim", "buffer_size", "diffloss_d", "diffloss_w", "vae_stride", "img_size")
    yield equal("sizes of the head and of latents", ours, [fields[name] for name in theirs])
    drawn = [model.config.mask_least, model.config.repeats]
    yield equal("what training draws", drawn, [fields["mask_ratio_min"], fields["diffusion_batch_mul"]])
    widths = [facts["vae"]["ch"] * times for times in facts["vae"]["ch_mult"]]
    yield equal("sizes of the autoencoder", list(autoencoder.widths), widths)
    yield equal("scale of latents", autoencoder.scale, facts["vae_scale"])
    yield equal("side of images", model.config.side, facts["image_size"])
    seen = math.prod(model.latent_grid((facts["image_size"],) * 2)) + mar.buffers
    yield equal("tokens of an image that is seen", seen, facts["image_tokens"])


@torch.no_grad()
def vae(model: Harmon, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    side, images = model.config.side, recorded_images(numbers)
    for number, image in enumerate(images):
        crop = image.crop(facts["cases"][number]["crop_box_xyxy"]).resize((side, side), Image.Resampling.BICUBIC)
        for how, made in (("crop", crop), ("pad", padded(image, side)), ("stretch", stretched(image, side))):
            yield close("pixels", to_pixels(made), numbers[f"{number}/{how}/pixels"], 1e-6, f"{number} {how}")
        yield equal("sizes", list(image.size), facts["cases"][number]["size_wh"], str(number))
        (latent,) = model.encode([image])
        yield close("latents", rows_of(latent[None]), numbers[f"{number}/stretch/latent"], 1e-4, f"{number} stretch")
        latents = encode_mean(model.autoencoder, numbers[f"{number}/pad/pixels"][None].to(model.device))
        yield close("latents", rows_of(latents), numbers[f"{number}/pad/latent"], 1e-4, f"{number} pad")
    pixels = numbers["0/stretch/pixels"][None].to(model.device)
    states = model.autoencoder.encoder(pixels)
    yield close("output of the encoder", states, numbers["0/stretch/encoder_output"], 1e-4)
    moments = model.autoencoder.encode(pixels).latent_dist.parameters
    yield close("moments", moments, numbers["0/stretch/moments"], 1e-4)
    latent = numbers["0/stretch/latent"].permute(0, 3, 1, 2).to(model.device)
    yield close("decoded", decode_latents(model.autoencoder, latent), numbers["0/stretch/decoded"], 1e-4)
    (image,) = model.decode(list(latent))
    yield close("bytes", levels(image), numbers["0/stretch/decoded_uint8"], 1.0)
    exact = to_image(numbers["0/stretch/decoded"][0])
    yield close("bytes of the same pixels", levels(exact), numbers["0/stretch/decoded_uint8"], 0.0)


def rows_of(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h, w, C), as the reference has latents."""
    return latents.permute(0, 2, 3, 1)


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


# --- networks


@torch.no_grad()
def pieces(model: Harmon, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    mar = model.network.mar
    for name in ("native", "interpolated"):
        latents = numbers[f"{name}/latent"].permute(0, 3, 1, 2).to(model.device)
        hidden = numbers[f"{name}/mask"].bool().to(model.device)
        images = [Masked.of(x, mask) for x, mask in zip(latents, hidden, strict=True)]
        whole = torch.stack([mar.encoder_inputs(Masked.seen(latent)) for latent in latents])
        yield close("inputs of the encoder", whole, numbers[f"{name}/encoder_input"], 1e-4, name)
        places = mar.positions(mar.encoder_pos_embed_learned, images[0].grid)[None]
        yield close("positions", places, numbers[f"{name}/encoder_pos_embed"], 1e-5, name)
        with outputs([*mar.encoder_blocks, *mar.decoder_blocks]) as states:
            encoded = mar.encode(images)
            blocks, states[:] = list(states), []
            yield close("output of the encoder", torch.stack(encoded), numbers[f"{name}/encoder_output"], 1e-4, name)
            read = torch.stack([model.into(one) for one in encoded])
            yield close("inputs of the language model", read, numbers[f"{name}/llm_input"], 1e-4, name)
            through = torch.stack(model.through(written(model, numbers), images))
            yield close("behind the language model", through, numbers[f"{name}/encoder_plus_llm"], 1e-4, name)
            states[:] = []
            decoded = torch.stack(mar.decode(list(through), images))
            yield close("output of the decoder", decoded, numbers[f"{name}/decoder_output"], 1e-4, name)
        for part, some in (("encoder", blocks), ("decoder", states)):
            for number, state in enumerate(some):
                yield close("blocks", state, numbers[f"{name}/{part}_block_{number}"], 1e-4, f"{name} {part} {number}")
        yield from last_states(model, numbers, name, read)
        seen = torch.stack([model.into(one) for one in mar.encode([Masked.seen(latent) for latent in latents])])
        yield close("images that are seen", seen, numbers[f"{name}/seen"], 1e-4, name)
    yield from head(model, numbers)


def written(model: Harmon, numbers: Tensors) -> Any:
    """The language model after the recorded contexts, without their padding."""
    rows = zip(numbers["context_ids"].long(), numbers["context_mask"].bool(), strict=True)
    context = model.language.empty(len(numbers["context_ids"]))
    model.language.extend(context, Rows.of([model.language.tokens(ids[mask].tolist()) for ids, mask in rows]))
    return context


def last_states(model: Harmon, numbers: Tensors, name: str, read: Tensor) -> Iterator[Deviation]:
    """Those of texts and images, each row by itself; rows of padding are meaningless."""
    recorded, masks = numbers[f"{name}/llm_last_hidden"], numbers["context_mask"].bool()
    for number, (ids, mask) in enumerate(zip(numbers["context_ids"].long(), masks, strict=True)):
        (states,) = model.language.whole([torch.cat([model.language.tokens(ids[mask].tolist()).inputs, read[number]])])
        kept = torch.cat([mask, torch.ones(read.shape[1], dtype=torch.bool)])
        yield close("last states", states, recorded[number][kept], 1e-4, f"{name} {number}")


def head(model: Harmon, numbers: Tensors) -> Iterator[Deviation]:
    network = model.network.mar.diffloss.net
    x, z, t = (numbers[f"head/{name}"].to(model.device) for name in ("x", "z", "t"))
    output = network(x, t, z)
    yield close("embedded times", network.time_embed(t), numbers["head/time_embed"], 1e-4)
    yield close("embedded conditions", network.cond_embed(z), numbers["head/cond_embed"], 1e-4)
    yield close("output of the head", output, numbers["head/output"], 1e-4)
    half = len(x) // 2
    times = torch.tensor([17, 333, 800], device=model.device).repeat(2)
    both = network(x[:half].repeat(2, 1), times, z)
    noise, v = guided(both, 2, 3.0)
    recorded = numbers["head/guided_output"].chunk(2)[0]
    yield close("guided output of the head", torch.cat([noise, v], dim=1), recorded, 1e-4)
    step = numbers["head/step_index"].long().to(model.device)
    predicted, v = network(x, respaced(100).times.to(x.device)[step], z).chunk(2, dim=1)
    mean, log_variance = reverse_step(x, predicted, v, step, 100)
    yield close("mean of a reverse step", mean, numbers["head/step_mean"], 1e-3)
    yield close("log variance of a reverse step", log_variance, numbers["head/step_log_variance"], 1e-4)
    tables, recorded = respaced(100), numbers["head/step_pred_x0"].to(x.device)  # of up to 2e4, at the last step
    clean, share = tables.clean(x, predicted, step), tables.at(tables.kept.sqrt(), step)
    yield close("clean tokens of a reverse step, times their share", share * clean, share * recorded, 1e-4)


def schedule(model: Harmon, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for name in ("sample", "official"):
        recorded = facts["sample_timestep_map" if name == "sample" else "official_timestep_map_100"]
        yield equal("steps among the 1000", respaced(len(recorded)).times.tolist(), recorded, name)
    steps = len(numbers["sample/betas"])
    for name, tables in (("train", diffusion()), ("sample", respaced(steps))):
        for ours, theirs in TABLES.items():
            yield close("tables", getattr(tables, ours), numbers[f"{name}/{theirs}"], 1e-9, f"{name} {theirs}")


# --- drawing


class Recorded:
    """The random numbers of image ``number`` of a run."""

    def __init__(self, numbers: Tensors, run: str, number: int) -> None:
        self.numbers, self.run, self.number = numbers, run, number

    def order(self, count: int) -> Tensor:
        return self.numbers[f"{self.run}/order"][self.number].long()

    def noise(self, iteration: int, count: int, channels: int, steps: int) -> Tensor:
        rows = slice(self.number * count, (self.number + 1) * count)
        first, more = (self.numbers[f"{self.run}/{iteration}/{name}"] for name in ("initial_noise", "step_noise"))
        return torch.cat([first[None, rows], more[:, rows]])


def sampler(model: Harmon, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    cases = json.loads((golden(model) / "tokens.json").read_text())["cases"]
    images = recorded_images(load_file(golden(model) / "vae.safetensors"))
    for name, case in facts.items():
        count, grid = case["images"], tuple(case["grid"])
        if "template" in case:
            seen = Segment("seen", image=images[int(case["image"].partition("/")[0])])
            context = [seen, *prompt(case["template"])]
        else:
            context = prompt(cases[case["case"]]["prompt"])
        steps = len(numbers[f"{name}/0/step_noise"])
        sampling = Sampling(
            timesteps=case["iterations"] + 1,
            guidance=case["guidance"],
            decoder_steps=steps,
            temperature=case["temperature"],
        )
        left = left_after(math.prod(grid), case["iterations"])
        drawn = [before - after for before, after in zip([math.prod(grid), *left], left, strict=False)]
        yield equal("tokens drawn in each iteration", drawn, case["predicted_per_image"], name)
        chances = [Recorded(numbers, name, number) for number in range(count)]
        blank = torch.zeros(count, model.config.mar.channels, *grid)
        hidden = torch.ones(count, math.prod(grid), dtype=torch.bool)
        with passed(model) as seen_passes:
            latents = model.sampled(
                [context] * count, blank, hidden, sampling, chances, schedule=case["guidance_schedule"]
            )
        flat_tokens = latents.cpu().flatten(2).transpose(1, 2)
        for number, (masks, conditions) in enumerate(seen_passes):
            yield equal("masks", masks, numbers[f"{name}/{number}/mask"].bool(), f"{name} {number}")
            scale = guidance_at(case["guidance_schedule"], case["guidance"], left[number], math.prod(grid))
            yield close("guidance", scale, case["guidance_per_iteration"][number], 1e-6, f"{name} {number}")
            now = masks & ~(seen_passes[number + 1][0] if number + 1 < len(seen_passes) else torch.zeros_like(masks))
            yield close("tokens", flat_tokens[now], numbers[f"{name}/{number}/tokens"], 1e-3, f"{name} {number}")
            if f"{name}/{number}/z" in numbers:
                recorded = numbers[f"{name}/{number}/z"]
                yield close("conditions", torch.cat([z[now] for z in conditions]), recorded, 1e-3, f"{name} {number}")
        yield close("latents", rows_of(latents), numbers[f"{name}/latent"], 1e-3, name)
        with torch.no_grad():
            pixels = decode_latents(model.autoencoder, latents.to(model.device))
        yield close("decoded", pixels, numbers[f"{name}/pixels"], 1e-3, name)
        made = torch.stack([levels(image) for image in model.decode(list(latents))])
        yield close("bytes", made, numbers[f"{name}/image"], 1.0, name)


@contextmanager
def passed(model: Harmon) -> Iterator[list[tuple[Tensor, list[Tensor]]]]:
    """Within the block, of each pass of MAR's decoder which tokens were hidden (B, n), and what all of them would be
    drawn after (B, n, E), for each branch of guidance."""
    passes: list[tuple[Tensor, list[Tensor]]] = []
    decode = model.network.mar.decode

    def watched(states: Sequence[Tensor], images: Sequence[Masked]) -> list[Tensor]:
        decoded = decode(states, images)
        distinct = list({id(image): image for image in images}.values())
        branches = torch.stack(decoded).unflatten(0, (-1, len(distinct)))
        passes.append((torch.stack([image.hidden.cpu() for image in distinct]), list(branches.cpu())))
        return decoded

    model.network.mar.decode = watched  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del model.network.mar.decode


# --- understanding


@torch.no_grad()
def understanding(model: Harmon, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    image = Image.fromarray(numbers["image"].numpy())
    segment = Segment("seen", image=image)
    seen = model.looked_at([segment], drawn=False)[0].inputs
    yield close("image that is seen", seen, numbers["seen"], 1e-4)
    for name, case in facts.items():
        context = [segment, Segment("text", text=case["question"])]
        before, _, after = asked(context, words, chat.WORDS)
        yield equal("ids", list(model.ids(str(before))), case["ids_before"], name)
        yield equal("ids", list(model.ids(str(after))), case["ids_after"], name)
        yield equal("tokens of an image", len(seen), case["image_tokens"], name)
        ids = [model.language.tokens(case[key]).inputs for key in ("ids_before", "ids_after")]
        (states,) = model.language.whole([torch.cat([ids[0], seen, ids[1]])])
        yield close("last states", states, numbers[f"{name}/last_hidden"], 1e-4, name)
        yield close("logits", model.language.logits(states), numbers[f"{name}/logits"], 1e-3, name)
        greedy = case["greedy_ids"]
        (reply,) = model.write([context], Decoding(max_tokens=len(greedy) + 1), [0])
        yield equal("greedy ids", list(reply.ids), greedy, name)
        logits = numbers[f"{name}/greedy_logits"]
        logprobs = logits.log_softmax(1).gather(1, torch.tensor(greedy)[:, None])[:, 0]
        yield close("log-probabilities of greedy ids", reply.logprobs, logprobs, 1e-3, name)
        (state, last), made = model.read([context]), []
        for token in greedy:
            made.append(model.language.logits(last)[0])
            last = model.language.step(state, torch.tensor([token], device=model.device))[:, -1]
        yield close("greedy logits", torch.stack(made), logits, 1e-3, name)
        yield equal("ids of a continuation", list(model.ids(case["continuation"])), case["continuation_ids"], name)
        (score,) = model.score([context], [case["continuation"]])
        yield close("log-probabilities", score, torch.tensor([sum(case["continuation_logprobs"])]), 1e-3, name)


# --- training


def training(model: Harmon, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    recorded = json.loads((golden(model) / "tokens.json").read_text())
    for name in ("text2image", "reconstruct"):
        context = contexts_of(model, recorded, facts, name)
        yield from of_images(model, facts, numbers, name, context)
    yield from of_replies(model, recorded, facts["image2text"], numbers)
    yield from srum_losses(model, facts["srum"], numbers, contexts_of(model, recorded, facts, "text2image"))


def contexts_of(model: Harmon, recorded: Facts, facts: Facts, name: str) -> list[list[Segment]]:
    """What each image of a case is drawn after; the last prompt is dropped."""
    if name == "reconstruct":
        images = recorded_images(load_file(golden(model) / "vae.safetensors"))
        chosen = [recorded["reconstruction"][number] for number in facts[name]["cases"]]
        contexts = zip(images, chosen, strict=True)
        return [
            [Segment("seen", image=x), Segment("text", text=case["template"], dropped=case["dropped"])]
            for x, case in contexts
        ]
    return [*(prompt(case["prompt"]) for case in recorded["cases"][:2]), []]


def of_images(
    model: Harmon, facts: Facts, numbers: Tensors, name: str, contexts: Sequence[Sequence[Segment]]
) -> Iterator[Deviation]:
    ids, present = numbers[f"{name}/input_ids"], numbers[f"{name}/attention_mask"].bool()
    place = json.loads((golden(model) / "tokens.json").read_text())["image_token_index"]
    for number, context in enumerate(contexts):
        kept = [segment for segment in context if not segment.dropped]
        ours = flat(model, chat.requested(kept, words, True), place)
        yield equal("ids", ours, ids[number][present[number]], f"{name} {number}")
    order, mask = numbers[f"{name}/order"].long(), numbers[f"{name}/mask"].bool()
    share = facts[name]["mask_rate"]
    count = math.ceil(round(share * mask.shape[1], 4))
    yield equal("masks", torch.zeros_like(mask).scatter(1, order[:, :count], True), mask, name)
    batch = packed(model, numbers, name, contexts)
    forward = model.forward(batch)
    mse, vb = numbers[f"{name}/mse"], numbers[f"{name}/vb"]
    hidden = mask.flatten()
    yield close("l_mse", forward.image_error, mse.mean(0).flatten()[hidden], 1e-5, name)
    yield close("l_vb", forward.bound, vb.mean(0).flatten()[hidden], 1e-4, name)
    yield from of_all_tokens(model, numbers, name, batch)
    cells = mask.nonzero()
    yield equal("cells", torch.stack([forward.image_segment, forward.cell], dim=1), cells, name)
    loss = (forward.image_error + forward.extra["variance"]).mean()
    yield close("losses", loss, facts[name]["loss"], 1e-5, name)
    yield from gradients(model, loss, facts[name], numbers, name)
    if name == "reconstruct":
        with whole_gradient(model):
            forward = model.forward(batch)
        loss = (forward.image_error + forward.extra["variance"]).mean()
        case = "reconstruct_true_gradient"
        yield close("losses", loss, facts[case]["loss"], 1e-5, case)
        yield from gradients(model, loss, facts[case], numbers, case)


def packed(model: Harmon, numbers: Tensors, name: str, contexts: Sequence[Sequence[Segment]]) -> Sequence[TrainingRow]:
    """The recorded images behind their contexts, with the recorded masks, times and noise."""
    latents = encode_mean(model.autoencoder, numbers[f"{name}/pixels"].to(model.device))
    mask, t, noise = (numbers[f"{name}/{part}"] for part in ("mask", "t", "noise"))
    hows = [
        Masking(hidden, t[:, number, hidden].long(), noise[:, number, hidden])
        for number, hidden in enumerate(mask.bool())
    ]
    samples = [
        [*context, Segment("noisy", latent=latent, loss=True)]
        for context, latent in zip(contexts, latents, strict=True)
    ]
    return model.pack(samples, hows)


@torch.no_grad()
def of_all_tokens(model: Harmon, numbers: Tensors, name: str, batch: Sequence[TrainingRow]) -> Iterator[Deviation]:
    """What the head makes of all tokens, those that are visible among them, whose errors the loss leaves out."""
    with passed(model) as passes:
        model.forward(batch)
    ((_, (conditions,)),) = passes
    latents = encode_mean(model.autoencoder, numbers[f"{name}/pixels"].to(model.device))
    clean = latents.flatten(2).transpose(1, 2).flatten(0, 1)
    z = conditions.flatten(0, 1).to(model.device)
    for repeat, (t, noise) in enumerate(zip(numbers[f"{name}/t"], numbers[f"{name}/noise"], strict=True)):
        t, noise = t.flatten().long().to(model.device), noise.flatten(0, 1).to(model.device)
        x = diffusion().noised(clean, noise, t)
        predicted, v = model.network.mar.diffloss.net(x, t, z).float().chunk(2, dim=1)
        shape = numbers[f"{name}/mse"][repeat].shape
        error = (predicted - noise).square().mean(1).view(shape)
        yield close("l_mse of all tokens", error, numbers[f"{name}/mse"][repeat], 1e-5, f"{name} {repeat}")
        bound = variational_bound(clean, x, predicted, v, t).view(shape)
        yield close("l_vb of all tokens", bound, numbers[f"{name}/vb"][repeat], 1e-4, f"{name} {repeat}")


def of_replies(model: Harmon, recorded: Facts, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    images = recorded_images(load_file(golden(model) / "vae.safetensors"))
    (newline,) = model.ids("\n")
    samples = []
    for number, pixels in enumerate(numbers["image2text/pixels"]):
        case, image = recorded["questions"][number], images[number]
        yield close("pixels", to_pixels(padded(image, model.config.side)), pixels, 1e-6, f"image2text {number}")
        question, reply = Segment("text", text=case["question"]), Segment("text", text=case["answer"], loss=True)
        samples.append([Segment("seen", image=image), question, reply])
        present = numbers["image2text/attention_mask"][number].bool()
        ids = [*flat(model, asked(samples[-1][:2], words, chat.WORDS), recorded["image_token_index"])]
        labels = [-100] * len(ids) + [*model.ids(case["answer"]), model.stop, -100]
        ids += [*model.ids(case["answer"]), model.stop, newline]
        yield equal("ids", ids, numbers["image2text/input_ids"][number][present], f"image2text {number}")
        yield equal("labels", labels, numbers["image2text/labels"][number][present], f"image2text {number}")
    forward = model.forward(model.pack(samples, []))
    recorded_labels = numbers["image2text/labels"]
    learned = recorded_labels[recorded_labels >= 0]
    yield equal("labels", forward.labels, learned, "image2text, those with a loss")
    loss = forward.text_error.mean()
    yield close("losses", loss, facts["loss"], 1e-5, "image2text")
    yield from gradients(model, loss, facts, numbers, "image2text")


def srum_losses(
    model: Harmon, facts: Facts, numbers: Tensors, contexts: Sequence[Sequence[Segment]]
) -> Iterator[Deviation]:
    """Eq. 1-3 through our objective: the reward weights errors, the bound stays as it is."""
    forward = model.forward(packed(model, numbers, "text2image", contexts))
    credit = numbers["srum/alpha"][:, None] * numbers["srum/R"].flatten(1)
    parts = srum_parts(model, forward, credit, facts["lambda_c"])
    recorded = facts["parts"]
    yield close("losses", parts["reward"].mean(), recorded["reward"], 1e-5, "srum reward")
    yield close("losses", forward.image_error.mean(), recorded["reference"], 1e-5, "srum reference")
    yield close("losses", forward.bound.mean(), recorded["vb"], 1e-5, "srum vb")
    total = torch.stack(list(parts.values())).sum(0).mean()
    yield close("losses", total, facts["total"], 1e-5, "srum total")
    plain = (forward.image_error + forward.bound).mean()
    yield close("losses", plain, facts["loss"], 1e-5, "srum plain")
    uniform = srum_parts(model, forward, torch.ones_like(credit), 0.0)
    summed = torch.stack(list(uniform.values())).sum(0).mean()
    yield close("losses", summed, facts["uniform_is_plain"], 1e-5, "srum uniform")
    hidden = numbers["text2image/mask"].bool().float().mean().item()
    yield close("share of hidden tokens", hidden, facts["mask_rate"], 1e-6, "srum")
    yield from gradients(model, total, facts, numbers, "srum")


def srum_parts(model: Harmon, forward: HarmonForward, credit: Tensor, weight: float) -> dict[str, Tensor]:
    own = credit.to(model.device)[forward.image_segment, forward.cell]
    tokens_ = Tokens("image", forward.image_error, own)
    return Srum().terms(tokens_, SrumConfig(constraint_weight=weight)) | forward.extra


def gradients(model: Harmon, loss: Tensor, facts: Facts, numbers: Tensors, name: str) -> Iterator[Deviation]:
    """Norms of the gradients of all parameters, and some in full."""
    named = dict(model.named_parameters())
    given = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    found = {key: value for key, value in zip(named, given, strict=True) if value is not None}
    without = [UNREAD, *(key for key in named if key not in found)]
    yield equal("parameters without a gradient", sorted(without), sorted(facts["no_grad"]), name)
    total = math.hypot(*(value.norm().item() for value in found.values()))
    yield relative("total gradient norm", total, facts["total_grad_norm"], 1e-3, name)
    yield equal("parameters with a gradient", sorted(found), sorted(facts["grad_norms"]), name)
    for key, norm in facts["grad_norms"].items():
        if norm > 1e-6:  # below it is rounding: biases of keys have a true gradient of zero
            yield relative("gradient norms", found[key].norm().item(), norm, 1e-3, f"{name} {key}")
    for key in [key for key in numbers if key.startswith(f"{name}/grad/")]:
        yield close("gradients", found[key.removeprefix(f"{name}/grad/")], numbers[key], 1e-4, key)


@contextmanager
def whole_gradient(model: Harmon) -> Iterator[None]:
    """Within the block, all of the gradient reaches the encoder through images that are seen."""
    model.seen_gradient = 1.0
    try:
        yield
    finally:
        del model.seen_gradient


# --- looking inside


def recorded_images(numbers: Mapping[str, Tensor]) -> list[Image.Image]:
    """The images of the fixture of the autoencoder, in order."""
    return [Image.fromarray(numbers[name].numpy()) for name in sorted(numbers) if name.startswith("image_")]


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "checkpoint_shapes": (checkpoint, JSON),
    "fixture_config": (fixture_config, JSON),
    "official_shapes_0_5b": (published("0_5b"), JSON),
    "official_shapes_1_5b": (published("1_5b"), JSON),
    "tokens": (tokens, JSON),
    "vae": (vae, BOTH),
    "pieces": (pieces, TENSORS),
    "schedule": (schedule, BOTH),
    "sampler": (sampler, BOTH),
    "understanding": (understanding, BOTH),
    "training": (training, BOTH),
}  # fmt: skip

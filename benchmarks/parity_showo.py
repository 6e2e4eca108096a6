"""Show-o's part of ``benchmarks/parity.py``: every quantity of a folder of fixtures such as tests/golden/showo."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from benchmarks.parity import BOTH, JSON, TENSORS, Check, Deviation, Facts, Tensors, close, equal, relative
from srum.errors import ModelError
from srum.models.base import Decoding, DiscreteForward, Distance, Sampling, Segment
from srum.models.checkpoints import Headers, require_fit
from srum.models.precision import Precision
from srum.models.showo import Showo
from srum.models.showo.checkpoint import empty_network, shapes_of
from srum.models.showo.config import FACTOR, PhiConfig, ShowoConfig
from srum.models.showo.language import Rows, embedded, logits, states
from srum.models.showo.magvit import Magvit, MagvitSizes
from srum.models.showo.model import shrink, signed
from srum.models.showo.sampler import Masks, Schedule, cosine, fill, still_masked
from srum.models.showo.sequence import QUESTIONS, TEMPLATE, Row, Span
from srum.run import find_method
from srum.train.methods.region_nft import RegionNftConfig
from srum.train.methods.sft import SftConfig
from srum.train.methods.srum import SrumConfig
from srum.train.objective import Terms, Tokens

IGNORED = -100
SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": lambda r: (1 - r).clamp(min=1e-6),
    "pow2": lambda r: (1 - r**2).clamp(1e-6, 1),
    "sigmoid": lambda r: (
        (torch.tensor(3.0).sigmoid() - (6 * r - 3).sigmoid())
        / (torch.tensor(3.0).sigmoid() - torch.tensor(-3.0).sigmoid())
    ).clamp(1e-6, 1),
}


class Showos:
    """The two checkpoints of a folder of fixtures: ``vq`` sees images by their ids, ``clip`` by features."""

    def __init__(self, folder: Path, device: str, precision: Precision) -> None:
        self.folder, self.precision = folder, precision
        self.vq, self.clip = (Showo.load(folder / name, device, precision) for name in ("show-o", "show-o-w-clip-vit"))
        self.device = self.vq.device
        self.images = [
            Image.fromarray(load_file(folder.parent / "vq.safetensors")[f"image_{number}"].numpy())
            for number in range(3)
        ]
        self.facts, self.training = (
            json.loads((folder.parent / f"{name}.json").read_text()) for name in ("tokens", "training")
        )

    def ids_of(self, number: int) -> Span:
        """An image of the fixtures as its ids."""
        return self.vq.layout.seen(self.vq.encode([self.images[number]])[0])

    def features_of(self, number: int) -> Span:
        """The same as features."""
        return Span(features=self.clip.features(self.clip.clip_pixels(self.images[number])[None])[0])


def load(checkpoint: Path, device: str, precision: Precision) -> Showos:
    """The models of a folder of fixtures."""
    return Showos(checkpoint, device, precision)


def prompt(text: str) -> list[Segment]:
    return [Segment("text", text=text, droppable=True)]


def unpadded(ids: Sequence[int], pad: int) -> list[int]:
    """Without padding on the left and on the right."""
    kept = [place for place, token in enumerate(ids) if token != pad]
    return list(ids[kept[0] : kept[-1] + 1])


# --- the checkpoint and what stands before the networks


def checkpoint(model: Showos, shapes: Facts, _: Tensors) -> Iterator[Deviation]:
    """The folders load by the strict rule, and a saved one has the same files, names, shapes and numbers."""
    for name, own in (("show-o", model.vq), ("show-o-w-clip-vit", model.clip)):
        here = {key: list(shape) for key, shape in own.headers.shapes.items()}
        yield equal("names and shapes of the tensors", here, shapes[name], name)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "saved"
            own.save(folder)
            written, official = (load_file(x / "pytorch_model.safetensors") for x in (folder, own.folder))
            yield equal("saved tensors, their names", written.keys(), official.keys(), name)
            same = (torch.equal(written[key], value) for key, value in official.items())
            yield equal("saved tensors, bit for bit", all(same), True, name)
            configs = [json.loads((x / "config.json").read_text()) for x in (folder, own.folder)]
            yield equal("saved configs", *configs, name)
            again = Showo.load(folder)
            yield equal("a saved folder loads where it stands", again.config.raw, own.config.raw, name)
    for part, module in (("magvitv2", model.vq.magvit), ("clip", model.clip.tower)):
        expected = {key.removeprefix("vision_model."): tuple(shape) for key, shape in shapes[part].items()}
        ours = shapes_of(module)
        rest = {key: shape for key, shape in expected.items() if not key.startswith("quantize.")}
        yield equal("names and shapes of the parts", ours, rest, part)


def official_shapes(model: Showos, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    """The tensors of the published sizes: that they, and no others, are what such a checkpoint must have."""
    headers = Headers({}, {}, Counter())
    for name, entry in facts["show-o-w-clip-vit"].items():
        shape, count = (entry["shape"], entry["count"]) if isinstance(entry, dict) else (entry, 1)
        for number in range(count if "{i}" in name else 1):
            headers.shapes[name.replace("{i}", str(number))] = tuple(shape)
    raw = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192}
    phi = PhiConfig(**raw, vocab_size=58498, qk_layernorm=True)
    config = ShowoConfig(phi, 50295, 8192, 1024, True, 128, 128, {})
    network = empty_network(config, headers)
    yield equal("strict load of the published names and shapes", _fault(headers, shapes_of(network)), "")
    short = replace(headers, shapes={n: s for n, s in headers.shapes.items() if n != "mm_projector.2.bias"})
    yield equal("what is refused without one", "mm_projector.2.bias" in _fault(short, shapes_of(network)), True)
    count = sum(math.prod(shape) for name, shape in shapes_of(network).items() if name.startswith("showo."))
    yield equal("parameters of the language model", count, facts["parameters"]["language model with head"])
    yield equal("ids", [config.special("<|soi|>"), config.first_code, config.mask], [50296, 50305, 58497])
    magvit = Headers({}, {}, Counter())
    magvit.shapes.update({name: tuple(shape) for name, shape in facts["magvitv2"].items()})
    with torch.device("meta"):
        built = shapes_of(Magvit(sizes := MagvitSizes.of(magvit)))
    tables = {"quantize.embedding": (2**sizes.bits, sizes.bits), "quantize.power_vals": (sizes.bits,)}
    yield equal("strict load of the published image tokenizer", _fault(magvit, built | tables), "")


def _fault(headers: Headers, expected: Mapping[str, tuple[int, ...]]) -> str:
    try:
        require_fit(Path("published"), headers, expected)
    except ModelError as error:
        return str(error)
    return ""


@torch.no_grad()
def vq(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    own, magvit = model.vq, model.vq.magvit
    sizes = [list(Image.fromarray(numbers[f"image_{number}"].numpy()).size) for number in range(3)]
    yield equal("sizes of the images", sizes, facts["sizes_wh"])
    pixels = torch.stack([signed(own.resized(image)) for image in model.images])
    yield close("pixels", pixels[1:, :, ::2, ::2], numbers["pixel_values_1_2_every_2nd"], 1e-6)
    z = magvit.encoder(pixels.to(own.device))
    yield close("z", z, numbers["z"], 1e-4)
    yield close("smallest z", z.abs().min(), facts["min_abs_z"], 1e-4)
    ids = torch.stack(own.encode(model.images))
    yield equal("ids", ids.flatten(1), numbers["ids"])
    yield equal("grid", list(own.latent_grid((own.config.side, own.config.side))), facts["grid"])
    rows = magvit.signs(torch.arange(len(facts["codebook_first_rows"]))[:, None, None].to(own.device))[:, :, 0, 0]
    yield equal("codes", rows, facts["codebook_first_rows"])
    yield equal("places of the bits", [2 ** int(x) for x in magvit._places(own.device).flatten()], facts["power_vals"])
    decoded = magvit.decode(ids[:, 0].to(own.device))
    yield close("decoded", decoded[:1], numbers["decoded_0"], 1e-4)
    yield close("decoded", decoded[1:, :, ::2, ::2], numbers["decoded_1_2_every_2nd"], 1e-4, "1, 2")
    made = torch.stack([torch.tensor(list(image.tobytes())) for image in own.decode(list(ids))])
    yield close("images", made, numbers["image_uint8"].flatten(1), 1.0)
    rectangle = numbers["rect_ids"].view(1, *facts["rect_grid"])
    yield close("decoded rectangles", magvit.decode(rectangle.to(own.device)), numbers["rect_decoded"], 1e-4)
    (image,) = own.decode([rectangle])
    yield equal("size of a decoded rectangle", list(image.size), list(numbers["rect_decoded"].shape[:1:-1]))


def tokens(model: Showos, facts: Facts, _: Tensors) -> Iterator[Deviation]:
    layout, config = model.vq.layout, model.vq.config
    names = {"<|pad|>": "[PAD]"}
    ours = {
        name: layout.bos if name in ("<|sot|>", "<|eot|>") else config.special(names.get(name, name))
        for name in facts["special_ids"]
    }
    yield equal("special tokens", ours, facts["special_ids"])
    yield equal("first image id", config.first_code, facts["image_token_offset"])
    yield equal("mask", config.mask, facts["mask_token_id"])
    yield equal("ids of the system prompt", list(layout.shown(Span(features=torch.zeros(1, 1))).spans[0].ids[1:-1]),
                facts["system_prompt_ids"])  # fmt: skip
    for text, ids in facts["text_ids"].items():
        yield equal("ids of texts", list(model.vq.ids(text)), ids, text[:20])
    blank = [config.mask] * config.cells
    for text, ids in zip(facts["prompts"], facts["t2i_gen"], strict=True):
        row = layout.drawing(text, blank)
        yield equal("rows of prompts", row.ids(), unpadded(ids, layout.pad), text[:20])
    yield equal("row without a prompt", layout.drawing(None, blank).ids(), unpadded(facts["t2i_uncond"], layout.pad))
    for text, ids, labels in zip(facts["lm"]["texts"], facts["lm"]["ids"], facts["lm"]["labels"], strict=True):
        yield from same_labels("rows of texts", *text_row(model, text), ids, labels, layout.pad)
    captions = facts["mmu_caption_train"]
    for number, text in enumerate(captions["texts"]):
        ids, labels = captions["ids"][number], captions["labels"][number]
        yield from same_labels("rows of captions", *caption_row(model, captions["images"][number], text), ids, labels,
                               layout.pad)  # fmt: skip
    seen = {False: Span([0]), True: Span(features=torch.zeros(1, 1))}
    for number, text in enumerate(facts["questions"]):
        yield equal("questions", layout.question(text, seen[False])[1:], facts["mmu_question_vq_text"][number])
        by_features = facts["mmu_question_clip"][number]
        yield equal("questions, features", layout.question(text, seen[True]), by_features["ids"])
        yield equal("words of a question", QUESTIONS[True].format(text), by_features["text"])
    for case in facts["llava"]:
        yield from same_labels("conversations", *conversation(model, case["turns"]), case["ids"], case["labels"])
    yield equal("rows of two images", mixed_row(model).ids(), unpadded(facts["mixed_ids"], layout.pad))


def same_labels(
    what: str, ours: list[int], our_labels: list[int], ids: list[int], labels: list[int], pad: int | None = None
) -> Iterator[Deviation]:
    """Ids and labels without padding."""
    length = len(ids) if pad is None else len(unpadded(ids, pad))
    yield equal(what, ours, ids[:length], str(length))
    yield equal(f"labels of {what}", our_labels, labels[:length], str(length))
    yield equal(f"labels of padding in {what}", set(labels[length:]) - {IGNORED}, set())


def text_row(model: Showos, text: str) -> tuple[list[int], list[int]]:
    ids = [*model.vq.layout.begun(text), model.vq.bos]
    return ids, ids


def caption_row(model: Showos, number: int, text: str) -> tuple[list[int], list[int]]:
    before = model.vq.layout.shown(model.ids_of(number)).ids().tolist()
    said, labels = text_row(model, text)
    return [*before, *said], [IGNORED] * len(before) + labels


def conversation(model: Showos, turns: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids and labels of questions and answers, as the reference trains on them."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        asked = list(model.vq.ids(QUESTIONS[True].format(question.replace("<image>", "").strip())))
        said = [*model.vq.ids(f" {answer}"), model.vq.bos]
        ids, labels = [*ids, *asked, *said], [*labels, *[IGNORED] * len(asked), *said]
    return ids, labels


def mixed_row(model: Showos) -> Row:
    """A text and an image, then another of each."""
    layout, facts = model.vq.layout, model.facts
    first = layout.drawing(facts["prompts"][0], model.ids_of(0).ids)
    text = Span([*layout.begun(facts["prompts"][1]), layout.bos])
    return Row([*first.spans, text, Span([layout.soi, *model.ids_of(1).ids, layout.eoi], whole=True)])


def masks(model: Showos, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    facts, layout = model.facts, model.vq.layout
    blank = [model.vq.config.mask] * model.vq.config.cells
    for number, text in enumerate(facts["prompts"]):
        yield same_mask("t2i_gen", layout.drawing(text, blank), numbers["t2i_gen"][number], left=True)
    for number, text in enumerate(facts["lm"]["texts"]):
        yield same_mask("lm", Row([Span(text_row(model, text)[0])]), numbers["lm"][number])
    captions = facts["mmu_caption_train"]
    for number, text in enumerate(captions["texts"]):
        shown = layout.shown(model.ids_of(captions["images"][number])).spans
        row = Row([*shown, Span(text_row(model, text)[0])])
        yield same_mask("mmu_caption_train", row, numbers["mmu_caption_train"][number])
    features = model.features_of(0)
    shown, mask = model.clip.layout.shown(features).spans, numbers["mmu_clip"][0]
    rest = len(mask) - sum(map(len, shown))
    yield same_mask("mmu_clip", Row([*shown, Span([0] * rest)]), mask)
    yield same_mask("mixed_lvg", mixed_row(model), numbers["mixed_lvg"][0], left=True, text_rows=False)
    for number, row in enumerate(reca_rows(model, True)):
        yield same_mask("reca_clip", row, numbers["reca_clip"][number])
    yield same_mask("reca_vq", next(reca_rows(model, False)), numbers["reca_vq"][0], left=True)


def same_mask(name: str, row: Row, mask: Tensor, left: bool = False, text_rows: bool = True) -> Deviation:
    """What the tokens of a row see; those of padding, whose output nobody uses, are left out, as are rows of text that
    see padding, which changes nothing of theirs."""
    ours, n = row.visible(), row.length
    theirs = (mask[-n:, -n:] if left else mask[:n, :n]).bool()
    unseen = torch.tensor([span.unseen for span in row.spans for _ in range(len(span))])
    return equal(f"masks, {name}", ours[~unseen], theirs[~unseen])


# --- the language model


@torch.no_grad()
def forward(model: Showos, _: Facts, numbers: Tensors) -> Iterator[Deviation]:
    own, cells = model.vq, model.vq.config.cells
    layers = own.network.showo.model.layers
    for number, ids in enumerate(numbers["ids"].tolist()):
        kept = unpadded(ids, own.layout.pad)
        laid = Rows.of([Row([Span(kept[: -cells - 2]), Span(kept[-cells - 2 :], whole=True)])], own.device)
        first = layers[0].self_attn
        with outputs([*layers, first.q_layernorm, first]) as made:
            hidden = states(own.network, laid)
        predicted = logits(own.network, hidden)[0]
        yield close("logits of images", predicted[-cells - 1 : -1], numbers["image_logits"][number], 1e-4, str(number))
        if number == 0:
            n, (query, attention, *after) = len(kept), made
            yield close("logits of texts", predicted[-cells - 6 : -cells - 1], numbers["text_logits_0"], 1e-4)
            for place, state in enumerate([embedded(own.network, laid), *after[:-1], hidden]):
                yield close("states after each layer", state[0], numbers[f"hidden_{place}"][-n:], 1e-4, str(place))
            yield close("queries", query[0], numbers["layer_0_query_normed"][:, -n:], 1e-4)
            yield close("attention", attention[0], numbers["layer_0_attention"][-n:], 1e-4)


@contextmanager
def outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What comes out of modules within the block, in the order in which they are through."""
    made: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: made.append(out[0] if isinstance(out, tuple) else out))
        for module in modules
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


# --- drawing


def sampler(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for name, case in facts.items():
        if name == "schedule_tables":
            yield from schedules(case)
            continue
        own = model.clip if name == "clip_model" else model.vq
        schedule, steps, config = SCHEDULES[case["schedule"]], case["steps"], own.config
        contexts = [prompt(text) for text in case["prompts"]]
        sampling = Sampling(guidance=case["guidance"] + 1, timesteps=steps + 1, temperature=case["temperature"])
        codes = torch.zeros(len(contexts), config.cells, dtype=torch.long, device=own.device)
        hidden = torch.ones_like(codes, dtype=torch.bool)
        if name == "inpaint":
            codes = own.encode([model.images[case["image"]]])[0].flatten()[None].long().to(own.device)
            hole, grid = hole_of(numbers["inpaint/mask_image"], own)
            yield close("mask on the grid", grid, numbers["inpaint/mask_grid"], 1e-5)
            yield equal("hole", hole.flatten()[None], numbers["inpaint/hole"])
            hidden = hole.flatten()[None].to(own.device)
        logits_of, taken, guided = own.guided(contexts, sampling), [], []

        def watched(
            codes: Tensor, hidden: Tensor, of: Callable[[Tensor, Tensor], Tensor] = logits_of,
            taken: list[Tensor] = taken, guided: list[Tensor] = guided, config: ShowoConfig = config,
        ) -> Tensor:  # fmt: skip
            taken.append(torch.where(hidden, config.mask, config.first_code + codes).cpu())
            guided.append((made := of(codes, hidden)).cpu())
            return made

        recorded = iter(zip(numbers[f"{name}/exponential"], numbers[f"{name}/uniform"], strict=True))
        made = fill(watched, codes, hidden, steps, case["temperature"], lambda _, r=recorded: next(r), schedule)
        yield equal("ids before each step", torch.stack(taken), numbers[f"{name}/input_ids"], name)
        masked = [(ids == config.mask).sum(1).tolist() for ids in taken]
        yield equal("masked before each step", masked, case["masked_before_each_step"], name)
        if f"{name}/guided_logits" in numbers:
            yield close("guided logits", torch.stack(guided), numbers[f"{name}/guided_logits"], 1e-3, name)
        yield equal("final ids", made, numbers[f"{name}/final_ids"], name)


def schedules(tables: Facts) -> Iterator[Deviation]:
    for name, table in tables.items():
        kind, cells, steps = name.split("/")
        tau, taus = 1.0, []
        for step in range(int(steps)):
            tau *= 1 - (step + 1) / int(steps)
            taus.append(tau)
        ours = [still_masked(step, int(steps), int(cells), SCHEDULES[kind]) for step in range(int(steps))]
        yield equal("schedules", ours, [count for count, _ in table], name)
        yield close("temperatures", torch.tensor(taus), torch.tensor([t for _, t in table]), 1e-9, name)


def hole_of(mask: Tensor, model: Showo) -> tuple[Tensor, Tensor]:
    """Where a mask image has a hole on the grid of ids."""
    image = model.resized(Image.fromarray(mask.numpy())).convert("L")
    values = torch.tensor(list(image.tobytes())).view(1, 1, *image.size[::-1]) / 255
    grid = interpolate(values, size=model.config.grid, mode="bicubic")[0, 0]
    return grid >= 0.5, grid


# --- understanding


@torch.no_grad()
def understanding(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for kind, own in (("vq", model.vq), ("clip", model.clip)):
        for number, case in enumerate(facts[kind]):
            name, image = f"{kind}_{number}", model.images[case["image"]]
            seen = model.ids_of(case["image"]) if kind == "vq" else model.features_of(case["image"])
            shown, asked = own.layout.shown(seen), own.layout.question(case["question"], seen)
            row = Row([*shown.spans, Span(asked)])
            if kind == "vq":
                yield equal("ids", row.ids(), case["ids"], name)
            else:
                ids = [token for span in row.spans for token in span.ids]
                yield equal("ids", ids, case["ids_without_features"], name)
                yield equal("place of the features", len(row.spans[0]), case["features_after"], name)
                yield close("pixels", own.clip_pixels(image), numbers[f"{name}/pixel_values"], 1e-4, name)
                assert seen.features is not None
                yield close("features", seen.features, numbers[f"{name}/features"], 1e-4, name)
                projected = own.network.mm_projector(seen.features.to(own.device))
                yield close("projected", projected, numbers[f"{name}/projected"], 1e-4, name)
            made = logits(own.network, states(own.network, Rows.of([row], own.device)))[0, -8:]
            yield close("logits", made, numbers[f"{name}/logits"], 1e-4, name)
            top = made[-1].topk(2).values
            yield close("margin of the first token", top[0] - top[1], case["first_top2_margin"], 1e-3, name)
            context = [Segment("seen", image=image), Segment("text", text=case["question"])]
            (written,) = own.write([context], Decoding(max_tokens=len(case["greedy"]) + 1), [0])
            yield equal("greedy ids", list(written.ids), [i for i in case["greedy"] if i != own.bos], name)
    first = facts["vq"][0]
    context = [Segment("seen", image=model.images[first["image"]]), Segment("text", text=first["question"])]
    (scores,) = model.vq.score([context], [case["text"] for case in facts["continuations"]])
    for ours, case in zip(scores.tolist(), facts["continuations"], strict=True):
        yield equal("ids of continuations", list(model.vq.ids(case["text"])), case["ids"], case["text"])
        yield close("log-probabilities of continuations", ours, case["logprob"], 1e-3, case["text"])


# --- training


def training(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    yield from masking(model, facts, numbers)
    yield from mixed_batch(model, model.vq, "vq", facts, numbers)
    yield from mixed_batch(model, model.clip, "clip", facts, numbers)
    yield from reconstruction(model, model.clip, "reca_clip", facts, numbers)
    yield from reconstruction(model, model.vq, "reca_vq", facts, numbers)
    yield from rewards(model, facts["rewards"], numbers)


def masks_of(numbers: Tensors, name: str) -> list[Masks]:
    """The recorded draws as what the model would draw."""
    draws = zip(numbers[f"{name}/u"].tolist(), numbers[f"{name}/permutation_noise"], strict=True)
    return [Masks(order, 1 - u) for u, order in draws]


def masking(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    for name, counts in (("t2i", facts["vq"]["masked_tokens"]), ("reca_clip", facts["reca_clip"]["masked_tokens"])):
        drawn = masks_of(numbers, name)
        yield equal("masked tokens", [one.count for one in drawn], counts, name)
        ids = torch.stack([torch.tensor(model.ids_of(number).ids) for number in range(3)])
        hidden = torch.stack([one.hidden for one in drawn])
        masked = torch.where(hidden, model.vq.config.mask, ids)
        yield equal("what goes in", masked, numbers[f"{name}/image_input"], name)
        yield equal("labels", torch.where(hidden, ids, IGNORED), numbers[f"{name}/image_labels"], name)
    shares = cosine(numbers["t2i/u"]).clamp(min=0)
    yield close("shares", shares, numbers["t2i/mask_prob"], 1e-6)
    yield equal("dropped texts", numbers["t2i/dropout_draw"] < 0.5, facts["vq"]["dropped"])


def t2i_samples(model: Showos, own: Showo, facts: Facts) -> list[list[Segment]]:
    """The rows of prompts: of which some are dropped, and their images."""
    latents = own.encode(model.images)
    return [
        [replace(prompt(text)[0], dropped=dropped), Segment("noisy", latent=latent, loss=True)]
        for text, dropped, latent in zip(model.facts["prompts"], facts["vq"]["dropped"], latents, strict=False)
    ]


def mixed_batch(model: Showos, own: Showo, name: str, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    """Prompts, texts and conversations of one step of the reference, its three losses and their gradients."""
    samples, case, cells = t2i_samples(model, own, facts), facts[name], own.config.cells
    batch = own.pack(samples, masks_of(numbers, "t2i"))
    out = own.forward(batch)
    yield close("cross-entropies of images", per_cell(out, numbers[f"{name}/t2i_ce"]), numbers[f"{name}/t2i_ce"] *
                (numbers["t2i/image_labels"] >= 0), 1e-3, name)  # fmt: skip
    hidden = states(own.network, batch.rows)
    image_rows = [
        logits(own.network, row[length - cells - 2 : length])
        for row, length in zip(hidden, batch.rows.lengths.tolist(), strict=True)
    ]
    markers = torch.tensor([own.layout.soi, own.layout.eoi], device=own.device)
    of_markers = torch.stack([cross_entropy(row[[0, -1]], markers, reduction="none") for row in image_rows])
    loss_t2i = (out.image_error.sum() + of_markers.sum()) / (len(out.image_error) + of_markers.numel())
    texts = [text_row(model, text) for text in model.facts["lm"]["texts"]]
    if name == "vq":
        yield close("logits of images", image_rows[0][1:-1], numbers["vq/t2i_image_logits_0"], 1e-4)
        yield close("cross-entropies of markers", of_markers, numbers["vq/t2i_ce_soi_eoi"], 1e-3)
        yield close("losses", out.image_error.mean(), case["loss_masked_tokens_only"], 1e-4, "masked tokens alone")
        yield from same_rows(model, batch, texts, numbers)
    talks = [conversation(model, turns) for turns in model.facts["talk"]]
    shown = [
        (own.layout.shown(model.ids_of(number) if name == "vq" else model.features_of(number))) for number in range(2)
    ]
    ce_texts = [next_token(own, [], *row) for row in texts]
    ce_talks = [next_token(own, list(before.spans), *row) for before, row in zip(shown, talks, strict=True)]
    for what, recorded, ours in (("lm", "vq/lm_ce", ce_texts), ("mmu", f"{name}/mmu_ce", ce_talks)):
        if name == "vq" or what == "mmu":
            for number, values in enumerate(ours):
                theirs = numbers[recorded][number]
                yield close(f"cross-entropies, {what}", values, theirs[theirs != 0], 1e-3, f"{name} {number}")
    loss_lm, loss_mmu = torch.cat(ce_texts).mean(), torch.cat(ce_talks).mean()
    if name == "clip":
        for number, (before, (ids, labels)) in enumerate(zip(shown, talks, strict=True)):
            whole = [token for span in before.spans for token in span.ids] + ids
            recorded_ids, recorded_labels = numbers["clip/mmu_ids_without_features"], numbers["clip/mmu_labels"]
            yield equal("ids", whole, unpadded(recorded_ids[number].tolist(), own.layout.pad), f"clip {number}")
            lost = before.length
            yield equal("labels", [IGNORED] * lost + labels, recorded_labels[number, : lost + len(labels)])
    for what, loss in (("loss_t2i", loss_t2i), ("loss_lm", loss_lm), ("loss_mmu", loss_mmu)):
        yield close("losses", loss, case[what], 1e-4, f"{name} {what}")
    weights = facts["vq"]["coefficients"]
    total = weights[0] * loss_t2i + weights[1] * loss_lm + weights[2] * loss_mmu
    yield close("losses", total, case["total"], 1e-4, f"{name} total")
    yield from same_gradients(own, total, case["grad_norms_total"], f"{name} total")
    if name == "vq":
        yield from same_gradients(own, loss_t2i, case["grad_norms_t2i"], "t2i")
        key = next(key for key in case if key.startswith("grad_norms_masked"))
        yield from same_gradients(own, out.image_error.mean(), case[key], "masked tokens alone")


def same_rows(
    model: Showos, batch: Any, texts: Sequence[tuple[list[int], list[int]]], numbers: Tensors
) -> Iterator[Deviation]:
    """The recorded rows of a step: prompts, texts, conversations."""
    own, recorded = model.vq, numbers["vq/ids"].tolist()
    pad = own.layout.pad
    for number, (ids, length) in enumerate(zip(batch.rows.ids.tolist(), batch.rows.lengths.tolist(), strict=True)):
        yield equal("rows", ids[:length], unpadded(recorded[number], pad), f"prompt {number}")
    talks = [conversation(model, turns) for turns in model.facts["talk"]]
    heads = [own.layout.shown(model.ids_of(number)).ids().tolist() for number in range(2)]
    behind = [([*head, *ids], [IGNORED] * len(head) + labels) for head, (ids, labels) in zip(heads, talks, strict=True)]
    for number, (ids, labels) in enumerate([*texts, *behind], start=3):
        yield equal("rows", ids, unpadded(recorded[number], pad), f"row {number}")
        theirs = numbers["vq/labels"][number].tolist()
        yield equal("labels", labels, theirs[: len(labels)], f"row {number}")
    for number, one in enumerate(masks_of(numbers, "t2i")):
        theirs = numbers["vq/labels"][number, -own.config.cells - 1 : -1]
        codes = torch.tensor(model.ids_of(number).ids)
        yield equal("labels", torch.where(one.hidden, codes, IGNORED), theirs, f"prompt {number}")


def next_token(own: Showo, before: list[Span], ids: list[int], labels: list[int]) -> Tensor:
    """Cross-entropies of the labels of a text behind an image, each at the token before it."""
    row = Row([*before, Span(ids)])
    hidden = states(own.network, Rows.of([row], own.device))[0]
    start = row.length - len(ids)
    wanted = [place for place, label in enumerate(labels) if label != IGNORED and start + place > 0]
    places = torch.tensor([start + place - 1 for place in wanted])
    return cross_entropy(
        logits(own.network, hidden[places]),
        torch.tensor([labels[i] for i in wanted], device=own.device),
        reduction="none",
    )


def per_cell(out: DiscreteForward, like: Tensor) -> Tensor:
    """Errors of masked ids on their cells, 0 elsewhere."""
    values = torch.zeros_like(like)
    values[out.image_segment.cpu(), out.cell.cpu()] = out.image_error.detach().cpu()
    return values


def same_gradients(own: Showo, loss: Tensor, recorded: Mapping[str, float], name: str) -> Iterator[Deviation]:
    """The norm of every tensor's gradient; a tensor without a recorded one has none."""
    named = dict(own.network.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    for key, gradient in zip(named, found, strict=True):
        norm = 0.0 if gradient is None else gradient.norm().item()
        yield relative("gradient norms", norm, recorded.get(key, 0.0), 1e-3, f"{name} {key}")


def total_norm(own: Showo, loss: Tensor) -> float:
    found = torch.autograd.grad(
        loss, [p for _, p in own.network.named_parameters()], retain_graph=True, allow_unused=True
    )
    return math.hypot(*(gradient.norm().item() for gradient in found if gradient is not None))


# --- RecA


def reca_rows(model: Showos, features: bool) -> Iterator[Row]:
    """The rows of RecA's step, whole."""
    own, facts = (model.clip if features else model.vq), model.training
    ids = (facts["reca_vq"]["seen_resolution"] // FACTOR) ** 2
    seen = model.features_of(0) if features else Span([0] * ids)
    for text in facts["reca_clip"]["texts"]:
        yield own.layout.drawing(said(text), [own.config.mask] * own.config.cells, seen)


def said(text: str) -> str:
    """A template without the words around it."""
    before, _, after = TEMPLATE.partition("{}")
    return text.removeprefix(before).removesuffix(after)


def reconstruction(model: Showos, own: Showo, name: str, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    case, side = facts[name], own.config.side
    squares = torch.stack([signed(own.resized(image)) for image in model.images])
    latents = own._encoded(squares)
    if name == "reca_clip":
        assert own.clip is not None
        pixels = shrink(squares, own.clip.image_size)
        yield close("seen pixels", pixels[:1], numbers["reca_clip/seen_pixels"], 1e-6)
        features = own.features(pixels)
        yield close("features", features[0], numbers["reca_clip/features_0"], 1e-4, name)
        seen = [Span(features=one) for one in features]
    else:
        ids = [one[0] for one in own._encoded(shrink(squares, case["seen_resolution"]))]
        yield equal("seen ids", torch.stack([x.flatten() for x in ids]) + own.config.first_code,
                    numbers["reca_vq/seen_ids"])  # fmt: skip
        seen = [own.layout.seen(one) for one in ids]
        blurred = shrink(shrink(squares[:1], side // 8), side)
        yield close("blurred pixels", blurred, numbers["reca_vq/blur8_pixels"], 1e-5)
        small = shrink(shrink(squares, side // 8), side)
        yield equal("blurred ids", torch.stack([x.flatten() for x in own._encoded(small)]) + own.config.first_code,
                    numbers["reca_vq/blur8_ids"])  # fmt: skip
    drawn = masks_of(numbers, "reca_clip")
    rows, error, columns = [], [], []
    for text, one, latent, masked in zip(case["texts"], seen, latents, drawn, strict=True):
        codes = torch.tensor(own.layout.codes(latent))
        rows.append(own.layout.drawing(said(text), torch.where(masked.hidden, own.config.mask, codes).tolist(), one))
        columns.append((rows[-1].image + masked.hidden.nonzero()[:, 0], codes[masked.hidden]))
    for number, row in enumerate(rows):
        recorded = numbers[f"{name}/ids"][number].tolist()
        if name == "reca_clip":
            at = len(row.spans[0])
            ours = row.ids()
            ours[at : at + len(row.spans[1])] = IGNORED
            yield equal("rows", ours, recorded, f"{name} {number}")
        else:
            yield equal("rows", row.ids(), unpadded(recorded, own.layout.pad), f"{name} {number}")
        labels = torch.full((row.length,), IGNORED)
        labels[columns[number][0]] = columns[number][1]
        theirs = numbers[f"{name}/labels"][number, -row.length :]
        here = slice(row.image, row.image + own.config.cells)
        yield equal("labels", labels[here], theirs[here], f"{name} {number}")
    hidden = states(own.network, Rows.of(rows, own.device))
    for number, (places, wanted) in enumerate(columns):
        made = logits(own.network, hidden[number, places.to(own.device)])
        error.append(cross_entropy(made, wanted.to(own.device), reduction="none"))
        theirs = numbers[f"{name}/ce"][number]
        yield close("cross-entropies of images", error[-1], theirs[drawn[number].hidden], 1e-3, f"{name} {number}")
    if name == "reca_clip":
        start = rows[0].image
        made = logits(own.network, hidden[0, start : start + own.config.cells])
        yield close("logits of images", made, numbers["reca_clip/image_logits_0"], 1e-4, name)
    loss = torch.cat(error).mean()
    yield close("losses", loss, case["loss"], 1e-4, name)
    learning = "grad_norms_when_embeddings_learn" if name == "reca_clip" else "grad_norms"
    yield from same_gradients(own, loss, case[learning], name)
    if name == "reca_clip":
        kept = {key: norm for key, norm in case[learning].items() if key not in case["no_gradient"]}
        yield equal("gradients of the release, but for what it cuts off", kept.keys(), case["grad_norms"].keys())
        for key, norm in kept.items():
            yield relative("gradient norms of the release", norm, case["grad_norms"][key], 1e-3, key)


# --- rewards: what the methods' pages make of masked ids, and two forms that none of them has


def rewards(model: Showos, facts: Facts, numbers: Tensors) -> Iterator[Deviation]:
    own = model.vq
    out = own.forward(own.pack(t2i_samples(model, own, model.training), masks_of(numbers, "t2i")))
    place = out.image_segment.cpu(), out.cell.cpu()
    maps = numbers["rewards/R"].flatten(1)
    alpha_r = (numbers["rewards/alpha"][:, None] * maps)[place].to(own.device)
    weight = numbers["rewards/weight"][place].to(own.device)
    advantage = numbers["rewards/advantage"][place].to(own.device)
    old = replace(out, logprob=numbers["rewards/old_logp"][place].to(own.device))
    yield close("weights", alpha_r + facts["lambda_c"], weight, 1e-6)
    yield close("log-probabilities", out.logprob, numbers["rewards/logp"][place], 1e-3)
    d = out.logprob - old.logprob
    yield close("largest difference", d.abs().max(), facts["max_abs_logp_difference"], 1e-3)
    yield equal("masked tokens", len(d), facts["masked_tokens"])
    apart: Distance = out.distance(old)
    beta = facts["beta"]
    sft = terms("sft", SftConfig(), Tokens("image", out.image_error, torch.ones_like(d)))
    signed_terms = terms(
        "srum", SrumConfig(constraint_weight=facts["lambda_c"]), Tokens("image", out.image_error, alpha_r)
    )
    log = terms(
        "region_nft",
        RegionNftConfig(beta=beta),
        Tokens("image", out.image_error, advantage, old.image_error, apart.change, apart.drift),
    )
    forms = {
        "plain": sft["error"],
        "signed": signed_terms["reward"] + signed_terms["reference"],
        "unlikelihood": -weight.clamp(min=0) * out.logprob - (-weight).clamp(min=0) * torch.log1p(-out.logprob.exp()),
        "nft_log": log["push"] + log["trust"],  # recorded without the old error, which has no gradient
        "nft_mix": mixture(d, advantage, beta, facts["mix_floor"]),
    }
    for name, values in forms.items():
        theirs, case = numbers[f"rewards/{name}"], facts[name]
        yield close("reward terms", values, theirs[place], 1e-3, name)
        yield equal("reward terms elsewhere", theirs[numbers["t2i/image_labels"] < 0].any(), False, name)
        yield close("losses of rewards", values.mean(), case["loss"], 1e-4, name)
        yield relative("gradient norms of rewards", total_norm(own, values.mean()), case["total_grad_norm"], 1e-3, name)


def mixture(d: Tensor, advantage: Tensor, beta: float, floor: float) -> Tensor:
    """Region-NFT's mixture form (docs/specs/showo.md, 13): logarithms go on as lines below the floor."""
    rho, r = d.exp(), (1 + advantage) / 2

    def minus_log(x: Tensor) -> Tensor:
        line = -math.log(floor) - (x - floor) / floor
        return torch.where(x > floor, -x.clamp(min=floor).log(), line)

    return (r * minus_log(1 + beta * (rho - 1)) + (1 - r) * minus_log(1 - beta * (rho - 1))) / beta


def terms(method: str, config: Any, tokens: Tokens) -> Terms:
    """What a method's page makes of tokens."""
    return find_method(method).terms(tokens, config)


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "checkpoint_shapes": (checkpoint, JSON),
    "official_shapes": (official_shapes, JSON),
    "vq": (vq, BOTH),
    "tokens": (tokens, JSON),
    "masks": (masks, TENSORS),
    "forward": (forward, TENSORS),
    "sampler": (sampler, BOTH),
    "understanding": (understanding, BOTH),
    "training": (training, BOTH),
}

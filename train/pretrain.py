"""Pretraining of ``srum-tiny`` from scratch on the embedded world: tokenizer, autoencoder, network (``srum pretrain``).

Each stage resumes from its state in the output folder, so that the whole can be done in several sittings. Batch k of a
stage depends on the seed and k alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from srum import flow
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.checkpoint import load_tokenizer
from srum.models.bagel.config import AutoencoderConfig, BagelConfig, LlmConfig, VitConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.base import Segment
from train.pretrain_autoencoder import pretrain_autoencoder, read_autoencoder
from train.tasks import PLAN_INSTRUCTION, TASKS, Sample
from train.trainer import trainable_parameters

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 768

LLM = {
    "model_type": "qwen2", "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6,
    "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "qk_norm": True,
}  # fmt: skip
VIT = {
    "model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
    "num_attention_heads": 4, "patch_size": 8, "image_size": 64, "num_channels": 3, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
AUTOENCODER_STEPS = 1200
AUTOENCODER = AutoencoderConfig(
    ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, scale_factor=1.0, shift_factor=0.0
)

TEXT_DROPOUT = 0.1
RECONSTRUCTED = 0.3  # share of the seen images that went through the autoencoder, as the model's own images did
TEXT_WEIGHT = 2.0  # of the cross-entropy beside the flow-matching loss
LATENT_NOISE = 0.25  # largest standard deviation of the noise on those latents


@dataclass(frozen=True)
class Phase:
    """A part of the network's training; ``weights`` of the tasks by name (others 0), where not those of ``TASKS``.

    ``timestep_shift`` > 1 draws more timesteps near noise, where the text decides what goes where. With
    ``trainable`` "generation" only that expert learns: understanding stays as it is, and a step costs half as much.
    Samples go in ``packs`` of similar length, whose rows are padded to the longest. The learning rate rises over the
    first ``warmup`` steps and falls linearly to zero over the last ``decay`` steps.
    """

    name: str
    steps: int
    batch: int = 64
    weights: Mapping[str, float] | None = None
    timestep_shift: float = 2.5
    warmup: int = 0
    decay: int = 0
    peak_lr: float = 2e-3
    trainable: Literal["all", "generation"] = "all"
    packs: int = 3


_RELATIONS = {
    "caption_to_image": 0.34,
    "plan_then_image": 0.14,
    "question_answering": 0.06,
    "find_all": 0.06,
    "judge": 0.4,
}
_CAPTIONS = {
    "caption_to_image": 0.6,
    "plan_then_image": 0.14,
    "question_answering": 0.05,
    "find_all": 0.05,
    "judge": 0.16,
}
_JUDGING = {"plan_then_image": 0.1, "question_answering": 0.1, "find_all": 0.05, "judge": 0.75}
_GENERATION = {"caption_to_image": 0.85, "plan_then_image": 0.15}
_COMPOSITION = {"composed_caption_to_image": 0.75, "caption_to_image": 0.1, "plan_then_image": 0.15}

# After two phases planned images come out well, and those of bare captions have the wrong number of things: how many is
# decided near noise, where few timesteps were drawn, and takes many more captions to learn (lab notes 15, 20, 27).
PHASES = (
    Phase("learning", 1500, warmup=100),
    Phase("annealing", 1200, decay=1200),
    Phase("relations", 450, weights=_RELATIONS, warmup=20, decay=400, peak_lr=1e-3),
    Phase("captions", 900, weights=_CAPTIONS, timestep_shift=5.0, warmup=20, decay=700, peak_lr=1.5e-3),
    Phase("judging", 300, weights=_JUDGING, warmup=20, decay=280, peak_lr=1e-3),
    Phase(
        "generation", 3400, weights=_GENERATION, timestep_shift=5.0, warmup=50, decay=3350, peak_lr=1.5e-3,
        trainable="generation", packs=1,
    ),
    Phase(
        "composition", 2000, weights=_COMPOSITION, timestep_shift=4.0, warmup=30, decay=1900, peak_lr=1.2e-3,
        trainable="generation", packs=1,
    ),
    Phase(
        "finishing", 2600, weights=_COMPOSITION, timestep_shift=4.0, warmup=50, decay=2500, peak_lr=1.5e-3,
        trainable="generation", packs=1,
    ),
)  # fmt: skip


# --- tokenizer


def train_tokenizer(folder: Path, seed: int = 0, samples: int = 20000) -> None:
    """A small byte-level BPE in the Qwen2 layout, trained on the texts of the tasks."""
    rng = np.random.default_rng(seed)
    texts = [part.text for sample in _samples(rng, samples) for part in sample if part.text]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 16, min_frequency=20, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    described = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def _samples(rng: np.random.Generator, n: int, mix: Mapping[str, float] | None = None) -> Iterator[Sample]:
    weights = np.array([task.weight if mix is None else mix.get(task.name, 0.0) for task in TASKS])
    for choice in rng.choice(len(TASKS), size=n, p=weights / weights.sum()):
        yield TASKS[choice].draw(rng)


# --- network


def tiny_config(autoencoder: AutoencoderConfig) -> BagelConfig:
    """The config of ``srum-tiny``: 64x64 px, 8x8 latent tokens of 8x8 px, 8x8 seen patches."""
    own: dict[str, Any] = {
        "autoencoder": json.loads(autoencoder.model_dump_json()),
        "latent_patch_size": 2,
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 8,
        "vae_transform": {"max_image_size": 64, "min_image_size": 64, "image_stride": 8},
        "vit_transform": {"max_image_size": 64, "min_image_size": 64, "image_stride": 8},
        "plan_instruction": PLAN_INSTRUCTION,
    }
    raw = {"llm_config.json": LLM, "vit_config.json": VIT, "bagel_config.json": own}
    return BagelConfig(llm=LlmConfig.model_validate(LLM), vit=VitConfig.model_validate(VIT), raw=raw, **own)


def fresh_network(config: BagelConfig, seed: int) -> BagelNetwork:
    """Random weights: normal with standard deviation 0.02, output layers of residual branches scaled down with depth,
    velocity head zero."""
    torch.manual_seed(seed)
    network = BagelNetwork(config)
    depth = (2 * config.llm.num_hidden_layers) ** -0.5
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            residual = ".layers." in name and any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2"))
            torch.nn.init.normal_(parameter, std=0.04 * (depth if residual else 1.0))
    torch.nn.init.zeros_(network.llm2vae.weight)
    network.vit_pos_embed.pos_embed.data = 0.5 * sincos_table(config.vit_max_num_patch_per_side, config.llm.hidden_size)
    network.latent_pos_embed.pos_embed.data = 0.5 * sincos_table(config.max_latent_size, config.llm.hidden_size)
    return network


def prepare(model: Bagel, samples: Sequence[Sample], rng: np.random.Generator) -> list[list[Segment]]:
    """Tasks to segments: drawn images become latents, some seen ones go through the autoencoder, texts drop."""
    drawn = [part.drawn for sample in samples for part in sample if part.drawn is not None]
    seen = [part.seen for sample in samples for part in sample if part.seen is not None]
    reconstruct = rng.random(len(seen)) < RECONSTRUCTED
    pixels = _pixels(drawn + [image for image, chosen in zip(seen, reconstruct, strict=True) if chosen])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encode_mean(model.autoencoder, pixels).float()
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        copies = latents[len(drawn) :]
        level = LATENT_NOISE * torch.rand(len(copies), 1, 1, 1, generator=generator)
        noisy = copies + level * torch.randn(copies.shape, generator=generator)
        decoded = decode_latents(model.autoencoder, noisy).float().clamp(-1, 1) if len(copies) else torch.empty(0)
        copied = iter(decoded)
    plain = iter(_pixels(seen))
    views = iter([next(copied) if chosen else image for image, chosen in zip(plain, reconstruct, strict=True)])
    targets = iter(latents[: len(drawn)])

    prepared = []
    for sample in samples:
        drop = any(part.droppable for part in sample) and rng.random() < TEXT_DROPOUT
        segments = []
        for part in sample:
            if part.seen is not None:
                segments.append(Segment("seen", image=next(views)))
            elif part.drawn is not None:
                segments.append(Segment("noisy", latent=next(targets), loss=part.loss))
            elif not (drop and part.droppable):
                segments.append(Segment("text", text=part.text, loss=part.loss, branch=part.branch))
        prepared.append(segments)
    return prepared


def _pixels(images: Sequence[np.ndarray]) -> Tensor:
    if not images:
        return torch.zeros(0, 3, 64, 64)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def backward(model: Bagel, samples: list[list[Segment]], phase: Phase, rng: np.random.Generator) -> tuple[float, float]:
    """Gradients of (flow matching + weighted cross-entropy), each a mean over its tokens in the batch; returns both."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    by_length = sorted(samples, key=lambda sample: sum(len(s.text or "") for s in sample))
    size = -(-len(samples) // phase.packs)
    packs = []
    for pack in (by_length[first : first + size] for first in range(0, len(samples), size)):
        clean = [model.tokens(s.latent) for sample in pack for s in sample if s.latent is not None]
        noise = [torch.randn(x.shape, generator=generator) for x in clean]
        t = flow.sample_timesteps(len(clean), phase.timestep_shift, generator)
        empty = [torch.zeros(0, model.config.latent_dim)]
        target = flow.velocity_target(torch.cat(clean or empty), torch.cat(noise or empty))
        packs.append((model.pack(pack, noise, t.tolist()), target))
    numbers = sum(target.numel() for _, target in packs)
    labels = max(1, sum(len(batch.labels) for batch, _ in packs))
    total_mse = total_ce = 0.0
    for batch, target in packs:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.velocity(batch)
        mse = (out.velocity - target).square().sum() / numbers
        ce = F.cross_entropy(out.logits, out.labels, reduction="sum") / labels
        (mse + TEXT_WEIGHT * ce).backward()
        total_mse, total_ce = total_mse + mse.item(), total_ce + ce.item()
    return total_mse, total_ce


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, constant, linear to zero at the end of the phase, as the phase says."""
    rise = (step + 1) / phase.warmup if phase.warmup else 1.0
    fall = (phase.steps - step) / phase.decay if phase.decay else 1.0
    return phase.peak_lr * min(1.0, rise, fall)


def pretrain_network(
    folder: Path,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    stop_after: float = math.inf,
    compile_layers: bool = False,
) -> None:
    """Train the network (at most ``stop_after`` seconds now), going on from ``folder``; write ``model/``."""
    autoencoder_config = AutoencoderConfig.model_validate_json((folder / "ae_config.json").read_text())
    config = tiny_config(autoencoder_config)
    network = fresh_network(config, seed)
    autoencoder = read_autoencoder(folder, autoencoder_config)
    autoencoder.to(memory_format=torch.channels_last)  # encoding takes half the time so
    model = Bagel(folder, config, network, autoencoder, load_tokenizer(folder), "bf16")
    if compile_layers:
        model.compile()
    optimizers = _optimizers(model)
    state_file = folder / "network_state.pt"
    first, done = 0, 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["model"])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        first, done = state["phase"], state["step"]
    deadline = time.monotonic() + stop_after
    for number, phase in list(enumerate(phases))[first:]:
        with trainable_parameters(model, phase.trainable):
            finished = _run_phase(model, optimizers, folder, number, phase, done, seed, deadline)
        if not finished:
            return
        done = 0


def _run_phase(
    model: Bagel,
    optimizers: Sequence[torch.optim.Optimizer],
    folder: Path,
    number: int,
    phase: Phase,
    done: int,
    seed: int,
    deadline: float,
) -> bool:
    """Train one phase from step ``done``; False if the deadline came first."""
    started, averages = time.monotonic(), dict[str, float]()
    for step in tqdm(range(done, phase.steps), phase.name, phase.steps, initial=done, disable=None):
        rng = np.random.default_rng((seed, number + 1, step))
        segments = prepare(model, list(_samples(rng, phase.batch, phase.weights)), rng)
        model.network.zero_grad(set_to_none=True)
        mse, ce = backward(model, segments, phase, rng)
        norm = torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, phase)
            optimizer.step()
        for name, value in (("mse", mse), ("ce", ce), ("norm", norm.item())):
            averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
        if (step + 1) % 20 == 0:
            row = {"phase": phase.name, "step": step + 1, "seconds": round(time.monotonic() - started, 1)}
            with (folder / "pretrain.jsonl").open("a") as log:
                log.write(json.dumps(row | {k: round(v, 4) for k, v in averages.items()}) + "\n")
        late = time.monotonic() > deadline
        if (step + 1) % 250 == 0 or step + 1 == phase.steps or late:
            _keep(model, optimizers, folder, number, step + 1)
        if late:
            return False
    return True


def _optimizers(model: Bagel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest (embeddings, heads, norms): docs/lab-notes.md, 12."""
    named = model.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _keep(model: Bagel, optimizers: Sequence[torch.optim.Optimizer], folder: Path, phase: int, step: int) -> None:
    partial = folder / "network_state.tmp"
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"model": model.network.state_dict(), "optimizers": states, "phase": phase, "step": step}
    torch.save(state, partial)
    model.save(folder / "model", torch.bfloat16)
    partial.replace(folder / "network_state.pt")


def pretrain(
    folder: Path,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    minutes: float = math.inf,
    compile_layers: bool = False,
) -> None:
    """All stages in order; those that are done are skipped. ``minutes`` bounds the network stage of this sitting, whose
    layers go through ``torch.compile`` if ``compile_layers``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(folder, seed)
    if not (folder / "ae_config.json").is_file():
        config = pretrain_autoencoder(folder, AUTOENCODER, autoencoder_steps, seed)
        (folder / "ae_config.json").write_text(config.model_dump_json())
    pretrain_network(folder, phases, seed, 60 * minutes, compile_layers)

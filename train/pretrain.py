"""Pretraining of ``srum-tiny`` from scratch on the embedded world: tokenizer, autoencoder, network (``srum pretrain``).

Each stage resumes from its state in the output folder, so that the whole can be done in several sittings. Batch k of a
stage depends on the seed and k alone. The phases of the network are in ``train.phases``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from srum.models.bagel.checkpoint import load_tokenizer
from srum.models.bagel.config import AutoencoderConfig, BagelConfig, LlmConfig, VitConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.bagel.sequence import Batch
from srum.models.base import Sampling
from srum.run_dir import atomic
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene
from srum.shapes.wording import PLAN_INSTRUCTION, REFINE_SYSTEM, REFINE_USER
from train.muon import StackedMuon
from train.phases import PHASES, TEXT_WEIGHT, Phase, learning_rate, scaled
from train.pretrain_autoencoder import pretrain_autoencoder, read_autoencoder
from train.pretrain_data import Steps, completed, draw_samples, loaded, pickled
from train.tasks import Drawing
from train.weights import trainable_parameters

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
AUTOENCODER_STEPS = 1500
AUTOENCODER = AutoencoderConfig(
    ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, scale_factor=1.0, shift_factor=0.0
)
TEXT_SAMPLES = 12800  # whose texts the tokenizer is trained on
LOG_EVERY = 20  # steps
KEEP_EVERY = 120.0  # seconds
OWN_BATCH = 512
OWN_SAMPLING = Sampling(size=(64, 64), timesteps=16, timestep_shift=5.0, guidance=2.5)


# --- tokenizer


class Texts(Dataset[bytes]):
    """Pickled lists of texts, each those of a batch of samples of the last phase, which knows every task."""

    def __init__(self, seed: int, batches: int) -> None:
        self.seed, self.batches = seed, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> bytes:
        rng = np.random.default_rng((self.seed, index))
        spec, prompt = sample_prompt(rng)
        rendered = [Drawing(render(sample_scene(spec, rng)), (spec, prompt))]  # the model has drawn nothing yet
        samples = draw_samples(rng, PHASES[-1], rendered)
        return pickled([part.text for sample in samples for part in sample if part.text])


def train_tokenizer(folder: Path, seed: int = 0, samples: int = TEXT_SAMPLES, workers: int = 0) -> None:
    """A small byte-level BPE in the Qwen2 layout, trained on the texts of the tasks."""
    batches = Texts(seed, -(-samples // PHASES[-1].batch))
    texts = [text for batch in loaded(batches, 0, workers) for text in batch]
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
        "refine_system": REFINE_SYSTEM,
        "refine_user": REFINE_USER,
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


def backward(model: Bagel, packs: Sequence[Batch]) -> Tensor:
    """Gradients of flow matching plus weighted cross-entropy, each a mean over its tokens in the step; both, (2,)."""
    cells = max(1, sum(len(batch.loss_tokens) for batch in packs))
    labels = max(1, sum(len(batch.labels) for batch in packs))
    total = torch.zeros(2, device=model.device)
    for batch in packs:
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            out = model.forward(batch)
        mse, ce = out.image_error.sum() / cells, out.text_error.sum() / labels
        loss = mse + TEXT_WEIGHT * ce
        if loss.requires_grad:  # a pack of texts teaches the generation expert nothing
            loss.backward()
        total += torch.stack([mse.detach(), ce.detach()])
    return total


def pretrain_network(
    folder: Path,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    stop_after: float = math.inf,
    compile_layers: bool = False,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Train the network (at most ``stop_after`` seconds now), going on from ``folder``; write ``model/``."""
    deadline = time.monotonic() + stop_after
    model = fresh_model(folder, seed, device)
    if compile_layers:
        model.compile()
    optimizers = _optimizers(model)
    first, done = _resumed(folder, model, optimizers)
    for number, phase in list(enumerate(phases))[first:]:
        drawings = own_drawings(model, folder / f"drawn_{number}.npz", phase.own, (seed, number)) if phase.own else []
        steps = Steps(folder, model.config, phase, number, seed, drawings)
        with trainable_parameters(model, phase.trainable):
            finished = _run_phase(model, optimizers, folder, steps, done, deadline, workers)
        if not finished:
            return
        done = 0


def fresh_model(folder: Path, seed: int, device: str = "cpu") -> Bagel:
    """The model with random weights, behind the tokenizer and the autoencoder in ``folder``."""
    autoencoder_config = AutoencoderConfig.model_validate_json((folder / "ae_config.json").read_text())
    config = tiny_config(autoencoder_config)
    network = fresh_network(config, seed).to(device)
    autoencoder = read_autoencoder(folder, autoencoder_config).to(device)
    autoencoder.to(memory_format=torch.channels_last)  # encoding takes half the time so
    return Bagel(folder, config, network, autoencoder, load_tokenizer(folder), "bf16")


def _resumed(folder: Path, model: Bagel, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, int]:
    """Phase and step to go on from, weights and optimisers as they were there."""
    state_file = folder / "network_state.pt"
    if not state_file.is_file():
        return 0, 0
    state = torch.load(state_file, weights_only=True, map_location=model.device)
    model.network.load_state_dict(state["model"])
    for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(its_state)
    return state["phase"], state["step"]


def _run_phase(
    model: Bagel,
    optimizers: Sequence[torch.optim.Optimizer],
    folder: Path,
    steps: Steps,
    done: int,
    deadline: float,
    workers: int,
) -> bool:
    """Train one phase from step ``done``; False if the deadline came first."""
    phase, patch_sides = steps.phase, (model.config.vit.patch_size, model.config.latent_patch_size)
    started = kept = time.monotonic()
    sums = torch.zeros(3, device=model.device)
    progress = tqdm(loaded(steps, done, workers), phase.name, phase.steps, initial=done, disable=None)
    for index, step in enumerate(progress, done):
        sums += _step(model, optimizers, completed(step, model.autoencoder, patch_sides), learning_rate(index, phase))
        last = index + 1 == phase.steps
        if (index + 1) % LOG_EVERY == 0 or last:
            count = (index - done) % LOG_EVERY + 1 if last else LOG_EVERY
            _log(folder, phase, index + 1, sums / count, (time.monotonic() - started) / (index + 1 - done))
            sums.zero_()
        now = time.monotonic()
        if last or now > deadline or now > kept + KEEP_EVERY:
            _keep(model, optimizers, folder, steps.number, index + 1)
            kept = now
        if now > deadline:
            return False
    return True


def _step(model: Bagel, optimizers: Sequence[torch.optim.Optimizer], packs: Sequence[Batch], lr: float) -> Tensor:
    """One optimiser step; flow-matching error, cross-entropy and norm of the gradient before clipping, (3,)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = backward(model, packs)
    norm = torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return torch.cat([losses, norm[None]])


def _log(folder: Path, phase: Phase, step: int, means: Tensor, seconds: float) -> None:
    """A line of ``pretrain.jsonl``: means over the steps since the last one, and seconds per step of this sitting."""
    mse, ce, norm = (round(value, 4) for value in means.tolist())
    row = {"phase": phase.name, "step": step, "of": phase.steps, "seconds_per_step": round(seconds, 4)}
    with (folder / "pretrain.jsonl").open("a") as log:
        log.write(json.dumps(row | {"mse": mse, "ce": ce, "norm": norm}) + "\n")
    if step % (10 * LOG_EVERY) == 0 or step == phase.steps:
        print(f"{phase.name} {step}/{phase.steps} {1000 * seconds:.0f} ms mse {mse:.4f} ce {ce:.4f}", flush=True)


def _optimizers(model: Bagel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest (embeddings, heads, norms): docs/lab-notes.md, 12."""
    named = model.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
    return [
        StackedMuon(matrices, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _keep(model: Bagel, optimizers: Sequence[torch.optim.Optimizer], folder: Path, phase: int, step: int) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"model": model.network.state_dict(), "optimizers": states, "phase": phase, "step": step}
    model.save(folder / "model", torch.bfloat16)
    with atomic(folder / "network_state.pt") as partial:
        torch.save(state, partial)


# --- the model's own drawings


@torch.no_grad()
def own_drawings(model: Bagel, file: Path, count: int, key: Sequence[int]) -> list[Drawing]:
    """``count`` images of training prompts by the model as it is now, half of them planned; kept in ``file``.

    Half are drawn with guidance, as in evaluation, half without, as in a rollout. Prompts and noise depend on ``key``.
    """
    rng = np.random.default_rng((*key, 7))
    asked = [sample_prompt(rng) for _ in range(count)]
    seeds = rng.integers(1 << 62, size=count).tolist()
    if not file.is_file():
        images: list[np.ndarray] = []
        for number, first in enumerate(range(0, count, OWN_BATCH)):
            some = slice(first, first + OWN_BATCH)
            sampling = OWN_SAMPLING if number // 2 % 2 == 0 else replace(OWN_SAMPLING, guidance=1.0)
            drawn = model.generate([text for _, text in asked[some]], sampling, seeds[some], plan=number % 2 == 0)
            images += [np.asarray(one.image) for one in drawn]
        with atomic(file) as partial, partial.open("wb") as stream:
            np.savez(stream, images=np.stack(images))
    with np.load(file) as stored:
        return [Drawing(image, its) for image, its in zip(stored["images"], asked, strict=True)]


def pretrain(
    folder: Path,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    minutes: float = math.inf,
    compile_layers: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    scale: float = 1.0,
) -> None:
    """All stages in order; those that are done are skipped.

    ``minutes`` bounds the network stage of this sitting; ``scale`` stretches or cuts all phases of the network. Its
    layers go through ``torch.compile`` if ``compile_layers``. ``workers`` make the samples: none on a CPU, which they
    would take from the network, else as many as cores. Raises ValueError for a scale that is not above 0.
    """
    phases = scaled(phases, scale)
    if torch.device(device).type != "cpu":  # launching kernels, not padding, takes the time there
        phases = [replace(phase, packs=1) for phase in phases]
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if workers is None:
        workers = 0 if torch.device(device).type == "cpu" else os.cpu_count() or 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # of no use in workers, and a warning
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(folder, seed, workers=workers)
    if not (folder / "ae_config.json").is_file():
        config = pretrain_autoencoder(folder, AUTOENCODER, autoencoder_steps, seed, device, workers)
        (folder / "ae_config.json").write_text(config.model_dump_json())
    pretrain_network(folder, phases, seed, 60 * minutes, compile_layers, device, workers)

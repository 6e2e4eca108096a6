"""Pretraining of ``srum-tiny`` from scratch on the embedded world: tokenizer, autoencoder, network (``srum pretrain``).

Each stage resumes from its state in the output folder, so that the whole can be done in several sittings. Batch k of a
stage depends on the seed and k alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from srum import flow
from srum.models.bagel.autoencoder import decode_latents, encode_mean
from srum.models.bagel.checkpoint import load_tokenizer
from srum.models.bagel.config import AutoencoderConfig, BagelConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.base import Segment
from train.pretrain_autoencoder import pretrain_autoencoder, read_autoencoder
from train.tasks import PLAN_INSTRUCTION, TASKS, Sample

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 768

LLM = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "qk_norm": True,
}  # fmt: skip
VIT = {
    "model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5,
    "num_attention_heads": 4, "patch_size": 8, "image_size": 64, "num_channels": 3, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
AUTOENCODER = AutoencoderConfig(
    ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, scale_factor=1.0, shift_factor=0.0
)

BATCH = 96
PEAK_LR = 2e-3
WARMUP = 100
TEXT_DROPOUT = 0.1
RECONSTRUCTED = 0.4  # share of the seen images that went through the autoencoder, as the model's own images did
LATENT_NOISE = 0.25  # largest standard deviation of the noise on those latents


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
        trainers.BpeTrainer(vocab_size=VOCABULARY - 16, min_frequency=20, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    described = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def _samples(rng: np.random.Generator, n: int) -> Iterator[Sample]:
    weights = np.array([task.weight for task in TASKS])
    for choice in rng.choice(len(TASKS), size=n, p=weights / weights.sum()):
        yield TASKS[choice].draw(rng)


# --- network


def tiny_config(autoencoder: AutoencoderConfig) -> BagelConfig:
    """The config of ``srum-tiny``: 64x64 px, 8x8 latent tokens of 8x8 px, 8x8 seen patches."""
    own = {
        "autoencoder": json.loads(autoencoder.model_dump_json()),
        "latent_patch_size": 2,
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 8,
        "vae_transform": {"max_image_size": 64, "min_image_size": 64, "image_stride": 8},
        "vit_transform": {"max_image_size": 64, "min_image_size": 64, "image_stride": 8},
        "plan_instruction": PLAN_INSTRUCTION,
    }
    raw = {"llm_config.json": LLM, "vit_config.json": VIT, "bagel_config.json": own}
    return BagelConfig(llm=LLM, vit=VIT, raw=raw, **own)


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
            residual = any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2"))
            torch.nn.init.normal_(parameter, std=0.04 * (depth if residual else 1.0))
    torch.nn.init.zeros_(network.llm2vae.weight)
    network.vit_pos_embed.pos_embed.data = 0.5 * sincos_table(config.vit_max_num_patch_per_side, config.llm.hidden_size)
    network.latent_pos_embed.pos_embed.data = 0.5 * sincos_table(config.max_latent_size, config.llm.hidden_size)
    return network


def prepare(model: Bagel, samples: Sequence[Sample], rng: np.random.Generator) -> list[list[Segment]]:
    """Tasks to segments: drawn images become latents, some of the seen ones go through the autoencoder, texts drop out."""
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
        copied = iter(decode_latents(model.autoencoder, noisy).float().clamp(-1, 1) if len(copies) else [])
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
                segments.append(Segment("text", text=part.text, loss=part.loss))
        prepared.append(segments)
    return prepared


def _pixels(images: Sequence[np.ndarray]) -> Tensor:
    if not images:
        return torch.zeros(0, 3, 64, 64)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def losses(model: Bagel, segments: list[list[Segment]], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(flow matching, cross-entropy), each a mean over its tokens."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    clean = [model.tokens(s.latent) for sample in segments for s in sample if s.latent is not None]
    noise = [torch.randn(x.shape, generator=generator) for x in clean]
    t = flow.sample_timesteps(len(clean), 1.0, generator)
    batch = model.pack(segments, noise, t.tolist())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.velocity(batch)
    target = flow.velocity_target(torch.cat(clean), torch.cat(noise))
    return (out.velocity - target).square().mean(), F.cross_entropy(out.logits, out.labels)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to zero over the last 40%."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP, (steps - step) / (0.4 * steps))


def pretrain_network(folder: Path, steps: int, seed: int = 0, stop_after: float = math.inf) -> None:
    """Train the network for ``steps`` (at most ``stop_after`` seconds now), resuming from ``folder``; write the checkpoint."""
    autoencoder_config = AutoencoderConfig.model_validate_json((folder / "ae_config.json").read_text())
    config = tiny_config(autoencoder_config)
    network = fresh_network(config, seed)
    model = Bagel(folder, config, network, read_autoencoder(folder, autoencoder_config), load_tokenizer(folder), "bf16")
    trainable = [p for _, p in model.named_parameters()]
    decayed = [p for p in trainable if p.ndim == 2]
    plain = [p for p in trainable if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}], lr=PEAK_LR, betas=(0.9, 0.98),
        fused=True,
    )  # fmt: skip
    state_file = folder / "network_state.pt"
    done = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    started = time.monotonic()
    averages: dict[str, float] = {}
    log = (folder / "pretrain.jsonl").open("a")
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="network", disable=None):
        rng = np.random.default_rng((seed, 1, step))
        segments = prepare(model, list(_samples(rng, BATCH)), rng)
        mse, ce = losses(model, segments, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        (mse + ce).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        for name, value in (("mse", mse.item()), ("ce", ce.item()), ("norm", norm.item())):
            averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
        if (step + 1) % 20 == 0:
            row = {"step": step + 1, "seconds": round(time.monotonic() - started, 1)}
            log.write(json.dumps(row | {k: round(v, 4) for k, v in averages.items()}) + "\n")
            log.flush()
        stopping = time.monotonic() - started > stop_after
        if (step + 1) % 500 == 0 or step + 1 == steps or stopping:
            partial = state_file.with_suffix(".tmp")
            state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, partial)
            partial.replace(state_file)
            model.save(folder / "model")
        if stopping:
            break


def pretrain(folder: Path, autoencoder_steps: int, steps: int, seed: int = 0, minutes: float = math.inf) -> None:
    """All stages in order; those that are done are skipped. ``minutes`` bounds the network stage of this sitting."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(folder, seed)
    if not (folder / "ae_config.json").is_file():
        config = pretrain_autoencoder(folder, AUTOENCODER, autoencoder_steps, seed)
        (folder / "ae_config.json").write_text(config.model_dump_json())
    pretrain_network(folder, steps, seed, stop_after=60 * minutes)

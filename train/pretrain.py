"""Pretraining of ``srum-tiny`` from scratch on the embedded world: tokenizer, autoencoder, network (``srum pretrain``).

Each stage resumes from its state in the output folder, so that the whole can be done in several sittings. Batch k of a
stage depends on the seed and k alone. The phases of the network are in ``train.phases``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset

from srum.drawing import draw_prompts
from srum.models.bagel.config import AutoencoderConfig, BagelConfig, LlmConfig, VitConfig
from srum.models.bagel.model import Bagel
from srum.models.bagel.network import BagelNetwork
from srum.models.bagel.positions import sincos_table
from srum.models.base import Sampling
from srum.models.checkpoints import load_tokenizer
from srum.run_dir import atomic, claim_settings, write_text
from srum.shapes.prompts import sample_prompt
from srum.shapes.render import render
from srum.shapes.scenes import sample_scene
from srum.shapes.wording import PLAN_INSTRUCTION, REFINE_SYSTEM, REFINE_USER, REFLECT_QUESTION, STOP
from srum.train.methods.sft import Sft, SftConfig
from srum.train.objective import Objective
from srum.train.phases import PHASES, Phase, scaled
from srum.train.pretrain_autoencoder import pretrain_autoencoder, read_autoencoder
from srum.train.pretrain_data import Pretraining, Steps, draw_samples, loaded, pickled
from srum.train.tasks import Drawing
from srum.train.trainer import train

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
        "reflect_question": REFLECT_QUESTION,
        "reflect_stop": STOP,
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


def fresh_model(folder: Path, seed: int, device: str = "cpu") -> Bagel:
    """The model with random weights, behind the tokenizer and the autoencoder in ``folder``."""
    autoencoder_config = AutoencoderConfig.model_validate_json((folder / "ae_config.json").read_text())
    config = tiny_config(autoencoder_config)
    network = fresh_network(config, seed).to(device)
    autoencoder = read_autoencoder(folder, autoencoder_config).to(device)
    return Bagel(folder, config, network, autoencoder, load_tokenizer(folder), "bf16")


def pretrain_network(
    folder: Path,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    compile_layers: bool = False,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Train the network phase by phase, each in ``phase-K-NAME/`` and from the weights of the one before.

    The last one's weights are published as ``model/``, in bfloat16.
    """
    model = fresh_model(folder, seed, device)
    for number, phase in enumerate(phases):
        place = folder / f"phase-{number}-{phase.name}"
        if not (place / "model").exists():
            model.autoencoder.to(memory_format=torch.channels_last)  # encoding takes half the time so
            if compile_layers:
                model.compile()
            drawings = own_drawings(model, place / "drawn.npz", phase.own, (seed, number)) if phase.own else []
            source = Pretraining(Steps(folder, model.config, phase, number, drawings), workers)
            train(model, source, objective(phase), phase.config, place, seed, progress=True)
        model = Bagel.load(place / "model", device, "bf16")
    model.save(folder / "model", torch.bfloat16)


def objective(phase: Phase) -> Objective:
    """Flow matching on images and cross-entropy on texts."""
    return Sft().objective(SftConfig(train=phase.config))


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
            texts, plan_seeds = [text for _, text in asked[some]], seeds[some] if number % 2 == 0 else None
            drawn = draw_prompts(model, texts, sampling, seeds[some], plan_seeds)
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
    compile_layers: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    scale: float = 1.0,
) -> None:
    """All stages in order; those that are done are skipped, and one that was interrupted goes on.

    ``scale`` stretches or cuts all phases of the network. Its layers go through ``torch.compile`` if
    ``compile_layers``. ``workers`` make the samples: none on a CPU, which they would take from the network, else as
    many as cores. Raises ValueError for a scale that is not above 0, RunError for a folder of another seed or scale.
    """
    phases = scaled(phases, scale)
    if torch.device(device).type != "cpu":  # launching kernels, not padding, takes the time there
        phases = tuple(replace(phase, packs=1) for phase in phases)
    claim_settings(folder, {"seed": seed, "scale": scale})
    torch.set_float32_matmul_precision("high")
    if workers is None:
        workers = 0 if torch.device(device).type == "cpu" else os.cpu_count() or 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # of no use in workers, and a warning
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(folder, seed, workers=workers)
    if not (folder / "ae_config.json").is_file():
        config = pretrain_autoencoder(folder, AUTOENCODER, autoencoder_steps, seed, device, workers)
        write_text(folder / "ae_config.json", config.model_dump_json())
    pretrain_network(folder, phases, seed, compile_layers, device, workers)

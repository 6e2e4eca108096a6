"""What BAGEL does on a GPU, a part at a time: whether its fast paths agree with the plain ones, and how fast it is.

    python -m benchmarks.gpu_check agree|draw|decode|train|compiled [--tiny]

``benchmarks/gpu_check.sh`` runs all parts, and the comparison with the reference's numbers, in a few minutes.

``agree`` exits with 1 where a fast path (flex_attention, CUDA graphs, torch.compile) and the plain one differ. The
other parts time the real size, random weights in bfloat16 that are made on the device: ``draw`` steps of images of
1024 px, ``decode`` text and a judge's questions, ``train`` steps of LoRA, ``compiled`` steps of images again. What is
counted, by formula, are the matrix products of the decoder's layers and attention, without markers, text, norms and
LoRA's own products. Shares are of the rate of the best of some large products on the same device. ``--tiny`` is a toy
size on the CPU, which shows that a part runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.real_size import REAL, SMALL, matmul_rate, peak_memory, random_model, seconds
from srum.config import LoraConfig, MemoryConfig, TrainConfig
from srum.drawing import draw_prompts
from srum.flow import FlowNoise
from srum.models.bagel import Bagel, network
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import LlmConfig
from srum.models.bagel.network import additive, attend
from srum.models.base import Decoding, Sampling, Segment, branch_counts
from srum.models.precision import computing
from srum.processes import Processes
from srum.records import Candidate
from srum.train import lora
from srum.train.data import TrainingRecord, candidate_mix
from srum.train.methods.region_nft import RegionNft, RegionNftConfig
from srum.train.trainer import Trainer, trainable_parameters
from srum.train.weights import recomputed

PROMPT = "two red cups on a wooden table beside a window, in the morning light"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of differences, as a share of what is compared (2-norms)


@dataclass(frozen=True)
class Scale:
    """Where and how large everything is."""

    device: torch.device
    size: tuple[int, int]  # (H, W) of an image in pixels
    batches: Sequence[int]  # images drawn at a time
    rows: Sequence[int]  # texts at a time
    tokens: int  # of a text
    packs: Sequence[int]  # images in a pack of training

    def model(self) -> Bagel:
        """Of the real size, or a toy."""
        return random_model(REAL if self.device.type == "cuda" else SMALL, self.device)


GPU = Scale(torch.device("cuda"), (1024, 1024), (1, 4, 8), (1, 16, 64), 256, (2, 8))
TINY = Scale(torch.device("cpu"), (64, 64), (1, 2), (1, 2), 4, (2,))


def say(text: str) -> None:
    """Print at once: a part may be stopped at any time."""
    print(text, flush=True)


# --- operations


def token_operations(llm: LlmConfig) -> int:
    """Of the matrix products of one expert for one token."""
    kv = llm.num_key_value_heads * llm.head_dim
    layer = 2 * llm.hidden_size**2 + 2 * llm.hidden_size * kv + 3 * llm.hidden_size * llm.intermediate_size
    return 2 * llm.num_hidden_layers * layer


def attention_operations(llm: LlmConfig, queries: int, keys: int) -> int:
    """Of the two products of attention in all layers, for a row."""
    return 4 * llm.num_hidden_layers * llm.hidden_size * queries * keys


def image_operations(model: Bagel, size: tuple[int, int]) -> int:
    """Of one image's latent tokens going once through the decoder."""
    h, w = model.latent_grid(size)
    return h * w * token_operations(model.config.llm) + attention_operations(model.config.llm, h * w, h * w)


# --- agreement


def agree(scale: Scale) -> bool:
    """Whether every fast path comes out as the plain one, at a small size."""
    passed = True
    for name, difference, tolerance in chain(decoding_agrees(scale), flex_agrees(scale), compiled_agrees(scale)):
        say(f"{'agrees' if difference <= tolerance else 'DIFFERS'}: {name}: {difference:.1e} of {tolerance:.0e}")
        passed &= difference <= tolerance
    return passed


Result = tuple[str, float, float]  # what, difference, tolerance


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The 2-norm of the difference as a share of that of ``theirs``; infinite where shapes differ."""
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return float("inf")
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (ours, theirs))
    return float((a - b).norm() / b.norm())


def flex_agrees(scale: Scale) -> Iterator[Result]:
    """Velocities and gradients of a training row of over 1,024 tokens, by flex_attention and with a dense mask."""
    model = in_float32(random_model(SMALL, scale.device))
    size = (512, 576) if scale.device.type == "cuda" else (64, 64)
    h, w = model.latent_grid(size)
    latents = [torch.randn(16, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    samples = [[Segment("text", text=PROMPT), Segment("noisy", latent=x, loss=True)] for x in latents]
    batch = model.pack(
        samples, [FlowNoise(eps, t) for eps, t in zip(model.noise([2, 3], [size] * 2), (0.3, 0.8), strict=True)]
    )
    learns = [model.network.llm2vae.weight, model.network.decoder.layers[0].self_attn.k_proj_moe_gen.weight]

    def run(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        for parameter in learns:
            parameter.requires_grad_()
        with torch.autocast(scale.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            velocity = model.forward(batch).velocity
        return [velocity], list(torch.autograd.grad(velocity.square().mean(), learns))

    for dtype, tolerance in TOLERANCES.items():
        taken = network.takes_blocks(batch.layout, None)
        ours = run(dtype)
        with patch.object(network, "takes_blocks", lambda *_: False):
            theirs = run(dtype)
        what = f"flex_attention {'taken' if taken else 'NOT TAKEN'}, {dtype}"
        for name, a, b in zip(("velocity", "gradients"), ours, theirs, strict=True):
            yield f"{what}, {name}", difference(a, b), tolerance


def decoding_agrees(scale: Scale) -> Iterator[Result]:
    """Logits and ids of greedy texts over contexts of unlike lengths, steps recorded as CUDA graphs and not."""
    model = in_float32(random_model(SMALL, scale.device))
    with torch.no_grad():
        context = model.contexts([[Segment("text", text=text)] for text in ("a", PROMPT, "how many cups?")])

        def run(records: bool) -> tuple[list[list[int]], list[Tensor]]:
            model.records = records
            logits: list[Tensor] = []
            rows = model.decode_tokens(context, Decoding(max_tokens=40), range(3), stop=-1, logits_out=logits)
            return [row.ids for row in rows], logits

        (ids, logits), (recorded_ids, recorded_logits) = run(False), run(scale.device.type == "cuda")
    yield "CUDA graphs, logits", difference(recorded_logits, logits), TOLERANCES[torch.float32]
    yield "CUDA graphs, ids", float(recorded_ids != ids), 0.0


def compiled_agrees(scale: Scale) -> Iterator[Result]:
    """Latents of two images in guided steps, compiled and not."""
    model = in_float32(random_model(SMALL, scale.device))
    sampling = Sampling(size=(64, 96), timesteps=4, guidance_interval=(0.0, 1.0))
    plain = [made.latent for made in draw_prompts(model, [PROMPT, "a cup"], sampling, [0, 1])]
    model.compile()
    compiled = [made.latent for made in draw_prompts(model, [PROMPT, "a cup"], sampling, [0, 1])]
    yield "compiled, latents", difference(compiled, plain), TOLERANCES[torch.float32]


def in_float32(model: Bagel) -> Bagel:
    """The model with weights and computation in float32."""
    model.network.float()
    model.precision = "fp32"
    return model


# --- drawing


def draw(scale: Scale) -> None:
    """Seconds per image from a few steps of each kind, guided and not, and the decoder of the autoencoder."""
    model, rate = scale.model(), matmul_rate(scale.device)
    say(f"{device_name(scale)}: {rate / 1e12:.2f} TFLOP/s in bf16, weights {peak_memory(scale.device):.1f} GB")
    compare_attention(model, scale)
    counts, operations = branch_counts(Sampling(size=scale.size)), image_operations(model, scale.size)
    for batch in scale.batches:
        with reporting(f"{batch} images", scale):
            contexts = contexts_of(model, batch)
            steps = {branches: step_seconds(model, contexts, scale.size, branches) for branches in (1, 2)}
            one, two = (batch * branches * operations / rate / took for branches, took in steps.items())
            latents = [torch.randn(16, *(side // 8 for side in scale.size)) for _ in range(batch)]
            decoding = [seconds(lambda latents=latents: model.decode(latents), scale.device) for _ in range(2)][-1]
            whole = sum(steps[branches] for branches in counts) + decoding
            say(
                f"{batch} images: step of one branch {steps[1]:.3f} s ({one:.0%} of the rate), guided {steps[2]:.3f} s"
                f" ({two:.0%}), autoencoder {decoding:.2f} s; scaled to {len(counts)} steps, {counts.count(2)} of them"
                f" guided: {whole:.1f} s, {whole / batch:.2f} s an image"
            )
    show_kernels(model, scale)


def draw_compiled(scale: Scale) -> None:
    """Guided steps of the most images at a time and of one, through torch.compile."""
    model, rate = scale.model(), matmul_rate(scale.device)
    contexts = {batch: contexts_of(model, batch) for batch in (scale.batches[-1], scale.batches[0])}
    model.compile()
    for batch, context in contexts.items():
        with reporting(f"{batch} images, compiled", scale):
            took = step_seconds(model, context, scale.size, 2)
            share = 2 * batch * image_operations(model, scale.size) / rate / took
            say(f"{batch} images, compiled: guided step {took:.3f} s ({share:.0%} of the rate)")


def contexts_of(model: Bagel, batch: int) -> Cache:
    """So many prompts, and as many contexts without them."""
    with torch.no_grad(), computing(model.device, model.precision):
        return model.contexts([[Segment("text", text=f"{PROMPT} {index}")] for index in range(batch)] + [[]] * batch)


def denoising(model: Bagel, contexts: Cache, size: tuple[int, int], steps: int, branches: int) -> Callable[[], None]:
    """So many steps of one kind."""
    sampling = Sampling(size=size, timesteps=steps + 1, guidance=float(2 * branches - 1), guidance_interval=(0.0, 1.0))
    sizes = [size] * (contexts.rows // 2)
    noise = model.noise(range(len(sizes)), sizes)

    def work() -> None:
        with torch.no_grad(), computing(model.device, model.precision):
            model.denoise(contexts, noise, sizes, sampling)

    return work


def step_seconds(model: Bagel, contexts: Cache, size: tuple[int, int], branches: int) -> float:
    """Of one step: what three take more than one, over two."""
    works = [denoising(model, contexts, size, steps, branches) for steps in (1, 3)]
    seconds(works[0], model.device)  # kernels are chosen, or compiled
    one, three = (seconds(work, model.device) for work in works)
    return (three - one) / 2


def compare_attention(model: Bagel, scale: Scale) -> None:
    """A layer's attention in a guided step of one image, by every way there is."""
    llm, (h, w) = model.config.llm, model.latent_grid(scale.size)
    length = h * w + 2
    q = torch.randn(2, llm.num_attention_heads, length, llm.head_dim, dtype=torch.bfloat16, device=scale.device)
    keys = (2, llm.num_key_value_heads, length + 20, llm.head_dim)
    k, v = (torch.randn(keys, dtype=torch.bfloat16, device=scale.device) for _ in range(2))
    visible = torch.ones(2, 1, length, length + 20, dtype=torch.bool, device=scale.device)
    visible[1, :, :, :20] = False
    bias = additive(visible, torch.bfloat16)
    groups = llm.num_attention_heads // llm.num_key_value_heads

    def repeated(bias: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=bias
        )

    def by(backend: SDPBackend, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

    ways: dict[str, Callable[[], Tensor]] = {
        "as it is": lambda: attend(q, k, v, bias),
        "cuDNN": lambda: by(SDPBackend.CUDNN_ATTENTION, bias),
        "keys repeated": lambda: repeated(bias),
        "keys repeated, one bias for all queries": lambda: repeated(bias[:, :, :1].expand_as(bias)),
        "no bias (other numbers)": lambda: attend(q, k, v, None),
        "no bias, flash (other numbers)": lambda: by(SDPBackend.FLASH_ATTENTION, None),
    }
    operations = 2 * attention_operations(llm, length, length + 20) // llm.num_hidden_layers
    for name, way in ways.items():
        with torch.no_grad(), reporting(f"attention {name}", scale):
            way()
            took = min(seconds(way, scale.device) for _ in range(5))
            say(f"attention {name}: {1e3 * took:.2f} ms, {operations / took / 1e12:.1f} TFLOP/s")


def show_kernels(model: Bagel, scale: Scale) -> None:
    """Where a guided step of some images spends its time."""
    batch = scale.batches[1]
    work, on_gpu = denoising(model, contexts_of(model, batch), scale.size, 1, 2), scale.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as log:
        seconds(work, scale.device)
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [(getattr(event, clock), event.count, event.key) for event in log.key_averages()]
    total = sum(time for time, _, _ in events)
    for time, count, name in sorted(events, reverse=True)[:12]:
        say(f"{time / total:6.1%} {time / 1e3:8.1f} ms {count:5} x {name[:90]}")


# --- text


def decode(scale: Scale) -> None:
    """Tokens per second of several texts at a time, launched one kernel at a time and as CUDA graphs; judging."""
    model = scale.model()
    llm = model.config.llm
    weights = token_operations(llm) + 2 * llm.vocab_size * llm.hidden_size  # bytes: 2 of each, as of operations
    rate = copy_rate(scale.device)
    say(f"{device_name(scale)}: copies {rate / 1e12:.2f} TB/s, a step reads {weights / 1e9:.1f} GB of weights")
    for rows in scale.rows:
        for recorded in (False, True) if scale.device.type == "cuda" else (False,):
            with torch.no_grad(), computing(model.device, model.precision), reporting(f"{rows} texts", scale):
                model.records = recorded
                context = model.contexts([[Segment("text", text=f"{PROMPT} {row}")] for row in range(rows)])
                texts = {n: decoding(model, context, n) for n in (3, scale.tokens)}
                took = [seconds(work, scale.device) for work in texts.values()][-1]
                share = weights * scale.tokens / rate / took
                say(
                    f"{rows} texts{', CUDA graphs' if recorded else ''}: {rows * scale.tokens / took:.0f} tokens/s,"
                    f" {1e3 * took / scale.tokens:.2f} ms a step, weights read at {share:.0%} of the rate of copies"
                )
    with reporting("judging", scale):
        image = Image.effect_noise(scale.size[::-1], 80).convert("RGB")
        seen, reply = Segment("seen", image=image), Decoding(max_tokens=64)
        asked = [[seen, Segment("text", text=f"{PROMPT}: is region {n} right?")] for n in range(8)]
        took = [seconds(lambda: model.write(asked, reply, range(8)), scale.device) for _ in range(2)][-1]
        say(f"8 questions about one image, up to 64 tokens each: {took:.2f} s")


def decoding(model: Bagel, context: Cache, tokens: int) -> Callable[[], object]:
    settings = Decoding(max_tokens=tokens + 1)
    return lambda: model.decode_tokens(context, settings, range(context.rows), stop=-1)  # an id that no token has


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by the best of 10 copies of a large tensor."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


# --- training


def train(scale: Scale) -> None:
    """Steps of region-NFT with LoRA of rank 64 of the generation expert, one pack each, activations recomputed."""
    rate = matmul_rate(scale.device)
    model = scale.model()
    for parameter in (parameter for _, parameter in model.named_parameters()):
        parameter.requires_grad_()
    config = TrainConfig(
        precision="bf16",
        text_dropout=0.0,
        lora=LoraConfig(rank=64),
        memory=MemoryConfig(checkpoint_activations=True, frozen="bf16"),
    )
    with (
        trainable_parameters(model, "generation") as chosen,
        lora.adapted(model, list(chosen), config.lora) as trained,
        recomputed(model.layers()),
    ):
        for images in scale.packs:
            with reporting(f"pack of {images} images", scale):
                train_pack(model, config.model_copy(update={"batch_size": images}), trained, scale, rate)


def train_pack(model: Bagel, config: TrainConfig, trained: Sequence[str], scale: Scale, rate: float) -> None:
    """One size of pack: a step to compile, then two that count."""
    method, own = RegionNft(), RegionNftConfig(train=config)
    records = random_records(model, config.batch_size, scale.size)
    mix = candidate_mix(records, method.credits(records, own), config, 0)
    trainer = Trainer(model, mix.feed(model, config, 0, Processes()), method.objective(own), config, 0, trained)
    rows = []
    first = seconds(lambda: rows.append(trainer.step(0)), scale.device)
    took = min(seconds(lambda step=step: rows.append(trainer.step(step)), scale.device) for step in (1, 2))
    h, w = model.latent_grid(scale.size)
    dense = h * w * token_operations(model.config.llm)
    scores = attention_operations(model.config.llm, h * w, h * w)
    # v_old, v_pred, and backwards through weights that stay as they are; all layers once more where recomputed
    once, again = (config.batch_size * (n * dense + m * scores) / rate / took for n, m in ((3, 4), (4, 5)))
    tokens = sum(model.length(example.segments) for example in mix.parts[0].examples)
    say(
        f"pack of {config.batch_size} images, {tokens} tokens: {took:.2f} s a step, {tokens / took:.0f} tokens/s,"
        f" {once:.0%} of the rate ({again:.0%} with what is recomputed), the first step {first:.1f} s;"
        f" losses {[round(row['loss'], 4) for row in rows]}, gradient {rows[-1]['grad_norm']:.1e}"
    )


def random_records(model: Bagel, count: int, size: tuple[int, int]) -> list[TrainingRecord]:
    """Candidates of one prompt with random latents, maps and scores."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        name = str(index)
        candidate = Candidate(
            id=name, prompt_id="0", prompt=PROMPT, index=index, seed=index, image=name, latent=name, size=size
        )
        latent = torch.randn(16, *(side // 8 for side in size), generator=generator)
        reward_map = torch.rand(model.latent_grid(size), generator=generator)
        score = index / count
        records.append(TrainingRecord(candidate, latent, reward_map, mapping="signed", alpha=1.0, sample_score=score))
    return records


# --- the device


def device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name() if scale.device.type == "cuda" else "CPU"


@contextmanager
def reporting(what: str, scale: Scale) -> Iterator[None]:
    """Say how much memory the block took at most, or that it failed, and go on."""
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except RuntimeError as error:  # out of memory, no such kernel
        say(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    else:
        say(f"    peak {peak_memory(scale.device):.1f} GB")


PARTS = {"draw": draw, "decode": decode, "train": train, "compiled": draw_compiled}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["agree", *PARTS])
    parser.add_argument("--tiny", action="store_true", help="a toy size, on the CPU")
    args = parser.parse_args(argv)
    scale = TINY if args.tiny else GPU
    if scale is GPU and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny shows that the script runs")
    if args.part == "agree":
        sys.exit(0 if agree(scale) else 1)
    PARTS[args.part](scale)


if __name__ == "__main__":
    main()

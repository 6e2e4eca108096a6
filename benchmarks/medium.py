"""How fast a BAGEL of medium size samples and judges: ratios against the plain way, share of the machine's rate.

    python -m benchmarks.medium [--prompts 16] [--steps 10] [--questions 8] [--tokens 64] [--repeats 3] [--compile]

Hidden width 512, 8 layers, 8 heads on 2 key-value heads, feed-forward width 1408, images of 256 px (256 latent tokens),
random weights. The plain ways are one prompt after the other with its guidance branches one after the other, one
question after the other, a decoded token run as any text is, float32, and a C library left to give the memory of
freed tensors back to the system; with ``--compile`` also the model as it is against the compiled one, without the
minutes of compiling. Times are seconds of the processor, medians, the two ways taking turns, but for the memory, which
comes first. The rate is that of the best large matrix product of the same type on this machine: a rollout at 100% would
do nothing but multiply, without a pause.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.stages import Item, Work, make_items, matmul_rate, medians, operations
from srum.models import EMBEDDED, keep_memory, native_bfloat16
from srum.models.bagel import Bagel
from srum.models.bagel.autoencoder import build_autoencoder
from srum.models.bagel.cache import Cache
from srum.models.bagel.config import AutoencoderConfig, BagelConfig, LlmConfig, ResizeLimits, VitConfig
from srum.models.bagel.sequence import Split
from srum.models.base import Decoding, Sampling, Segment
from srum.models.checkpoints import load_tokenizer
from srum.models.precision import Precision
from srum.train.pretrain import fresh_network

SIDE = 256  # pixels
LLM = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
VIT = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 4,
    "patch_size": 16, "image_size": SIDE, "num_channels": 3, "layer_norm_eps": 1e-6,
}  # fmt: skip
LIMITS = ResizeLimits(max_image_size=SIDE, min_image_size=SIDE, image_stride=16)


def medium_model(precision: Precision) -> Bagel:
    """The model of this benchmark, the same random weights every time; its tokenizer is the shipped model's."""
    config = BagelConfig(
        llm=LlmConfig.model_validate(LLM),
        vit=VitConfig.model_validate(VIT),
        autoencoder=AutoencoderConfig(ch=32),
        max_latent_size=SIDE // 16,
        vit_max_num_patch_per_side=SIDE // 16,
        vae_transform=LIMITS,
        vit_transform=LIMITS,
    )
    folder = EMBEDDED["srum-tiny"]
    network, autoencoder = fresh_network(config, seed=0), build_autoencoder(config.autoencoder)
    torch.nn.init.normal_(
        network.llm2vae.weight, std=0.02
    )  # zero at the start of a training, which would stop no clock
    return Bagel(folder, config, network.eval(), autoencoder.eval(), load_tokenizer(folder), precision)


def rollout(model: Bagel, prompts: Sequence[str], steps: int) -> tuple[Work, Work]:
    """Latents of the prompts: (one prompt and one guidance branch at a time, all together)."""
    sampling = Sampling(size=(SIDE, SIDE), timesteps=steps + 1, guidance_interval=(0.0, 1.0))
    alone = replace(sampling, guidance=1.0)

    def together() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.precision == "bf16"):
            seeds, sizes = range(len(prompts)), [sampling.size] * len(prompts)
            contexts = [[Segment("text", text=prompt)] for prompt in prompts]
            cache = model.contexts(contexts + [[]] * len(prompts))
            model.denoise(cache, model.noise(seeds, sizes), sizes, sampling)

    def one_by_one() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.precision == "bf16"):
            for seed, prompt in enumerate(prompts):
                for context in ([Segment("text", text=prompt)], []):
                    noise = model.noise([seed], [sampling.size])
                    model.denoise(model.contexts([context]), noise, [sampling.size], alone)

    return one_by_one, together


def judging(model: Bagel, count: int, tokens: int) -> tuple[Work, Work]:
    """Replies to questions about one image: (one at a time, together)."""
    (item,) = make_items(1)
    contexts, decoding = questions(item, count), Decoding(max_tokens=tokens)

    def one_by_one() -> None:
        for context in contexts:
            model.write([context], decoding, [0])

    return one_by_one, lambda: model.write(contexts, decoding, range(count))


def questions(item: Item, count: int) -> list[list[Segment]]:
    """Contexts of so many questions about one image, which they share."""
    seen = Segment("seen", image=item.image)
    return [[seen, Segment("text", text=f"Region {n} of {item.prompt}: score?")] for n in range(count)]


def writing(model: Bagel, rows: int, tokens: int) -> tuple[Work, Work]:
    """Greedy texts that never stop: (every token laid out and looked at as a text of its own, steps of one shape)."""
    (item,) = make_items(1)

    def context() -> Cache:
        return model.contexts(questions(item, rows))

    def as_texts() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.precision == "bf16"):
            cache, last = context(), [model.bos] * rows
            cache.reserve(tokens)
            for _ in range(tokens - 1):
                states = model._extend(cache, [[Split(kind="text", ids=[token])] for token in last])
                last = model.network.language_model.lm_head(states).argmax(1).tolist()

    def as_steps() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.precision == "bf16"):
            model.decode_tokens(context(), Decoding(max_tokens=tokens), range(rows), stop=-1)  # an id that no token has

    return as_texts, as_steps


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compare with the compiled model, too")
    args = parser.parse_args(argv)
    prompts = [item.prompt for item in make_items(args.prompts)]
    best: Precision = "bf16" if native_bfloat16(torch.device("cpu")) else "fp32"
    model = medium_model(best)
    table = Table("what", "plain s", "ours s", "ratio", "share of the rate", title=f"medium size, {best}")

    def row(what: str, times: tuple[float, float], counted: Work, precision: Precision = best) -> None:
        slow, fast = times
        share = operations(counted) / matmul_rate(precision) / fast
        table.add_row(what, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}", f"{100 * share:.0f}%")

    def compare(what: str, plain: Work, ours: Work, counted: Work | None = None) -> tuple[float, float]:
        row(what, times := medians(plain, ours, args.repeats), counted or ours)
        return times

    sequential, batched = rollout(model, prompts, args.steps)
    batched()  # the first is slower
    returned, _ = medians(batched, batched, args.repeats)
    keep_memory()
    _, kept = compare("rollout, against one prompt and branch at a time", sequential, batched)
    row("rollout, against memory given back", (returned, kept), batched)
    if best == "bf16":
        one_by_one, together = rollout(medium_model("fp32"), prompts, args.steps)
        compare("rollout, against float32", together, batched)
        times = medians(one_by_one, together, args.repeats)
        row("rollout in float32, against one at a time in float32", times, together, "fp32")
    singly, asked = judging(model, args.questions, args.tokens)
    compare("judging, against one question at a time", singly, asked)
    compare("the same tokens, against a text per token", *writing(model, args.questions, args.tokens))
    if args.compile:
        compiled = medium_model(best)
        compiled.compile()
        for what, plain, ours in (
            ("rollout, compiled", batched, rollout(compiled, prompts, args.steps)[1]),
            ("judging, compiled", asked, judging(compiled, args.questions, args.tokens)[1]),
        ):
            ours()  # compiles; the counter of operations does not see into compiled code
            compare(what, plain, ours, counted=plain)
    rates = ", ".join(f"{name} {matmul_rate(name) / 1e9:.0f} GFLOP/s" for name in ("bf16", "fp32"))
    Console().print(table, f"{torch.get_num_threads()} threads, {rates}")


if __name__ == "__main__":
    main()

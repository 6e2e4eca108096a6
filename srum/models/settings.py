"""Settings of a run that most architectures cannot follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from srum.config import ConfigError, RunConfig

NOTHING: Mapping[str, str] = MappingProxyType({})


def refuse_unused(
    config: RunConfig,
    name: str,
    no_spread: str,
    *,
    step: str = "step",
    guided: str = "velocity is",
    refine: bool = False,
    own: Mapping[str, str] = NOTHING,
) -> None:
    """Raises ConfigError for settings that would do nothing for the architecture ``name``, whose layers are not spread
    for the reason ``no_spread``.

    ``step`` and ``guided``: what it draws by, and what guidance changes there, with its verb. ``refine``: that
    section's sampler is looked at, too. ``own``: what else the architecture finds wrong, by the setting, and first.
    """
    wrong = dict(own)
    for setting, why in _unused(config, name, no_spread, step, guided, refine):
        wrong.setdefault(setting, why)
    for setting, why in wrong.items():
        raise ConfigError(f"{setting}: {why}")


def _unused(
    config: RunConfig, name: str, no_spread: str, step: str, guided: str, refine: bool
) -> Iterator[tuple[str, str]]:
    if config.rollout.planned(config.candidates_per_prompt) > 0:
        yield "rollout.plan", f"{name} writes no plan; set it to false"
    if config.eval.plan:
        yield "eval.plan", f"{name} writes no plan; set it to false"
    if config.device == "spread":
        yield "device", no_spread
    if config.compile:
        yield "compile", f"{name} does not run through torch.compile; leave it false"
    if config.refine.image_guidance > 1:
        yield "refine.image_guidance", f"{name} has no guidance by images; leave it at 1"
    sections = {"rollout": config.rollout, "eval": config.eval} | ({"refine": config.refine} if refine else {})
    for section, part in sections.items():
        if part.guidance_interval != (0.0, 1.0):
            yield f"{section}.guidance_interval", f"{name} is guided in every {step}; leave it at [0, 1]"
        for field in ("guidance_every", "velocity_every"):
            if getattr(part, field) > 1:
                yield f"{section}.{field}", f"{name} runs whole in every {step}; leave it at 1"
        if part.renorm != "global":
            yield f"{section}.renorm", f"{name}'s guided {guided} not renormalised; leave this at its default"

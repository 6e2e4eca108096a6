"""Settings of a run that such a model cannot follow."""

from __future__ import annotations

from srum.config import ConfigError, RunConfig


def refuse(config: RunConfig, name: str, no_spread: str) -> None:
    """Raises ConfigError for settings that would do nothing for the architecture ``name``, whose layers are not spread
    for the reason ``no_spread``."""
    plans = config.rollout.planned(config.candidates_per_prompt) > 0
    wrong = {
        "rollout.plan": f"{name} writes no plan; set it to false" if plans else "",
        "eval.plan": f"{name} writes no plan; set it to false" if config.eval.plan else "",
        "device": no_spread if config.device == "spread" else "",
        "compile": f"{name} does not run through torch.compile; leave it false" if config.compile else "",
        "train.replies": f"{name} learns no texts; set it to 0" if config.train.replies else "",
        "refine.image_guidance": f"{name} has no guidance by images; leave it at 1"
        if config.refine.image_guidance > 1
        else "",
        "seen_size": f"{name} sees images at a size of its own; leave it unset"
        if getattr(config, "seen_size", None)  # of RecA's configs
        else "",
    }
    for section, part in (("rollout", config.rollout), ("eval", config.eval)):
        if part.guidance_interval != (0.0, 1.0):
            wrong[f"{section}.guidance_interval"] = f"{name} is guided in every step; leave it at [0, 1]"
        for field in ("guidance_every", "velocity_every"):
            if getattr(part, field) > 1:
                wrong[f"{section}.{field}"] = f"{name} runs whole in every step; leave it at 1"
        if part.renorm != "global":
            wrong[f"{section}.renorm"] = f"{name}'s guided velocity is not renormalised; leave this at its default"
    for field, why in wrong.items():
        if why:
            raise ConfigError(f"{field}: {why}")

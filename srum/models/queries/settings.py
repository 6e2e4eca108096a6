"""Settings of a run that such a model cannot follow."""

from __future__ import annotations

from srum.config import RunConfig
from srum.models.settings import refuse_unused


def refuse(config: RunConfig, name: str, no_spread: str) -> None:
    """Raises ConfigError for settings that would do nothing for the architecture ``name``, whose layers are not spread
    for the reason ``no_spread``."""
    own = {}
    if config.train.replies:
        own["train.replies"] = f"{name} learns no texts; set it to 0"
    if getattr(config, "seen_size", None):  # of RecA's configs
        own["seen_size"] = f"{name} sees images at a size of its own; leave it unset"
    refuse_unused(config, name, no_spread, own=own)

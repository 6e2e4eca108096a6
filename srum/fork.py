"""A run that begins where another one was: it shares what lies before a stage, and does that stage its own way.

Images, latents, reward maps and weights are written once under their names and shared by hard links, so that a fork
takes no room; what is appended to, or small enough to be edited by hand, is copied.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from srum.config import FREE, RunConfig, differing_fields, dump, load_config
from srum.run import Run
from srum.run_dir import CONFIG, RunError, prompts_copy, round_dir, write_json, write_text
from srum.stages import Stage

FILES = {  # of a round, by the stage that makes them, in order
    "rollout": ("prompts.jsonl", "candidates.jsonl", "images", "latents"),
    "ground": ("regions.jsonl",),
    "judge": ("judgements.jsonl",),
    "rasterize": ("rewards.jsonl", "rewards", "counts.json"),
    "images": ("pictures.jsonl", "pictures"),
    "pair": ("pairs.jsonl", "pair_counts.json"),
    "train": ("train",),
}
OF_SOME = ("imported.json", "rollout_counts.json")  # of rounds whose candidates were imported, or drawn by a server
DEPENDS = {  # on which parts of the config a stage depends, beside those of the stages before it
    "rollout": ("model", "seed", "prompts", "prompt_count", "candidates_per_prompt", "rollout"),
    "ground": ("ground",),
    "judge": ("judge",),
    "rasterize": ("reward",),
    "images": ("images",),
    "pair": ("pairs",),
}
NEVER_SHARED = ("rounds", "eval")  # parts of the config on which nothing in a fork depends; training takes all others
WRITTEN_ONCE = {"images", "latents", "pictures", "rewards", "model", "adapter", "samples"}  # folders
LEFT_BEHIND = "checkpoints"  # of a finished training, whose weights are in model/: nothing reads them again


def fork_run(source: Path, target: Path, stage: str, config: RunConfig, round_: int | None = None) -> None:
    """Make ``target`` a run with ``config`` that has what ``source`` made before ``stage`` of round ``round_``.

    The rounds before that one are shared whole, but for ``eval/`` and checkpoints. None: the last round, of those that
    ``config`` asks for, whose stage could begin. ``config`` may be of another method (``srum.config.changed``).
    ``forked.json`` says what was forked. The folder appears by rename, complete. Raises RunError, and makes nothing,
    for a source that is no run or has not come so far, an unknown stage, a target that exists, and a config that
    differs in what a shared stage depends on.
    """
    if stage not in FILES:
        raise RunError(f"stage: {stage!r} is none; expected {', '.join(FILES)}")
    if not (source / CONFIG).exists():
        raise RunError(f"{source} is not the folder of a run: it has no {CONFIG}")
    if target.exists():
        raise RunError(f"{target} exists; choose another folder for the fork")
    k = _last_round(source, stage, config.rounds) if round_ is None else round_
    if k >= config.rounds:
        raise RunError(f"round {k} cannot be forked: the config asks for {config.rounds} rounds, counted from 0")
    if lacking := _lacking(source, stage, k):
        raise RunError(f"{stage} of round {k} cannot be forked: {lacking} is missing or unfinished")
    _require_the_same(source, stage, config, k)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a fork that was interrupted
    for name in _shared(source, stage, k):
        share(source / name, partial / name, linked=not WRITTEN_ONCE.isdisjoint(name.parts))
    held = load_config(source / CONFIG)
    if config.prompts == held.prompts and (copy := prompts_copy(source, held)).is_file():
        share(copy, prompts_copy(partial, config), linked=False)
    write_json(partial / "forked.json", {"source": str(source.resolve()), "stage": stage, "round": k})
    write_text(partial / CONFIG, dump(config))
    partial.rename(target)


def _last_round(source: Path, stage: str, rounds: int) -> int:
    """The last round whose ``stage`` could begin; 0 where none could, so that what is missing is that of the first."""
    return next((k for k in reversed(range(rounds)) if _lacking(source, stage, k) is None), 0)


def _parts(source: Path, stage: str, k: int) -> Iterator[Path]:
    """The files and folders that a fork at ``stage`` of round ``k`` shares: of the stages that the source has."""
    has = list(Run(source, load_config(source / CONFIG)).stages.values())
    for number in range(k + 1):
        for made in _before(stage, has) if number == k else has:
            files = FILES.get(made.name) or [f"{name}.jsonl" for name in made.writes]
            yield from (round_dir(source, number) / file for file in files)


def _before(stage: str, has: Sequence[Stage]) -> list[Stage]:
    """Those that come before ``stage``; of a user's own those that the source does before all that is done again."""
    done_again = list(FILES)[list(FILES).index(stage) :]
    first = next(place for place, made in enumerate(has) if made.name in done_again)  # training, if no other
    return [m for place, m in enumerate(has) if m.name not in done_again and (m.name in FILES or place < first)]


def _lacking(source: Path, stage: str, k: int) -> Path | None:
    """The first thing that is not there as a whole."""
    return next((part for part in _parts(source, stage, k) if not _is_whole(part)), None)


def _is_whole(part: Path) -> bool:
    if part.name == "train":
        arms = [arm for arm in part.glob("*") if arm.is_dir()]
        return bool(arms) and all((arm / "model").is_dir() for arm in arms)
    if part.suffix == ".jsonl":
        return part.exists() and part.read_bytes()[-1:] in (b"", b"\n")
    return part.exists()


def _require_the_same(source: Path, stage: str, config: RunConfig, k: int) -> None:
    """RunError where the config differs from the source's in what a shared stage depends on."""
    shared = list(DEPENDS)[: list(FILES).index(stage)]
    fixed = {field for name in shared for field in DEPENDS[name]}
    different = [
        line
        for line in differing_fields(load_config(source / CONFIG), config, besides=FREE)
        if (field := re.split(r"[.:]", line)[0]) in fixed or (k > 0 and field not in NEVER_SHARED)
    ]
    if different:
        hint = "fork round 0, or keep them" if k > 0 else "fork from an earlier stage, or keep them"
        raise RunError(f"the fork would share what depends on other values ({'; '.join(different)}); {hint}")


def _shared(source: Path, stage: str, k: int) -> Iterator[Path]:
    """The files that a fork shares, by their names in the run; hidden ones are half-written."""
    folders = [round_dir(source, number) for number in range(k + (stage != "rollout"))]
    beside = (folder / name for folder in folders for name in OF_SOME)
    for part in (*_parts(source, stage, k), *(path for path in beside if path.exists())):
        files = [file for file in sorted(part.rglob("*")) if file.is_file()] if part.is_dir() else [part]
        names = [file.relative_to(source) for file in files]
        yield from (n for n in names if LEFT_BEHIND not in n.parts and not any(p.startswith(".") for p in n.parts))


def share_folder(old: Path, new: Path) -> None:
    """A folder whose files are never written again, at once; nothing where there is a new one already."""
    if new.exists():
        return
    partial = new.with_name(f".{new.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file in (path for path in old.rglob("*") if path.is_file()):
        share(file, partial / file.relative_to(old), linked=True)
    partial.rename(new)


def share(old: Path, new: Path, linked: bool) -> None:
    """A hard link where that is wanted and the file system can, else a copy."""
    new.parent.mkdir(parents=True, exist_ok=True)
    if linked:
        with suppress(OSError):  # another file system, or one without links
            os.link(old, new)
            return
    shutil.copy2(old, new)

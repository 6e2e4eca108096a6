"""Publishing an arm of a run: its weights or its adapter, an image to know them by, and a model card.

What is published is loaded back, and has to draw the image that the run's own weights draw, before it gets its name or
goes to the hub.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from PIL.Image import Image

import srum
from srum import models
from srum.disk import writing
from srum.drawing import draw_prompts
from srum.errors import SrumError
from srum.models.base import Sampling, TrainableModel
from srum.records import Prompt
from srum.run import Run, load_model
from srum.run_dir import read_records
from srum.seeding import seed_for
from srum.stages.rollout import choose_prompts
from srum.train.lora import add_adapter
from srum.train.model_card import CARD, example_sampling, model_card
from srum.train.trainer import DTYPES

EXAMPLE = "example.png"
TOLERANCE = 2  # levels of 255 between an image by merged weights and one by an adapter that is added later


class PublishError(SrumError):
    """What cannot be published, or not there; the message is one line."""


def publish(run: Run, arm: str, destination: str, adapter: bool = False, private: bool = False) -> str:
    """Publish the newest weights of ``arm``, or its ``adapter`` alone, and return where they are.

    ``destination`` is a new folder, or ``owner/name`` on the hub (``to_hub``). Raises PublishError for an arm that was
    not trained, an adapter whose base is not the model that entered, a folder that is there, a missing token, a hub
    that refuses, and a copy that draws another image than the run's weights.
    """
    k = last_round(run, arm)
    if adapter:
        _require_adapter(run, arm, k)
    if not to_hub(destination):
        if Path(destination).exists():
            raise PublishError(f"{destination} is there already; choose another folder")
        _make(run, arm, k, Path(destination), destination, adapter)
        return destination
    if get_token() is None:
        raise PublishError(
            f"{destination}: pushing to the hub needs a token, by `hf auth login` or in HF_TOKEN; "
            f"a folder of that name would be ./{destination}"
        )
    with tempfile.TemporaryDirectory() as kept:
        _make(run, arm, k, Path(kept) / "model", destination, adapter)
        return _pushed(Path(kept) / "model", destination, private)


def to_hub(destination: str) -> bool:
    """Whether that is ``owner/name`` on the hub: it looks so, and no folder ``owner`` is here."""
    return models.HUB_ID.fullmatch(destination) is not None and not Path(destination).parent.is_dir()


def last_round(run: Run, arm: str) -> int:
    """The last round that the arm was trained in."""
    if arm not in run.arms:
        raise PublishError(f"{run.folder} trains no arm {arm!r}; it has {', '.join(run.arms)}")
    done = [k for k in range(run.config.rounds) if (run.train_dir(arm, k) / "model").is_dir()]
    if not done:
        raise PublishError(f"{run.folder}: {arm} has not been trained yet")
    return max(done)


def _require_adapter(run: Run, arm: str, k: int) -> None:
    if not (run.train_dir(arm, k) / "adapter").is_dir():
        raise PublishError(f"{run.train_dir(arm, k)} has no adapter; a training with train.lora.rank writes one")
    if k:
        raise PublishError(f"the adapter of round {k} goes onto the weights of round {k - 1}: publish the weights")


def _make(run: Run, arm: str, k: int, folder: Path, name: str, adapter: bool) -> None:
    """The folder with all that belongs into it, checked; or none."""
    prompt = _prompt(run, k)
    seed = seed_for(run.config.seed, prompt.id, "eval")
    made = run.train_dir(arm, k)

    def drawn(model: TrainableModel) -> Image:
        (image,) = draw_prompts(model, [prompt.text], Sampling(**example_sampling(run.config)), [seed])
        return image.image

    with _complete(folder) as partial:
        shutil.copytree(made / ("adapter" if adapter else "model"), partial)
        image = drawn(_loaded(run, partial, adapter))
        _require_same(image, drawn(load_model(run.config, str(made / "model"))), TOLERANCE if adapter else 0)
        image.save(partial / EXAMPLE)
        model_card(run, arm, k, name, prompt.text, seed, adapter).save(partial / CARD)


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its place at the end of the block, and goes where that fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _loaded(run: Run, folder: Path, adapter: bool) -> TrainableModel:
    """The model of the folder, read back."""
    if not adapter:
        return load_model(run.config, str(folder))
    model = load_model(run.config, run.config.model, DTYPES[run.config.train.memory.frozen])
    add_adapter(model.network, folder)
    return model


def _require_same(image: Image, expected: Image, tolerance: int) -> None:
    apart = int(np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max())
    if apart > tolerance:
        raise PublishError(
            f"read back, it draws another image than the run's weights, by {apart} of 255: not published"
        )


def _prompt(run: Run, k: int) -> Prompt:
    """The first of the evaluation, or where there is none, of the round."""
    config = run.config.eval
    if config.count:
        return choose_prompts(config.prompts, config.count, seed=0)[0]
    return read_records(run.round(k) / "prompts.jsonl", Prompt)[0]


def _pushed(folder: Path, repository: str, private: bool) -> str:
    hub = HfApi()
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"srum {srum.__version__}")
    except (HTTPError, OSError) as error:  # refused, or not reached
        raise PublishError(f"{repository}: not pushed: {str(error).splitlines()[0]}") from None
    return str(url)

"""The doctor: what it says of the golden checkpoint and of BAGEL's size, and what it refuses."""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from srum import doctor, models
from srum.cli import app
from srum.doctor import Machine, _fits_shared, self_check, tables
from srum.errors import ModelError, SrumError
from srum.models.bagel import Bagel
from srum.models.bagel.memory import Sizes, stage_needs, training_need
from srum.models.needs import Need, Recipe
from tests.fakes import released_config

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"
HOST = Machine(torch.device("cpu"), "CPU", 10**9, bfloat16=False)


def printed(folder: Path, machine: Machine = HOST) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(*tables(folder, machine, (64, 64)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_it_says_what_the_folder_holds() -> None:
    shapes = json.loads((CHECKPOINT.parent / "checkpoint_shapes.json").read_text())
    text = printed(CHECKPOINT)
    assert f"{len(shapes)} tensors" in text and "complete" in text and "F32" in text
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert f"{parameters / 1e6:,.1f} million parameters" in text


def test_what_does_not_fit_is_said() -> None:
    assert "does not fit" not in printed(CHECKPOINT)
    small = Machine(torch.device("cpu"), "CPU", 1000, bfloat16=False)
    assert printed(CHECKPOINT, small).count("does not fit") == 4


def test_the_fewest_processes_that_hold_a_training(tmp_path: Path) -> None:
    """BAGEL-7B in bfloat16 on GPUs of 24 GB: LoRA in four, as the table of docs/training.md says."""
    config = released_config(tmp_path)
    gpu = Machine(torch.device("cuda"), "a GPU", int(0.95 * 24e9), bfloat16=True)
    need_of = partial(training_need, config, Sizes.of(config), (1024, 1024), True)
    table = _fits_shared(need_of, gpu)
    assert [list(column.cells) for column in table.columns[:2]] == [
        ["LoRA of rank 64", "generation expert", "all weights"],
        ["4", "16", "32"],
    ]
    small = _fits_shared(need_of, replace(gpu, memory=10**9))
    assert set(small.columns[1].cells) == {"[red]more than 64[/red]"}


def test_the_images_that_fit() -> None:
    """(100 - 10) // 20 = 4; exactly nothing left, and less than nothing, hold no image."""
    assert [Need(10, 20).images(available) for available in (100, 10, 5)] == [4, 0, 0]


def test_bagel_needs_what_its_size_says(tmp_path: Path) -> None:
    """Float32 weights of 14.6 billion parameters take 58.4 GB; training all adds four times as much."""
    config = released_config(tmp_path)
    sizes = Sizes.of(config)
    assert (sizes.network, sizes.autoencoder) == (14_607_260_128, 83_819_683)
    once = {name: need.once / 1e9 for name, need in stage_needs(config, sizes, (1024, 1024), bfloat16=False).items()}
    assert once["rollout"] == once["judging"] == pytest.approx(4 * (14.607260128 + 0.083819683))
    assert once["training, all weights"] - once["rollout"] == pytest.approx(16 * 14.607260128)


def test_the_tiers_of_the_documentation_are_the_estimates(tmp_path: Path) -> None:
    config = released_config(tmp_path)
    sizes = Sizes.of(config)
    lora, expert = Recipe(lora_rank=64, frozen=2, recompute=True), Recipe(frozen=2, recompute=True)
    everything = Recipe(everything=True, recompute=True, compares=False, processes=8)
    recipes = [lora, replace(lora, processes=2), replace(lora, processes=4), expert, replace(expert, averages=2)]
    recipes += [replace(expert, processes=4), replace(expert, processes=8), everything]
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"48 GB \| 80 GB \|\n\|[-|]+\n(.*?)\n\n", text, re.S)
    for line, recipe in zip(table.splitlines(), recipes, strict=True):
        need = training_need(config, sizes, (1024, 1024), True, recipe)
        fits = [str(need.images(int(0.95 * tier * 10**9)) or "no") for tier in (24, 48, 80)]
        numbers = [str(recipe.processes), f"{need.once / 1e9:.0f}", f"{need.per_image / 1e9:.1f}", *fits]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == numbers


def test_training_and_sampling_agree() -> None:
    deviation, tolerance = self_check(Bagel.load(CHECKPOINT), (64, 96), bfloat16=False)
    assert deviation < 1e-4 < tolerance


def test_the_command_ends_well_and_badly(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["doctor", str(CHECKPOINT), "--size", "64"])
    assert run.exit_code == 0 and "training and sampling agree" in run.output
    run = CliRunner().invoke(app, ["doctor", str(tmp_path), "--no-check"])
    assert run.exit_code == 2 and "is no model: it has no file that marks one (bagel: llm_config.json; " in run.output
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ModelError, match=r"but a run: its weights are in .*round-000/train/METHOD/model$"):
        models.architecture(tmp_path)
    (tmp_path / "round-001/train/sft/model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"but a run: its weights are in .*round-001/train/sft/model$"):
        models.architecture(tmp_path)
    run = CliRunner().invoke(app, ["doctor", str(CHECKPOINT), "--device", "cuda:99"])
    assert run.exit_code == 2 and "device: cuda:99 is not here" in run.output
    for name in ("nonsense", "meta", "cpu:x"):
        with pytest.raises(ModelError, match=f"device: '{name}' is none to work on"):
            models.find_device(name)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    """By the doctor's tables, and where the weights are loaded."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    whole = (folder / name).read_bytes()
    for kept, what in (
        (len(whole) - 1, "not a whole safetensors file: "),
        (4, "not a whole safetensors file: "),
        (0, "empty"),
    ):
        (folder / name).write_bytes(whole[:kept])
        run = CliRunner().invoke(app, ["doctor", str(folder), "--size", "64"])
        assert run.exit_code == 2 and run.stderr.startswith(f"error: {folder / name} is {what}")
        with pytest.raises(SrumError, match=f"{name} is {what}"):
            models.load(str(folder), "cpu")


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_device_of_a_name(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """With two GPUs and with none; "spread" is where all but the layers goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    best = torch.device("cuda" if gpus else "cpu")
    assert models.find_device("auto") == models.find_device("spread") == best
    assert models.find_device("cpu") == HOST.device
    for name, index in (("cuda", 0), ("cuda:1", 1), ("cuda:2", 2)):
        if index < gpus:
            assert models.find_device(name) == torch.device(name)
        else:
            with pytest.raises(ValueError, match=f"device: {name} is not here, this machine has {gpus} of that type"):
                models.find_device(name)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
@pytest.mark.parametrize(
    ("place", "limit", "used", "dropped"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_container_has_used_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, limit: str, used: str, dropped: str
) -> None:
    """Of a limit of 1,000 bytes 700 are used, 200 of them by files that the system drops when memory is wanted."""
    monkeypatch.setattr(doctor, "CONTAINER", tmp_path)
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "memory.stat").write_text(f"cache 300\n{dropped} 200\n")
    (folder / used).write_text("700\n")
    for limited, free in (("1000\n", 500), ("400\n", 0)):
        (folder / limit).write_text(limited)
        assert Machine.here("cpu").memory == free
    (folder / limit).write_text("max\n")
    assert Machine.here("cpu").memory > 10**6


def test_the_memory_of_freed_tensors_is_kept_and_that_of_shapes_bounded() -> None:
    """Once there is enough, no page is asked for again; left alone, all are every time, 16,384 of them. Of the first
    256 shapes of bfloat16 products each keeps half a megabyte, where these run in hardware; later ones take its place.
    """
    count = """if True:
        import resource, torch
        from srum.models import keep_memory
        keep_memory()

        def resident():
            return int(open("/proc/self/statm").read().split()[1])

        weight, grown, faults = torch.randn(64, 64, dtype=torch.bfloat16), [], []
        for first, last in ((1, 9), (9, 265), (265, 393)):
            before = resident()
            for rows in range(first, last):
                torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
            grown.append((resident() - before) / (last - first))
        for _ in range(10):
            torch.zeros(2**24)  # 64 MiB
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[-6], *grown[1:])"""
    printed = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    again, filling, full = map(float, printed.stdout.split())
    assert again < 1000
    assert full < filling / 2 or not models.native_bfloat16(HOST.device)


def test_a_hub_id_is_fetched_once_and_its_failure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **options: object) -> str:
        asked.append(name)
        if name == "owner/none":
            raise OSError("there is no such repository\nand more")
        return str(CHECKPOINT)

    monkeypatch.setattr(models, "snapshot_download", fetch)
    assert models.find("owner/model") == CHECKPOINT
    with pytest.raises(ModelError, match="no folder 'owner/none', and none from the hub: there is no such"):
        models.find("owner/none")
    with pytest.raises(ModelError, match="no model 'nothing'"):
        models.find("nothing")
    assert asked == ["owner/model", "owner/none"]

"""The command line: every stage, the loop, a plug-in grounder, and errors in one line."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from srum import __version__, models
from srum.cli import GROUPS, app
from srum.config import load_config
from srum.models.base import Written
from srum.run_dir import alone_in
from tests.fakes import FakeModel

METHODS = "give one of sft, srum, region_nft, reca, rvr, flow_grpo, r3, process or module:Name"
SMALL = [
    "rounds=1",
    "prompt_count=3",
    "candidates_per_prompt=2",
    "train.steps=2",
    "train.batch_size=2",
    "eval.count=3",
    "reward.on_failure=keep",
]
SETS = [part for override in SMALL for part in ("--set", override)]
ARMS = ["sft", "srum", "region_nft"]
GROUNDER = """
from srum.records import Region

class WholeImage:
    def propose(self, images, prompts):
        return [[Region(id=1, box=(0, 0, i.width, i.height / 2), area=1, source="mine")] for i in images]
"""


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "load", FakeModel.load)
    monkeypatch.chdir(tmp_path)


def srum(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_of(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_help_is_there_without_torch() -> None:
    code = "import sys, srum.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    stages = {"rollout", "ground", "judge", "rasterize", "train", "eval", "report", "run", "pretrain"}
    assert all(command in srum("--help").output for command in stages | {"show", "compare", "export", "import"})


HEAVY = {"torch", "numpy", "matplotlib", "transformers", "PIL"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["run", "--help"], 0),
        (["run", "--set", "typo=1"], 2),
        (["run", "--config", "nowhere.yaml"], 2),
        (["config", "--explain", "train.lr"], 0),
        (["ground", "run", "--set", "train.lrr=1"], 2),
        (["judge", "nowhere"], 2),
        (["eval", "nowhere"], 2),
    ],
)
def test_help_and_a_typo_are_answered_without_imports_of_weight(arguments: list[str], status: int) -> None:
    """In a second of processor time, most of which torch alone would take: imports are what can be counted."""
    code = f"import sys; from srum.cli import app; sys.argv[1:] = {arguments}\n"
    code += "try: app()\n"
    code += (
        f"except SystemExit as end: sys.exit(repr({HEAVY} & set(sys.modules)) if end.code == {status} else 'failed')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "set()", result.stderr
    assert status == 0 or (result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 2)


@pytest.mark.parametrize("fault", [ValueError("ours"), OSError("ours"), KeyError("ours")])
def test_an_error_of_ours_is_a_traceback(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise fault

    monkeypatch.setattr(FakeModel, "draw", broken)
    result = srum("rollout", "run", *SETS)
    assert result.exception is fault and "error: " not in result.stderr


def test_a_device_without_room_is_one_line_that_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na total capacity of 1")

    monkeypatch.setattr(FakeModel, "draw", full)
    error = error_of(srum("rollout", "run", *SETS))
    assert error.startswith("CUDA out of memory: lower the number of the stage (rollout.batch_size, judge.batch_size, ")
    page = Path(__file__).parents[1] / "docs/howto/memory.md"
    named = re.findall(r"[a-z]+\.[a-z_.]+(?=[,)])", error.partition("(")[2])
    assert len(named) == 4 and all(f"`{field}`" in page.read_text(encoding="utf-8") for field in named)


def test_every_expected_error_has_the_one_base() -> None:
    """The bases of all that are defined here lead to SrumError, but for a reply without a value, which is counted, and
    a request to the server that is refused, which is answered."""
    folder = Path(__file__).parents[1]
    files = [path for house in ("srum", "grounding", "judging", "train") for path in (folder / house).rglob("*.py")]
    classes = [node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    bases = {one.name: {ast.unparse(base) for base in one.bases} for one in classes}
    errors = {name for name, own in bases.items() if any(base.endswith(("Error", "Exception")) for base in own)}
    expected = {"SrumError"}
    while more := {name for name, own in bases.items() if own & expected} - expected:
        expected |= more
    assert len(errors) > 10 and errors - expected == {"Refused", "Unreadable"}


def test_run_ends_in_a_table_and_is_not_overwritten() -> None:
    result = srum("run", *SETS)
    assert result.exit_code == 0, result.output
    assert "region_nft" in result.output and Path("runs/default/report.html").is_file()
    summary = Path("runs/default/summary.json").read_bytes()
    assert "pass --resume" in error_of(srum("run", *SETS))
    assert "(seed: 0 != 1)" in error_of(srum("run", *SETS, "--set", "seed=1", "--resume"))
    assert srum("run", "--resume").exit_code == 0
    assert Path("runs/default/summary.json").read_bytes() == summary


def test_stages_are_the_run() -> None:
    assert srum("run", "--out", "whole", *SETS).exit_code == 0
    assert srum("rollout", "parts", *SETS).exit_code == 0
    for stage in ("ground", "judge", "rasterize", "train"):
        assert srum(stage, "parts", "--round", "0").exit_code == 0
    assert srum("eval", "parts", "--round", "0").exit_code == 0
    assert srum("eval", "parts").exit_code == 0
    assert srum("report", "parts").output == "open parts/report.html\n"
    for name in ("summary.json", "round-000/rewards.jsonl", "round-000/counts.json", "config.yaml"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    assert (
        Path("parts/round-000/eval/region_nft/verdicts.jsonl").read_bytes()
        == Path("parts/eval/region_nft/verdicts.jsonl").read_bytes()
    )


def test_set_changes_the_run_that_is_there_where_no_result_depends_on_it() -> None:
    assert srum("rollout", "run", *SETS, "--set", "seed=5").exit_code == 0
    before = load_config(Path("run/config.yaml"))
    assert srum("ground", "run", "--set", "device=cpu").exit_code == 0
    assert load_config(Path("run/config.yaml")) == before.model_copy(update={"device": "cpu"})
    refused = "run is a run of another config (train.batch_size: 2 != 8); choose another folder"
    kept = Path("run/config.yaml").read_bytes()
    for command in (["judge", "run"], ["run", "--out", "run"], ["run", "--out", "run", "--resume"]):
        assert error_of(srum(*command, "--set", "device=auto", "--set", "train.batch_size=8")) == refused
        batches = error_of(srum(*command, "--set", "judge.batch_size=7"))  # rounding depends on them
        assert batches == "run is a run of another config (judge.batch_size: 64 != 7); choose another folder"
    assert Path("run/config.yaml").read_bytes() == kept


def test_two_launches_do_not_work_in_one_folder() -> None:
    """Nor does the one that is refused change anything; what only reads goes on."""
    assert srum("rollout", "run", *SETS).exit_code == 0
    Path("lines.jsonl").touch()
    before = Path("run/config.yaml").read_bytes()
    with alone_in(Path("run")):
        stages = [[stage, "run"] for stage in ("rollout", "ground", "judge", "rasterize", "train", "eval")]
        others = [["chain", "run"], ["strokes", "run"], ["reconstruct", "rendered", "--out", "run"]]
        for command in (*stages, *others, ["import", "lines.jsonl", "run"], ["run", "--out", "run", "--resume"]):
            refused = error_of(srum(*command, "--set", "device=cpu"))
            assert refused == "run: another srum is at work in it; wait for it, or choose another folder"
        assert srum("report", "run").exit_code == 0
    assert Path("run/config.yaml").read_bytes() == before
    assert srum("ground", "run").exit_code == 0


def test_an_arm_is_trained_once_and_the_command_says_so() -> None:
    for stage in ("rollout", "ground", "judge", "rasterize"):
        assert srum(stage, "run", *SETS).exit_code == 0
    folder = Path("run/round-000/train")
    first = srum("train", "run").output
    assert "training on" in first and "already trained" not in first
    said = [f"already trained: {folder / arm}\n" for arm in ARMS]
    assert srum("train", "run").output == "".join([*said, "next: srum eval run\n"])
    shutil.rmtree(folder / "sft")
    third = srum("train", "run").output
    assert third.startswith(f"already trained: {folder / 'srum'}\n") and "training on" in third
    assert (folder / "sft/model").is_dir()


def test_changed_candidates_are_not_trained_on_before_the_old_training_is_deleted() -> None:
    for stage in ("rollout", "ground", "judge", "rasterize", "train"):
        assert srum(stage, "run", *SETS, "--set", "compare=[]", "--set", "train.keep_checkpoints=true").exit_code == 0
    folder = Path("run/round-000")
    lines = (folder / "rewards.jsonl").read_text().splitlines(keepends=True)
    (folder / "rewards.jsonl").write_text("".join(lines[1:]))
    shutil.rmtree(folder / "train/region_nft/model")
    error = error_of(srum("train", "run"))
    assert error.endswith(f"or delete {folder / 'train/region_nft'} to train anew") and "different: " in error
    shutil.rmtree(folder / "train/region_nft")
    assert srum("train", "run").exit_code == 0


def test_a_run_goes_through_the_authors_lines_and_trains() -> None:
    for stage in ("rollout", "ground", "judge"):
        assert srum(stage, "ours", *SETS).exit_code == 0
    exported = srum("export", "ours", "lines.jsonl")
    count = len(Path("lines.jsonl").read_text().splitlines())
    assert exported.output.startswith(f"lines.jsonl: {count} candidates, ") and count > 0
    with Path("lines.jsonl").open("a") as lines:
        lines.write('{"prompt": "a cat"}\n')
    imported = srum("import", "lines.jsonl", "theirs", "--images", "ours", *SETS)
    assert f"theirs/round-000: {count} candidates, 1 lines left out" in imported.output
    assert (
        imported.stderr
        == f"left out: lines.jsonl:{count + 1}: bad_image_file: Field required, got {{'prompt': 'a cat'}}\n"
    )
    for stage in ("rasterize", "train"):
        assert srum(stage, "theirs").exit_code == 0
    assert "ours/round-000 holds another round" in error_of(srum("import", "lines.jsonl", "ours", "--images", "ours"))


def test_a_users_grounder_and_another_method() -> None:
    Path("whole_images.py").write_text(GROUNDER)
    flags = ["--grounder", "whole_images:WholeImage", "--method", "srum"]
    assert srum("run", "--out", "mine", *SETS, *flags).exit_code == 0
    (first, *_) = Path("mine/round-000/regions.jsonl").read_text().splitlines()
    assert {region["source"] for region in json.loads(first)["regions"]} == {"mine", "background"}
    assert Path("mine/config.yaml").read_text().startswith("method: srum\n")
    assert sorted(path.name for path in Path("mine/round-000/train").iterdir()) == ["sft", "srum"]


METHOD = """
from srum.config import NotNegative, RunConfig
from srum.train.methods.base import CandidateMethod, cross_entropy


class BestConfig(RunConfig):
    method: str = "my_method:Best"
    others: NotNegative = 0.0  # what candidates count that are not the best of their prompt


class Best(CandidateMethod):
    name, label, colour = "best", "best of each prompt", "#009e73"
    Config = BestConfig

    def credits(self, records, config):
        best = {}
        for record in sorted(records, key=lambda record: record.sample_score):
            best[record.candidate.prompt_id] = record.candidate.id
        counts = [1.0 if r.candidate.id in best.values() else config.others for r in records]
        return [r.reward_map.new_full(r.reward_map.shape, count) for r, count in zip(records, counts)]

    def terms(self, tokens, config):
        if tokens.kind == "text":
            return cross_entropy(tokens, config)
        return {"error": tokens.credit * tokens.error}
"""


def test_a_users_method_with_a_field_of_its_own() -> None:
    """Beside a shipped one and as one that is compared: trained, evaluated, and shown under its name."""
    Path("my_method.py").write_text(METHOD)
    flags = ["--method", "my_method:Best", "--set", "compare=[sft]"]
    assert srum("run", "--out", "mine", *SETS, *flags, "--set", "others=0.25").exit_code == 0
    assert list(json.loads(Path("mine/summary.json").read_text())) == ["base", "sft", "best"]
    assert "others: 0.25" in Path("mine/config.yaml").read_text()
    page = Path("mine/report.html").read_text()
    assert "others: 0.25" in page and page.count("best") > 3
    rows = [json.loads(line) for line in Path("mine/round-000/train/best/metrics.jsonl").read_text().splitlines()]
    assert all(row["parts"].keys() == {"error"} and row["mean_credit"] <= 1 for row in rows)
    assert any(row["mean_credit"] < 1 for row in rows)
    typo = error_of(srum("run", *SETS, *flags, "--set", "othres=0.25"))
    assert typo == "unknown key othres; did you mean others?"

    compared = ["--method", "sft", "--set", "compare=['my_method:Best']"]
    assert srum("run", "--out", "theirs", *SETS, *compared).exit_code == 0
    assert list(json.loads(Path("theirs/summary.json").read_text())) == ["base", "best", "sft"]
    assert "best" in srum("compare", "mine", "theirs").output


UNJUDGED = """
from srum.config import RunConfig
from srum.models.base import Segment
from srum.records import Candidate
from srum.run_dir import read_records
from srum.stages import ROLLOUT
from srum.train.examples import Example
from srum.train.feed import Mix, Part
from srum.train.methods.base import Method, cross_entropy


class CaptionConfig(RunConfig):
    method: str = "my_captions:Captions"


class Captions(Method):
    name, label, colour = "captions", "captions", "#009e73"
    Config = CaptionConfig
    stages = (ROLLOUT,)

    def examples(self, run, k, config):
        folder = run.round(k)
        examples = [
            Example(
                id=c.id,
                segments=[Segment("seen", image=folder / c.image), Segment("text", text=c.prompt, loss=True)],
            )
            for c in read_records(folder / "candidates.jsonl", Candidate)
        ]
        return Mix([Part("captions", examples, config.train.batch_size)])

    def terms(self, tokens, config):
        return cross_entropy(tokens, config)
"""


def test_a_users_method_with_stages_and_examples_of_its_own() -> None:
    """Texts on the images of the rollout, without a judge: no other stage is done, and the report is written."""
    Path("my_captions.py").write_text(UNJUDGED)
    flags = ["--method", "my_captions:Captions", "--set", "compare=[]", "--set", "train.trainable=all"]
    assert srum("run", "--out", "mine", *SETS, *flags).exit_code == 0
    assert sorted(p.name for p in Path("mine/round-000").glob("*.jsonl")) == ["candidates.jsonl", "prompts.jsonl"]
    rows = [json.loads(line) for line in Path("mine/round-000/train/captions/metrics.jsonl").read_text().splitlines()]
    assert all(row["parts"]["cross_entropy"] == row["loss"] > 0 and row["mean_credit"] is None for row in rows)
    assert rows[0]["loss_by_timestep"] == [None] * 4
    assert list(json.loads(Path("mine/summary.json").read_text())) == ["base", "captions"]
    assert error_of(srum("judge", "mine")).startswith("captions has no stage 'judge'; its stages are rollout, train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "train.lrr=1"], "unknown key train.lrr; did you mean train.lr?"),
        (
            ["run", "--method", "ppo"],
            f"method: no method 'ppo': {METHODS}",
        ),
        (["run", "--method", "not_there:It"], "method: method 'not_there:It': no module 'not_there' here or installed"),
        (["run", "--set", "compare=[ppo]"], "compare: ppo: no method 'ppo'"),
        (["run", "--config", "nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
        (["run", "--grounder", "nothing:Here"], "grounder 'nothing:Here': no module 'nothing'"),
        (["run", "--set", "prompts=bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["run", "--set", "prompts=empty.txt"], "empty.txt: no prompts in it"),
        (["judge", "new"], "new is not the folder of a run: it has no config.yaml; srum rollout makes one"),
        (["report", "new"], "new is not the folder of a run: it has no config.yaml"),
        (["rollout", "new", "--set", "prompts=bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["rollout", "new", "--set", "model=nowhere"], "no model 'nowhere': give a checkpoint folder"),
        (["rollout", "other"], "other is not empty and has no config.yaml"),
        (["rollout", "other/file"], "other/file is a file"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a red circle"}\nnonsense\n')
    Path("empty.txt").touch()
    Path("other").mkdir()
    Path("other/file").touch()
    assert error_of(srum(*arguments)).startswith(message)
    assert not Path("runs").exists() and not Path("new").exists()


def test_a_stage_says_which_one_is_missing() -> None:
    assert srum("rollout", "run", *SETS).exit_code == 0
    assert (
        error_of(srum("judge", "run"))
        == "run/round-000/regions.jsonl is missing: the stage that writes it has not finished"
    )
    untrained = "run/round-000/train/{}/model is missing: {} has not been trained in round 0"
    assert error_of(srum("rollout", "run", "--round", "1")) == untrained.replace("{}", "region_nft")
    assert error_of(srum("eval", "run")) == untrained.replace("{}", "sft")
    assert [path.name for path in Path("run").glob("round-*")] == ["round-000"]


def test_a_grounder_that_fails_on_every_image_ends_the_run_before_judging() -> None:
    """And is tried again once it has been mended."""
    Path("my_broken.py").write_text(GROUNDER.replace("i.height / 2", "i.hight"))
    assert srum("rollout", "run", *SETS, "--set", "ground.grounder=my_broken:WholeImage").exit_code == 0
    message = "the grounder my_broken:WholeImage failed on every image; on the first: AttributeError: "
    assert error_of(srum("ground", "run")).startswith(message)
    Path("my_broken.py").write_text(GROUNDER)
    sys.modules.pop("my_broken")
    assert srum("ground", "run").exit_code == 0


def test_without_a_reward_map_the_training_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FakeModel, "write", lambda self, contexts, *_: [Written("?", (), torch.zeros(0), True) for _ in contexts]
    )
    error = error_of(srum("run", "--out", "run", *SETS, "--set", "reward.on_failure=skip"))
    assert error.startswith("nothing to train on: no candidate of run/round-000 has a reward map, because of {")


def test_a_run_without_an_evaluation() -> None:
    assert srum(
        "run", "--out", "run", *SETS, "--set", "eval.count=0", "--set", "eval.prompts=none.txt"
    ).output.endswith("\nopen run/report.html\n")
    assert not Path("run/summary.json").exists() and not Path("run/eval").exists()
    assert error_of(srum("eval", "run")) == "run has no evaluation: eval.count is 0"


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "draw", interrupt)
        result = srum("rollout", "run", *SETS)
    assert result.exit_code == 130 and result.stderr.endswith("the same command goes on, srum run with --resume\n")
    assert srum("rollout", "run").exit_code == 0


def test_help_groups_every_command_with_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = srum("--help").output
    places = [page.index(f" {group} ") for group in GROUPS]
    assert places == sorted(places) and "─ Commands ─" not in page
    assert page.index("│ run ") < min(page.index(f"│ {name} ") for name in ("rollout", "report", "config"))


def test_version_and_the_whole_config() -> None:
    assert srum("--version").output == f"srum {__version__}\n"
    Path("c.yaml").write_text(srum("config", "--set", "seed=3").output)
    assert load_config("c.yaml") == load_config(None, ["seed=3"])
    assert srum("config", "--explain", "train.lr").output.startswith("train.lr: number > 0; by default 0.0001\n  ")
    assert error_of(srum("config", "--explain", "train.lrr")) == "unknown key train.lrr; did you mean train.lr?"


def test_the_shell_completes_fields_and_methods() -> None:
    asked = {"_SRUM_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    for words, completed in {"srum run --set train.lr": "train.lr=", "srum run --method region": "region_nft"}.items():
        result = CliRunner().invoke(app, [], env=asked | {"COMP_WORDS": words}, prog_name="srum")
        assert result.output.split() == [completed]


@pytest.mark.parametrize("command", ["chain", "strokes"])
def test_prompts_of_another_world_are_drawn_and_not_checked(command: str) -> None:
    """GenEval's own file has the layout of the embedded world's metadata, whose prompts are checked."""
    asked = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    Path("geneval.jsonl").write_text(json.dumps(asked))
    for prompts, checked in (("geneval.jsonl", False), ("held_out", True)):
        result = srum(command, prompts.partition(".")[0], f"--set=eval.prompts={prompts}", "--set=eval.count=1")
        assert result.exit_code == 0, result.output
        assert "1 prompts drawn, ended by" in result.output and ("right, %" in result.output) == checked

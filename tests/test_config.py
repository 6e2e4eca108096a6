"""The config: round trip, overrides, what is refused and how it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from srum.config import (
    ConfigError,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    config_class,
    config_of,
    differing_fields,
    dump,
    load_config,
)
from srum.models.base import Sampling
from srum.train.methods.region_nft import RegionNftConfig

METHODS = "give one of sft, srum, region_nft, reca, rvr, flow_grpo, r3, process or module:Name"
CONFIGS = Path(__file__).parents[1] / "configs"


def test_dump_and_load_is_the_identity(tmp_path: Path) -> None:
    config = load_config(None, ["train.lr=1e-5", "rollout.size=[32, 48]", "eval.guidance_interval=[0.2, 0.9]"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.train.lr == 1e-5 and config.rollout.size == (32, 48)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\ntrain:\n  lr: 1e-3\n  steps: 7\n")
    config = load_config(tmp_path / "c.yaml", ["train.lr=2e-3", "train.lr=3e-3"])
    assert (config.seed, config.train.lr, config.train.steps) == (1, 3e-3, 7)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_load_and_say_how_to_start(path: Path) -> None:
    load_config(path)
    header = path.read_text().partition("\nmodel:")[0]
    assert f"configs/{path.name}" in header and ("srum train" in header or "srum run" in header)


def test_presets_for_other_worlds_are_not_evaluated() -> None:
    """The exact checker knows coloured shapes alone, and would refuse any other prompt."""
    presets = sorted(CONFIGS.glob("bagel-7b-*.yaml"))
    assert len(presets) == 8
    assert {path.stem: load_config(path).eval.count for path in presets} == dict.fromkeys((p.stem for p in presets), 0)


def test_the_presets_of_the_paper_and_of_the_released_code() -> None:
    """Table 6 of the paper, and what the released launch script sets instead."""
    recipe = {"betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.0, "clip": 1.0, "schedule": "constant"}
    recipe |= {"trainable": "all"}
    method = {"method": "srum", "constraint_weight": 0.5, "use_layout": True, "credit": "region"}
    paper, released = (load_config(CONFIGS / f"bagel-7b-{name}.yaml") for name in ("paper", "released"))
    for config in (paper, released):
        assert {name: getattr(config.train, name) for name in recipe} == recipe
        assert {name: getattr(config, name) for name in method} == method
    own = [
        (c.train.lr, c.train.warmup_steps, c.train.timestep_shift, c.train.memory.pack_tokens, c.reward.mapping)
        for c in (paper, released)
    ]
    assert own == [(2.5e-5, 500, 4.0, 40960, "signed"), (2e-5, 100, 1.0, 9216, "reference")]
    assert released.train.steps == 309


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == RegionNftConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "unknown key lr; did you mean train.lr?"),
        ("trian.lr=1", "unknown key trian; did you mean train?"),
        ("judge.retrys=2", "unknown key judge.retrys; did you mean judge.retries?"),
        ("reward.xyzzy=2", "unknown key reward.xyzzy; known here are mapping, overlap, shape, background, centred"),
        ("train.lr=-1", "train.lr: Input should be greater than 0, got -1"),
        ("train.lr=.nan", "train.lr: Input should be a finite number, got nan"),
        ("train.steps=two", "train.steps: "),
        ("train=3", "train: expected keys and values, got 3"),
        ("train.tracker=paper", "train.tracker: Input should be 'tensorboard', 'wandb' or 'trackio', got 'paper'"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: Input should be less than 1, got 1.0"),
        ("old_decay=2", "old_decay: Input should be less than or equal to 1, got 2"),
        (
            "method=sgd",
            f"method: no method 'sgd': {METHODS}",
        ),
        ("method=no.such:Thing", "method: method 'no.such:Thing': no module 'no' here or installed"),
        (
            "method=srum.train.methods.sft:No",
            "method: method 'srum.train.methods.sft:No': srum.train.methods.sft has no",
        ),
        ("method=3", "method: no method '3'"),
        ("constraint_weight=0.5", "unknown key constraint_weight; known here are method, model, device"),
        ("train.beta=0.5", "unknown key train.beta; did you mean train.betas?"),
        ("train.old_decay=0.5", "unknown key train.old_decay; did you mean old_decay?"),
        ("compare=sft", "compare: expected a list such as [sft, srum], got 'sft'"),
        ("rollout.size=512", "rollout.size: expected a list such as [64, 64], got 512"),
        ("rollout.size=[512]", "rollout.size: expected a list such as [64, 64], got [512]"),
        ("rollout.size=[1, 2, 3]", "rollout.size: expected a list such as [64, 64], got [1, 2, 3]"),
        ("seed.x=3", "seed: "),
        ("device=gpu", "device: 'gpu' is none; expected auto, spread, cpu, mps, cuda or cuda:1"),
        ("device='cpu:1'", "device: 'cpu:1' is none"),
        ("train.lr", "'train.lr' is not an override"),
        ("train.lr=[", "train.lr: '[' is not a YAML value"),
        ("train.warmup_steps=90", "train.warmup_steps: 90 leaves nothing of steps=90"),
        ("eval.guidance_interval=[0.5, 0.5]", "eval.guidance_interval: (0.5, 0.5) is empty"),
        ("candidates_per_prompt=1", "candidates_per_prompt: region_nft compares"),
        ("ground.max_area=0.0", "ground.min_area: 0.0 leaves no area below max_area=0.0"),
        ("ground.options=3", "ground.options: expected keys and values, got 3"),
        ("judge.server={url: http://x/v1, model: m}", "judge.soft: a server gives no log-probabilities"),
        ("judge={soft: false, reply: none, server: {url: http://x, model: m}}", "judge.soft: a server gives"),
        ("judge={soft: false, model: start, server: {url: http://x, model: m}}", "judge.model: 'start' cannot judge"),
        ("judge.server.url=http://x/v1", "judge.server.model: a server needs both"),
        ("judge.server={url: localhost:8000, model: m}", "judge.server.url: 'localhost:8000' is no address"),
        ("judge.server={url: file:///etc/passwd, model: m}", "judge.server.url: 'file:///etc/passwd' is no address"),
        ("judge.server={url: http://me:secret@x/v1, model: m}", "judge.server.url: no user, password or query"),
        ("judge.server.key_variable=sk-secret", "judge.server.key_variable: expected the name of an environment var"),
        ("judge.server.modle=m", "unknown key judge.server.modle; did you mean judge.server.model?"),
        ("judge={think: true, reply: none}", "judge.think: there is no reply to think in"),
        ("reward={mapping: reference, overlap: mean}", "reward.overlap: the released code's map has rules of its own"),
        ("reward={mapping: reference, centred: true}", "reward.centred: the released code's map has rules of its own"),
    ],
)
def test_what_is_refused_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(message) and "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_config_from_before_a_field_is_read_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "judge: {instructions: compact, soft: true, retries: 1}\nreward: {mapping: unit}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.judge.model, config.judge.reply, config.reward.shape) == ("self", "free", "mask")


@pytest.mark.parametrize("none", [["rollout.plan=false"], ["rollout.plan=true", "rollout.planned_share=0"]])
def test_a_plan_to_train_with_needs_a_plan(none: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.plan_in_context"):
        load_config(None, ["train.plan_in_context=true", *none])


def test_a_share_above_zero_plans_at_least_one() -> None:
    assert [RolloutConfig(plan=True).planned(count) for count in (1, 2, 3, 4, 8)] == [1, 1, 2, 2, 4]
    assert [RolloutConfig(plan=True, planned_share=share).planned(4) for share in (0.0, 0.01, 1.0)] == [0, 1, 4]
    assert RolloutConfig().planned(4) == 0


def test_replies_to_learn_need_a_judge_that_replies() -> None:
    learn = ["train.trainable=all", "train.replies=16"]
    with pytest.raises(ConfigError, match=r"train\.replies: there is no reply to learn"):
        load_config(None, [*learn, "judge.reply=none"])
    assert load_config(None, [*learn, "judge.reply=constrained"]).train.replies == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", r"c\.yaml: expected keys"),
        ("a: 1\nb: c: d\n", r"c\.yaml:2:5: not YAML: mapping values are not allowed here$"),
        ("a: [", r"c\.yaml:1:5: not YAML: expected the node content, but found '<stream end>'$"),
        ("a: \0", r"c\.yaml: not YAML: special characters are not allowed: #x0000$"),
        ("a: 2026-13-01", r"c\.yaml: not YAML: month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


def test_a_config_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("prompts: 提示.txt\n".encode())
    code = "import sys; from srum.config import load_config; print(ascii(load_config(sys.argv[1]).prompts))"
    legacy = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.yaml")],
        env=os.environ | legacy,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ascii("提示.txt")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_differing_fields_are_named() -> None:
    assert differing_fields(load_config(), load_config()) == []
    other = load_config(None, ["seed=3", "train.lr=0.5"])
    assert differing_fields(load_config(), other) == ["seed: 0 != 3", f"train.lr: {TrainConfig().lr} != 0.5"]


def test_options_of_a_grounder_are_kept_and_compared(tmp_path: Path) -> None:
    config = load_config(None, ["ground.grounder=grid", "ground.options.side=4"])
    assert config.ground.options == {"side": 4}
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_config(tmp_path / "config.yaml") == config
    different = ["ground.grounder: classical != grid", "ground.options.side: None != 4"]
    assert differing_fields(load_config(), config) == different


def test_sampling_fields_are_those_of_the_sampler() -> None:
    config = RunConfig()
    assert Sampling(**config.rollout.sampling()).size == config.rollout.size
    assert config.eval.sampling().keys() == config.rollout.sampling().keys()


@pytest.mark.parametrize("method", ["sft", "srum", "region_nft"])
def test_a_config_has_the_class_of_its_method(tmp_path: Path, method: str) -> None:
    config = load_config(None, [f"method={method}"])
    assert type(config) is config_class(method) and config.method == method
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_another_methods_config_shares_all_but_the_fields_of_its_own() -> None:
    config = load_config(None, ["beta=0.7", "credit=sample", "seed=3", "train.lr=0.5"])
    other = config_of("srum", config)
    assert (other.method, other.seed, other.train.lr) == ("srum", 3, 0.5)
    assert other.model_dump(include={"constraint_weight", "use_layout", "credit"}) == {
        "constraint_weight": 0.5, "use_layout": True, "credit": "region",
    }  # fmt: skip
    back = config_of("region_nft", other)
    assert differing_fields(config, back) == ["beta: 0.7 != 0.3", "credit: sample != region"]


def test_a_config_is_read_without_torch() -> None:
    code = "import sys; from srum.config import load_config; load_config(None, ['method={}'])\n"
    code = "".join(code.format(method) for method in ("sft", "srum", "region_nft"))
    code += "sys.exit(', '.join({'torch', 'numpy', 'PIL'} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

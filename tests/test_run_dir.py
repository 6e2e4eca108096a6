"""The folder of a run: nothing half-written, nothing lost, nothing overwritten, errors that name the line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srum.config import load_config
from srum.evaluation.accuracy import CheckedImage
from srum.images import open_image
from srum.processes import Processes
from srum.prompt_files import read_prompts
from srum.records import Candidate, Grounding, Judgement, Prompt, RewardMap
from srum.run import StageTimer
from srum.run_dir import (
    Home,
    RunError,
    alone_in,
    atomic,
    claim_run,
    finished,
    inside,
    read_by_id,
    read_records,
    require_use,
    round_dirs,
    run_stage,
    write_records,
)
from srum.seeding import seed_for

ITEMS = {f"p{number}": number for number in range(7)}


class Work:
    """Turns numbers into prompts and remembers the batches; dies at the item ``fail_at``, leaves out ``skip``."""

    def __init__(self, fail_at: str = "", skip: frozenset[str] = frozenset()) -> None:
        self.fail_at, self.skip = fail_at, skip
        self.batches: list[list[str]] = []

    def __call__(self, batch: Mapping[str, int]) -> list[Prompt]:
        if self.fail_at in batch:
            raise KeyboardInterrupt
        self.batches.append(list(batch))
        return [
            Prompt(id=name, text=f"number {number} é\u2028") for name, number in batch.items() if name not in self.skip
        ]


def stage(folder: Path, work: Work, batch_size: int = 3) -> list[Prompt]:
    return list(run_stage(folder, "things", Prompt, ITEMS, batch_size, work, gaps=bool(work.skip)))


def test_a_stage_writes_one_file_and_is_not_done_again(tmp_path: Path) -> None:
    records = stage(tmp_path, Work())
    assert [r.id for r in records] == list(ITEMS) and finished(tmp_path, "things")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["things.jsonl"]
    again = Work()
    assert stage(tmp_path, again) == records and again.batches == []
    write_records(tmp_path / "things.jsonl", records[::-1])
    assert stage(tmp_path, again) == records and again.batches == []


def test_an_interrupted_stage_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a", Work(fail_at="p4"))
    assert not finished(tmp_path / "a", "things")
    rest = Work()
    stage(tmp_path / "a", rest)
    stage(tmp_path / "b", Work())
    assert rest.batches == [["p3", "p4", "p5"], ["p6"]]
    assert (tmp_path / "a/things.jsonl").read_bytes() == (tmp_path / "b/things.jsonl").read_bytes()


@pytest.mark.parametrize("place", ["p3", "p6"])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (3, 1), (3, 4), (1, 3), (2, 7)])
def test_another_batch_size_goes_on_where_an_interrupted_stage_stopped(
    tmp_path: Path, place: str, before: int, after: int
) -> None:
    """Every item is done once, and the file is that of a stage without interruption."""
    first, rest = Work(fail_at=place), Work()
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a", first, before)
    stage(tmp_path / "a", rest, after)
    assert [name for batch in first.batches + rest.batches for name in batch] == list(ITEMS)
    assert all(len(batch) == after for batch in rest.batches[:-1])
    stage(tmp_path / "b", Work())
    assert (tmp_path / "a/things.jsonl").read_bytes() == (tmp_path / "b/things.jsonl").read_bytes()


def test_two_interruptions_keep_the_shards_of_both(tmp_path: Path) -> None:
    for place, size in (("p4", 2), ("p6", 1)):
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path, Work(fail_at=place), size)
    rest = Work()
    assert [record.id for record in stage(tmp_path, rest, 5)] == list(ITEMS) and rest.batches == [["p6"]]


def test_records_stay_in_their_file(tmp_path: Path) -> None:
    """Found by id after a pickle, too; a file that changes meanwhile is noticed."""
    made = list(stage(tmp_path, Work()))
    path = tmp_path / "things.jsonl"
    records = pickle.loads(pickle.dumps(read_by_id(path, Prompt)))
    assert list(records.values()) == made and records["p3"] == made[3] and "p9" not in records
    records = read_by_id(path, Prompt)
    path.write_bytes(path.read_bytes().replace(b"number 0", b"number 00"))
    with pytest.raises(RunError, match=r"things\.jsonl: p4"):
        records["p4"]


def test_a_finished_file_of_other_items_is_refused(tmp_path: Path) -> None:
    records = stage(tmp_path, Work())
    path = tmp_path / "things.jsonl"
    stranger = Prompt(id="q", text="x")
    for found, message in [
        (records[:2], "nothing about p2, p3, p4 and 2 more"),
        ([*records, stranger], "records about the unknown q"),
        ([*records, records[3]], "several records about p3"),
    ]:
        write_records(path, found)
        with pytest.raises(RunError, match=rf"things\.jsonl holds {message}; delete it"):
            stage(tmp_path, Work())
    path.unlink()
    write_records(tmp_path / "things.parts/00000.jsonl", [stranger])
    with pytest.raises(RunError, match=r"00000\.jsonl holds records about the unknown q; delete it"):
        stage(tmp_path, Work())


def test_items_without_a_record_are_tried_again_after_an_interruption(tmp_path: Path) -> None:
    """And a finished file may be without them."""
    skip = frozenset({"p0", "p4"})
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, Work(fail_at="p6", skip=skip))
    again = Work(skip=skip)
    records = stage(tmp_path, again)
    assert [record.id for record in records] == ["p1", "p2", "p3", "p5", "p6"]
    assert again.batches == [["p0", "p4", "p6"]]
    assert stage(tmp_path, again) == records and len(again.batches) == 1


@pytest.mark.parametrize("cut", [1, 20, 90, 150, 300])
def test_a_torn_last_line_costs_its_batch_and_no_other(tmp_path: Path, cut: int) -> None:
    stage(tmp_path, Work())
    path = tmp_path / "things.jsonl"
    whole = path.read_bytes()
    torn = whole[:-cut]
    assert not torn.endswith(b"\n")
    path.write_bytes(torn)
    again = Work()
    if cut == 1:  # only the line's end is missing: the record is whole
        assert len(stage(tmp_path, again)) == len(ITEMS) and again.batches == []
        return
    assert not finished(tmp_path, "things")
    with pytest.raises(RunError, match=r"things\.jsonl:\d is torn; run `the stage that writes it` again"):
        read_records(path, Prompt)
    assert path.read_bytes() == torn
    with pytest.warns(UserWarning, match="ends in a torn line"):
        stage(tmp_path, again)
    assert path.read_bytes() == whole
    kept = [json.loads(line)["id"] for line in torn.split(b"\n")[:-1]]
    lost = [batch for batch in (["p0", "p1", "p2"], ["p3", "p4", "p5"], ["p6"]) if not kept or batch[-1] >= kept[-1]]
    assert again.batches == lost


@pytest.mark.parametrize("look", [lambda folder: finished(folder, "things"), lambda folder: stage(folder, Work())])
def test_shards_that_a_kill_left_do_not_outlive_their_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], Any]
) -> None:
    """Killed with its file written and its shards still there, looked at, then deleted to be repeated."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        stage(tmp_path, Work())
    assert (tmp_path / "things.jsonl").exists() and (tmp_path / "things.parts").exists()
    assert look(tmp_path)
    (tmp_path / "things.jsonl").unlink()
    again = Work()
    stage(tmp_path, again)
    assert len(again.batches) == 3


def test_a_torn_shard_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, Work(fail_at="p6"))
    shard = tmp_path / "things.parts" / "00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-5])
    again = Work()
    with pytest.warns(UserWarning, match=r"00001.jsonl ends in a torn line"):
        assert len(stage(tmp_path, again)) == len(ITEMS)
    assert again.batches == [["p3", "p4", "p5"], ["p6"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 1, "id": "x"', "not JSON"),
        ('{"id": "x", "text": "y"}', "not a record of schema version 1"),
        ('{"schema": 2, "id": "x", "text": "y"}', "not a record of schema version 1"),
        ('{"schema": 1, "id": "x"}', "text: Field required"),
        ("[]", "not a record"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"schema": 1, "id": "a", "text": "b"}'
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RunError, match=rf"p\.jsonl:2: {message}"):
        read_records(tmp_path / "p.jsonl", Prompt)


FACTS: dict[str, Any] = {"prompt_id": "p", "prompt": "a cat", "index": 0, "seed": 0, "size": [8, 8]}
CANDIDATE = FACTS | {"id": "a", "image": "images/a.png", "latent": "latents/a.st"}
REWARD = {"candidate_id": "a", "values": "rewards/a.st", "grid": [1, 1], "mapping": "signed", "alpha": 1}
LAYOUT = {"score": 1.0}
HOSTILE_IDS = ["../x", "/x", "..", ".hidden", "a/b", "a\\b", "", "a\n", "a" * 201, "-rf", "\u00e9"]
HOSTILE_PATHS = ["../x", "/x", "..", "a/../../x", "images\\x", "C:x", "", ".", "a\x00"]


def read_back(folder: Path, kind: type[Any], values: Mapping[str, Any]) -> Any:
    (folder / "r.jsonl").write_text(json.dumps({"schema": 1, **values}) + "\n")
    (record,) = read_records(folder / "r.jsonl", kind)
    return record


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (Prompt, {"id": "a", "text": "b"}, "id"),
        (Candidate, CANDIDATE, "id"),
        (Candidate, CANDIDATE, "prompt_id"),
        (Candidate, CANDIDATE, "parent"),
        (Grounding, {"candidate_id": "a", "regions": []}, "candidate_id"),
        (Judgement, {"candidate_id": "a", "regions": [], "layout": LAYOUT}, "candidate_id"),
        (RewardMap, REWARD | {"sample_score": 0}, "candidate_id"),
        (CheckedImage, {"prompt_id": "a", "prompt": "b", "category": "c", "correct": True, "reasons": []}, "prompt_id"),
    ],
)
@pytest.mark.parametrize("hostile", HOSTILE_IDS)
def test_an_id_that_could_not_name_a_file_is_refused_where_it_is_read(
    tmp_path: Path, kind: type[Any], values: dict[str, Any], field: str, hostile: str
) -> None:
    assert read_back(tmp_path, kind, values)
    with pytest.raises(RunError, match=rf"r\.jsonl:1: {field}: .* cannot name a file") as error:
        read_back(tmp_path, kind, values | {field: hostile})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["image", "latent", "values"])
@pytest.mark.parametrize("hostile", HOSTILE_PATHS)
def test_a_path_out_of_the_round_is_refused_where_it_is_read(tmp_path: Path, field: str, hostile: str) -> None:
    kind, values = (RewardMap, REWARD | {"sample_score": 0}) if field == "values" else (Candidate, CANDIDATE)
    with pytest.raises(RunError, match=rf"r\.jsonl:1: {field}: .* is not the path of a file inside the round's folder"):
        read_back(tmp_path, kind, values | {field: hostile})


@settings(max_examples=200)
@given(st.text(alphabet="a./\\~:- ", max_size=12))
def test_a_path_that_is_accepted_leads_down(path: str) -> None:
    try:
        name = Candidate.model_validate(CANDIDATE | {"image": path}).image
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/run/round", name)).startswith("/run/round/")


@pytest.mark.parametrize("field", ["image", "latent", "values"])
def test_a_link_out_of_the_round_is_refused_where_its_record_is_read(tmp_path: Path, field: str) -> None:
    """Be it the file or the folder that is the link; one that stays inside is followed, a missing file is no fault."""
    kind, values = (RewardMap, REWARD | {"sample_score": 0}) if field == "values" else (Candidate, CANDIDATE)
    path = tmp_path / "round" / values[field]
    path.parent.mkdir(parents=True)
    assert read_back(tmp_path / "round", kind, values)
    (tmp_path / "secret").write_text("private")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match=rf"r\.jsonl:1: '{values[field]}' is not in "):
        read_back(tmp_path / "round", kind, values)
    path.unlink()
    path.symlink_to(path.name)  # to itself
    assert read_back(tmp_path / "round", kind, values)
    path.unlink()
    (path.parent / "other").write_text("public")
    path.symlink_to("other")
    assert read_back(tmp_path / "round", kind, values)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not in "):
        read_back(tmp_path / "round", kind, values)


def test_the_shards_of_a_stage_name_files_of_the_round(tmp_path: Path) -> None:
    record = Candidate.model_validate(CANDIDATE)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    write_records(tmp_path / "things.parts/00000.jsonl", [record])
    assert read_records(tmp_path / "things.parts/00000.jsonl", Candidate) == [record]
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "images/a.png").symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="is not in "):
        read_records(tmp_path / "things.parts/00000.jsonl", Candidate)


def test_a_path_from_the_root_is_refused_after_others_have_been_found(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.path("a.png") == tmp_path / "a.png"
    with pytest.raises(RunError, match=r"'/vmlinuz' is not in"):
        home.path("/vmlinuz")


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot's files are links to the blobs of its own repository; those of another lead out."""
    blobs = {}
    for owner in ("datasets--me--images", "datasets--you--images"):
        blobs[owner] = tmp_path / owner / "blobs/0a1b"
        blobs[owner].parent.mkdir(parents=True)
        blobs[owner].write_text(owner)
    snapshot = tmp_path / "datasets--me--images/snapshots/main/round-000"
    snapshot.mkdir(parents=True)
    (snapshot / "own.png").symlink_to("../../../blobs/0a1b")
    (snapshot / "other.png").symlink_to(blobs["datasets--you--images"])
    assert inside(snapshot, "own.png").read_text() == "datasets--me--images"
    with pytest.raises(RunError, match=r"'other\.png' is not in"):
        inside(snapshot, "other.png")
    (tmp_path / "plain/snapshots/main").mkdir(parents=True)
    (tmp_path / "plain/blobs").write_text("x")
    (tmp_path / "plain/snapshots/main/x").symlink_to("../../blobs")
    with pytest.raises(RunError, match="'x' is not in"):
        inside(tmp_path / "plain/snapshots/main", "x")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".file.txt.partial").symlink_to(tmp_path / "mine")
    (tmp_path / "file.txt").symlink_to(tmp_path / "mine")
    with atomic(tmp_path / "file.txt") as partial:
        partial.write_text("theirs")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "file.txt").read_text() == "theirs"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "text"}, "text has a text alone"),
        ({"kind": "text", "text": "a", "candidate_id": "b"}, "text has a text alone"),
        ({"kind": "seen", "text": "a"}, "seen has a candidate_id alone"),
        ({"kind": "clean", "candidate_id": "../b"}, "cannot name a file"),
    ],
)
def test_a_part_of_a_context_is_a_text_or_a_candidate(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidate.model_validate(CANDIDATE | {"context": [part]})


def test_candidates_from_before_chains_are_read(tmp_path: Path) -> None:
    record = read_back(tmp_path, Candidate, CANDIDATE)
    assert record.parent is None and record.context == []


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    prompts = [Prompt(id="a", text="é\n\u2028 b", metadata={"x": [1, None, {"y": 0.1}]})]
    write_records(tmp_path / "p.jsonl", prompts)
    assert read_records(tmp_path / "p.jsonl", Prompt) == prompts
    with pytest.raises(RunError, match=r"missing\.jsonl is missing"):
        read_records(tmp_path / "missing.jsonl", Prompt)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(KeyboardInterrupt), atomic(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not path.exists()
    with atomic(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.glob(".*.partial")) == []


def test_claim_run_refuses_what_it_would_overwrite(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim_run(run, load_config())
    with pytest.raises(RunError, match="--resume"):
        claim_run(run, load_config())
    claim_run(run, load_config(), resume=True)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=r"another config \(seed: 0 != 3; beta: 0.3 != 0.5\)"):
        claim_run(run, load_config(None, ["seed=3", "beta=0.5"]), resume=True)
    assert (run / "config.yaml").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RunError, match="not empty"):
        claim_run(tmp_path / "full", load_config(), resume=True)


def test_a_launch_is_alone_in_its_folder_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = "import sys, time; from pathlib import Path; from srum.run_dir import alone_in\n"
    code += "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"in\n"
            with pytest.raises(RunError, match="run: another srum is at work in it"), alone_in(folder):
                pass
        finally:
            other.kill()
    with alone_in(folder), pytest.raises(RunError, match="another srum is at work"), alone_in(folder):
        pass
    with alone_in(folder):
        claim_run(folder, load_config())


class Another:
    """A process that is not the first: what that one has found is told to it."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def once(self, work: Callable[[], Any]) -> Any:
        return self.told


def test_a_file_of_no_use_is_removed_by_one_process_and_refused_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "regions.jsonl"
    path.touch()
    require_use(path, lambda: None)
    assert path.exists()
    with pytest.raises(RunError, match=r"^nothing came of it$"):
        require_use(path, lambda: "nothing came of it")
    assert not path.exists()
    monkeypatch.setattr(Processes, "here", lambda: Another("told"))
    with pytest.raises(RunError, match=r"^told$"):
        require_use(path, Mock(side_effect=AssertionError("it reads what may be gone")))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"file/run cannot be worked in: Not a directory"),
        alone_in(tmp_path / "file/run"),
    ):
        pass


def test_no_lock_is_left_in_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="not empty"), alone_in(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_its_config_was_there_starts(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.partial").write_text("half")
    claim_run(tmp_path, load_config(), resume=True)
    assert load_config(tmp_path / "config.yaml") == load_config()


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa red square\r\n\r\n  two é  \n # not #3\na #4\n".encode())
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "p.txt")] == [
        ("line-0001", "a red square"),
        ("line-0003", "two é"),
        ("line-0005", "a #4"),
    ]


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a"},
        {"text": "b", "id": "b.1"},
        {"prompt": "c", "metadata": {"k": 1}},
        {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "d"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [(p.id, p.text) for p in prompts] == [
        ("line-0001", "a"),
        ("b.1", "b"),
        ("line-0003", "c"),
        ("line-0004", "d"),
    ]
    assert [p.metadata for p in prompts] == [{}, {}, {"k": 1}, lines[3]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "no prompts in it"),
        ("p.jsonl", "", "no prompts in it"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n"b"', r"p\.jsonl:2: expected an object"),
        ("p.jsonl", '{"prompt": " "}', r"p\.jsonl:1: expected a text"),
        ("p.jsonl", '{"prompt": 3}', r"p\.jsonl:1: expected a text"),
        ("p.jsonl", '{"prompt": "a", "id": "../x"}', r"p\.jsonl:1: id '../x' cannot name a file"),
        ("p.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', r"p\.jsonl:2: the id 'x' is taken"),
        ("p.jsonl", '{"prompt": "a", "metadata": 3}', r"p\.jsonl:1: expected an object in 'metadata'"),
    ],
)
def test_a_malformed_prompts_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        read_prompts(tmp_path / name)


def test_a_prompt_with_half_a_surrogate_pair_is_left_out_alone_and_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a red circle \\ud83d"}\n{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "b", "tag": "\\udc00"}\n'
    )
    with pytest.warns(UserWarning, match="left out") as warned:
        prompts = read_prompts(path)
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("line-0002", "fine \N{GRINNING FACE}")]
    assert [str(warning.message).split(" is")[0] for warning in warned] == [f"{path}:1", f"{path}:3"]


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RunError, match="not UTF-8 at byte 3"):
        read_prompts(tmp_path / "p.txt")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"x\.png is not a readable image"):
        open_image(tmp_path / "x.png")


def test_times_add_up_over_interruptions(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    path.write_text('{"judge": 5.0}')
    with StageTimer(path).stage("judge"):
        pass
    with pytest.raises(KeyboardInterrupt), StageTimer(path).stage("ground"):
        time.sleep(0.01)
        raise KeyboardInterrupt
    with StageTimer(path).stage("ground"):
        pass
    times = json.loads(path.read_text())
    assert 5.0 <= times["judge"] < 6.0 and 0.01 <= times["ground"] < 1.0


def test_what_is_timed_within_a_stage_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    with StageTimer(path).stage("train"), StageTimer(path).stage("train/sft"):
        time.sleep(0.2)
    times = json.loads(path.read_text())
    assert times["train/sft"] >= 0.2 > times["train"] >= 0


def test_seeds_are_stable_and_their_parts_count() -> None:
    assert seed_for(0, 1, "p-0", "rollout") == 5056254892708178496
    assert len({seed_for(1, 23), seed_for(12, 3), seed_for("1", "23"), seed_for("1", 23), seed_for(123)}) == 5
    assert all(0 <= seed_for(number) < 2**63 for number in range(100))


# --- images of others


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    """Orientation 6: the camera was turned, the stored left edge is the top."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 0] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    turned = np.asarray(open_image(tmp_path / "x.png"))
    assert turned.shape == (4, 2, 3) and (turned[0] == 255).all() and not turned[1:].any()


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_numbers_with_a_fraction_are_shares(tmp_path: Path, white: float) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32) * np.float32(white)).save(tmp_path / "x.tiff")
    assert np.asarray(open_image(tmp_path / "x.tiff"))[0, :, 0].tolist() == [0, 128, 255]


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(RunError, match=r"x\.tiff is not a readable image: an image with pixels that are no numbers"):
        open_image(tmp_path / "x.tiff")


def test_a_copy_of_a_round_is_none(tmp_path: Path) -> None:
    for name in ("round-000", "round-1000", "round-000.bak", "round-001 (copy)", "round-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "round-003").touch()
    assert [path.name for path in round_dirs(tmp_path)] == ["round-000", "round-1000"]

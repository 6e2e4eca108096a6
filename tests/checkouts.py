"""Checkouts of benchmarks' repositories as tests make them up: their files, fields and names, none of their words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from srum.evaluation.benchmarks import dpg, geneval, genevalpp, imgedit, reasonbench, tiif, wise

OBJECTS = [f"thing {number}" for number in range(80)]


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def geneval_files() -> dict[str, str]:
    sizes = dict(zip(geneval.TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    rows = [
        {"tag": tag, "include": [{"class": OBJECTS[n % 80], "count": 1}], "prompt": f"a drawing of {tag} {n}"}
        for tag, size in sizes.items()
        for n in range(size)
    ]
    text = lines(rows)
    return {geneval.PROMPTS["short"]: text, geneval.PROMPTS["rewritten"]: text, geneval.NAMES: "\n".join(OBJECTS)}


def genevalpp_files() -> dict[str, str]:
    rows = [
        {"tag": tag, "include": [{"class": "cup", "count": 2, "color": "red"}], "prompt": f"two red cups {n}"}
        for tag in genevalpp.TAGS
        for n in range(40)
    ]
    scorer = 'SYSTEM = """You are an expert image evaluator of tests."""\n' + (
        'def ask(prompt, checklist):\n    return f"""Asked: {prompt}\\nExpectation checklist: {checklist}"""\n'
    )
    return {genevalpp.PROMPTS: lines(rows), genevalpp.SCORER: scorer}


def compbench_files() -> dict[str, str]:
    sizes = {"3d_spatial": 300, "color": 300, "complex": 300, "complex_action": 212, "complex_spatial": 58}
    sizes |= dict.fromkeys(("non-spatial", "numeracy", "shape", "spatial", "texture"), 300)
    rows = [
        {"Question": f"{category} {n}", "Category": category, "Question_id": 1000 * place + n}
        for place, (category, size) in enumerate(sizes.items(), start=1)
        for n in range(size)
    ]
    scorer = (
        'def tasks(prompt_name):\n    question = (\n        f"How well does it fit "\n'
        '        f"\\"{prompt_name}\\"? "\n'
        '        f"Say {{\\"score\\": 0 to 100}}."\n    )\n    return question\n'
    )
    return {"val_comp.json": json.dumps(rows), "CompBench_eval/qwen_eval.py": scorer}


def dpg_files() -> dict[str, str]:
    rows = [
        {
            "item_id": f"p{n}",
            "text": f"a prompt {n}",
            "proposition_id": str(q),
            "dependency": "0" if q == 1 else "1",
            "tuple": f"{level} - whole (thing)",
            "question_natural_language": f"Is there {level} {q}?",
        }
        for n in range(1065)
        for q, level in enumerate(("entity", "attribute"), start=1)
    ]
    return {dpg.QUESTIONS: table(rows)}


def wise_files() -> dict[str, str]:
    files = {}
    for variant, folder in wise.FOLDERS.items():
        rows = [{"Prompt": f"prompt {n}", "Explanation": f"meaning {n}", "prompt_id": n} for n in range(1, 1001)]
        for file, part in zip(wise.FILES, (rows[:400], rows[400:700], rows[700:]), strict=True):
            files[f"{folder}/{file}"] = json.dumps(part)
        files[wise.SCORERS[variant]] = (
            'def messages(prompt_data):\n    return ["an audit expert of tests", '
            "f\"{prompt_data['Prompt']} has the EXPLANATION {prompt_data['Explanation']}\"]\n"
        )
    return files


def unigenbench_files() -> dict[str, str]:
    points = {"Testpoints": ["Style", "Attribute - Color"], "Testpoint Description": ["ink", "red"]}
    rows = [{"index": str(n), "prompt_en": f"prompt {n}", "sub_dims_en": json.dumps(points)} for n in range(600)]
    scorer = (
        "def call(prompt, testpoint, explanation, test_explanation):\n"
        '    explanation_dict = {"Style": "how", "Attribute - Color": "which"}\n'
        '    return f"""{prompt} {explanation} {test_explanation} <checkpoint>{testpoint}</checkpoint>"""\n'
    )
    text = table(rows)
    names = [f"data/test_prompts_{variant}.csv" for variant in ("en", "en_long")]
    return dict.fromkeys(names, text) | {"eval/qwenvl_72b_en_eval.py": scorer}


def reasonbench_files() -> dict[str, str]:
    files = {}
    for name, (prompts, questions, scorer, blocks) in reasonbench.DIMENSIONS.items():
        block = {"q1": "is it?", "c1": "1 if it is", "q2": "and so?", "c2": "1 if so"}
        asked = [
            {"id": n, "prompt": "not this"} | dict.fromkeys((*blocks, reasonbench.QUALITY), block)
            for n in range(1, 201)
        ]
        files[f"prompts/{prompts}.json"] = json.dumps([{"id": n, "prompt": f"{name} {n}"} for n in range(1, 201)])
        files[f"deepseek_evaluation_qs/{questions}.json"] = json.dumps(asked)
        files[f"evaluation/Qwen2.5-VL/{scorer}.py"] = (
            "def ask(qs_reason_question_criteria):\n"
            '    return f"""The questions and criteria: {qs_reason_question_criteria}. Say {{"score": []}}"""\n'
        )
    return files


def imgedit_files() -> dict[str, str]:
    sizes = (95, 94, 117, 92, 86, 94, 100, 23, 36)
    kinds = [kind for kind, size in zip(imgedit.TYPES, sizes, strict=True) for _ in range(size)]
    edits = {str(n): {"id": "photos/one.png", "prompt": f"edit {n}", "edit_type": kind} for n, kind in enumerate(kinds)}
    templates = {kind: f"Judge the {kind}: <edit_prompt>" for kind in imgedit.TYPES}
    return {imgedit.EDITS: json.dumps(edits), imgedit.TEMPLATES: json.dumps(templates)}


def tiif_files() -> dict[str, str]:
    types = [kind for kinds in tiif.GROUPS.values() for kind in kinds]
    files = {tiif.SCORER: 'raw_prompt = """Answer: ##YNQuestions##"""\n'}
    counts = {"testmini": [8] * 4 + [7] * 35, "full": [66] * 3 + [65] * 36}
    for name, (prompts, questions, _) in tiif.SETS.items():
        for kind, count in zip(types, counts[name], strict=True):
            rows = [
                {"type": kind, "short_description": f"{kind} {n}", "long_description": f"long {kind} {n}"}
                for n in range(count)
            ]
            asked = [{"type": kind, "yn_question_list": ["A?", "B?"], "yn_answer_list": ["yes", "no"]}] * count
            files |= {f"{prompts}/{kind}.jsonl": lines(rows), f"{questions}/{kind}_q.jsonl": lines(asked)}
    return files


def gedit_files() -> dict[str, str]:
    names = ["_context_no_delimit", *(f"_prompts_0shot_{name}" for name in ("two_image_edit_rule", "rule_PQ"))]
    text = "".join(f'{name} = """{name} of tests"""\n' for name in names)
    return {"viescore/vie_prompts.py": text + '_prompts_0shot_tie_rule_SC = """Do <instruction>."""\n'}


def t2i_compbench_files() -> dict[str, str]:
    kinds = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
    return {f"examples/dataset/{kind}_val.txt": "\n".join(f"{kind} {n}" for n in range(300)) for kind in kinds}


FILES: dict[str, Callable[[], dict[str, str]]] = {
    "geneval": geneval_files,
    "genevalpp": genevalpp_files,
    "compbench": compbench_files,
    "dpg": dpg_files,
    "wise": wise_files,
    "unigenbench": unigenbench_files,
    "reasonbench": reasonbench_files,
    "imgedit": imgedit_files,
    "gedit": gedit_files,
    "tiif": tiif_files,
    "t2i_compbench": t2i_compbench_files,
}


def checkout(name: str, folder: Path) -> Path:
    """A checkout of the benchmark's repository, with the images that are to be changed."""
    write(folder, FILES[name]())
    photo = Image.new("RGB", (64, 64), "green")
    if name == "imgedit":
        (folder / "singleturn/photos").mkdir(parents=True)
        photo.save(folder / "singleturn/photos/one.png")
    if name == "gedit":
        _gedit_rows(folder, photo)
    return folder


def _gedit_rows(folder: Path, photo: Image.Image) -> None:
    import pyarrow
    from pyarrow import parquet

    from srum.evaluation.benchmarks.gedit import GROUPS

    data = io.BytesIO()
    photo.save(data, format="png")
    rows = [
        {
            "key": f"{group}{n}",
            "task_type": group,
            "instruction": f"{language} {group} {n}",
            "instruction_language": language,
            "input_image": {"bytes": data.getvalue(), "path": None},
        }
        for group in GROUPS
        for n in range(3)
        for language in ("en", "cn")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")

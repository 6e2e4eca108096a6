"""What a config or a command names: a shipped thing by its name, an installed package's by its entry point, or a user's
own by ``module:Name``, where the current directory is importable."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from srum.errors import SrumError


class PluginError(SrumError, ValueError):
    """A name that leads to nothing of its kind; the message is one line."""


SHIPPED: dict[str, dict[str, str]] = {
    "method": {
        "sft": "train.methods.sft:Sft",
        "srum": "train.methods.srum:Srum",
        "region_nft": "train.methods.region_nft:RegionNft",
    },
    "judge": {"self": "judging.self_judge:SelfJudge"},
    "reward": {},
    "benchmark": {
        "shapes": "srum.evaluation.benchmarks.shapes:Shapes",
        "geneval": "srum.evaluation.benchmarks.geneval:Geneval",
        "compbench": "srum.evaluation.benchmarks.compbench:CompBench",
        "genevalpp": "srum.evaluation.benchmarks.genevalpp:GenevalPlus",
        "dpg": "srum.evaluation.benchmarks.dpg:Dpg",
        "wise": "srum.evaluation.benchmarks.wise:Wise",
        "unigenbench": "srum.evaluation.benchmarks.unigenbench:UniGenBench",
        "reasonbench": "srum.evaluation.benchmarks.reasonbench:ReasonBench",
        "imgedit": "srum.evaluation.benchmarks.imgedit:ImgEdit",
        "gedit": "srum.evaluation.benchmarks.gedit:Gedit",
        "tiif": "srum.evaluation.benchmarks.tiif:Tiif",
        "t2i_compbench": "srum.evaluation.benchmarks.t2i_compbench:T2ICompBench",
    },
    "evaluator": {
        "checker": "srum.evaluation.judges:Checker",
        "detector": "srum.evaluation.detection:Mask2FormerClip",
        "vqa": "srum.evaluation.vqa:BlipVqa",
    },
}  # kind -> name -> module:Name


def find(kind: str, name: str, shipped: Mapping[str, str] | None = None) -> Any:
    """The ``kind`` (method, judge, reward, ...) of that name: what stands under ``Name`` in its module.

    Entry points are those of the group ``srum.KINDs``. Raises PluginError for a name that is neither shipped, nor an
    entry point, nor ``module:Name``, and for a module or a name in it that is missing; what the module itself raises
    while it is imported is raised as it is.
    """
    shipped = SHIPPED[kind] if shipped is None else shipped
    installed = {point.name: point.value for point in entry_points(group=f"srum.{kind}s")}
    place = {**installed, **shipped}.get(name, name)
    module_name, _, attribute = place.partition(":")
    if not (module_name and attribute):
        known = ", ".join({**shipped, **installed})
        raise PluginError(f"no {kind} {name!r}: give " + (f"one of {known} or " if known else "") + "module:Name")
    module = _imported(kind, name, module_name)
    if not hasattr(module, attribute):
        raise PluginError(f"{kind} {name!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def names(kind: str) -> list[str]:
    """The shipped and the installed things of that kind."""
    return [*SHIPPED[kind], *(point.name for point in entry_points(group=f"srum.{kind}s"))]


def resolve(place: str) -> Any:
    """What stands at ``module:name`` of this package or of a user's stage."""
    module, _, name = place.partition(":")
    return getattr(_imported("stage", place, module), name)


def _imported(kind: str, name: str, module_name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, something that it imports does not
        raise PluginError(f"{kind} {name!r}: no module {error.name!r} here or installed") from None

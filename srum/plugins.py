"""What a config or a command names: a shipped thing by its name, an installed package's by its entry point, or a user's
own by ``module:Name``, where the current directory is importable."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from traceback import walk_tb
from typing import Any

from pydantic import ValidationError

from srum.errors import SrumError

OURS = ("srum",)  # packages whose errors are faults of ours


class PluginError(SrumError, ValueError):
    """A name that leads to nothing of its kind, or what it names cannot be made; the message is one line."""


SHIPPED: dict[str, dict[str, str]] = {
    "method": {
        "sft": "srum.train.methods.sft:Sft",
        "srum": "srum.train.methods.srum:Srum",
        "region_nft": "srum.train.methods.region_nft:RegionNft",
        "reca": "srum.train.methods.reca:Reca",
        "rvr": "srum.train.methods.rvr:Rvr",
        "flow_grpo": "srum.train.methods.flow_grpo:FlowGrpo",
        "r3": "srum.train.methods.r3:R3",
        "process": "srum.train.methods.process:Process",
    },
    "judge": {"self": "srum.judging.self_judge:SelfJudge"},
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
    installed: dict[str, str] = {}
    if name not in shipped:  # a look at every installed package, which takes milliseconds
        installed = {point.name: point.value for point in entry_points(group=f"srum.{kind}s")}
    place = {**installed, **shipped}.get(name, name)
    module_name, _, attribute = place.partition(":")
    if not (module_name and attribute):
        known = ", ".join({**shipped, **installed})
        raise PluginError(f"no {kind} {name!r}: give {f'one of {known} or ' if known else ''}module:Name")
    module = _imported(kind, name, module_name)
    if not hasattr(module, attribute):
        raise PluginError(f"{kind} {name!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def names(kind: str) -> list[str]:
    """The shipped and the installed things of that kind."""
    return [*SHIPPED[kind], *(point.name for point in entry_points(group=f"srum.{kind}s"))]


def find_class(kind: str, name: str, method: str, shipped: Mapping[str, str] | None = None) -> type[Any]:
    """The class of that name, which has to have a ``method`` such as ``judge``. Raises PluginError as ``find`` does."""
    found = find(kind, name, shipped)
    if not isinstance(found, type):
        raise PluginError(f"{kind} {name!r}: it is no class")
    if not callable(getattr(found, method, None)):
        raise PluginError(f"{kind} {name!r}: {found.__name__} has no method {method}")
    return found


def construct(kind: str, name: str, made: type[Any], model: Any, options: Mapping[str, Any]) -> Any:
    """An instance of a plug-in's class. ``options`` are arguments of its constructor.

    A parameter called ``model`` receives the unified model, one called ``device``, unless it is among the options, that
    model's; a class that has no use for either needs no model (None). Raises PluginError for options that the
    constructor has not or refuses, and for a ValueError or OSError of a user's constructor.
    """
    parameters = inspect.signature(made).parameters
    theirs = {} if model is None else {"model": model, "device": str(model.device)}
    given = {key: value for key, value in theirs.items() if key in parameters and key not in options}
    try:
        inspect.signature(made).bind(**given, **options)
    except TypeError as error:
        known = ", ".join(option for option in parameters if option != "model") or "none"
        raise PluginError(f"{kind} {name!r}: {error}; its options are: {known}") from None
    try:
        return made(**given, **options)
    except SrumError:
        raise
    except ValidationError as error:
        wrong = "; ".join(f"{detail['loc'][0]}: {detail['msg']}, got {detail['input']!r}" for detail in error.errors())
        raise PluginError(f"{kind} {name!r}: {wrong}") from None
    except (ValueError, OSError) as error:
        if not raised_by(made.__module__, error):
            raise
        message = " ".join(str(error).split())
        raise PluginError(f"{kind} {name!r}: {type(error).__name__}: {message}") from error


def raised_by(module: str, error: Exception) -> bool:
    """Whether the innermost frame of an error that is of the plug-in's ``module`` or of ours is the plug-in's."""
    theirs = module.partition(".")[0]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    innermost = next(package for package in reversed(packages) if package in (*OURS, theirs))
    return innermost not in OURS


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

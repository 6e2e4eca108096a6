"""The ``srum`` command: one sub-command per stage, ``srum run`` for the loop.

Imports of weight happen inside the commands, after the config has been read, so that ``--help`` and a typo in ``--set``
are answered at once. What the user can put right is
one line and exit code 2; anything else is a traceback.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from srum import cores
from srum.errors import SrumError
from srum.stages import SHIPPED, Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from srum.config import RunConfig
    from srum.drawing.chains import ChainSettings
    from srum.drawing.strokes import StrokeSettings
    from srum.processes import Processes
    from srum.run import Run


# The commands by group, in the order of `srum --help`.
GROUPS = {
    "Loop": ("run", "init", "config", "plan", "fork", "sweep"),
    "Stages": ("rollout", "ground", "judge", "rasterize", "images", "pair", "train", "eval", "import"),
    "Looking": ("report", "show", "compare", "ui", "export", "publish"),
    "Models": ("doctor", "convert", "chain", "strokes", "refine", "reconstruct", "bench", "serve", "pretrain"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


class OneLineErrors(TyperGroup):
    """Shows what the user can put right (``srum.errors``) as one line, and the commands by group."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of ``GROUPS``."""
        order = list(GROUP_OF)
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, which knows its group."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = GROUP_OF.get(cmd_name)
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: {cores.KEPT}", err=True)
            raise typer.Exit(130) from None
        except SrumError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            typer.echo(f"error: {str(error).partition('. ')[0]}: {SMALLER}", err=True)
            raise typer.Exit(2) from None


# What to do where a device has no room for a batch.
SMALLER = (
    "lower the number of the stage (rollout.batch_size, judge.batch_size, train.memory.pack_tokens, eval.batch_size); "
    "docs/howto/memory.md says how the run goes on with it"
)


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # not imported for an Exit, which is a RuntimeError, too
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def main() -> None:
    """The command ``srum``."""
    cores.command_line()
    app()


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Self-rewarding post-training for unified multimodal models, region by region.",
)

AT_ONCE = ("rasterize", "pair")  # stages that are done before another process would have begun
BEGIN = ("rollout", "images")  # stages that make the run where there is none
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Round = Annotated[int, typer.Option("--round", min=0, help="Round, from 0.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; what it leaves out has its default.")]


def _known(kind: str) -> Callable[[str], list[str]]:
    """What the shell completes: names of that kind."""

    def complete(incomplete: str) -> list[str]:
        from srum.plugins import names

        return [name for name in names(kind) if name.startswith(incomplete)]

    return complete


def _known_fields(incomplete: str) -> list[str]:
    """What the shell completes: fields of a config, those of the default method among them."""
    from srum.config import METHOD, config_class
    from srum.explain import fields

    return [field.name for field in fields(config_class(METHOD)) if field.name.startswith(incomplete)]


def _known_overrides(incomplete: str) -> list[str]:
    return [f"{name}=" for name in _known_fields(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="Override of one field, such as train.lr=1e-5; repeat --set for each.",
        autocompletion=_known_overrides,
    ),
]


def _print_version(wanted: bool) -> None:
    from srum import __version__

    if wanted:
        typer.echo(f"srum {__version__}")
        raise typer.Exit


@app.callback()
def _srum(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _stage_command(stage: Stage) -> Callable[..., None]:
    """The command of a stage. That of the first makes the run where there is none."""

    def command(run: RunFolder, round_: Round = 0, config: ConfigFile = None, overrides: Overrides = None) -> None:
        wanted = _check_config(run, config, overrides or [], new=stage.name in BEGIN)

        from srum.loop import next_command, perform

        with (
            _sharing(None if stage.name in AT_ONCE else wanted) as processes,
            _opened(run, config, overrides) as opened,
        ):
            perform(opened, stage.name, round_)
            if processes.rank == 0:
                typer.echo(f"next: {next_command(opened, stage.name, round_)}")

    return command


for _stage in SHIPPED:
    app.command(_stage.name, help=_stage.summary)(_stage_command(_stage))


@app.command("eval")
def eval_(
    run: RunFolder,
    round_: Annotated[int | None, typer.Option("--round", min=0, help="After this round (default: the last).")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Check the images of the base model and of every arm, with the exact checker.

    After the last round this writes summary.json and the report; with --round, the folder eval/ of that round.
    """
    wanted = _check_config(run, config, overrides or [], new=False)

    from srum import loop
    from srum.run_dir import RunError
    from srum.stages.rollout import own_prompts

    with _sharing(wanted) as processes, _opened(run, config, overrides) as opened:
        held_out = processes.once(lambda: own_prompts(opened.pinned))
        if not (opened.config.eval.count or (round_ is None and held_out)):
            raise RunError(f"{run} has no evaluation: eval.count is 0")
        if round_ is None:
            loop.conclude(opened)
            if processes.rank == 0:
                typer.echo(f"open {run / 'report.html'}")
            return
        results = loop.evaluate_arms(opened, round_ + 1, opened.round(round_) / "eval")
        if processes.rank == 0:
            loop.console.print(loop.summary_table(loop.summarize(results)))


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html from what the run has so far."""
    from srum import open_run
    from srum.views.report import write_report

    typer.echo(f"open {write_report(open_run(run).folder)}")


@app.command()
def show(
    run: RunFolder,
    candidate: Annotated[
        str,
        typer.Argument(metavar="CANDIDATE", help="Its id, as report.html and candidates.jsonl have it: train-0003-1."),
    ],
    round_: Annotated[
        int | None, typer.Option("--round", min=0, help="Round (default: the newest that has it).")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Save the candidate and its reward map, .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Print what a run knows of one candidate: regions, scores, reasons, failures."""
    from rich.console import Console

    from srum import open_run
    from srum.views.show import candidate_tables

    view = open_run(run).candidate(candidate, round_)
    Console().print(*candidate_tables(view))
    if image is not None:
        _save_figure(view.figure(grid=True), image)


@app.command()
def compare(
    run: RunFolder,
    other: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of another run.")] = None,
    image: Annotated[Path | None, typer.Option(help="Save the first 24 held-out images whose verdicts differ.")] = None,
    arm: Annotated[
        str | None, typer.Option(help="Arm whose images are saved (default: the first run's method).")
    ] = None,
) -> None:
    """Print what the arms of a run took and how accurate they are at equal compute; of two runs, side by side, also
    their configs, rounds and accuracies."""
    from rich.console import Console

    from srum import open_run
    from srum.evaluation.compute import compute_tables
    from srum.views.plots import before_after_figure
    from srum.views.show import changed_images, comparison_tables

    if other is None:
        Console().print(*compute_tables([open_run(run)]))
        return
    views = open_run(run), open_run(other)
    Console().print(*comparison_tables(*views))
    if image is not None:
        arm = arm or views[0].method.name
        pairs = list(islice(changed_images(*views, arm), 24))
        if not pairs:
            raise SrumError(f"{image} was not written: no verdict on an image of {arm} differs")
        _save_figure(before_after_figure(pairs, names=(str(run), str(other))), image)


@app.command()
def ui(
    what: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Folder of a run; or a model: name, folder, hub id.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the page, on this machine; 0 takes one that is free.")
    ] = 7860,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Open a page: type a prompt, see what base and trained weights draw, how it is judged, and draw it again."""
    from srum.views.ui import open_session, serve

    serve(open_session(what, config, overrides or []), what, port)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .parquet, or the authors' .jsonl.")],
    pairs: Annotated[bool, typer.Option("--pairs", help="RvR's pairs, in the parquet layout of its authors.")] = False,
) -> None:
    """Write the candidates of all rounds to a parquet file for the datasets library, or to the authors' JSON lines."""
    from srum import open_run

    if pairs:
        from srum.exchange.pair_interchange import write_pairs

        if out.suffix != ".parquet":
            raise SrumError(f"{out}: pairs are exported to a .parquet file")
        typer.echo(f"{out}: {write_pairs(open_run(run), out)} pairs")
        return

    if out.suffix == ".jsonl":
        from srum.exchange.interchange import write_lines

        written, left_out = write_lines(open_run(run), out)
        typer.echo(f"{out}: {written} candidates, {left_out} without the scores that the format needs were left out")
        return
    if out.suffix != ".parquet":
        raise SrumError(f"{out}: an export is a .parquet or a .jsonl file")
    try:
        from srum.exchange.export import write_export
    except ModuleNotFoundError as error:
        raise SrumError(f"{error.name} is missing: pip install 'srum[export]'") from None
    written, unreadable = write_export(open_run(run), out)
    typer.echo(f"{out}: {written} candidates, {unreadable} whose image cannot be read were left out")


@app.command()
def publish(
    run: RunFolder,
    arm: Annotated[
        str,
        typer.Argument(metavar="ARM", help="The arm whose newest weights are published: a method, such as region_nft."),
    ],
    destination: Annotated[str, typer.Argument(metavar="DIR|OWNER/NAME", help="A new folder, or a name on the hub.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, with its base named.")] = False,
    private: Annotated[bool, typer.Option("--private", help="On the hub, where only its owner sees it.")] = False,
) -> None:
    """Publish weights with a model card written from the run, once they have been loaded back and draw the same."""
    from srum import open_run
    from srum.run import Run
    from srum.train.publishing import publish as publish_arm

    view = open_run(run)
    typer.echo(publish_arm(Run(view.folder, view.config), arm, destination, adapter, private))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or shipped name.")],
    size: Annotated[
        int | None, typer.Option(min=16, help="Side of the images in pixels (default: the largest).")
    ] = None,
    check: Annotated[bool, typer.Option(help="Load the weights and compare training with sampling.")] = True,
    device: Annotated[str, typer.Option(help="As device in a config: auto, spread, cpu, cuda, cuda:1, ...")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run a step of each stage at its size, without weights or a GPU.")
    ] = False,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Of the dry run's training; may be repeated (default: 1, 8, 64).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings of the dry run (default: three usual trainings).")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a checkpoint holds, what of it fits on this machine, and whether it computes as it should; with
    --dry-run what each stage would take of a GPU, of a published model without its weights, too."""
    from rich.console import Console

    if dry_run:
        from srum.config import load_config
        from srum.train.dry_run import costs, table_of

        run = load_config(config, overrides or ()) if config or overrides else None
        Console().print(table_of(costs(model, run, processes or (1, 8, 64))))
        return

    from srum import models
    from srum.doctor import CHECKED, Machine, self_check, tables, usual_side

    folder, machine = models.find(model), Machine.here(device)
    side = size or usual_side(folder, machine)
    Console().print(*tables(folder, machine, (side, side)))
    loaded = models.load(folder, device) if check else None
    if loaded is not None and not loaded.abilities >= CHECKED:
        typer.echo(f"no self-check, which compares velocities: {type(loaded).__name__} predicts none")
    elif loaded is not None:
        deviation, tolerance = self_check(loaded, (side, side), machine.bfloat16)
        typer.echo(f"training and sampling agree to {deviation:.1e} (at most {tolerance:.0e} expected)")
        if deviation > tolerance:
            raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a model, or a file of weights.", exists=True)],
    out: Annotated[Path, typer.Option(help="The new folder, or file: .safetensors, or .pth for the authors' code.")],
) -> None:
    """Make safetensors of pickled weights, which are not read elsewhere since a pickle may run code: of a folder, with
    all else that is in it, or of a file; and a pickle of safetensors."""
    from srum.models.pickles import convert as convert_weights

    for path in convert_weights(source, out):
        typer.echo(path)


@app.command("import")
def import_(
    lines: Annotated[
        Path,
        typer.Argument(
            metavar="LINES.jsonl|PAIRS.parquet", help="SRUM's judged images, or RvR's pairs (file or folder)."
        ),
    ],
    run: RunFolder,
    images: Annotated[Path, typer.Option(help="Folder of the images that the lines name.")] = Path(),
    round_: Round = 0,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Make a round of the authors' files: up to its judgements of SRUM's JSON lines, of pairs of RvR's parquet."""
    from srum import models
    from srum.exchange.interchange import import_round
    from srum.exchange.pair_interchange import import_pairs

    paired = lines.is_dir() or lines.suffix == ".parquet"
    with _opened(run, config, overrides) as opened:
        model = models.load(opened.config.model, opened.config.device, empty=True)  # its autoencoder alone is asked
        read = import_pairs if paired else import_round
        count, problems = read(lines, images, model, opened.round(round_))
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    kinds = ("pairs", "rows") if paired else ("candidates", "lines")
    typer.echo(f"{opened.round(round_)}: {count} {kinds[0]}, {len(problems)} {kinds[1]} left out")


@app.command()
def fork(
    run: RunFolder,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Folder of the new run.")],
    stage: Annotated[
        str,
        typer.Option(
            "--from",
            help="First stage that the new run does itself: rollout, ground, judge, rasterize, images, pair or train.",
        ),
    ],
    method: Annotated[str | None, typer.Option(help="Another method for the new run.")] = None,
    round_: Annotated[
        int | None, typer.Option("--round", min=0, help="Round of that stage (default: the last that has come so far).")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Make a run that shares what lies before a stage, to go on otherwise from there: `srum run --resume --out NEW`."""
    from srum.config import CONFIG, changed, load_config
    from srum.fork import fork_run

    named = [] if method is None else [f"method={method}"]
    fork_run(run, new, stage, changed(load_config(run / CONFIG), [*named, *(overrides or [])]), round_)
    typer.echo(f"{new}: before {stage} as {run}; srum run --out {new} --resume goes on")


@app.command("run")
def run_(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/default"),
    config: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was interrupted; with --set rounds=N, by more rounds."),
    ] = False,
    grounder: Annotated[str | None, typer.Option(help="sam, detector, classical, ... or my_module:MyGrounder.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="srum, region_nft, sft, ... or my_module:MyMethod; its weights draw the next round.",
            autocompletion=_known("method"),
        ),
    ] = None,
) -> None:
    """Run all rounds, compare the method with the base model and others; end in a table and a report."""
    named = {"ground.grounder": grounder, "method": method}
    flags = [f"{name}={value}" for name, value in named.items() if value is not None]
    checked = _check_config(out, config, [*(overrides or []), *flags])

    from srum.loop import run_loop

    with _sharing(checked) as processes:
        wanted = processes.once(lambda: _config(out, config, [*(overrides or []), *flags]))
        run_loop(wanted, out, resume, command=shlex.join(["srum", *sys.argv[1:]]), foretell=True)
        if processes.rank == 0:
            typer.echo(f"open {out / 'report.html'}")


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file; what it leaves out has its default.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where the run would be, for the room on that disk.")] = Path("runs"),
) -> None:
    """Say what a run will cost: images, forward passes, time, memory, disk, and what will not fit.

    Time, memory and disk are measured with a small run of the same config in a temporary folder.
    """
    from srum.config import load_config

    wanted = load_config(config, overrides or ())

    from srum.loop import check_inputs, show_plan
    from srum.plan import foresee

    with _sharing(wanted) as processes:
        settled = processes.once(lambda: check_inputs(wanted))
        foretold = foresee(settled, out, always=True)
        if processes.rank == 0:
            show_plan(foretold)


@app.command("config")
def config_(
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Say what a field is, or all of a section.", autocompletion=_known_fields),
    ] = None,
) -> None:
    """Print the whole config that a file and overrides make; with --explain, what a field of it is."""
    from srum.config import dump, load_config

    wanted = load_config(config, overrides or [])
    if explain is None:
        typer.echo(dump(wanted), nl=False)
        return
    from srum.explain import explain as explained

    for field in explained(type(wanted), explain):
        typer.echo(field)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The config to write.")] = Path("srum.yaml"),
    model: Annotated[str | None, typer.Option(help="Shipped name, folder, or hub id.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that it will run on.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A .txt or .jsonl file, or a set of the embedded world.")] = None,
    grounder: Annotated[str | None, typer.Option(help="sam, detector, native, classical, ... or module:Name.")] = None,
    judge: Annotated[str | None, typer.Option(help="self, start, a model, http://... or module:Name.")] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name on its server.")] = "",
    method: Annotated[
        str | None, typer.Option(help="srum, region_nft, sft, ... or module:Name.", autocompletion=_known("method"))
    ] = None,
) -> None:
    """Ask what a run should be, write that as a commented config, and check it. What an option says is not asked."""
    from srum.config import METHOD, parse_config
    from srum.init import Answers, is_here, launch, settings, usual_side, write

    if path.exists():
        raise SrumError(f"{path} is there already; choose another name")
    model = _asked(model, "model (srum-tiny, a folder, or a hub id such as ByteDance-Seed/BAGEL-7B-MoT)", "srum-tiny")
    tiny = model == "srum-tiny"
    gpus = int(_asked(gpus, "GPUs", str(len(list(Path("/dev").glob("nvidia[0-9]*")))), _count))
    prompts = _asked(prompts, "prompts (a .txt or .jsonl file, or train)", "train" if tiny else "prompts.txt")
    grounder = _asked(grounder, "grounder", "classical" if tiny else "sam")
    judge = _asked(judge, "judge (self, start, a model, or a server's http://...)", "self")
    if judge.startswith(("http://", "https://")):
        judge_model = _asked(judge_model or None, "the judge's name there", "")
    method = _asked(method, "method", METHOD, _method_name)
    answers = Answers(model, gpus, prompts, grounder, judge, judge_model, method)
    values = settings(answers, usual_side(model))
    wanted = parse_config(values)

    from srum import models
    from srum.loop import check_inputs
    from srum.stages.rollout import choose_prompts

    here = is_here(model, models.EMBEDDED)
    if here:
        check_inputs(wanted)
    else:
        choose_prompts(prompts, wanted.prompt_count, wanted.seed)
    write(path, values, launch(path, gpus))
    left = "" if here else f"; {model} is fetched at the first use, and checked then"
    typer.echo(f"{path}: checked{left}. Go on with\n\n    {launch(path, gpus)}\n")


def _asked(given: Any, question: str, default: str, parse: Callable[[str], Any] = str) -> Any:
    """What an option gave, or what is answered, asked again until ``parse`` takes it."""
    return given if given is not None else typer.prompt(question, default=default, value_proc=parse)


def _count(answer: str) -> int:
    if not answer.isdecimal():
        raise typer.BadParameter(f"{answer!r} is no whole number from 0 on")
    return int(answer)


def _method_name(answer: str) -> str:
    from srum.config import config_class

    try:
        config_class(answer)
    except SrumError as error:
        raise typer.BadParameter(str(error)) from None
    return answer


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="Folder of the runs: SETTING/seed-S.")] = Path("runs/sweep"),
    config: ConfigFile = None,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="A.B=VALUE,VALUE", help="A field and its values; several fields are combined."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="So many seeds, from that of the config on.")] = 3,
) -> None:
    """Run every setting with several seeds, and print one table with intervals over seeds and prompts.

    Interrupted, the same command goes on.
    """
    from srum.config import load_config

    wanted = load_config(config, overrides or [])

    from srum.loop import console
    from srum.sweep import sweep as sweep_runs
    from srum.sweep import sweep_table

    with _sharing(wanted) as processes:
        numbers = range(wanted.seed, wanted.seed + seeds)
        rows = sweep_runs(wanted, vary or [], numbers, out, shlex.join(["srum", *sys.argv[1:]]))
        if processes.rank == 0:
            console.print(sweep_table(rows))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the states to resume from; the model is its model/.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    compile_layers: Annotated[
        bool,
        typer.Option("--compile", help="Train through torch.compile: faster after a minute; needs a C++ compiler."),
    ] = False,
    device: Annotated[str, typer.Option(help="Where it trains: cpu, cuda, cuda:1, mps.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that make samples; 0 on a CPU, else as many as cores.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Stretch (above 1) or cut the schedule of the network.")] = 1.0,
) -> None:
    """Pretrain srum-tiny from scratch on the embedded world: tokenizer, autoencoder, network.

    Interrupted, the same command goes on.
    """
    from srum.train.pretrain import pretrain as run_stages

    run_stages(out, seed=seed, compile_layers=compile_layers, device=device, workers=workers, scale=scale)


@app.command()
def refine(
    run: RunFolder,
    round_: Annotated[int | None, typer.Option("--round", min=0, help="The candidates of this round.")] = None,
    arm: Annotated[str | None, typer.Option("--eval", metavar="ARM", help="The evaluated images of this arm.")] = None,
    model: Annotated[
        str | None, typer.Option(help="What draws and judges (default: the newest weights of the run's method).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=4, help="As --set refine.rounds=N.")] = None,
    overrides: Overrides = None,
) -> None:
    """Draw images again that the model itself finds fault with: those of a round (default: 0), or of an evaluation.

    Into the folder refined/ beside them, resumable; ends in a table. The run and its config stay as they are.
    """
    from srum.config import CONFIG, changed, load_config

    if not (run / CONFIG).exists():
        raise SrumError(f"{run} is not the folder of a run: it has no {CONFIG}")
    if arm is not None and round_ is not None:
        raise SrumError("--round and --eval: give one of them")
    wanted = changed(load_config(run / CONFIG), [*(overrides or []), *([f"refine.rounds={rounds}"] if rounds else [])])

    from srum.loop import console
    from srum.run import Run, newest_weights
    from srum.run_dir import alone_in
    from srum.train.refining import items_of, refine_run, refinement_rows
    from srum.views.show import rows_table

    with _sharing(wanted) as processes, alone_in(run):
        opened = Run(run, load_config(run / CONFIG))
        place = run / "eval" / arm if arm is not None else opened.round(round_ or 0)
        made = refine_run(opened, place, model or newest_weights(opened), wanted)
        if processes.rank == 0:
            console.print(rows_table(refinement_rows(items_of(opened, place), place, made), str(place / "refined")))


@app.command()
def reconstruct(
    source: Annotated[str, typer.Argument(metavar="RUN|IMAGES", help="A run, or a source as in images.source.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("runs/reconstructed"),
    model: Annotated[
        str | None, typer.Option(help="What sees and draws (default: the run's newest, or srum-tiny).")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Have a model draw the images that it sees (RecA): pictures before and after, and how many scenes are the same."""
    from srum.config import CONFIG, changed, load_config

    run = Path(source) if (Path(source) / CONFIG).exists() else None
    wanted = load_config(config or (run and run / CONFIG), () if run else [f"images.source={source}"])
    wanted = changed(wanted, ["method=reca", *(overrides or [])])

    from srum.run_dir import locked
    from srum.train.reconstructing import reconstruct_images

    with _sharing(wanted) as processes, locked(out):
        line = reconstruct_images(wanted, out, run, model)
        if processes.rank == 0:
            typer.echo(line)


@app.command()
def chain(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the chains; interrupted, the same call goes on.")
    ],
    config: ConfigFile = None,
    overrides: Overrides = None,
    refinements: Annotated[int, typer.Option(min=0, help="At most so many times an image is refined.")] = 4,
    template: Annotated[str, typer.Option(help="Words of the chain: compact, released, or a .yaml file.")] = "compact",
    temperature: Annotated[float, typer.Option(min=0, help="Of what is written; 0 is greedy.")] = 0.0,
    edit_guidance: Annotated[float, typer.Option(help="Text guidance of refining; <= 1 is off.")] = 1.5,
    image: Annotated[
        Path | None, typer.Option(help="Save the first eight chains as strips, .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Draw the evaluation's prompts with a chain: draw, look, say what must change, draw that; after a plan only with
    --set eval.plan=true.

    Where the prompts are the embedded world's, print how accurate the images are after each refinement.
    """
    from srum.drawing.chaining import samplings
    from srum.drawing.chains import ChainSettings
    from srum.drawing.chains import template as words
    from srum.models.base import Decoding

    def settings(wanted: RunConfig) -> ChainSettings:
        drawing, changing = samplings(wanted, edit_guidance)
        return ChainSettings(
            drawing=drawing,
            changing=changing,
            form=words(template),
            plan=wanted.eval.plan,
            max_refinements=refinements,
            decoding=Decoding(temperature=temperature),
        )

    _draw_on(out, config, overrides, settings, image)


@app.command()
def strokes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the drawings; the same call goes on.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    max_strokes: Annotated[int, typer.Option(min=1, help="At most so many strokes.")] = 5,
    refinements: Annotated[int, typer.Option(min=0, help="At most so many corrections of a stroke.")] = 1,
    budget: Annotated[int, typer.Option(min=1, help="At most so many images; 1 is the planning pass.")] = 4,
    edit_guidance: Annotated[float, typer.Option(help="Text guidance of later images; <= 1 is off.")] = 1.5,
    long: Annotated[bool, typer.Option("--long", help="Each stage sees all before it (docs/process.md).")] = False,
    image: Annotated[Path | None, typer.Option(help="Save the first eight as strips, .png, .svg or .pdf.")] = None,
) -> None:
    """Draw the evaluation's prompts in strokes: plan, draft, inspect, correct; print what the checker says of each."""
    from srum.drawing.chaining import samplings
    from srum.drawing.strokes import StrokeSettings

    def settings(wanted: RunConfig) -> StrokeSettings:
        drawing, changing = samplings(wanted, edit_guidance)
        return StrokeSettings(
            drawing=drawing,
            changing=changing,
            layout="long" if long else "short",
            max_strokes=max_strokes,
            max_refinements=refinements,
            budget=budget,
        )

    _draw_on(out, config, overrides, settings, image)


def _draw_on(
    out: Path,
    config: Path | None,
    overrides: list[str] | None,
    settings: Callable[[RunConfig], ChainSettings | StrokeSettings],
    image: Path | None,
) -> None:
    """Draw the evaluation's prompts in more than one step, and print what came of it."""
    from srum.evaluation.chains import draw_evaluation, endings, tables
    from srum.loop import console
    from srum.run_dir import locked
    from srum.views.plots import strips_figure

    with _sharing(_check_config(out, config, overrides or [])) as processes:
        wanted = processes.once(lambda: _config(out, config, overrides or []))
        chosen = settings(wanted)
        with locked(out):
            records = draw_evaluation(wanted, chosen, out)
        if processes.rank == 0:
            console.print(*tables(wanted, chosen, records, out))
            console.print(f"{len(records)} prompts drawn, ended by", endings(records))
            if image is not None:
                _save_figure(strips_figure(records[:8], out), image)


@app.command()
def bench(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="NAME | table RUN...", help="A benchmark, module:Name, or table.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say which benchmarks there are.")] = False,
    model: Annotated[str, typer.Option(help="Folder, hub id or shipped name of the model that draws.")] = "",
    images: Annotated[Path | None, typer.Option(help="Images made by anyone, in the official layout.")] = None,
    out: Annotated[Path, typer.Option(help="Images, verdicts, tables go into its bench/.")] = Path("runs/bench"),
    data: Annotated[Path | None, typer.Option(help="Checkout of the benchmark's repository.")] = None,
    variant: Annotated[str, typer.Option(help="Set of prompts or version (default: the first of --list).")] = "",
    preset: Annotated[str, typer.Option(help="Settings of the sampler: bagel, srum, ...; --set changes some.")] = "",
    overrides: Overrides = None,
    think: Annotated[bool, typer.Option("--think", help="Draw after a plan.")] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Images per prompt (default: as published).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts of each category.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
    evaluator: Annotated[str, typer.Option(help="chat, detector, ... or none (default: the benchmark's own).")] = "",
    judge_url: Annotated[str, typer.Option(help="Server of chat completions; its key is in OPENAI_API_KEY.")] = "",
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")] = "",
    judge_extra: Annotated[str, typer.Option(help="Further fields of each request, as JSON.")] = "{}",
    token_limit: Annotated[str, typer.Option(help="What the server calls the limit of tokens.")] = "max_tokens",
    training: Annotated[list[Path] | None, typer.Option(help="Training prompts, a file or a run, to look for.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 16,
    device: Annotated[str, typer.Option(help="As device in a config.")] = "auto",
) -> None:
    """Draw a benchmark's images, have them scored, print the table; or compare runs: srum bench table RUN...

    Interrupted, the same command goes on; torchrun shares the work.
    """
    from srum.config import ServerConfig, parse_section
    from srum.evaluation import bench as benches
    from srum.evaluation import bench_tables
    from srum.processes import connected

    if list_ or not what:
        typer.echo(bench_tables.listing())
        return
    if what[0] == "table":
        typer.echo(bench_tables.comparison([Path(run) for run in what[1:]]))
        return
    judge = {"url": judge_url, "model": judge_model, "token_limit": token_limit, "extra": _json(judge_extra)}
    request = benches.Request(
        name=what[0],
        model=model,
        images=images,
        out=out,
        data=data,
        variant=variant,
        preset=preset,
        overrides=tuple(overrides or ()),
        think=think,
        samples=samples,
        limit=limit,
        seed=seed,
        evaluator=evaluator,
        judge=parse_section(ServerConfig, judge, "judge"),
        training=tuple(training or ()),
        batch_size=batch_size,
        device=device,
    )
    with connected() as processes:
        text = benches.run(request)
        if processes.rank == 0:
            typer.echo(text)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or shipped name.")],
    host: Annotated[str, typer.Option(help="Address; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    key_variable: Annotated[str, typer.Option(help="Environment variable with the key that clients must send.")] = "",
    name: Annotated[str, typer.Option(help="What clients call the model (default: as it is named here).")] = "",
    device: Annotated[str, typer.Option(help="As device in a config.")] = "auto",
) -> None:
    """Serve a model by OpenAI's protocol: chat completions with images, images/generations, images/edits."""
    from srum import models
    from srum.exchange.serve import Http, ServeError, Service

    key = os.environ.get(key_variable, "") if key_variable else ""
    if key_variable and not key:
        raise ServeError(f"{key_variable} holds no key")
    service = Service(models.load(model, device), name or model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Http(service, host, port, key) as server:
        typer.echo(f"{service.name} at {server.address}; stop with Ctrl-C")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise SrumError(f"{text!r} is not JSON: {error}") from None


@contextmanager
def _opened(folder: Path, config: Path | None, overrides: list[str] | None) -> Iterator[Run]:
    """The run in ``folder``, to be worked in by this launch alone; where there is none, a new one whose prompts and
    model exist."""
    from srum import models
    from srum.processes import Processes
    from srum.run import Run
    from srum.run_dir import CONFIG, alone_in, claim_run
    from srum.stages.rollout import round_prompts

    def wanted_config() -> RunConfig:
        wanted = _config(folder, config, overrides or [])
        if not (folder / CONFIG).exists():
            models.require_model(wanted.model)
            round_prompts(wanted, 0)
        settled: RunConfig = models.settled(wanted)
        return settled

    processes = Processes.here()
    wanted = processes.once(wanted_config)
    with alone_in(folder):
        processes.once(lambda: claim_run(folder, wanted, resume=True))
        yield Run(folder, wanted)


def _config(folder: Path, config: Path | None, overrides: list[str]) -> RunConfig:
    """The overrides on the file that is named, else on the config of the folder's run, else on the defaults."""
    from srum.config import CONFIG, load_config

    if config is None and (folder / CONFIG).exists():
        config = folder / CONFIG
    return load_config(config, overrides)


def _check_config(folder: Path, config: Path | None, overrides: list[str], new: bool = True) -> RunConfig | None:
    """The config, or ConfigError now, before the imports of weight, or SrumError where there is no run and the command
    makes none (``new``); of process 0, which alone reads files."""
    from srum.config import CONFIG

    if int(os.environ.get("RANK", "0")):
        return None
    wanted = _config(folder, config, overrides)
    if not new and not (folder / CONFIG).exists():
        raise SrumError(f"{folder} is not the folder of a run: it has no {CONFIG}; srum rollout makes one")
    return wanted


@contextmanager
def _sharing(config: RunConfig | None) -> Iterator[Processes]:
    """The processes of this launch: on a CPU, where none were started with this one, as many as pay for this config
    (``srum.plan``)."""
    from srum.plan import sharing
    from srum.processes import connected

    count = 1 if config is None or "WORLD_SIZE" in os.environ else sharing(config)
    with connected(count) as processes:
        yield processes


def _save_figure(figure: Figure, path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise SrumError(f"{path}: an image is saved as .png, .svg or .pdf")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SrumError(f"cannot write {path}: {error.strerror}") from None

"""What of the site is made when it is built: the config, the commands, the notebooks, the README's results at home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click
from typer.main import get_command

from srum.cli import app
from srum.explain import reference

README = Path(__file__).parents[1] / "README.md"
NOTEBOOKS = README.parent / "notebooks"
CONFIG = """# The config

Every field of `config.yaml`, as `srum config --explain FIELD` has it: what it may be, its default, what it means.
`--set train.lr=1e-5` changes one on the command line, `srum init` writes a file with the ones that matter first.

"""


@event_priority(100)  # before the plugin that renders notebooks looks for them
def on_files(files: Any, config: Any) -> None:
    """Add them."""
    command = get_command(app)
    commands = get_docs_for_click(obj=command, ctx=command.context_class(command, info_name="srum"), name="srum")
    files.append(File.generated(config, "reference/config.md", content=CONFIG + reference()))
    files.append(File.generated(config, "reference/commands.md", content=commands))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", NOTEBOOKS.parent, config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the README's results where the home page has the marker."""
    return markdown.replace("<!-- results -->", results()) if page.file.src_uri == "index.md" else markdown


def results() -> str:
    """The section of the README, its links as they are from within docs/."""
    _, rest = README.read_text(encoding="utf-8").split("## What it gains\n")
    return "## What it gains\n" + rest.partition("\n## ")[0].replace("](docs/", "](")

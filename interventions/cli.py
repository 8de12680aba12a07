"""`luthier`: the toolkit on the command line. The composition root: the one place that may use all three packages.

Each verb lives in `cli_<verb>.py`. Nothing here imports torch, so `luthier --help` answers at once. Bad input prints one
line and exits with 2; set LUTHIER_TRACEBACK=1 to see where it was raised.
"""

import os
import sys

import typer

from .cli_align import align
from .cli_demo import demo
from .cli_discover import discover
from .cli_embed import app as embed
from .cli_ensemble import app as ensemble
from .cli_interfere import app as interfere
from .cli_report import report
from .cli_tune import tune

app = typer.Typer(
    name="luthier",
    help="Find the attention heads that do a task, change only those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for verb in (demo, discover, tune, align, report):
    app.command()(verb)
app.add_typer(embed, name="embed")
app.add_typer(interfere, name="interfere")
app.add_typer(ensemble, name="ensemble")


def main() -> None:
    """The `luthier` console script."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("LUTHIER_TRACEBACK"):
            raise
        print(f"luthier: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

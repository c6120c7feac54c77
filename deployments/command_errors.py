"""How a command of the command line fails: what a person reads, and the exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from magicdec.cluster.grafana_server import GrafanaError
from magicdec.config import ConfigError
from magicdec.deployments.embedded_model import ModelNotFoundError
from magicdec.deployments.settings import SettingsError, StartFailed
from magicdec.types import RequestError

USAGE_ERROR = 2
INTERRUPTED = 130
MENDABLE = (
    SettingsError,
    ModelNotFoundError,
    ConfigError,
    RequestError,
    StartFailed,
    GrafanaError,
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend is one line and exit code 2; what they cannot keeps its traceback."""
    try:
        yield
    except MENDABLE as error:
        typer.echo(f"magicdec: {error}", err=True)
        raise typer.Exit(USAGE_ERROR) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error

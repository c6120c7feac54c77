"""`magicdec dashboards push | show`: the Grafana dashboard, written to a server or printed."""

import json
from typing import Annotated

import typer

from magicdec.cluster.dashboard import TITLE, UID, build_dashboard
from magicdec.cluster.grafana_server import DataSource, GrafanaServer, dashboard_diff
from magicdec.deployments.command_errors import one_line_errors

dashboards = typer.Typer(
    name="dashboards", help="Grafana dashboards of this server.", no_args_is_help=True
)

Url = Annotated[str, typer.Option(help="Grafana's address, with its path if it has one.")]
Token = Annotated[
    str,
    typer.Option(help="A service account's token.", envvar="GRAFANA_TOKEN", show_envvar=True),
]
Folder = Annotated[str, typer.Option(help="Title of the folder; its uid is magicdec.")]
PrometheusUrl = Annotated[
    str | None,
    typer.Option(
        help="Make or change a data source of this address, as Grafana reaches it.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would change, as a diff; change nothing.")
]


@dashboards.command()
def push(
    url: Url,
    token: Token,
    folder: Folder = TITLE,
    prometheus_url: PrometheusUrl = None,
    dry_run: DryRun = False,
) -> None:
    """Write the dashboard to a Grafana server, in place of the one with its uid.

    Nothing is written where nothing differs. Prints what changes.
    """
    with one_line_errors():
        _push(GrafanaServer(url, token), folder, prometheus_url, dry_run=dry_run)


@dashboards.command()
def show() -> None:
    """Print the dashboard's JSON, to import it by hand."""
    typer.echo(json.dumps(build_dashboard(), indent=1))


def _push(server: GrafanaServer, folder: str, prometheus_url: str | None, *, dry_run: bool) -> None:
    wanted = build_dashboard()
    diff = dashboard_diff(server.dashboard(UID), wanted)
    typer.echo(diff or f"dashboard {UID}: as it should be", nl=not diff)
    if dry_run:
        return
    if server.put_folder(UID, folder):
        typer.echo(f"folder {folder}: written")
    if prometheus_url is not None:
        source = DataSource(f"{UID}-prometheus", f"{TITLE} Prometheus", prometheus_url)
        if server.put_data_source(source):
            typer.echo(f"data source {source.name}: written")
    if diff:
        server.put_dashboard(wanted, UID)
        typer.echo(f"dashboard {UID}: written")

"""`magicdec dashboards push` against Grafana's HTTP API: what is written, and what is not again."""

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from magicdec.cluster.dashboard import UID, build_dashboard
from magicdec.deployments.cli import app
from tests.cluster.grafana_stub import TOKEN, Stub, running_stub


@pytest.fixture
def grafana() -> Iterator[Stub]:
    with running_stub() as stub:
        yield stub


def push(url: str, *options: str, token: str = TOKEN) -> Result:
    return CliRunner().invoke(app, ["dashboards", "push", "--url", url, "--token", token, *options])


def test_a_push_makes_folder_and_dashboard(grafana: Stub) -> None:
    pushed = push(grafana.url, "--folder", "Models")
    assert pushed.exit_code == 0, pushed.output
    assert grafana.folders[UID]["title"] == "Models"
    written = grafana.dashboards[UID]
    assert {k: v for k, v in written.items() if k not in ("id", "version")} == build_dashboard()
    assert not grafana.sources  # it was not asked for


def test_a_second_push_writes_nothing(grafana: Stub) -> None:
    options = ("--prometheus-url", "http://prometheus:9090")
    push(grafana.url, *options)
    written = list(grafana.writes)
    again = push(grafana.url, *options)
    assert again.exit_code == 0 and "as it should be" in again.output
    assert grafana.writes == written
    assert grafana.dashboards[UID]["version"] == 1


def test_what_somebody_changed_is_shown_and_set_right(grafana: Stub) -> None:
    push(grafana.url)
    grafana.dashboards[UID]["title"] = "Mine"
    grafana.folders[UID]["title"] = "Also mine"
    pushed = push(grafana.url)
    assert '- "title": "Mine"' in pushed.output and '+ "title": "MagicDec Serve"' in pushed.output
    assert grafana.dashboards[UID]["title"] == "MagicDec Serve"
    assert grafana.dashboards[UID]["version"] == 2
    assert grafana.folders[UID]["title"] == "MagicDec Serve"


def test_a_dry_run_changes_nothing(grafana: Stub) -> None:
    said = push(grafana.url, "--dry-run", "--prometheus-url", "http://prometheus:9090")
    assert said.exit_code == 0
    assert '+ "uid": "magicdec"' in said.output
    assert not grafana.writes


def test_a_data_source_is_made_and_changed_by_uid(grafana: Stub) -> None:
    push(grafana.url, "--prometheus-url", "http://old:9090")
    (source,) = grafana.sources.values()
    assert (source["type"], source["url"]) == ("prometheus", "http://old:9090")
    source["jsonData"] = {"timeInterval": "15s"}  # an operator's own
    push(grafana.url, "--prometheus-url", "http://new:9090")
    (source,) = grafana.sources.values()
    assert source["url"] == "http://new:9090" and source["jsonData"] == {"timeInterval": "15s"}


def test_a_wrong_token_is_one_line(grafana: Stub) -> None:
    refused = push(grafana.url, token="wrong")
    assert refused.exit_code == 2
    assert "answers 401" in refused.output and "Traceback" not in refused.output
    assert not grafana.writes


def test_a_failing_server_is_one_line_with_its_reason(grafana: Stub) -> None:
    grafana.fails_with = 500
    failed = push(grafana.url)
    assert failed.exit_code == 2 and "answers 500: database is locked" in failed.output


@pytest.mark.parametrize("url", ["grafana:3000", "ftp://grafana", "http://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    refused = push(url)
    assert refused.exit_code == 2 and "url must be" in refused.output


def test_nobody_there_is_one_line() -> None:
    with running_stub() as stub:
        url = stub.url
    gone = push(url)
    assert gone.exit_code == 2 and "does not answer" in gone.output


def test_show_prints_the_dashboard() -> None:
    shown = CliRunner().invoke(app, ["dashboards", "show"])
    assert json.loads(shown.output) == build_dashboard()

"""A Grafana server, as far as a dashboard needs one: folder, data source and dashboard, by uid.

Over the package grafana-api, which is old: of it only what Grafana 11 to 13 still answers is used,
and everything that it raises becomes GrafanaError here.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from grafana_api.grafana_api import GrafanaException
from grafana_api.grafana_face import GrafanaFace

TIMEOUT_S = 30.0  # the package's own five are short for a dashboard
_NOT_FOUND, _PRECONDITION_FAILED = 404, 412
_SET_BY_GRAFANA = ("id", "version")

_T = TypeVar("_T")
_Dashboard = dict[str, Any]


class GrafanaError(RuntimeError):
    """What Grafana refused or did not answer; the message is one line for a person."""


@dataclass(frozen=True, slots=True)
class DataSource:
    """A Prometheus that Grafana is to query. `url` is as Grafana's server reaches it."""

    uid: str
    name: str
    url: str


class GrafanaServer:
    """Changes nothing that is as it should be already."""

    def __init__(self, url: str, token: str) -> None:
        """`token`: a service account's. Raises GrafanaError for a URL that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise GrafanaError(f"url must be http:// or https:// and a host, got {url!r}")
        self._url = url
        self._api = GrafanaFace(
            token,
            host=parts.hostname,
            port=parts.port,
            url_path_prefix=parts.path.strip("/") + "/" if parts.path.strip("/") else "",
            protocol=parts.scheme,
            timeout=TIMEOUT_S,
        )

    def dashboard(self, uid: str) -> _Dashboard | None:
        """The dashboard as it is there, without what Grafana itself sets; None: there is none."""
        found = self._find(lambda: self._api.dashboard.get_dashboard(uid))
        return None if found is None else _comparable(found["dashboard"])

    def put_folder(self, uid: str, title: str) -> bool:
        """Whether it had to be made or renamed."""
        found = self._find(lambda: self._api.folder.get_folder(uid))
        if found is None:
            self._call(lambda: self._api.folder.create_folder(title, uid))
        elif found["title"] != title:
            self._call(lambda: self._api.folder.update_folder(uid, title, overwrite=True))
        return found is None or found["title"] != title

    def put_data_source(self, source: DataSource) -> bool:
        """Whether it had to be made or changed. By uid: Grafana 13 knows no other address."""
        wanted = {
            "uid": source.uid,
            "name": source.name,
            "type": "prometheus",
            "access": "proxy",
            "url": source.url,
        }
        # The package asks by name or number alone; its GET and PUT take any path.
        path = f"/datasources/uid/{source.uid}"
        found = self._find(lambda: self._api.api.GET(path))
        if found is not None and all(found.get(name) == value for name, value in wanted.items()):
            return False
        if found is None:
            self._call(lambda: self._api.datasource.create_datasource(wanted))
        else:
            self._call(lambda: self._api.api.PUT(path, json=found | wanted))
        return True

    def put_dashboard(self, dashboard: _Dashboard, folder_uid: str) -> None:
        """In place of the one with its uid."""
        body = {
            "dashboard": {**dashboard, "id": None},
            "folderUid": folder_uid,
            "overwrite": True,
            "message": "written by magicdec",
        }
        self._call(lambda: self._api.dashboard.update_dashboard(body))

    def _find(self, ask: Callable[[], Any]) -> dict[str, Any] | None:
        """None for what Grafana does not know."""
        try:
            found: dict[str, Any] = ask()
            return found
        except GrafanaException as error:
            if error.status_code == _NOT_FOUND:
                return None
            raise self._error(error) from error
        except requests.RequestException as error:
            raise GrafanaError(f"{self._url} does not answer: {error}") from error

    def _call(self, act: Callable[[], _T]) -> _T:
        try:
            return act()
        except GrafanaException as error:
            raise self._error(error) from error
        except requests.RequestException as error:
            raise GrafanaError(f"{self._url} does not answer: {error}") from error

    def _error(self, error: GrafanaException) -> GrafanaError:
        reason = "someone else changed it meanwhile"
        if error.status_code != _PRECONDITION_FAILED:
            answer = error.response
            reason = answer.get("message", answer) if isinstance(answer, dict) else answer
        return GrafanaError(f"{self._url} answers {error.status_code}: {reason}")


def dashboard_diff(there: _Dashboard | None, wanted: _Dashboard) -> str:
    """What a push would change, as a unified diff; empty: nothing."""
    old = [] if there is None else _lines(_comparable(there))
    return "".join(difflib.unified_diff(old, _lines(_comparable(wanted)), "there", "wanted"))


def _comparable(dashboard: _Dashboard) -> _Dashboard:
    return {name: value for name, value in dashboard.items() if name not in _SET_BY_GRAFANA}


def _lines(dashboard: _Dashboard) -> list[str]:
    return json.dumps(dashboard, indent=1, sort_keys=True).splitlines(keepends=True)

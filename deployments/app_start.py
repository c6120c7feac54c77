"""Starts a Serve application and says in one line why it did not start."""

from ray import serve
from ray.serve.deployment import Application

from magicdec.deployments.settings import StartFailed


def run_application(application: Application, name: str, route_prefix: str | None) -> None:
    """Returns when it serves. Raises StartFailed."""
    try:
        serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:  # Serve gave up: the reason is in the deployment's status
        raise StartFailed(_failure(name) or str(error)) from error


def _failure(name: str) -> str | None:
    """The last line of the message of the deployment that did not start."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    messages = [d.message for d in application.deployments.values() if d.message]
    lines = [line.strip() for m in messages for line in m.splitlines() if line.strip()]
    return lines[-1] if lines else application.message or None

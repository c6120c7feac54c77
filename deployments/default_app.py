"""The application with default settings, for `serve build magicdec.deployments.default_app:app`.

A Serve config that sets anything names `magicdec.deployments.app:app_builder` as its import_path
and gives the sections of the settings file as `args`.
"""

from magicdec.deployments.app import build
from magicdec.deployments.settings import ServeSettings

app = build(ServeSettings())

"""What the chart's schema refuses of the server's settings, the server refuses, and no more."""

from typing import Any

import pytest

from magicdec.config import ConfigError
from magicdec.deployments.settings import SettingsError, parse_settings
from tests.helm.chart import Refused, render
from tests.helm.setting_limits import SETTING_LIMITS, refused_values, taken_values

Case = tuple[str, str, Any]

REFUSED: list[Case] = [
    (*at, v) for at, limit in SETTING_LIMITS.items() for v in refused_values(limit)
]
TAKEN: list[Case] = [(*at, v) for at, limit in SETTING_LIMITS.items() for v in taken_values(limit)]


@pytest.mark.parametrize(("section", "name", "value"), REFUSED)
def test_a_setting_out_of_range_is_refused_by_both(section: str, name: str, value: Any) -> None:
    with pytest.raises(Refused, match=f"/settings/{section}/{name}"):
        render({"settings": {section: {name: value}}})
    with pytest.raises((ConfigError, SettingsError), match=name):
        parse_settings({section: {name: value}}).engine_config()


@pytest.mark.parametrize(("section", "name", "value"), TAKEN)
def test_a_setting_at_its_limit_renders(section: str, name: str, value: Any) -> None:
    render({"settings": {section: {name: value}}})

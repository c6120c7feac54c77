"""The time between two points of a device's work."""

import time

import pytest
import torch

from magicdec.device_span import DeviceSpan

HOST = torch.device("cpu")


def test_a_span_ends_where_it_is_ended() -> None:
    span = DeviceSpan(HOST)
    time.sleep(0.02)
    span.end()
    seconds = span.seconds()
    time.sleep(0.02)
    assert span.seconds() == seconds >= 0.02


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_devices_own_time() -> None:
    """The host is through long before."""
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    span = DeviceSpan(device)
    for _ in range(50):
        matrix @ matrix
    span.end()
    host = time.perf_counter() - started
    torch.cuda.synchronize(device)
    assert host < span.seconds() <= time.perf_counter() - started

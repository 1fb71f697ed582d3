"""Listening sockets, and what is said where there can be none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gateway.compose.listeners import (
    ClaimError,
    Running,
    leave_record,
    listen,
    naming_origins,
    naming_this_one,
)
from gateway.settings.load import ConfigError, load


@pytest.mark.parametrize("shared_by", [None, 2])
def test_a_port_in_use_is_one_clear_line(shared_by: int | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen("127.0.0.1", port, field="gateway.port", shared_by=shared_by)
    (line,) = [str(problem) for problem in caught.value.problems]
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "gateway.port" in line


def test_a_port_in_use_by_the_tidegate_of_this_directory_is_told_so(tmp_path: Path) -> None:
    def take(port: int) -> None:
        with naming_this_one(tmp_path):
            listen("127.0.0.1", port, field="gateway.port")

    with socket.create_server(("127.0.0.1", 0)) as own:
        url, pid = f"http://127.0.0.1:{own.getsockname()[1]}", os.getppid()
        with pytest.raises(ConfigError, match="another program"):
            take(own.getsockname()[1])
        leave_record(tmp_path, Running(pid=pid, url=url, admin_url="http://127.0.0.1:1"))
        with pytest.raises(ClaimError, match=f"already runs here .process {pid}, {url}.*status"):
            take(own.getsockname()[1])
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigError, match="another program"),
    ):
        take(other.getsockname()[1])


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match="no such address") as caught:
        listen(host, 0, field="gateway.admin_port")
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("gateway.admin_host", f'"{host}"')


def test_it_says_where_the_address_came_from() -> None:
    loaded = load(None, {}, ["gateway.host=192.0.2.1"])
    with pytest.raises(ConfigError) as caught, naming_origins(loaded):
        listen(loaded.settings.gateway.host, 0, field="gateway.port")
    (problem,) = caught.value.problems
    assert (problem.field, problem.origin) == ("gateway.host", "--set gateway.host=192.0.2.1")


def test_the_same_port_can_be_had_again_at_once() -> None:
    (first,) = listen("127.0.0.1", 0, field="gateway.port")
    port = first.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        accepted = None
        while accepted is None:
            try:
                accepted, _ = first.accept()
            except BlockingIOError:
                continue
        accepted.close()
    first.close()
    (again,) = listen("127.0.0.1", port, field="gateway.port")
    again.close()


def test_several_share_a_port_of_the_systems_choice() -> None:
    first, second = listen("127.0.0.1", 0, field="gateway.port", shared_by=2)
    with first, second:
        assert first.getsockname() == second.getsockname()

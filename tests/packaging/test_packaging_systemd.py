"""The systemd units: known directives, the command line that there is, and time to drain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from autoscaler.settings import AutoscalerSettings
from gateway.datapath.settings import GatewaySettings
from modelcache.fetch.download import JOIN_S
from modelcache.pagecache.holder import END_S
from modelcache.peers.server import MOST_WAIT_S

COMMAND = str(Path(sys.executable).parent / "tidegate")
UNITS = ("tidegate.service", "tidegate-agent.service")
DIRECTIVES = {
    "Unit": "Description Wants After StartLimitIntervalSec StartLimitBurst",
    "Service": """
        Type User Group StateDirectory StateDirectoryMode WorkingDirectory Environment
        EnvironmentFile ExecStart ExecReload KillMode TimeoutStopSec OOMPolicy Restart RestartSec
        LimitNOFILE
        NoNewPrivileges CapabilityBoundingSet AmbientCapabilities ProtectSystem ProtectHome
        PrivateTmp PrivateDevices ProtectProc ProtectClock ProtectHostname ProtectKernelLogs
        ProtectKernelModules ProtectKernelTunables ProtectControlGroups RestrictAddressFamilies
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality MemoryDenyWriteExecute
        SystemCallArchitectures SystemCallFilter SystemCallErrorNumber UMask""",
    "Install": "WantedBy",
}
"""By section, as systemd spells them: it only warns of others, and goes on without."""

Unit = dict[str, dict[str, list[str]]]


def parse(path: Path) -> Unit:
    unit: Unit = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            assert name in DIRECTIVES[section].split(), line
            unit[section][name].append(value)
    return unit


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, root: Path) -> Unit:
    return parse(root / "deploy" / "systemd" / str(request.param))


def test_every_directive_is_known_and_stands_once(unit: Unit) -> None:
    assert list(unit) == ["Unit", "Service", "Install"]
    for section in unit.values():
        assert {len(values) for values in section.values()} == {1}


def test_it_ends_by_itself_before_it_is_ended(unit: Unit) -> None:
    service = unit["Service"]
    longest_s = 5 + MOST_WAIT_S + 5 + END_S + JOIN_S
    engines = "up" in service["ExecStart"][0].split()
    if engines:
        longest_s = GatewaySettings().drain_s + AutoscalerSettings().terminate_s
    assert float(service["TimeoutStopSec"][0]) > longest_s
    # Or its children get SIGTERM with it. Engines outlive their control process for a while.
    assert service["KillMode"] == ["process" if engines else "mixed"]
    assert service["OOMPolicy"] == ["continue"], "or one child that is ended ends all"


def test_it_can_write_only_where_it_has_to(unit: Unit) -> None:
    service = unit["Service"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert service["CapabilityBoundingSet"] == [""]
    (directory,) = service["StateDirectory"]
    assert service["WorkingDirectory"] == [f"%S/{directory}"]
    assert service["User"] != ["root"]


def test_engines_get_what_they_need_and_secrets_are_in_a_file(root: Path) -> None:
    gateway, agent = (parse(root / "deploy" / "systemd" / name)["Service"] for name in UNITS)
    for denied in ("PrivateDevices", "MemoryDenyWriteExecute", "SystemCallFilter"):
        assert denied not in gateway
        assert denied in agent
    assert gateway["EnvironmentFile"] == ["-/etc/tidegate/tidegate.env"]
    assert agent["EnvironmentFile"] == ["/etc/tidegate/agent.env"]
    assert gateway["StateDirectory"] != agent["StateDirectory"]


@pytest.mark.parametrize("name", UNITS)
def test_its_command_line_is_understood(name: str, root: Path, tmp_path: Path) -> None:
    """With settings that are wrong: they are read, from the file that the option names."""
    (line,) = parse(root / "deploy" / "systemd" / name)["Service"]["ExecStart"]
    program, *words = line.split()
    assert Path(program).name == "tidegate"
    config = tmp_path / Path(words[-1]).name
    config.write_text("[gateway]\nport = -1\n")
    done = subprocess.run(
        [COMMAND, *words[:-1], str(config)],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "gateway.port = -1" in done.stderr
    assert str(config) in done.stderr

"""A worker runs the compiled modules where they fit today's source, and answers either way."""

from __future__ import annotations

from pathlib import Path

import pytest
from datapath_rig import Gateway, ScriptedReplica, answers, gateway, post

from gateway import compiled

BODY = b'{"model":"m","messages":[]}'


def is_compiled(served: Gateway) -> bool:
    maps = Path(f"/proc/{served.pids()[0]}/maps").read_text()
    return "tidegate-compiled" in maps


@pytest.mark.parametrize("wanted", [True, False])
def test_both_forms_answer(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not wanted:
        monkeypatch.setenv("TIDEGATE_COMPILED", "0")
    with gateway() as served, ScriptedReplica(answers()) as replica:
        served.publish(replica)
        assert served.ask(post(BODY)).status == 200
        assert is_compiled(served) is (wanted and compiled.is_available())

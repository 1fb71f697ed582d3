"""Pools out of service over restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from autoscaler.control.disabled_pools import DisabledPools


@pytest.mark.parametrize(
    "text", [None, "", "[1]", '{"pools": [1]}', "[" * 100_000, '{"pools": ["m", "n"]}']
)
def test_what_was_set_last_is_kept_whatever_was_there(tmp_path: Path, text: str | None) -> None:
    async def story() -> None:
        path = tmp_path / "disabled.json"
        if text is not None:
            path.write_text(text)
        pools = DisabledPools(path)
        assert ("m" in pools) == (text is not None and '"m"' in text)
        pools.set("m", disabled=False)
        saving = asyncio.create_task(pools.save())
        await asyncio.sleep(0)
        pools.set("m", disabled=True)
        await asyncio.gather(saving, pools.save())
        again = DisabledPools(path)
        assert "m" in again
        assert ("n" in again) == (text is not None and '"n"' in text)

    asyncio.run(story())

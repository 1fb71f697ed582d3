"""Label selectors as apimachinery reads them: what is selected, and what is refused."""

from __future__ import annotations

import pytest

from autoscaler.label_selectors import (
    MAX_LENGTH,
    SelectorError,
    parse_selector,
)

LABELS = {"app": "vllm", "tier": "gold", "empty": "", "n": "7", "x.io/y": "z", "in": "notin"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("  ", True),
        ("app=vllm", True),
        ("app==vllm", True),
        ("app = vllm", True),
        ("app=other", False),
        ("app!=other", True),
        ("app!=vllm", False),
        ("absent!=vllm", True),
        ("absent=vllm", False),
        ("app=vllm,tier=gold", True),
        ("app=vllm,tier=silver", False),
        ("app=vllm , tier!=silver", True),
        ("tier in (gold, silver)", True),
        ("tier in (silver)", False),
        ("tier notin (silver,bronze)", True),
        ("tier notin (gold)", False),
        ("absent notin (gold)", True),
        ("absent in (gold)", False),
        ("tier in(gold)", True),
        ("app", True),
        ("absent", False),
        ("!absent", True),
        ("!app", False),
        ("! app", False),
        ("app,!absent", True),
        ("empty=", True),
        ("empty=,app=vllm", True),
        ("app=", False),
        ("absent=", False),
        ("empty", True),
        ("empty in (,a)", True),
        ("empty in (a,)", True),
        ("empty in (a,,b)", True),
        ("app in (a,)", False),
        ("x.io/y=z", True),
        ("n>6", True),
        ("n>7", False),
        ("n<8", True),
        ("n < 7", False),
        ("app>1", False),
        ("absent<1", False),
        ("in=notin", True),
        ("in in (notin)", True),
        ("in", True),
        ("notin", False),
        ("app in (in)", False),
        ("app\t=\nvllm", True),
    ],
)
def test_selected(text: str, expected: bool) -> None:
    assert parse_selector(text).matches(LABELS) is expected


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "app,",
        "app,,tier",
        "=vllm",
        "app=vllm tier=gold",
        "app=!x",
        "app===x",
        "app in",
        "app in gold",
        "app in (gold",
        "app in ()",
        "app in (a b)",
        "app in (a=b)",
        "app notin ()",
        "!",
        "!!app",
        "!app=x",
        "app!",
        "n>",
        "n>x",
        "n>1.5",
        "(app)",
        "app=(x)",
        "-app=x",
        "app-=x",
        "a/b/c=x",
        "A.io/x=y",
        "/x=y",
        "app=-x",
        "app=x-",
        "app='x'",
        'app="x"',
        "app=a/b",
        "app=ü",
        "app=" + 64 * "x",
        64 * "x",
        "a" * MAX_LENGTH + "=",
        254 * "a" + "/x",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(SelectorError):
        parse_selector(text)


def test_the_longest_that_are_allowed() -> None:
    key = ".".join(["a" * 50] * 4) + "/" + "k" * 63
    assert parse_selector(f"{key}={63 * 'v'}").matches({key: 63 * "v"})

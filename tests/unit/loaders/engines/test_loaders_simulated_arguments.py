import math

import pytest

from loaders.engines.simulated.arguments import settings_from
from loaders.engines.simulated.faults import KINDS, TRIGGERS


def test_little_has_to_be_said() -> None:
    settings = settings_from(["--model", "demo"])
    assert settings.served_models == ("demo",)
    assert settings.startup_s == (0, 0, 0, 0)
    assert settings.host == "127.0.0.1"


def test_flags_reach_the_settings() -> None:
    line = (
        "--model /m --served-model-name a b --port 0 --startup-s 10 --loading-s 7 --seed 3"
        " --prefill-tokens-per-s inf --no-enable-prefix-caching --max-model-len 200000"
        " --block-size 32 --api-key k --fault slow --fault crash:at_s=9 --wake-s 1 4"
    )
    settings = settings_from(line.split())
    assert settings.served_models == ("a", "b")
    assert settings.startup_s == (4.0, 7.0, 2.5, 1.5)
    assert settings.model.prefill_tokens_per_s == math.inf
    assert not settings.model.prefix_caching
    assert settings.model.kv_blocks == 6250  # what one longest sequence needs
    assert settings.faults == ("slow", "crash:at_s=9")
    assert settings.wake_s == (1.0, 4.0)


def test_flags_of_vllm_that_mean_nothing_here_are_accepted() -> None:
    line = "--model m --enforce-eager --dtype bfloat16 --gpu-memory-utilization 0.9"
    assert settings_from(line.split()).served_models == ("m",)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "--model"),
        ("--model m --fault explode", "unknown fault 'explode'"),
        ("--model m --decode-tokens-per-s 0", "decode_tokens_per_s must be above 0"),
        ("--model m --kv-blocks 2", "cannot hold one sequence"),
        ("--model m --port 70000", "port must be"),
        ("--model m --startup-s -1", "durations"),
        ("--model m --startup-s nan", "durations"),
        ("--model m --output-tokens 0", "output-tokens"),
        ("--model m --prefil-tokens-per-s 5", "unrecognized arguments"),
        ("--model m --served-model-name ''", "model name"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_2(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        settings_from([part.strip("'") for part in line.split()])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_help_explains_every_fault_and_trigger(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings_from(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in (*KINDS, *TRIGGERS, "examples:", "simulated"):
        assert word in text

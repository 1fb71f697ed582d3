"""Layered loading: precedence, origins, and every way it can go wrong, a line each."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.settings import docs, fields, toml
from gateway.settings.defaults import load_installed
from gateway.settings.load import ConfigError, Flag, LoadedSettings, load
from gateway.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[4]
POOL = '[[pools]]\nname = "chat"\nengine = "simulated"\nmodel = "m"\n'
IN_CLUSTER = '[[pools]]\nname = "{}"\nbackend = "kubernetes"\n[pools.kubernetes]\nname = "llama"\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "tidegate.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(directory: Path, text: str, environ: dict | None = None, *sets: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(directory, text), environ or {}, sets)
    lines = [str(problem) for problem in caught.value.problems]
    assert all("\n" not in line for line in lines)
    return lines


def outcome(path: Path | None, sets: Sequence[str] = ()) -> str:
    """What loading came to: ``good``, or its problems; anything but ``ConfigError`` is raised."""
    try:
        loaded = load(path, {}, sets)
    except ConfigError as error:
        return " | ".join(str(problem) for problem in error.problems) or "\n no reason given"
    return "good" if isinstance(loaded, LoadedSettings) else "\n nothing"


# ── Precedence and origins ────────────────────────────────────────────────────────────────────────


def test_nothing_given_is_the_defaults() -> None:
    loaded = load(None, {})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.path is None


def test_each_layer_is_over_the_one_below(tmp_path: Path) -> None:
    path = write(tmp_path, "[gateway]\nport = 1\nadmin_port = 1001\nworkers = 1\ndrain_s = 1\n")
    environ = {
        "TIDEGATE__GATEWAY__PORT": "2",
        "TIDEGATE__GATEWAY__ADMIN_PORT": "1002",
        "TIDEGATE__GATEWAY__WORKERS": "2",
        "PATH": "/bin",
        "TIDEGATE_DEBUG": "1",
    }
    sets = ["gateway.port=3", "gateway.admin_port=1003"]
    loaded = load(path, environ, sets, flags=[Flag("gateway.port", 4, "--port")])
    gateway = loaded.settings.gateway
    assert (gateway.port, gateway.admin_port, gateway.workers, gateway.drain_s) == (4, 1003, 2, 1)
    assert loaded.origins["gateway.port"] == "--port"
    assert loaded.origins["gateway.admin_port"] == "--set gateway.admin_port=1003"
    assert loaded.origins["gateway.workers"] == "environment TIDEGATE__GATEWAY__WORKERS"
    assert loaded.origins["gateway.drain_s"] == f"{path}, line 5"
    assert loaded.origins["gateway.host"] == "default"


def test_there_is_an_origin_for_every_value(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, POOL), {})
    assert {"state_dir", "gateway.holding.deadline_s", "pools.0.name"} <= set(loaded.origins)
    assert loaded.origins["pools.0.name"].endswith("line 2")
    assert loaded.origins["pools.0.aliases"] == "default"


def test_a_list_replaces_the_list_below(tmp_path: Path) -> None:
    base = {"pools": [{"name": "built-in", "engine": "simulated", "model": "m"}]}
    assert [pool.name for pool in load(None, {}, base=base).settings.pools] == ["built-in"]
    loaded = load(write(tmp_path, POOL), {}, base=base)
    assert [pool.name for pool in loaded.settings.pools] == ["chat"]
    assert "built in" not in loaded.origins.values()
    assert load(write(tmp_path, "pools = []"), {}, base=base).settings.pools == ()


def test_one_element_of_a_list_is_reached_by_index_or_name(tmp_path: Path) -> None:
    path = write(tmp_path, POOL + POOL.replace("chat", "org/m-1.5"))
    loaded = load(
        path,
        {"TIDEGATE__POOLS__1__MAX_REPLICAS": "5"},
        [
            "pools.0.max_replicas=2",
            "pools.chat.min_replicas=1",
            'pools."org/m-1.5".aliases=x, y',
            "pools.0.aliases.0=z",
        ],
    )
    first, second = loaded.settings.pools
    assert (first.max_replicas, first.min_replicas, first.aliases) == (2, 1, ("z",))
    assert (second.max_replicas, second.aliases) == (5, ("x", "y"))
    assert loaded.origins["pools.1.max_replicas"] == "environment TIDEGATE__POOLS__1__MAX_REPLICAS"


def test_the_fields_of_a_pools_backend_may_stand_in_the_pool_itself(tmp_path: Path) -> None:
    text = '[[pools]]\nname = "a"\nbackend = "static"\nurls = ["http://127.0.0.1:1"]\n'
    sets = ("pools.a.health_path=/up", "pools.1.name=b", "pools.1.gpus_per_replica=2")
    sets = (*sets, "pools.1.engine=simulated", "pools.1.model=m")
    loaded = load(write(tmp_path, text), {}, sets)
    first, second = loaded.settings.pools
    assert first.static.urls == ("http://127.0.0.1:1",)
    assert first.static.health_path == "/up"
    assert second.process.gpus_per_replica == 2
    assert loaded.origins["pools.0.static.urls"] == f"{tmp_path / 'tidegate.toml'}, line 4"
    assert loaded.origins["pools.0.static.health_path"] == "--set pools.a.health_path=/up"


def test_a_mistake_in_a_backends_field_in_the_pool_itself(tmp_path: Path) -> None:
    text = '[[pools]]\nname = "a"\nbackend = "static"\nurls = ["http://127.0.0.1:1"]\n'
    (wrong,) = problems(tmp_path, POOL + 'urls = ["http://127.0.0.1:1"]\n')
    assert "static is only for" in wrong
    (typed,) = problems(tmp_path, text.replace("127.0.0.1:1", "127.0.0.1:99999"))
    assert typed.startswith("pools.0.static.urls.0 ")
    assert typed.endswith("line 4)")


def test_a_pool_from_the_environment_alone() -> None:
    environ = {
        "TIDEGATE__POOLS__0__MODEL": "m",
        "TIDEGATE__POOLS__0__NAME": "first",
        "TIDEGATE__POOLS__0__ENGINE": "simulated",
        "TIDEGATE__POOLS__1__NAME": "second",
        "TIDEGATE__POOLS__1__BACKEND": "static",
        "TIDEGATE__POOLS__1__STATIC__URLS": "http://a:1,http://b:2",
        "TIDEGATE__POOLS__0__ENV__HF_Home": "/x",
    }
    first, second = load(None, environ).settings.pools
    assert first.env == {"HF_Home": "/x"}
    assert second.static.urls == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("gateway.port=9", "gateway.port", 9),
        ("gateway.port= 9 ", "gateway.port", 9),
        ("gateway.max_body_bytes=1_048_576", "gateway.max_body_bytes", 1_048_576),
        ("gateway.drain_s=1.5", "gateway.drain_s", 1.5),
        ("gateway.drain_s=2", "gateway.drain_s", 2.0),
        ("loaders.cpu_enforce_eager=no", "loaders.cpu_enforce_eager", False),
        ("loaders.cpu_enforce_eager=TRUE", "loaders.cpu_enforce_eager", True),
        ("router.max_inflight_tokens=none", "router.max_inflight_tokens", None),
        ("router.max_inflight_tokens=", "router.max_inflight_tokens", None),
        ("gateway.cors_allow_origins=", "gateway.cors_allow_origins", ()),
        ("gateway.cors_allow_origins=a", "gateway.cors_allow_origins", ("a",)),
        ('gateway.cors_allow_origins=["a", "b,c"]', "gateway.cors_allow_origins", ("a", "b,c")),
        ("gateway.holding={max_requests = 3}", "gateway.holding.max_requests", 3),
        ('gateway.holding={"max_requests": 4}', "gateway.holding.max_requests", 4),
        ("gateway.host=a=b", "gateway.host", "a=b"),
    ],
)
def test_text_becomes_the_value_it_stands_for(text: str, field: str, expected: object) -> None:
    value: object = load(None, {}, [text]).settings
    for part in field.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_relative_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "etc"
    there.mkdir()
    text = 'state_dir = "state"\n[gateway]\ntls_key = "/abs.key"\ntls_certificate = "../c"\n'
    text += POOL.replace('"m"', '"./models/m"') + POOL.replace('"chat"', '"b"')
    path = write(there, text)
    monkeypatch.chdir(tmp_path)
    found = load(Path("etc/tidegate.toml"), {}).settings
    assert found.state_dir == Path("etc/state")
    assert found.gateway.tls_key == Path("/abs.key")
    assert found.gateway.tls_certificate == Path("etc/../c")
    assert found.pools[0].model == str(there / "models/m")
    assert found.pools[1].model == "m"
    over = load(path, {"TIDEGATE__STATE_DIR": "other"}, ["pools.0.model=./mine"]).settings
    assert over.state_dir == Path("other")
    assert over.pools[0].model == str(tmp_path / "mine")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(None, {}, ["state_dir=~/t"]).settings.state_dir == Path("/home/somebody/t")


def test_warnings_say_where_they_come_from() -> None:
    loaded = load(None, {}, ["gateway.admin_host=0.0.0.0", "pools=[]"])
    texts = [str(warning) for warning in loaded.warnings]
    assert any(
        "admin listener has no TLS" in text and "--set gateway.admin_host" in text for text in texts
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TIDEGATE_GATEWAY_PORT", "TIDEGATE__GATEWAY__PORT"),
        ("TIDEGATE_GATEWAY__PORT", "TIDEGATE__GATEWAY__PORT"),
        ("TIDEGATE_GATEWAY_HOLDING_MAX_REQUESTS", "TIDEGATE__GATEWAY__HOLDING__MAX_REQUESTS"),
        ("TIDEGATE_STATE_DIR", "TIDEGATE__STATE_DIR"),
        ("TIDEGATE_POOLS_1_MAX_REPLICAS", "TIDEGATE__POOLS__1__MAX_REPLICAS"),
        ("TIDEGATE_MAX_REPLICAS", "TIDEGATE__POOLS__0__MAX_REPLICAS"),
        ("TIDEGATE_LOG_LEVEL", "TIDEGATE__GATEWAY__LOG_LEVEL"),
        ("TIDEGATE_CONFIG", None),
        ("TIDEGATE_ENGINE", None),
        ("TIDEGATE_DEBUG", None),
        ("TIDEGATE_TEST_RUN", None),
        ("TIDEGATE_PORT_8000_TCP", None),
        ("TIDEGATED_GATEWAY_PORT", None),
    ],
)
def test_a_variable_with_one_underscore_is_warned_about(name: str, meant: str | None) -> None:
    lines = [str(one) for one in load(None, {name: "3"}, ["pools=[]"]).warnings[1:]]
    expected = f"environment {name}: is not read; {meant}, with two underscores, is probably meant"
    assert lines == ([] if meant is None else [expected])


def test_a_variable_that_is_named_or_kubernetes_own_is_not_warned_about() -> None:
    environ = {
        "TIDEGATE_PEER_PORT": "secret",
        "TIDEGATE_LOG_LEVEL": "key",
        "TIDEGATE_GATEWAY_PORT": "tcp://10.0.0.1:8000",
    }
    sets = [
        "modelcache.peer_token_env=TIDEGATE_PEER_PORT",
        'pools=[{name="a", backend="static", static={urls=["http://h"]}}]',
        "pools.0.static.api_key_env=TIDEGATE_LOG_LEVEL",
    ]
    assert load(None, environ, sets).warnings == ()


# ── What is wrong, one line each ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "range",
            "[gateway]\nport = 70000",
            "gateway.port = 70000: it must be an integer from 0 to 65535 (FILE, line 2)",
        ),
        (
            "type is not guessed",
            '[gateway]\nport = "8000"',
            'gateway.port = "8000": it must be an integer from 0 to 65535 (FILE, line 2)',
        ),
        (
            "true is not 1",
            "[gateway]\nport = true",
            "gateway.port = true: it must be an integer from 0 to 65535 (FILE, line 2)",
        ),
        (
            "nan",
            "[gateway]\n\ndrain_s = nan",
            "gateway.drain_s = nan: it must be a number from 0 to 3600 (FILE, line 3)",
        ),
        (
            "choice",
            '[gateway]\nlog_level = "loud"',
            'gateway.log_level = "loud": it must be one of "debug", "info", "warning", "error" '
            "(FILE, line 2)",
        ),
        (
            "date",
            "[gateway]\nhost = 2026-01-01",
            "gateway.host = 2026-01-01: it must be text (not empty) (FILE, line 2)",
        ),
        (
            "spelling",
            "[gateway]\nadmin_prt = 1",
            "gateway.admin_prt is an unknown setting; did you mean gateway.admin_port? "
            "(FILE, line 2)",
        ),
        (
            "elsewhere",
            "port = 1",
            "port is an unknown setting; did you mean gateway.port or gateway.picker.port or "
            "pools.N.kubernetes.port? (FILE, line 1)",
        ),
        (
            "section",
            "[gatway]\nport = 1",
            "gatway is an unknown setting; did you mean gateway? (FILE, line 1)",
        ),
        (
            "section as value",
            "gateway = 3",
            "gateway = 3: it must be a table (FILE, line 1)",
        ),
        (
            "missing",
            '[gateway]\n[[pools]]\nengine = "simulated"\nmodel = "m"',
            "pools.0.name is missing: it must be text of 1 to 256 characters",
        ),
        (
            "own words of a validator",
            '[[pools]]\nname = "a"\nbackend = "static"\n[pools.static]\nurls = [\n  "ftp://x"]',
            'pools.0.static.urls.0 = "ftp://x": must be http://host:port or https://host:port '
            "(FILE, line 5)",
        ),
        (
            "a field of a backend given twice",
            '[[pools]]\nname = "a"\nbackend = "static"\nurls = ["http://h:1"]\n'
            '[pools.static]\nurls = ["http://h:1"]',
            "pools.0.urls is an unknown setting; did you mean pools.N.static.urls? (FILE, line 4)",
        ),
        (
            "a table of another backend",
            POOL + '[pools.static]\nurls = ["http://h:1"]',
            'pools.0.static is only for backend = "static" (FILE, line 5)',
        ),
        (
            "a table that lacks what its backend needs",
            '[[pools]]\nname = "a"\nbackend = "static"',
            "pools.0.static.urls is missing: a static pool needs at least one",
        ),
        (
            "within the table of a backend",
            POOL + "[pools.process]\ngpus = [0]",
            "pools.0.process.gpus is set, but gpus_per_replica is 0 (FILE, line 6)",
        ),
        (
            "an argument that is Tidegate's own",
            POOL + 'engine_args = ["--port", "1"]',
            "pools.0.engine_args holds --port, which Tidegate sets itself (FILE, line 5)",
        ),
        (
            "between fields of a pool",
            POOL + "min_replicas = 3",
            "pools.0.min_replicas (3) > max_replicas (1) (FILE, line 5)",
        ),
        (
            "between fields, one of them a default",
            "[autoscaler]\nstable_window_s = 2",
            "autoscaler.panic_window_s (12) is longer than stable_window_s (2) (FILE, line 2)",
        ),
        (
            "between sections",
            "[gateway]\nport = 8001",
            "gateway.admin_port is 8001, as port is: give each its own (FILE, line 2)",
        ),
        (
            "two pools of one workload",
            IN_CLUSTER.format("a") + IN_CLUSTER.format("b"),
            "pools.1.kubernetes.name Deployment llama is the workload of pool 'a' already "
            "(FILE, line 10)",
        ),
        (
            "two pools of one workload, one of which names the namespace",
            '[kubernetes]\nnamespace = "d"\n'
            + IN_CLUSTER.format("a")
            + IN_CLUSTER.format("b")
            + 'namespace = "d"\n',
            "pools.1.kubernetes.name Deployment llama is the workload of pool 'a' already "
            "(FILE, line 12)",
        ),
        (
            "between pools",
            POOL + POOL,
            "pools.1.name 'chat' is pools.0.name too; a name means one pool (FILE, line 6)",
        ),
        (
            "a URL with what it must not have",
            '[modelcache]\npeers = ["http://10.0.0.7:8002/"]',
            'modelcache.peers.0 = "http://10.0.0.7:8002/": it must be a URL like http://host:port, '
            "without user, path or final / (FILE, line 2)",
        ),
        (
            "a name with white space",
            POOL + 'aliases = ["a b"]',
            'pools.0.aliases.0 = "a b": it must be text of 1 to 256 characters without white space '
            "(FILE, line 5)",
        ),
        (
            "a table whose keys are bounded",
            '[modelcache]\nbundles = { "hf://org/model" = 3 }',
            'modelcache.bundles."hf://org/model" = 3: it must be a table, each key 32 digits 0 to '
            "f, each value a SHA-256 of 64 digits 0 to f (FILE, line 2)",
        ),
        (
            "a value below such a key",
            f"[modelcache.bundles.\"hf://org/model\"]\n{'0' * 32} = 'x'",
            f'modelcache.bundles."hf://org/model".{"0" * 32} = "x": it must be a SHA-256 of 64 '
            "digits 0 to f (FILE, line 2)",
        ),
        ("syntax", "[gateway\n", "FILE: is not valid TOML: "),
        ("key twice", "a = 1\na = 2", "FILE: is not valid TOML: "),
    ],
)
def test_a_wrong_file(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (line,) = problems(tmp_path, text)
    line = line.replace(str(tmp_path / "tidegate.toml"), "FILE")
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gateway.port", "--set gateway.port: is not of the form section.field=value"),
        ("=3", "--set =3: is not of the form section.field=value"),
        ("a b=3", "--set a b=3: is not of the form section.field=value"),
        ("x\ny=3", "--set x\\ny=3: is not of the form section.field=value"),
        ("gateway.port=x", 'gateway.port = "x": it must be an integer from 0 to 65535 (--set'),
        ("gateway.port=1.5", "gateway.port = 1.5: it must be an integer from 0 to 65535 (--set"),
        (
            "gateway.port.x=1",
            "gateway.port.x is an unknown setting: gateway.port is a single value (--set",
        ),
        ("gateway.prot=1", "gateway.prot is an unknown setting; did you mean gateway.port? (--set"),
        (
            "pools.chat.name=a",
            "pools.chat.name is an unknown setting: pools takes an index from 0 (--set",
        ),
        ("pools.7.name=a", "pools.7.name is past the end: the next index is 0 (--set"),
        ("gateway.holding={", "gateway.holding cannot be read as TOML or JSON; it must be a table"),
        ("gateway=3", "gateway = 3: it must be a table (--set"),
        ('pools."²".name=a', 'pools."²".name is an unknown setting: pools takes an index from 0'),
        ("pools.00.name=a", "pools.00.name is an unknown setting: pools takes an index from 0"),
        ("gateway.host=\udcff", "gateway.host is not UTF-8 text (--set"),
        ("pools=" + "[" * 5000, "pools cannot be read as TOML or JSON"),
        ("pools=" + "[" * 700 + "]" * 700, ""),
    ],
)
def test_a_wrong_override(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {}, [text])
    (line,) = [str(problem) for problem in caught.value.problems]
    assert line.startswith(expected)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gateway.prot", "gateway.port"),
        ("port", "gateway.port or gateway.picker.port or pools.N.kubernetes.port"),
        ("pools.0.url", "pools.N.static.urls"),
        ("pools.0.max_model_len", "pools.0.max_model_len_tokens"),
        ("pools.0.timeout_s", "pools.0.start_timeout_s or pools.0.prepare_timeout_s"),
        ("autoscaler.min_replicas", "pools.N.min_replicas"),
        ("autoscaler.idle_s", "autoscaler.idle_to_zero_s"),
        ("gateway.certificate", "gateway.tls_certificate"),
        ("modelcache.quota", "modelcache.quota_bytes"),
        # Nothing is offered for what there is nothing like.
        ("max_tokens", None),
        ("loaders.threads", None),
        ("gateway.api_keys", None),
        ("gateway.prefix", None),
        ("pools.0.device", None),
        ("pools.0.image", None),
        ("tensor_parallel_size", None),
    ],
)
def test_what_is_offered_for_an_unknown_key_has_to_do_with_it(
    given: str, meant: str | None
) -> None:
    text = fields.suggest(given.split("."))
    assert "did you mean" not in text if meant is None else text == f"; did you mean {meant}?"


def test_a_wrong_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"TIDEGATE__GATEWAY__PORT": "0x50", "TIDEGATE__GATEWAY__PRT": "1"})
    lines = [str(problem) for problem in caught.value.problems]
    assert len(lines) == 2
    assert all("(environment TIDEGATE__GATEWAY__P" in line for line in lines)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    lines = problems(
        tmp_path,
        "[gateway]\nport = -1\nworkers = 999\n[autoscaler]\ntick_s = 0\n",
        {"TIDEGATE__GATEWAY__DRAIN_S": "x"},
        "router.learning_rate=7",
        "nonsense=1",
    )
    assert len(lines) == 6


def test_contradictions_of_every_kind_are_said_together(tmp_path: Path) -> None:
    """Those within a pool keep pydantic from looking at the whole: the rest is said too."""
    lines = problems(
        tmp_path,
        "[gateway]\nport = 9\nadmin_port = 9\ntls_key = 'k'\n"
        + POOL
        + "min_replicas = 3\n"
        + POOL
        + 'aliases = ["chat", 7]\n',
    )
    said = sorted(line.partition(" (")[0].partition(": ")[0] for line in lines)
    assert said == [
        "gateway.admin_port is 9, as port is",
        "gateway.tls_certificate is missing",
        "pools.0.min_replicas",
        "pools.1.aliases.0 'chat' is pools.0.name too; a name means one pool",
        "pools.1.aliases.1 = 7",
        "pools.1.name 'chat' is pools.0.name too; a name means one pool",
    ]
    # What cannot be read as a section at all contradicts nothing.
    assert len(problems(tmp_path, "gateway = 3\npools = [1, {name = 2}]")) >= 2


def test_contradictions_are_said_beside_what_is_wrong_by_itself(tmp_path: Path) -> None:
    text = (
        '[gateway]\nport = 99999\ntls_certificate = "c.pem"\n'
        "[autoscaler]\ntick_s = -1\npanic_window_s = 500\n"
        '[[pools]]\nname = "a"\nengine = "simulated"\nmax_replicas = 0\n'
        '[[pools]]\nname = "b"\nengine = "none"\nmin_replicas = 3\nmodel = "m"\n'
        '[[pools]]\nname = "c"\nbackend = "static"\nurls = ["ftp://x"]\n'
    )
    found = [line.split(" ")[0] for line in problems(tmp_path, text)]
    assert sorted(found) == [
        "autoscaler.panic_window_s",
        "autoscaler.tick_s",
        "gateway.port",
        "gateway.tls_key",
        "pools.0.max_replicas",
        "pools.0.model",
        "pools.1.engine",
        "pools.1.min_replicas",
        "pools.2.static.urls.0",
    ]


def test_files_that_are_missing_are_said_beside_what_is_wrong(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[gateway]\nport = 99999\ntls_certificate = "c.pem"\ntls_key = "k.pem"\n'
        '[loaders]\nengine_python = "none"\n'
        '[[pools]]\nname = "a"\nengine = "vllm"\nmodel = "./none"\nmax_replicas = 0\n',
    )
    with pytest.raises(ConfigError) as caught:
        load_installed(lambda: load(path, {}))
    assert sorted(problem.field for problem in caught.value.problems) == [
        "gateway.port",
        "gateway.tls_certificate",
        "gateway.tls_key",
        "loaders.engine_python",
        "pools.0.max_replicas",
        "pools.0.model",
    ]


def test_a_pool_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, POOL, {}, "pools.chta.max_replicas=2")
    assert "the pools are chat" in line


@pytest.mark.parametrize("kind", ["missing", "directory", "binary", "huge"])
def test_a_file_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "settings.toml"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"a = '\xff\xfe'")
    elif kind == "huge":
        path.write_bytes(b"#" * 5_000_000)
    with pytest.raises(ConfigError) as caught:
        load(path, {}, ["pools.0.max_replicas=2"])
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"{path}: ")


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    text = '[[pools]]\nname = "a"\nbackend = "static"\n[pools.static]\nurls = ["http://h:1"]\n'
    lines = problems(tmp_path, text + "headers = { Authorization = ['s3cret'] }")
    assert "Authorization" in lines[0]
    assert "s3cret" not in lines[0]
    ok = load(write(tmp_path, text + 'headers = { Authorization = "Bearer s3cret" }'), {})
    shown = [(row.shown, json.dumps(row.plain)) for row in docs.rows(ok)]
    assert not any("s3cret" in text for row in shown for text in row)


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.builds(
            "{}={}".format,
            st.sampled_from(
                [".".join(path).replace("*", "0") for path, _ in fields.walk(fields.root())]
            ),
            st.text(max_size=20),
        ),
    )
)
def test_no_override_raises_anything_else(text: str) -> None:
    assert "\n" not in outcome(None, [text])


TOML_PIECES = st.sampled_from(
    [
        "a",
        "b.c",
        '"q.#"',
        "'l'",
        " = ",
        "1",
        '"s#"',
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        ",",
        "\n",
        "#c",
        " ",
    ]
    + [
        "'''\n'\n'''",
        '"""x\n"y\\"""""',
        "[gateway]\n",
        "[[pools]]\n",
        "port = 1\n",
        "x = [\n1,\n]\n",
    ]
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(TOML_PIECES, max_size=14).map("".join))
def test_no_file_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "generated.toml"
    path.write_text(text, encoding="utf-8")
    assert "\n" not in outcome(path)


# ── Lines of a file ───────────────────────────────────────────────────────────────────────────────


def test_lines_of_keys() -> None:
    text = """\
# a comment = 1
top = 1
[a]
x = [ # ]
  "]",
  1, { y = 2 },
]
"quoted.key".z = '''
no = 1
''''
last = "a # b \\" = "
[a.'b c']
v = 1
[[l]]
n = 1
[l.sub]
n = 2
[[l]]
n = 3
[[l.inner]]
n = 4
"""
    assert tomllib.loads(text)
    lines = toml.locate(text)
    assert lines == {
        ("top",): 2,
        ("a",): 3,
        ("a", "x"): 4,
        ("a", "quoted.key", "z"): 8,
        ("a", "last"): 11,
        ("a", "b c"): 12,
        ("a", "b c", "v"): 13,
        ("l", "0"): 14,
        ("l", "0", "n"): 15,
        ("l", "0", "sub"): 16,
        ("l", "0", "sub", "n"): 17,
        ("l", "1"): 18,
        ("l", "1", "n"): 19,
        ("l", "1", "inner", "0"): 20,
        ("l", "1", "inner", "0", "n"): 21,
    }
    assert toml.nearest(lines, ("a", "x", "2", "y")) == 4
    assert toml.nearest(lines, ("nowhere",)) is None


# ── The example ───────────────────────────────────────────────────────────────────────────────────


def example() -> str:
    return (ROOT / "tidegate.example.toml").read_text(encoding="utf-8")


def test_the_example_is_what_the_fields_say() -> None:
    assert example() == docs.example(), (
        "a field changed: tidegate config example > tidegate.example.toml"
    )


def test_the_example_is_the_defaults_apart_from_its_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(write(Path(), example()), {})
    assert loaded.settings.model_copy(update={"pools": ()}) == Settings()
    assert len(loaded.settings.pools) == 1
    assert loaded.warnings == ()


def test_the_example_with_its_further_pools_taken_up(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, example().replace("#: ", "")), {})
    backends = [pool.backend for pool in loaded.settings.pools]
    assert backends == ["process", "static", "kubernetes"]


def test_what_the_example_leaves_unset_can_be_set_as_it_says(tmp_path: Path) -> None:
    unset = []
    lines = []
    section = ""
    for line in example().splitlines():
        if line.startswith("["):
            section = line
        name, equals, _ = line.removeprefix("# ").partition(" = ")
        if line.startswith("# ") and equals and " " not in name and not line.endswith("."):
            unset.append(name)
            # What only one kind of pool takes is checked by the further samples.
            others = section in {"[pools.static]", "[pools.kubernetes]"}
            line = line if others else line.removeprefix("# ")
            line = line.replace("gpus_per_replica = 0", "gpus_per_replica = 1")
        lines.append(line.replace("gpus_per_replica = 0", "gpus_per_replica = 1"))
    loaded = load(write(tmp_path, "\n".join(lines)), {})
    assert loaded.settings.gateway.tls_key == Path("/etc/tidegate/tls.key")
    assert loaded.settings.pools[0].process.gpu_memory_bytes is not None
    assert len(unset) > 8


def test_the_example_mentions_and_explains_every_field() -> None:
    lines = example().splitlines()
    for path, node in fields.walk(fields.root()):
        name = path[-1]
        plain = ".".join(part for part in path if part != "*")
        if node.kind == "section" or path == ("pools",):
            at = [i for i, line in enumerate(lines) if line in {f"[{'.'.join(path)}]", "[[pools]]"}]
        elif node.kind == "list" and node.element.kind == "section":
            at = [i for i, line in enumerate(lines) if line == f"#: [[{plain}]]"]
        else:
            nested = path.count("*") > (path[0] == "pools")  # in a sample, which is all comments
            starts = (f"#: {name} = ",) if nested else (f"{name} = ", f"# {name} = ")
            at = [i for i, line in enumerate(lines) if line.startswith(starts)]
            if nested:
                at = [i for i in at if not lines[i - 1].startswith("#:")]
        assert at, f"{path} is not in the example"
        assert all(lines[i - 1].startswith("# ") for i in at), f"{path} is not explained"

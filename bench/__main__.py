"""Measure Tidegate.

  python -m bench             what `make bench` runs: Locust against Tidegate in front of the
                              simulated engine, a minute, a report in bench/out/
  python -m bench load        the same, with options
  python -m bench datapath    CPU per request and per chunk, latency, memory: Tidegate beside nginx,
                              sglang-router and vllm-router, the router alone on one core
  python -m bench pick        what one pick of the router costs, by replicas and scorers; seconds
  python -m bench coldhold    200 requests held at zero replicas while the engine starts
  python -m bench loading     safetensors to memory, beside the libraries and the loaders of others
  python -m bench coldstart   a request at zero to its first token, from each tier of warmth
  python -m bench pages       files into the page cache, what is cached, and whether it stays
  python -m bench remote      models from stores to the disk, beside the stores' own clients
  python -m bench cache       ten nodes that start the same model at once, from one limited store
  python -m bench clients     real clients and load tools: outcomes and tokens beside the engine's
                              own counters
  python -m bench forecast    forecasters on traces of a folder: pinball, coverage, WAPE, time
  python -m bench scaling     scaling policies on traces of a folder: violations, cost, goodput
  python -m bench enginemodel the replay's engine model beside the real vLLM, on one trace
  python -m bench picker      the endpoint picker behind a real Envoy, beside Envoy alone
  python -m bench adoption    seconds until a control process that was killed has its engines back
  python -m bench zero        scale to zero on a trace of small models, beside other rules
  python -m bench adapter     the adapter under load: 500 HPAs, and 200 requests a second
  python -m bench tick        one tick of the control loop by pools and replicas, and one forecast

Everything listens on 127.0.0.1 and ends within a stated time. bench/README.md explains the methods.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MISSING = "bench: the bench needs packages that are not installed: `make dev`"

try:
    from bench import contenders, scenarios
except ModuleNotFoundError:
    print(MISSING, file=sys.stderr)
    sys.exit(2)


def _datapath(arguments: argparse.Namespace) -> int:
    from bench import datapath, machine, profile, report

    names = tuple(arguments.only.split(",")) if arguments.only else contenders.DEFAULT
    if arguments.quick and not arguments.only:
        names = tuple(n for n in names if not n.endswith("cache_aware"))
    unknown = [name for name in names if name not in contenders.CONTENDERS]
    if unknown:
        print(f"unknown contender {unknown[0]!r}; known: {', '.join(contenders.CONTENDERS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    options = datapath.Options(
        names=names,
        rounds=arguments.rounds or (2 if arguments.quick else 5),
        scale=0.6 if arguments.quick else 1.0,
        quick=arguments.quick,
        router_core=arguments.core,
        other_core=arguments.other_core,
        headers=arguments.headers,
        scenarios=tuple(arguments.scenarios.split(",")) if arguments.scenarios else (),
    )
    if arguments.profile:
        return profile.run(arguments.profile, options, arguments.out)
    before = machine.counters()
    results = datapath.run(options)
    after = machine.counters()
    date = datetime.date.today().isoformat()
    made = report.document(
        results,
        options=options,
        command=_command(),
        date=date,
        machine=machine.describe(),
        noise=machine.noise(before, after),
    )
    paths = report.write(made, arguments.out, f"datapath-{date}")
    print("\n" + report.terminal(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    missed = any(v["passed"] is False for v in made["verdicts"])
    return 1 if missed or results.missing else 0


def _pick(arguments: argparse.Namespace) -> int:
    from bench import pick

    return pick.run(arguments.json)


def _zero(arguments: argparse.Namespace) -> int:
    from bench import zero

    date = datetime.date.today().isoformat()
    return zero.run(arguments.data, arguments.out, _command(), date)


def _adapter(arguments: argparse.Namespace) -> int:
    from bench import adapter

    date = datetime.date.today().isoformat()
    return adapter.run(arguments.seconds, arguments.out, _command(), date)


def _tick(arguments: argparse.Namespace) -> int:
    from bench import tick

    counts = tuple(int(one) for one in arguments.pools.split(","))
    return tick.run(counts, arguments.out, _command(), datetime.date.today().isoformat())


def _picker(arguments: argparse.Namespace) -> int:
    from bench import picker

    date = datetime.date.today().isoformat()
    return picker.run(arguments.rounds, arguments.out, _command(), date)


def _adoption(arguments: argparse.Namespace) -> int:
    from bench import adoption

    return adoption.run(arguments.rounds, arguments.limit_s, arguments.json)


def _scaling(arguments: argparse.Namespace) -> int:
    from bench import machine, scaling, scaling_report

    options = scaling.Options(
        data=arguments.data,
        cold_starts_s=tuple(float(one) for one in arguments.cold_starts.split(",")),
        policies=tuple(arguments.policies.split(",")) if arguments.policies else (),
        only=tuple(arguments.only.split(",")) if arguments.only else (),
        days=1.0 if arguments.quick else arguments.days,
        windows=arguments.windows,
        replicas=arguments.replicas,
        jobs=arguments.jobs,
        quick=arguments.quick,
    )
    rows = scaling.run_all(options)
    date = datetime.date.today().isoformat()
    made = scaling_report.document(
        rows,
        date=date,
        command=_command(),
        machine=machine.describe(),
        options=scaling.as_plain(options),
    )
    name = f"scaling-{'quick-' if arguments.quick else ''}{date}"
    paths = scaling_report.write(made, arguments.out, name)
    print(scaling_report.terminal(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _engine_model(arguments: argparse.Namespace) -> int:
    from bench import engine_model, machine

    options = engine_model.Options(
        engine_python=arguments.engine_python, model=arguments.model, requests=arguments.requests
    )
    if not (options.engine_python.exists() and options.model.exists()):
        raise RuntimeError(f"no vLLM at {options.engine_python} or no model at {options.model}")
    before = machine.counters()
    made = engine_model.run(options)
    date = datetime.date.today().isoformat()
    made |= {
        "date": date,
        "command": _command(),
        "machine": machine.describe(),
        "noise": machine.noise(before, machine.counters()),
    }
    path = arguments.out / f"enginemodel-{date}.json"
    engine_model.write(made, path)
    print(f"{engine_model.terminal(made)}\nwrote {path}")
    return 0 if engine_model.passed(made) else 1


def _forecast(arguments: argparse.Namespace) -> int:
    from bench import forecast, machine

    models = tuple(arguments.models.split(",")) if arguments.models else forecast.USUAL
    unknown = [name for name in models if name not in forecast.MODELS]
    if unknown:
        print(f"unknown model {unknown[0]!r}; known: {', '.join(forecast.MODELS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    options = forecast.Options(
        data=arguments.data,
        models=models,
        only=tuple(arguments.only.split(",")) if arguments.only else (),
        origins=arguments.origins,
    )
    rows = forecast.measure(options)
    if not rows:
        print(f"no trace of a day or more in {options.data}", file=sys.stderr)
        return 2
    date = datetime.date.today().isoformat()
    made = {
        "date": date,
        "command": _command(),
        "machine": machine.describe(),
        "options": {"models": models, "only": options.only, "origins": options.origins},
        "summary": forecast.summary(rows),
        "rows": rows,
    }
    paths = forecast.write(made, arguments.out, f"forecast-{date}")
    print(forecast.terminal(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    return 1 if any(not one["passed"] for one in made["summary"]["verdicts"]) else 0


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with traces")
    parser.add_argument("--models", metavar="A,B", help="all but prophet and direct unless said")
    parser.add_argument("--only", metavar="A,B", help="traces whose names have one of these")
    parser.add_argument("--origins", type=int, default=150, metavar="N",
                        help="points of each trace (150)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    parser.set_defaults(run=_forecast)


def _load(arguments: argparse.Namespace) -> int:
    from bench import load

    options = load.Options(
        users=arguments.users,
        per_s=arguments.per_s,
        time_s=arguments.time_s,
        endpoint=arguments.endpoint,
        model=arguments.model or load.POOL,
        output_tokens=arguments.output_tokens,
        prompt_words=arguments.prompt_words,
        think_s=arguments.think_s,
        out=arguments.out,
    )
    return load.run(options, _command())


def _coldhold(arguments: argparse.Namespace) -> int:
    from bench import coldhold

    options = coldhold.Options(
        requests=arguments.requests,
        engine=arguments.engine,
        tokens=arguments.tokens,
        gap_ms=arguments.gap_ms,
        limit_s=arguments.limit_s,
        out=arguments.out,
    )
    return coldhold.run(options, _command())


def _remote(arguments: argparse.Namespace) -> int:
    from bench import remote

    options = remote.Options(
        rounds=arguments.rounds,
        file_bytes=arguments.file_mib * 1024 * 1024,
        only=tuple(arguments.only.split(",")) if arguments.only else (),
        rate_bytes_s=arguments.rate_mb_s * 1_000_000,
        out=arguments.out,
    )
    return remote.run(options, _command())


def _cache(arguments: argparse.Namespace) -> int:
    from bench import cache

    options = cache.Options(
        nodes=arguments.nodes,
        size_bytes=round(arguments.gb * 1e9),
        rate_bytes_s=arguments.rate_mb_s * 1_000_000,
        rounds=arguments.rounds,
        apart_s=arguments.apart_s,
        out=arguments.out,
    )
    return cache.run(options, _command())


def _coldstart(arguments: argparse.Namespace) -> int:
    from bench import coldstart

    known = [one.name for one in coldstart.CONTENDERS]
    only = tuple(arguments.only.split(",")) if arguments.only else ()
    unknown = [name for name in only if name not in known]
    if unknown:
        print(f"unknown contender {unknown[0]!r}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    options = coldstart.Options(rounds=arguments.rounds, only=only, out=arguments.out)
    return coldstart.run(options, _command())


def _pages(arguments: argparse.Namespace) -> int:
    from bench import machine, pages, pages_report

    options = pages.Options(
        gb=arguments.gb, rounds=arguments.rounds, decay_s=arguments.decay_s, out=arguments.out
    )
    before = machine.counters()
    results = pages.run(options)
    noise = machine.noise(before, machine.counters())
    made = pages_report.document(
        results,
        command=_command(),
        date=datetime.date.today().isoformat(),
        machine=machine.describe(),
        noise=noise,
    )
    paths = pages_report.write(made, options.out)
    print("\n" + pages_report.markdown(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0 if all(verdict["passed"] for verdict in made["verdicts"]) else 1


def _loading(arguments: argparse.Namespace) -> int:
    from bench import loading, loading_files, loading_report, machine

    options = loading.Options(
        gb=arguments.gb or (loading.QUICK_GB if arguments.quick else loading_files.FULL_GB),
        rounds=arguments.rounds or (loading.QUICK_ROUNDS if arguments.quick else 3),
        only=tuple(arguments.only.split(",")) if arguments.only else (),
        quick=arguments.quick,
        out=arguments.out,
    )
    before = machine.counters()
    results = loading.run(options)
    after = machine.counters()
    date = datetime.date.today().isoformat()
    made = loading_report.document(
        results,
        options=options,
        command=_command(),
        date=date,
        machine=machine.describe(),
        noise=machine.load(before, after),
    )
    stem = f"loading-quick-{date}" if arguments.quick else f"loading-{date}"
    paths = loading_report.write(made, arguments.out, stem)
    print("\n" + loading_report.terminal(made))
    print(f"wrote {', '.join(str(path) for path in paths)}")
    missed = any(v["passed"] is False for v in made["verdicts"])
    return 1 if missed or results.wrong else 0


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="only warm, in place on the CPU, without other loaders"
    )
    parser.add_argument("--gb", type=float, metavar="X", help="of weights (4.06; --quick: 0.5)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of all (3; --quick: 9)")
    parser.add_argument("--only", metavar="A,B", help="these contenders, and the raw limits")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the report"
    )
    parser.set_defaults(run=_loading)


def _clients(arguments: argparse.Namespace) -> int:
    from bench import real_clients

    return real_clients.run(
        real_clients.Options(
            engine=arguments.engine,
            requests=arguments.requests,
            only=tuple(arguments.only.split(",")) if arguments.only else (),
            model=arguments.model,
            engine_python=arguments.engine_python,
            out=arguments.out,
        )
    )


def _add_clients(parser: argparse.ArgumentParser) -> None:
    from bench import real_clients

    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="of each (40)")
    parser.add_argument("--only", metavar="A,B",
                        help="of those in bench/real_clients.py")  # fmt: skip
    parser.add_argument("--model", type=Path, default=real_clients.MODEL_FOLDER, metavar="FOLDER",
                        help="what vLLM serves, and the load tools' tokenizer")  # fmt: skip
    parser.add_argument("--engine-python", type=Path, default=real_clients.ENGINE_PYTHON,
                        metavar="FILE", help="the interpreter that has vLLM")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the record")
    parser.set_defaults(run=_clients)


def _command() -> str:
    """As it was given, but for where this machine has the traces."""
    text = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    return re.sub(r"(--data[ =])('[^']*'|\S+)", r"\1DIR", text)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=int, default=30, metavar="N", help="users at once (30)")
    parser.add_argument("--per-s", type=float, default=10, metavar="X", help="users added/s (10)")
    parser.add_argument("--time-s", type=int, default=60, metavar="S", help="length (60)")
    parser.add_argument("--endpoint", metavar="URL", help="instead of an own Tidegate")
    parser.add_argument("--model", help="what goes into `model`, with --endpoint")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help="a chat's (64)")
    parser.add_argument("--prompt-words", type=int, default=120, metavar="N", help="mean (120)")
    parser.add_argument("--think-s", type=float, default=0.5, metavar="S", help="mean pause (0.5)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the report")
    parser.set_defaults(run=_load)


def _add_coldhold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="held (200)")
    parser.add_argument("--engine", choices=("vllm", "simulated"), help="vllm unless said")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of an answer (16)")
    parser.add_argument("--gap-ms", type=float, default=5, metavar="MS", help="between two (5)")
    parser.add_argument("--limit-s", type=float, default=420, metavar="S", help="at most (420)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the report")
    parser.set_defaults(run=_coldhold)


def _add_pages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=4.0, metavar="X", help="of files (4)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all ways (5)")
    parser.add_argument("--decay-s", type=float, default=120.0, metavar="S",
                        help="how long to watch what stays; 0: not (120)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    parser.set_defaults(run=_pages)


def _add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all clients (5)")
    parser.add_argument("--file-mib", type=int, default=256, metavar="N", help="four files (256)")
    parser.add_argument("--only", metavar="A,B", help="such as http:tidegate,http:aiohttp")
    parser.add_argument("--rate-mb-s", type=int, default=200, metavar="N", help="the cap (200)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    parser.set_defaults(run=_remote)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=10, metavar="N", help="at once (10)")
    parser.add_argument("--gb", type=float, default=0.5, metavar="X", help="the model (0.5)")
    parser.add_argument("--rate-mb-s", type=int, default=25, metavar="N", help="the store's (25)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of one and all (3)")
    parser.add_argument("--apart-s", type=float, default=0.0, metavar="S",
                        help="between one node's beginning and the next one's (0)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    parser.set_defaults(run=_cache)


def _add_engine_model(parser: argparse.ArgumentParser) -> None:
    from bench import real_clients

    parser.add_argument("--requests", type=int, default=60, metavar="N", help="sent (60)")
    parser.add_argument("--model", type=Path, default=real_clients.MODEL_FOLDER, metavar="FOLDER",
                        help="what vLLM serves")  # fmt: skip
    parser.add_argument("--engine-python", type=Path, default=real_clients.ENGINE_PYTHON,
                        metavar="FILE", help="the interpreter that has vLLM")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="record's folder")
    parser.set_defaults(run=_engine_model)


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with traces")
    parser.add_argument("--cold-starts", default="10,60,300", metavar="S,S", help="(10,60,300)")
    parser.add_argument("--policies", metavar="A,B", help="all unless said")
    parser.add_argument("--only", metavar="A,B", help="traces whose names have one of these")
    parser.add_argument("--days", type=float, default=2.0, metavar="N", help="scored (2)")
    parser.add_argument("--windows", type=int, default=1, metavar="N",
                        help="parts of a long trace to score (1)")  # fmt: skip
    parser.add_argument("--replicas", type=float, default=12.0, metavar="N", help="about (12)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--quick", action="store_true", help="three traces, a day, 60 s")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    parser.set_defaults(run=_scaling)


def _add_picker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each (5)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="report's folder")
    parser.set_defaults(run=_picker)


def _add_adoption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="kills (5)")
    parser.add_argument("--limit-s", type=float, default=60, metavar="S", help="of a start (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.set_defaults(run=_adoption)


def _add_coldstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each (5)")
    parser.add_argument("--only", metavar="A,B", help="of: plain, plain_warm, on_disk, paged, "
                        "remote, forked")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the report"
    )
    parser.set_defaults(run=_coldstart)


def _parser() -> argparse.ArgumentParser:
    text = __doc__ or ""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    path = commands.add_parser(
        "datapath",
        help="CPU per request and chunk, latency, memory, beside nginx and the peers",
        description="Side-by-side comparison of the data path. Needs two cores, gcc, nginx, and "
        "the network once for the peers' packages. About 8 minutes; --quick about 90 s. Exit code "
        "1 when a bar is missed or a contender does not start.",
    )
    path.add_argument("--quick", action="store_true", help="two short rounds, no cache_aware")
    path.add_argument("--rounds", type=int, metavar="N", help="rounds of all contenders (5)")
    path.add_argument("--only", metavar="A,B", help=f"of: {', '.join(contenders.CONTENDERS)}")
    path.add_argument(
        "--scenarios", metavar="A,B",
        help=f"only these, and neither held streams nor memory: "
        f"{', '.join(s.name for s in scenarios.ROUNDS)}",
    )  # fmt: skip
    path.add_argument(
        "--headers", choices=("openai", "minimal"), default="openai",
        help="request headers as the openai client sends them (17), or as few as can be (3)",
    )  # fmt: skip
    path.add_argument("--core", type=int, default=1, help="core of the router under test (1)")
    path.add_argument("--other-core", type=int, default=0, help="core of everything else (0)")
    path.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the report"
    )
    path.add_argument(
        "--profile", metavar="NAME",
        help="instead of comparing: where one contender's time goes (needs py-spy or perf)",
    )  # fmt: skip
    path.set_defaults(run=_datapath)
    picks = commands.add_parser(
        "pick",
        help="what one pick of the router costs, by replicas and scorers",
        description="One and two scorers over 4, 32 and 128 replicas, compiled where the compiled "
        "modules were built. A few seconds. Exit code 1 when a bar is missed.",
    )  # fmt: skip
    picks.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    picks.set_defaults(run=_pick)
    zeros = commands.add_parser(
        "zero",
        help="scale to zero on a trace of small models, beside other rules",
        description="What each rule for the idle time costs on a trace of many small models, over "
        "several prices of a cold start. Needs *_clients_minute.parquet files (t_s, and requests "
        "per minute of each model). Exit code 1 when ours costs more than 1.03 of the best fixed "
        "idle time in hindsight.",
    )  # fmt: skip
    zeros.add_argument("--data", type=Path, required=True, metavar="DIR", help="the traces")
    zeros.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the report")
    zeros.set_defaults(run=_zero)
    ticks = commands.add_parser(
        "tick",
        help="one tick of the control loop by pools and replicas, and one forecast",
        description="The CPU of a tick of the control loop with ten replicas in each pool, and of "
        "a refit and forecast. About 4 minutes. Exit code 1 when a bar is missed.",
    )  # fmt: skip
    ticks.add_argument("--pools", default="100,300,1000", metavar="N,N", help="(100,300,1000)")
    ticks.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the report")
    ticks.set_defaults(run=_tick)
    adapters = commands.add_parser(
        "adapter",
        help="the adapter under load: 500 HPAs, and 200 requests a second",
        description="`tidegate adapter` with TLS and permissions: latencies and CPU. About 4 "
        "minutes. Exit code 1 when a bar is missed.",
    )
    adapters.add_argument("--seconds", type=float, default=60, metavar="S", help="each load (60)")
    adapters.add_argument("--out", type=Path, default=Path("bench/results"), help="report's folder")
    adapters.set_defaults(run=_adapter)
    _add_load(commands.add_parser(
        "load",
        help="Locust, streaming chat, on the simulated engine",
        description="Streaming chat from Locust users to Tidegate in front of the simulated "
        "engine, from zero replicas; or to any OpenAI-compatible endpoint. Writes a report. Exit "
        "code 1 when a chat failed.",
    ))  # fmt: skip
    _add_coldhold(commands.add_parser(
        "coldhold",
        help="many requests held at zero while the engine starts",
        description="Requests to a pool at zero replicas, held while the engine starts: every one "
        "answered, once. Real vLLM by default (`make engine` prepares it). Exit code 1 otherwise.",
    ))  # fmt: skip
    _add_pages(commands.add_parser(
        "pages",
        help="files into the page cache, what is cached, and whether it stays",
        description="Every way to bring files into the page cache beside each other, how long it "
        "takes to tell what is cached, a reader beside prewarming, and what is left after two "
        "minutes with the page holder and without. Writes 4 GB to the disk and removes them. "
        "About 6 minutes. Exit code 1 when a bar is missed.",
    ))  # fmt: skip
    _add_remote(commands.add_parser(
        "remote",
        help="models from HTTP, S3 and OSS to the disk, digests verified, beside their clients",
        description="Downloads 1 GB from an nginx on this machine by each client in turn, and one "
        "download with a bandwidth cap, watched. About 4 minutes. Exit code 1 when a bar is "
        "missed.",
    ))  # fmt: skip
    _add_cache(commands.add_parser(
        "cache",
        help="ten nodes that start the same model at once, from one store of limited rate",
        description="One node alone, then ten that know each other, fetch the same model at once: "
        "what the store sent, and how long it took. Every node is a process with its own disk "
        "store; needs about 6 GB of disk. About 3 minutes. Exit code 1 when a bar is missed.",
    ))  # fmt: skip
    _add_clients(commands.add_parser(
        "clients",
        help="real clients and load tools: outcomes and tokens beside the engine's own counters",
        description="Runs openai, anthropic, LangChain, guidellm, aiperf, genai-bench, vllm bench "
        "serve, ab, hey, oha and wrk, each from an environment of its own under "
        ".tidegate/clients, against one Tidegate. Installs what is missing (several GB for all). "
        "Exit code 1 when a client fails, or a count of tokens is off by more than 1 %%.",
    ))  # fmt: skip
    _add_forecast(commands.add_parser(
        "forecast",
        help="forecasters on traces: pinball, coverage, WAPE, time of a refit",
        description="Asks every forecaster at the same points of the traces of a folder (CSV, "
        "parquet) and scores what it said. About 10 minutes on one core. Writes a report. Exit "
        "code 1 when a bar is missed.",
    ))  # fmt: skip
    _add_scaling(commands.add_parser(
        "scaling",
        help="scaling policies on traces: violations, cost, goodput per replica-hour",
        description="Plays every trace of a folder (CSV, parquet) at several cold starts through "
        "ours, the peers' and the clairvoyant policy, on virtual time. About 20 minutes on two "
        "cores, --quick 1. Writes a report.",
    ))  # fmt: skip
    _add_engine_model(commands.add_parser(
        "enginemodel",
        help="the replay's engine model beside the real vLLM, on one trace",
        description="Measures prefill and decode of the real vLLM, sends it a trace of random "
        "lengths, and plays the same trace by the model. About 2 minutes. Exit code 1 when TTFT or "
        "throughput differ by more than 25 %%.",
    ))  # fmt: skip
    _add_picker(commands.add_parser(
        "picker",
        help="the endpoint picker behind a real Envoy, beside Envoy alone",
        description="Requests/s, CPU and latency of an Envoy that asks the endpoint picker for "
        "each request, of Envoy alone (round robin) and of the gateway, to the same replicas in "
        "turns. About 3 minutes. Exit code 1 where an answer was wrong.",
    ))  # fmt: skip
    _add_adoption(commands.add_parser(
        "adoption",
        help="seconds until a control process that was killed has its engines back",
        description="Starts two simulated engines, ends the control process with SIGKILL, starts "
        "it again, and counts until both are ready again, beside a start without engines. About "
        "5 s a round. Exit code 1 when the bar is missed.",
    ))  # fmt: skip
    _add_coldstart(commands.add_parser(
        "coldstart",
        help="a request at zero to its first token, from each tier of warmth",
        description="The real vLLM through the whole of Tidegate: plain from cold disk, then from "
        "each tier a pool can wait in, with the phases. `make engine` prepares it. About 8 "
        "minutes. Exit code 1 when a bar is missed.",
    ))  # fmt: skip
    _add_loading(commands.add_parser(
        "loading",
        help="safetensors to memory, cold and warm, beside every other loader",
        description="The same files read by Tidegate's loader, the safetensors library, vLLM's "
        "strategies, runai-model-streamer, fastsafetensors, InstantTensor, tensorizer, and the "
        "raw disk. Needs the engine environment (`make engine`), 9 GB of disk, and the network "
        "once for the peers' packages. About 15 minutes, --quick 2. Exit code 1: a bar is missed.",
    ))  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given or ["load"])
    # A TERM must end what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code: int = arguments.run(arguments)
    except ModuleNotFoundError as error:
        print(f"{MISSING} ({error.name})", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

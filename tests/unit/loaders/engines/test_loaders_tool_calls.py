"""Which parser of tool calls a model is started with: by its template, and what is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loaders.engines.base import EngineOptions, Placement
from loaders.engines.vllm.engine import VllmEngine
from loaders.engines.vllm.tool_calls import FORMATS, find_tool_parser, read_template
from loaders.settings import LoaderSettings

HERMES = (
    "{%- if tools %}For each function call, return <tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>{%- endif %}'
)
TEMPLATES = {
    "hermes": HERMES,
    "qwen3_coder": "<tool_call>\n<function=name>\n<parameter=a>\n1\n</parameter></function>"
    "</tool_call> with arguments",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> arguments </tool_call>",
    "llama3_json": "<|start_header_id|>user<|end_header_id|> Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.',
    "mistral": "{{- '[AVAILABLE_TOOLS] [' }} {{- '[TOOL_CALLS] [' }}",
    "deepseek_v3": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '```json'",
    "deepseek_v31": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "openai": "<|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json",
    None: "{{ '<|im_start|>' + message['role'] }} {# arguments of tools #}",
}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment with a vLLM that has every parser but one."""
    site = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    (site / "vllm-0.32.0.dist-info").mkdir(parents=True)
    parsers = site / "vllm" / "tool_parsers"
    parsers.mkdir(parents=True)
    listed = "".join(f'    "{name}": (\n' for name, _ in FORMATS if name != "kimi_k2")
    (parsers / "__init__.py").write_text(listed)
    (tmp_path / "env" / "bin").mkdir()
    python = tmp_path / "env" / "bin" / "python"
    python.symlink_to(sys.executable)
    return python


def make_model(folder: Path, template: str, file: str = "chat_template.jinja") -> str:
    folder.mkdir(exist_ok=True)
    text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / file).write_text(text, encoding="utf-8")
    return str(folder)


def command(python: Path, model: str, *args: str) -> tuple[str, ...]:
    options = EngineOptions(model=model, served_model="m", args=args)
    settings = LoaderSettings(engine_python=python)
    placement = Placement(host="127.0.0.1", port=1)
    return VllmEngine().command(options, placement, settings).argv


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("parser", TEMPLATES)
def test_the_template_says_the_parser(
    tmp_path: Path, python: Path, parser: str | None, file: str
) -> None:
    argv = command(python, make_model(tmp_path / "model", TEMPLATES[parser], file))
    if parser in (None, "kimi_k2"):  # not known; not in this vLLM
        assert not {"--enable-auto-tool-choice", "--tool-call-parser"} & set(argv)
    else:
        assert "--enable-auto-tool-choice" in argv
        assert argv[argv.index("--tool-call-parser") + 1] == parser


@pytest.mark.parametrize(
    "args",
    [
        ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic"),
        ("--no-enable-auto-tool-choice",),
        ("--tool_call_parser=xlam",),
        ("--chat-template", "other.jinja"),
    ],
)
def test_what_the_user_says_of_tools_is_left_alone(
    tmp_path: Path, python: Path, args: tuple[str, ...]
) -> None:
    argv = command(python, make_model(tmp_path / "model", HERMES), *args)
    assert argv[-len(args) :] == args
    assert "hermes" not in argv


def test_of_several_templates_one_that_has_tools_is_enough(tmp_path: Path, python: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": HERMES}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert "hermes" in command(python, str(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"chat_template": 5}', "[" * 100_000])
def test_a_model_without_a_template_that_can_be_read_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "chat_template.json").mkdir()
    assert "<tool_call>" not in read_template(tmp_path)
    assert find_tool_parser(str(tmp_path), []) is None
    assert find_tool_parser("org/model", []) is None

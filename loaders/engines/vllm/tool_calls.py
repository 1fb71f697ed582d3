"""How a model writes a tool call, and which of vLLM's parsers reads that.

vLLM answers a request with tools and ``tool_choice: "auto"`` only when it is started with
``--enable-auto-tool-choice`` and the parser of the model's format. The format is in the model's own
chat template: the template shows it to the model, or writes the calls of earlier turns in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MAX_FILE_BYTES = 16 * 1024 * 1024
PARSER_LISTS = (
    "vllm/tool_parsers/__init__.py",
    "vllm/entrypoints/openai/tool_parsers/__init__.py",
)
"""Where vLLM lists its parsers, and where it did before."""

FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai", ("<|channel|>", "<|constrain|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("minimax_m2", ("<minimax:tool_call>", "<invoke name=")),
    ("seed_oss", ("<seed:tool_call>",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "</tool_call>", "arguments")),
    ("mistral", ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    ("llama3_json", ("<|start_header_id|>", '"parameters": dictionary')),
    ("granite", ("<|tool_call|>", "<|start_of_role|>")),
    ("internlm", ("<|action_start|>", "<|plugin|>")),
    ("lfm2", ("<|tool_list_start|>",)),
)
"""A parser, and what is in the chat templates of the models that it reads: the first that has all
of it is the one. Where no line fits, the user has to say which."""


def find_tool_parser(model: str, site_packages: list[Path]) -> str | None:
    """The ``--tool-call-parser`` of a model in a local directory, for the vLLM that is installed
    there; ``None`` where the format is not known, or that vLLM has no parser of it."""
    template = read_template(Path(model))
    for parser, signs in FORMATS:
        if all(sign in template for sign in signs):
            return parser if has_parser(parser, site_packages) else None
    return None


def read_template(model: Path) -> str:
    """All chat templates of a model; empty where it has none that can be read."""
    for name in TEMPLATE_FILES:
        try:
            with (model / name).open("rb") as file:
                text = file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
            if name.endswith(".json"):
                given = json.loads(text)
                found = given.get("chat_template") if isinstance(given, dict) else None
                # Several have names: one may be for requests with tools alone.
                text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
                text = "" if found is None else text.replace('\\"', '"')
        except (OSError, ValueError, RecursionError):
            continue
        if text:
            return text
    return ""


def has_parser(name: str, site_packages: list[Path]) -> bool:
    """Whether a vLLM has the parser. Read from its source: to import it would take ten seconds."""
    for site in site_packages:
        for place in PARSER_LISTS:
            try:
                listed = (site / place).read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            if re.search(rf'"{re.escape(name)}"', listed):
                return True
    return False

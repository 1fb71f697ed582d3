"""Ask with a client library, in its environment: ``real_clients_child.py CASE URL MODEL REQUESTS``.

Each request has another prompt; every answer has to be whole and not empty, or the exit status is
1. It imports nothing of Tidegate, and of the libraries only the one that the case is about.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_TOKENS = 24


def _question(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Count upwards from {index}: " + "one two three " * index}]


def _chat_texts(chunks: Iterable[Any]) -> Iterable[str]:
    for chunk in chunks:
        for choice in chunk.choices:
            yield choice.delta.content or ""


def _openai(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _ask_openai(url: str, model: str, index: int, **more: Any) -> str:
    chunks = _openai(url).chat.completions.create(
        model=model, messages=_question(index), max_tokens=MAX_TOKENS, stream=True, **more
    )
    return "".join(_chat_texts(chunks))


def _ask_openai_usage(url: str, model: str, index: int) -> str:
    return _ask_openai(url, model, index, stream_options={"include_usage": True})


def _ask_openai_early_close(url: str, model: str, index: int) -> str:
    """A client that is content with the ``finish_reason``."""
    text = ""
    with _openai(url).chat.completions.create(
        model=model, messages=_question(index), max_tokens=MAX_TOKENS, stream=True
    ) as chunks:
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            if chunk.choices[0].finish_reason is not None:
                break
    return text


def _ask_openai_completions(url: str, model: str, index: int) -> str:
    chunks = _openai(url).completions.create(
        model=model, prompt=_question(index)[0]["content"], max_tokens=MAX_TOKENS, stream=True
    )
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def _ask_openai_responses(url: str, model: str, index: int) -> str:
    with _openai(url).responses.stream(
        model=model, input=_question(index)[0]["content"], max_output_tokens=MAX_TOKENS
    ) as stream:
        return "".join(e.delta for e in stream if e.type == "response.output_text.delta")


def _ask_openai_async(url: str, model: str, index: int) -> str:
    from openai import AsyncOpenAI

    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chunks = await client.chat.completions.create(
                model=model, messages=_question(index), max_tokens=MAX_TOKENS, stream=True
            )
            texts = [c.delta.content or "" async for chunk in chunks for c in chunk.choices]
        return "".join(texts)

    return asyncio.run(ask())


def _anthropic(url: str) -> Any:
    from anthropic import Anthropic

    return Anthropic(base_url=url, api_key="none", max_retries=0)


def _ask_anthropic(url: str, model: str, index: int) -> str:
    message = _anthropic(url).messages.create(
        model=model, messages=_question(index), max_tokens=MAX_TOKENS
    )
    return "".join(block.text for block in message.content)


def _ask_anthropic_stream(url: str, model: str, index: int) -> str:
    with _anthropic(url).messages.stream(
        model=model, messages=_question(index), max_tokens=MAX_TOKENS
    ) as stream:
        return "".join(stream.text_stream)


def _body(model: str, index: int) -> dict[str, Any]:
    messages = _question(index)
    return {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "stream": True}


def _texts(events: Iterable[Any]) -> Iterable[str]:
    for event in events:
        if event.data == "[DONE]":
            return
        for choice in json.loads(event.data)["choices"]:
            yield choice["delta"].get("content") or ""


def _ask_httpx_sse(url: str, model: str, index: int) -> str:
    import httpx
    from httpx_sse import connect_sse

    with (
        httpx.Client(timeout=60) as client,
        connect_sse(
            client, "POST", f"{url}/v1/chat/completions", json=_body(model, index)
        ) as source,
    ):
        return "".join(_texts(source.iter_sse()))


def _ask_sseclient(url: str, model: str, index: int) -> str:
    import requests
    import sseclient

    answer = requests.post(
        f"{url}/v1/chat/completions", json=_body(model, index), stream=True, timeout=60
    )
    client = sseclient.SSEClient(answer)
    text = "".join(_texts(client.events()))
    client.close()
    return text


def _ask_langchain(url: str, model: str, index: int) -> str:
    from langchain_openai import ChatOpenAI

    client = ChatOpenAI(
        model=model, base_url=f"{url}/v1", api_key="none", max_tokens=MAX_TOKENS, max_retries=0
    )
    return "".join(str(chunk.content) for chunk in client.stream(_question(index)[0]["content"]))


CASES: dict[str, Callable[[str, str, int], str]] = {
    "openai": _ask_openai,
    "openai-usage": _ask_openai_usage,
    "openai-early-close": _ask_openai_early_close,
    "openai-completions": _ask_openai_completions,
    "openai-responses": _ask_openai_responses,
    "openai-async": _ask_openai_async,
    "anthropic": _ask_anthropic,
    "anthropic-stream": _ask_anthropic_stream,
    "httpx-sse": _ask_httpx_sse,
    "sseclient-py": _ask_sseclient,
    "langchain-openai": _ask_langchain,
}


def main(case: str, url: str, model: str, requests: int) -> int:
    """Ask so many times, one after the other."""
    empty = [index for index in range(requests) if not CASES[case](url, model, index)]
    if empty:
        print(f"empty answers: {empty}", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], int(sys.argv[4])))

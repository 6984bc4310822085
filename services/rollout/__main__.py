"""`python -m services.rollout --model DIR`: parse, wire, serve. Exit code 2: bad configuration."""

import shutil
import signal
import sys
from pathlib import Path

from pydantic import SecretStr, ValidationError
from pydantic_settings import CliApp, SettingsError

from services.common.errors import ConfigError
from services.common.logging import configure_logging
from services.common.serve import bind_socket, run, serve
from services.common.settings import ApiKey, resolve_api_key
from services.rollout.engines.protocol import Engine
from services.rollout.settings import ENV_PREFIX, RolloutSettings

EXIT_CONFIG = 2


def main() -> int:
    """Run the service until a stop signal; return the exit code."""
    try:
        settings = CliApp.run(RolloutSettings)
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(map(str, problem["loc"])).replace("_", "-")
            print(f"rollout service: {flag}: {problem['msg']}. See --help.", file=sys.stderr)
        return EXIT_CONFIG
    except SettingsError as error:
        print(f"rollout service: bad configuration: {error}", file=sys.stderr)
        return EXIT_CONFIG
    configure_logging(settings.log_level)
    # Until the server takes over the signals, a stop must unwind the stack and end the engine.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(_run(settings))
    except ConfigError as error:
        print(f"rollout service: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


async def _run(settings: RolloutSettings) -> None:
    from services.rollout.api.app import create_app
    from services.rollout.service import (
        build_service,
        make_weights_dir,
        read_model_folder,
        resolve_model,
    )

    api_key = _key(settings.api_key, settings.host, "api-key")
    admin_key = _key(settings.admin_key, settings.host, "admin-key")
    sock = bind_socket(settings.host, settings.port)
    settings = settings.model_copy(update={"model": resolve_model(settings.model)})
    model = read_model_folder(settings)
    weights_dir = make_weights_dir(settings)
    try:
        engine = _start_engine(settings, model.tokenizer, model.eos_token_ids)
        service = build_service(engine, model, settings, weights_dir)
        for name, key in (("api", api_key), ("admin", admin_key)):
            if key.generated:
                print(f"generated {name} key: {key.value}", flush=True)
        app = create_app(settings, service, api_key=api_key.value, admin_key=admin_key.value)
        try:
            await engine.add_native_routes(app, (api_key.value, admin_key.value))
            await serve(app, sock, url_file=settings.url_file, drain_s=settings.drain_s)
        finally:
            await service.close()
    finally:
        if settings.weights_dir is None:
            shutil.rmtree(weights_dir, ignore_errors=True)


def _key(configured: SecretStr | None, host: str, name: str) -> ApiKey:
    value = configured.get_secret_value() if configured is not None else None
    variable = ENV_PREFIX + name.replace("-", "_").upper()
    return resolve_api_key(value, host=host, flag=f"--{name}", variable=variable)


def _start_engine(
    settings: RolloutSettings, tokenizer: object, eos_token_ids: tuple[int, ...]
) -> Engine:
    if settings.engine == "hf":
        from services.rollout.engines.hf_engine import HfEngine

        return HfEngine.load(
            Path(settings.model),
            tokenizer,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            eos_token_ids=eos_token_ids,
            max_num_seqs=settings.max_num_seqs,
            seed=settings.seed,
            faults=settings.faults,
        )
    try:
        from services.rollout.engines.vllm_engine import VllmEngine
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}. Fix: pip install -e .[rollout], or --engine hf."
        ) from error
    try:
        return VllmEngine.start(settings, eos_token_ids)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM does not start: {error}. Fix: see its log above; --kv-cache-gb, --max-model-len "
            "and --dtype are the usual causes."
        ) from error


if __name__ == "__main__":
    sys.exit(main())

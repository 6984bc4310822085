"""`python -m services.rollout --model DIR`: parse, wire, serve. Exit code 2: bad configuration."""

import signal
import sys

from pydantic import SecretStr, ValidationError
from pydantic_settings import CliApp, SettingsError

from services.common.auth import ApiKey, resolve_api_key
from services.common.errors import ConfigError
from services.common.logging import configure_logging
from services.common.serve import bind_socket, run, serve
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
    # Imported here: torch and transformers take seconds, which --help and a bad flag should not.
    from services.rollout.api.app import create_app
    from services.rollout.model_folder import read_model_folder, resolve_model
    from services.rollout.service import build_service, start_engine
    from services.rollout.weights.staging import weights_folder

    api_key = _key(settings.api_key, settings.host, "api-key")
    admin_key = _key(settings.admin_key, settings.host, "admin-key")
    # Before the engine: a port that is taken should not cost the minutes of its start.
    sock = bind_socket(settings.host, settings.port)
    settings = settings.model_copy(update={"model": resolve_model(settings.model)})
    model = read_model_folder(settings)
    with weights_folder(settings.weights_dir) as weights_dir:
        engine = start_engine(settings, model)
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


def _key(configured: SecretStr | None, host: str, name: str) -> ApiKey:
    value = configured.get_secret_value() if configured is not None else None
    variable = ENV_PREFIX + name.replace("-", "_").upper()
    return resolve_api_key(value, host=host, flag=f"--{name}", variable=variable)


if __name__ == "__main__":
    sys.exit(main())

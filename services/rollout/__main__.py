"""`python -m services.rollout --model DIR`: parse, wire, serve. Exit code 2: bad configuration."""

import sys

from services.common.serve import bind_socket, serve
from services.common.settings import start
from services.rollout.settings import RolloutSettings


def main() -> int:
    """Run the service until a stop signal; return the exit code."""
    return start(RolloutSettings, _serve)


async def _serve(settings: RolloutSettings) -> None:
    # Imported here: torch and transformers take seconds, which --help and a bad flag should not.
    from services.rollout.api.app import create_app
    from services.rollout.model_folder import read_model_folder, resolve_model
    from services.rollout.service import build_service, start_engine
    from services.rollout.weights.staging import weights_folder

    api_key = settings.resolve_key(settings.api_key, "api_key")
    admin_key = settings.resolve_key(settings.admin_key, "admin_key")
    # Before the engine: a port that is taken should not cost the minutes of its start.
    sock = bind_socket(settings.host, settings.port)
    settings = settings.model_copy(update={"model": resolve_model(settings.model)})
    model = read_model_folder(settings)
    with weights_folder(settings.weights_dir) as weights_dir:
        engine = await start_engine(settings, model)
        service = build_service(engine, model, settings, weights_dir)
        # Only now: what the engine prints while it starts would push the keys out of sight.
        if settings.api_key is None:
            print(f"generated api key: {api_key}", flush=True)
        if settings.admin_key is None:
            print(f"generated admin key: {admin_key}", flush=True)
        app = create_app(service, settings, api_key=api_key, admin_key=admin_key)
        try:
            await engine.add_native_routes(app, (api_key, admin_key), service.ledger.hold)
            await serve(app, sock, url_file=settings.url_file, drain_s=settings.drain_s)
        finally:
            await service.close()


if __name__ == "__main__":
    sys.exit(main())

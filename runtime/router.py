"""`tandem router`: one router in this process, or `--routers N` that a supervisor runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.router import main as router
from tandem.router.settings import RouterConfig
from tandem.runtime.parent import is_child

SETTINGS = RouterConfig


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises ConfigError, or SystemExit after `--help`."""
    config = router.read(argv)
    if config.routers == 1 or is_child():
        router.run(config)
        return 0
    from tandem.router.place import bind
    from tandem.runtime.processes import routers_of
    from tandem.runtime.running import reachable
    from tandem.runtime.supervisor import Deployment, supervise

    with bind(config.host, config.port) as listening:
        port = listening.getsockname()[1]
        settings = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)} | {"port": port}
        url = f"http://{reachable(config.host)}:{port}"
        return supervise(
            Deployment(
                lambda _: routers_of(settings, config.routers),
                RouterConfig,
                listening,
                drain_grace_s=config.drain_grace_s,
                secret=b"",  # it starts no workers
                ready_text=lambda _: f"tandem router ready: {url}, {config.routers} routers",
            )
        )

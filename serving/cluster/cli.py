"""The command `mpt cluster`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mpt.errors import UserError
from mpt.extras import require

CONFIG = Path(__file__).parents[1] / "config.yaml"


def cluster(
    action: Annotated[
        Literal["reload"] | None,
        typer.Argument(
            help="`reload`: have the cluster on --port take its changed config, or another with --config.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A Ray Serve config; docs/operations.md lists what `args` may say.", show_default="the tiny four"
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="TCP port.", show_default="the config's, else 8000")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs that Ray may hand out.", show_default="as many as there are")
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="How long running requests may finish after SIGTERM, in seconds.", show_default="30"
        ),
    ] = None,
) -> None:
    """Serve checkpoints on a local Ray, each model with replicas of its own, until interrupted.

    On a Ray cluster that runs already: `serve deploy serving/config.yaml`; on Kubernetes: k8s/README.md.

    \b
    Examples:
      mpt cluster
      mpt cluster --config my-models.yaml --port 9000
      mpt cluster reload --port 9000
    """
    if action == "reload":
        if cpus is not None or drain_seconds is not None:
            raise UserError("--cpus and --drain-seconds are for a new `mpt cluster`; leave them out of `reload`")
        from serving.cluster import reload

        for line in reload.ask(config, port):
            print(line, flush=True)
        return
    require("`mpt cluster`", "cluster", "ray", "cryptography")
    from serving.cluster import local

    local.run(config or CONFIG, port, cpus, 30.0 if drain_seconds is None else drain_seconds)

"""A Ray with our application, told what to run by lines of JSON on stdin.

python tests/serving/cluster/ray_driver.py PORT FOLDER < lines of `args`

On stdout: the address of its GCS, then `deployed` after each line. It deploys as `serve deploy` does, which calls the
same of Ray's controller over the dashboard. FOLDER is its own, and has a short name.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

from serving.cluster import home
from serving.cluster.local import ENVIRONMENT
from serving.cluster.options import read_args
from serving.cluster.timeouts import Timeouts


def environment(folder: Path) -> dict[str, str]:
    """What every node of the Ray in this folder is started with. It may have several, unlike that of `mpt cluster`."""
    timeouts = Timeouts.of(read_args({})).environment()
    own = {name: value for name, value in home.environment(folder).items() if "TLS" not in name}
    return ENVIRONMENT | timeouts | home.ports() | own


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    certificate, key = home.write_certificate(folder)
    os.environ.update(environment(folder))
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.init(
        "local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        _temp_dir=f"{folder}/ray",
    )  # fmt: skip
    print(ray.get_runtime_context().gcs_address, flush=True)
    tls = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    serve.start(http_options={"host": "127.0.0.1", "port": port, **tls})
    for line in sys.stdin:
        application = {"name": "mpt", "import_path": "serving.cluster.deployment:app", "args": json.loads(line)}
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))
        while (application := serve.status().applications["mpt"]).status != "RUNNING":
            assert application.status == "DEPLOYING", application
            time.sleep(0.1)
        print("deployed", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

"""A Ray with our application, told what to run by lines of JSON on stdin.

python tests/serving/cluster/ray_driver.py PORT FOLDER < lines of `args`

On stdout: the address of its GCS, then `deployed` after each line. It deploys as `serve deploy` does, which calls the
same of Ray's controller over the dashboard. FOLDER is Ray's own, and has a short name.
"""

import json
import logging
import os
import sys
import time

from serving.cluster import haproxy
from serving.cluster.local import ENVIRONMENT, _free_port
from serving.cluster.options import read_args
from serving.cluster.timeouts import Timeouts


def environment() -> dict[str, str]:
    """What every node of it is started with."""
    ports = {name: str(_free_port()) for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")}
    own = {"RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.command()}
    return ENVIRONMENT | Timeouts.of(read_args({})).environment() | ports | own


def main() -> None:
    os.environ.update(environment())
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    port, folder = int(sys.argv[1]), sys.argv[2]
    ray.init(
        "local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, _temp_dir=folder
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for line in sys.stdin:
        application = {"name": "mpt", "import_path": "serving.cluster.deployment:app", "args": json.loads(line)}
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))
        while (status := serve.status().applications["mpt"].status) != "RUNNING":
            assert status == "DEPLOYING", status
            time.sleep(0.1)
        print("deployed", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

"""A Ray with our application, told what to run by lines of JSON on stdin; `deployed` on stdout after each.

python tests/serving/cluster/ray_driver.py PORT < lines of `args`
"""

import json
import logging
import os
import sys

from serving.cluster import haproxy
from serving.cluster.local import ENVIRONMENT, _free_port


def main() -> None:
    os.environ.update(ENVIRONMENT)
    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = haproxy.command()
    for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        os.environ[name] = str(_free_port())
    import ray
    from ray import serve

    from serving.cluster.deployment import app

    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    for line in sys.stdin:
        serve.run(app(json.loads(line)), name="mpt", route_prefix="/")
        print("deployed", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

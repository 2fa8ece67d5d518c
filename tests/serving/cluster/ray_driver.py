"""A Ray with our application, told what to run by lines of JSON on stdin; `deployed` on stdout after each.

python tests/serving/cluster/ray_driver.py PORT < lines of `args`
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from serving.cluster import home
from serving.cluster.local import ENVIRONMENT, LOCAL


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="mpt-"))
    certificate, key = home.write_certificate(folder)
    os.environ.update(ENVIRONMENT | LOCAL | home.ports() | home.environment(folder))
    import ray
    from ray import serve

    from serving.cluster.deployment import app

    ray.init(
        "local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        _temp_dir=f"{folder}/ray",
    )  # fmt: skip
    tls = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), **tls})
    for line in sys.stdin:
        serve.run(app(json.loads(line)), name="mpt", route_prefix="/")
        print("deployed", flush=True)
    ray.shutdown()
    home.remove(folder)


if __name__ == "__main__":
    main()

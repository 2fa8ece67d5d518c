"""Check the text of a RayService's serveConfigV2, which KubeRay hands to Ray Serve unread.

Ray Serve 2.60 accepts what it does not know (`max_ongoing_request: 3`, `ray_actor_options.num_gpu`) and an autoscaling
that starts above its maximum; such a mistake would show as a default in production. So keys are compared here.
"""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import get_args

import yaml
from pydantic import BaseModel
from ray.serve import Deployment
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema


def load(text: str) -> ServeDeploySchema:
    """The config as Ray Serve will see it; raises ValueError for anything it would refuse, ignore or clamp."""
    config = yaml.safe_load(text)
    unknown = list(unknown_keys(ServeDeploySchema, config))
    if unknown:
        raise ValueError(f"Ray Serve knows no {', '.join(unknown)}")
    for application in config["applications"]:
        for deployment in application.get("deployments", []):
            if "autoscaling_config" in deployment:
                check_autoscaling(deployment["name"], AutoscalingConfig(**deployment["autoscaling_config"]))
    return ServeDeploySchema(**config)


def deployments(text: str) -> list[Deployment]:
    """What the applications of the config make of their `args`: the import and the build, without a cluster.

    Raises whatever the import or the application raises, such as UserError for an option it does not know.
    """
    found = []
    for application in yaml.safe_load(text)["applications"]:
        built = resolve_name(application["import_path"])(application.get("args", {}))
        found += build_app(built, name=application["name"]).deployments
    for one in found:
        if scaling := one._deployment_config.autoscaling_config:
            check_autoscaling(one.name, scaling)
    return found


def check_autoscaling(deployment: str, scaling: AutoscalingConfig) -> None:
    start = scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas
    if not scaling.min_replicas <= start <= scaling.max_replicas:
        raise ValueError(f"`{deployment}` scales from {scaling.min_replicas} over {start} to {scaling.max_replicas}")


def unknown_keys(model: type[BaseModel], value: object, path: str = "") -> Iterator[str]:
    """Paths of the keys in value that model, or a model inside it, has no field for."""
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from unknown_keys(model, part, f"{path}[{index}]")
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in model.model_fields:
            yield f"`{here}`"
            continue
        for inner in models_in(model.model_fields[key].annotation):
            yield from unknown_keys(inner, part, here)


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The pydantic models an annotation such as `Dict | AutoscalingConfig | None` or `List[Model]` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)

"""Which replicas Ray Serve replaces when our application is deployed over another: those of another version."""

import hashlib
import json
from typing import Any

from ray import serve
from ray.serve._private.config import DeploymentConfig

import mpt


def version_of(name: str, *told: Any) -> str:
    """What a deployment's replicas are made of; replicas of another version are replaced. told: their options."""
    made_of = json.dumps([mpt.__version__, name, *told], sort_keys=True, default=str)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


class _Versioned(DeploymentConfig):
    """Keeps the version it was made with.

    Ray Serve replaces the replicas of a deployment whose version changed. `serve deploy` gives all deployments of an
    application one version, the hash of its `args` (`build_serve_application`), and `serve.run` gives each a random
    one, so that either would replace every replica for one changed key of one model (Ray 2.60).
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "version":
            super().__setattr__(name, value)


def with_version(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """The deployment, whose replicas are replaced when it is deployed over one with another version."""
    config = deployment._deployment_config
    values = {name: getattr(config, name) for name in DeploymentConfig.model_fields}
    deployment._deployment_config = _Versioned.model_construct(**{**values, "version": version})
    return deployment

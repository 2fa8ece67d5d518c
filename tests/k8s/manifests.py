"""Render the manifests of k8s/ and check an object against the schema of its kind, with no cluster and no network.

The schemas of Kubernetes itself are those kubernetes-validate ships (strict: an unknown key is an error); those of the
custom kinds lie in tests/k8s/schemas, and say there where they come from. Pod templates inside custom kinds are checked
as strictly as a Deployment's. What a schema cannot say (CEL rules, webhooks, names that must exist) is in
test_manifests.py.
"""

import functools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.37"
CORE = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
CORE_URL = "https://kubernetes.io/api/_definitions.json"


class UnknownKind(Exception):
    """An object of a kind that no schema here describes: add one, or the object goes unchecked."""


@functools.cache
def render(folder: str) -> list[dict]:
    """What `kubectl apply -k k8s/<folder>` would send. Shared by the tests: look, do not change."""
    done = subprocess.run(["kubectl", "kustomize", str(ROOT / "k8s" / folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"k8s/{folder} does not render: {done.stderr.strip()}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def training_jobs() -> list[dict]:
    """What k8s/training starts one by one, with `kubectl create -f`, and so has in no kustomization."""
    files = sorted((ROOT / "k8s/training").glob("*.yaml"))
    documents = [document for path in files for document in yaml.safe_load_all(path.read_text())]
    return [document for document in documents if document.get("kind") in ("RayJob", "TrainJob")]


def walk(value: object) -> Iterator[object]:
    """value and every part of it, at any depth."""
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(part)


def name_of(manifest: dict) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def validate(manifest: dict) -> None:
    """Raise jsonschema.ValidationError with the path of the worst offence, or UnknownKind."""
    if any(part is None for part in walk(manifest)):
        # The strict schemas allow null anywhere; in YAML it is a key whose value was forgotten, such as `emptyDir:`.
        raise jsonschema.ValidationError(f"{name_of(manifest)} has a key without a value")
    group_version, kind = manifest["apiVersion"], manifest["kind"]
    custom = _custom_kinds().get(group_version.replace("/", "_"))
    if custom is None:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            raise UnknownKind(
                f"`{group_version} {kind}` is neither in Kubernetes {KUBERNETES} nor in {SCHEMAS}"
            ) from None
    elif kind not in custom:
        raise UnknownKind(f"`{group_version} {kind}` is not in {SCHEMAS}")
    else:
        custom[kind].validate(manifest)


@functools.cache
def _custom_kinds() -> dict[str, dict[str, jsonschema.Draft202012Validator]]:
    """A validator for each custom kind, by the name of its file and its own: ["ray.io_v1"]["RayJob"]."""
    core = json.loads((Path(kubernetes_validate.__file__).parent / CORE).read_text())
    registry = Registry().with_resource(CORE_URL, DRAFT202012.create_resource(core))
    validators = {}
    for path in [*SCHEMAS.glob("*.yaml"), *SCHEMAS.glob("*.json")]:
        schema = yaml.safe_load(path.read_text())
        group_version, url = path.stem, f"https://schemas.invalid/{path.stem}"
        for kind, fields in schema["kinds"].items():
            envelope = {
                "apiVersion": {"const": group_version.replace("_", "/")},
                "kind": {"const": kind},
                "metadata": {"$ref": "k8s:io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
            }
            fields["properties"] |= envelope
            fields["required"] = [*fields.get("required", []), *envelope]
        _close(schema)
        registry = registry.with_resource(url, DRAFT202012.create_resource(schema))
        validators[group_version] = {kind: f"{url}#/kinds/{kind}" for kind in schema["kinds"]}
    return {
        group_version: {
            kind: jsonschema.Draft202012Validator({"$ref": url}, registry=registry) for kind, url in kinds.items()
        }
        for group_version, kinds in validators.items()
    }


def _close(schema: object) -> None:
    """Refuse unknown keys in every object, in place, and point `k8s:` at the definitions of Kubernetes."""
    if isinstance(schema, list):
        for part in schema:
            _close(part)
    if not isinstance(schema, dict):
        return
    if "properties" in schema:
        schema.setdefault("type", "object")
        schema.setdefault("additionalProperties", False)
    if str(schema.get("$ref", "")).startswith("k8s:"):
        schema["$ref"] = f"{CORE_URL}#/$defs/{schema['$ref'].removeprefix('k8s:')}"
    for part in schema.values():
        _close(part)

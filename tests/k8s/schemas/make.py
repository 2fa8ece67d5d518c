"""Regenerate the schemas that come from packages: python tests/k8s/schemas/make.py (needs npm, pip and a registry).

    gateway.networking.k8s.io_v1   npm @kubernetes-models/gateway-api 0.5.1: JSON schemas of Gateway API 1.0.0's CRDs
    monitoring.coreos.com_v1       npm @kubernetes-models/prometheus-operator 5.0.1: TypeScript of the CRDs of v0.90.1
    trainer.kubeflow.org_v1alpha1  PyPI kubeflow-trainer-api 2.3.0: pydantic models of Trainer's OpenAPI
    jobset.x-k8s.io_v1alpha2       the same package, which carries JobSet's models too

ray.io_v1.yaml and kueue.x-k8s.io_v1beta2.yaml are in no package: they are transcribed by hand, and the first says how
all of these files are read. They know less than the CRDs: TypeScript has no patterns, OpenAPI models have no enums and
no minima, apart from DURATIONS and ENUMS below, and rules in CEL are nowhere.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate

HERE = Path(__file__).parent
KEPT = ("type", "enum", "const", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
DURATION = "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$"
# Of PrometheusRule and the monitors.
DURATIONS = {"for", "interval", "keep_firing_for", "query_offset", "scrapeTimeout"}
ENUMS = {  # from JobSet's jobset_types.go and Trainer's trainjob_types.go, by model and field
    ("JobsetV1alpha2DependsOn", "status"): ["Ready", "Complete"],
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): ["Recreate", "BlockingRecreate", "InPlaceRestart"],
    ("JobsetV1alpha2FailurePolicyRule", "action"): ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"],
    ("JobsetV1alpha2StartupPolicy", "startupPolicyOrder"): ["AnyOrder", "InOrder"],
    ("JobsetV1alpha2SuccessPolicy", "operator"): ["All", "Any"],
    ("TrainerV1alpha1RuntimeRef", "kind"): ["TrainingRuntime", "ClusterTrainingRuntime"],
}


def npm(package: str, folder: Path) -> Path:
    """Where the unpacked npm package lies."""
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (tarball,) = folder.glob("*.tgz")
    subprocess.run(["tar", "xzf", tarball.name], cwd=folder, check=True)
    tarball.unlink()
    return (folder / "package").rename(folder / re.sub(r"\W+", "-", package))


def lean(schema: dict) -> dict:
    """What a validator reads of a schema: no prose, no defaults, and nothing required that has a default."""
    if "oneOf" in schema or "anyOf" in schema:
        parts = [lean(part) for part in schema.get("oneOf") or schema["anyOf"] if part != {"type": "null"}]
        if len(parts) == 1:
            return parts[0]
        if [part.get("type") for part in parts] == ["integer", "string"]:
            return {"type": ["integer", "string"]}
    if "$ref" in schema:
        return {"$ref": re.sub(r"^#/\$defs/IoK8s", "k8s:IoK8s", schema["$ref"])}
    out = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("properties"):
        properties = schema["properties"]
        out["properties"] = {name: lean(field) for name, field in properties.items()}
        required = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
        if required:
            out["required"] = required
    if isinstance(schema.get("items"), dict):
        out["items"] = lean(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = lean(schema["additionalProperties"])
    return out


def without_envelope(kind: dict) -> dict:
    """A kind without what every kind has, and without `status`."""
    for name in ("apiVersion", "kind", "metadata", "status"):
        kind["properties"].pop(name, None)
    required = [name for name in kind.get("required", []) if name in kind["properties"]]
    return {"properties": kind["properties"], "required": required or ["spec"]}


def gateway(folder: Path) -> dict:
    """Kinds of Gateway API: each module holds its schema as a JSON literal."""
    package = npm("@kubernetes-models/gateway-api@0.5.1", folder)
    defs = {}
    for kind in ("Gateway", "HTTPRoute"):
        source = (package / f"gateway.networking.k8s.io/v1/{kind}.js").read_text()
        literal = re.search(r"^const schema = (\{.*?^\});", source, re.DOTALL | re.MULTILINE)
        defs[kind] = without_envelope(lean(json.loads(literal[1])))
    return defs


def monitoring(folder: Path) -> dict:
    """Kinds of the Prometheus operator, read from the interface each declaration file begins with."""
    package = npm("@kubernetes-models/prometheus-operator@5.0.1", folder)
    defs = {}
    for kind in ("PodMonitor", "PrometheusRule", "ServiceMonitor"):
        source = (package / f"monitoring.coreos.com/v1/{kind}.d.ts").read_text()
        interface = re.search(r"^export interface I\w+ (\{.*?^\})", source, re.DOTALL | re.MULTILINE)[1]
        tokens = re.findall(r'"[^"]*"|[A-Za-z]+|[{}\[\]<>?:;|]', re.sub(r"/\*.*?\*/", "", interface, flags=re.DOTALL))
        defs[kind] = without_envelope(typescript(tokens))
    return defs


def typescript(tokens: list[str]) -> dict:
    """Consume one type from tokens, as a JSON schema. A number is an integer: these CRDs hold no floats."""
    options = [one_type(tokens)]
    while tokens and tokens[0] == "|":
        tokens.pop(0)
        options.append(one_type(tokens))
    if len(options) == 1:
        return options[0]
    if all("const" in option for option in options):
        return {"enum": [option["const"] for option in options]}
    return {"type": [option["type"] for option in options]}


def one_type(tokens: list[str]) -> dict:
    """Consume a type that is no union."""
    token = tokens.pop(0)
    if token.startswith('"'):
        return {"const": token[1:-1]}
    if token == "Array":
        tokens.pop(0)  # <
        items = typescript(tokens)
        tokens.pop(0)  # >
        return {"type": "array", "items": items}
    if token == "{":
        return fields(tokens)
    return {"string": {"type": "string"}, "number": {"type": "integer"}, "boolean": {"type": "boolean"}}.get(token, {})


def fields(tokens: list[str]) -> dict:
    """Consume the fields of an object up to its closing brace; `[key: string]: T` makes it a map."""
    properties, required = {}, []
    while tokens[0] != "}":
        name = tokens.pop(0).strip('"')
        if name == "[":
            del tokens[: tokens.index("]") + 2]  # key: string ] :
            values = typescript(tokens)
            del tokens[:2]  # ; }
            return {"type": "object", "additionalProperties": values}
        if tokens[0] == "?":
            tokens.pop(0)
        else:
            required.append(name)
        tokens.pop(0)  # :
        properties[name] = typescript(tokens)
        if name in DURATIONS:
            properties[name]["pattern"] = DURATION
        tokens.pop(0)  # ;
    tokens.pop(0)
    return {"properties": properties, **({"required": required} if required else {})}


def trainer(folder: Path) -> tuple[dict, dict]:
    """Kinds of Kubeflow Trainer and JobSet, and the models they are made of."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "trainer")]
    subprocess.run([*pip, "kubeflow-trainer-api==2.3.0"], check=True)
    sys.path.insert(0, str(folder / "trainer"))
    from kubeflow_trainer_api import models

    kinds, defs = {}, {}
    for name in (
        "TrainerV1alpha1TrainJob",
        "TrainerV1alpha1TrainingRuntime",
        "TrainerV1alpha1ClusterTrainingRuntime",
        "JobsetV1alpha2JobSet",
    ):
        schema = getattr(models, name).model_json_schema()
        kinds[re.sub(r"^.*V\dalpha\d", "", name)] = without_envelope(lean(schema))
        defs |= {model: lean(part) for model, part in schema["$defs"].items() if not model.startswith("IoK8s")}
    for (model, field), values in ENUMS.items():
        defs[model]["properties"][field] = {"enum": values}
    return kubernetes_types(kinds), kubernetes_types(defs)


def kubernetes_types(defs: dict) -> dict:
    """defs with k8s:IoK8sApiCoreV1EnvVar written as k8s:io.k8s.api.core.v1.EnvVar."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema/v1.37.0-local-strict"
    names = json.loads((folder / "_definitions.json").read_text())["$defs"]
    written = {"".join(part[0].upper() + part[1:] for part in name.split(".")): name for name in names}
    return json.loads(re.sub(r"k8s:(IoK8s\w+)", lambda match: f"k8s:{written[match[1]]}", json.dumps(defs)))


def write(group_version: str, kinds: dict, defs: dict) -> None:
    """One file for an API group, with those of the defs that its kinds lead to (so none of `status`)."""
    found, text = {}, json.dumps(kinds)
    while new := set(re.findall(r'"#/\$defs/(\w+)"', text)) - set(found):
        found |= {name: defs[name] for name in new}
        text = json.dumps([defs[name] for name in new])
    schema = {"kinds": kinds, "$defs": dict(sorted(found.items()))}
    (HERE / f"{group_version}.json").write_text(json.dumps(schema, indent=1) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write("gateway.networking.k8s.io_v1", gateway(folder), {})
        write("monitoring.coreos.com_v1", monitoring(folder), {})
        kinds, defs = trainer(folder)
        write("jobset.x-k8s.io_v1alpha2", {"JobSet": kinds.pop("JobSet")}, defs)
        write("trainer.kubeflow.org_v1alpha1", kinds, defs)


if __name__ == "__main__":
    main()

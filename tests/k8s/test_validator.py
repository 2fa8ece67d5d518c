"""The checks of test_manifests.py catch what they are there for; kubectl and k8s/ have no part in it."""

import copy

import jsonschema
import pytest
import yaml

from tests.k8s import serve_config
from tests.k8s.manifests import UnknownKind, validate

# KubeRay's own sample config/samples/ray-service.incremental-upgrade.yaml (commit 12cb11e4), shortened.
RAY_SERVICE = yaml.safe_load("""
apiVersion: ray.io/v1
kind: RayService
metadata: {name: rayservice-incremental-upgrade}
spec:
  upgradeStrategy:
    type: NewClusterWithIncrementalUpgrade
    clusterUpgradeOptions: {gatewayClassName: istio, stepSizePercent: 10, intervalSeconds: 30, maxSurgePercent: 10}
  serveConfigV2: |
    applications:
    - name: fruit_app
      import_path: fruit.deployment_graph
      deployments:
      - name: MangoStand
        ray_actor_options: {num_cpus: 0.5}
        max_ongoing_requests: 100
        autoscaling_config: {min_replicas: 1, max_replicas: 3}
  rayClusterConfig:
    rayVersion: 2.51.0
    enableInTreeAutoscaling: true
    headGroupSpec:
      rayStartParams: {num-cpus: '0'}
      template: &template
        spec:
          containers:
          - name: ray
            image: rayproject/ray:2.51.0
            ports: [{containerPort: 8000, name: serve}]
            resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {cpu: 1, memory: 4Gi}}
    workerGroupSpecs:
    - {groupName: small-group, minReplicas: 0, maxReplicas: 4, rayStartParams: {}, template: *template}
""")

# examples/failure-policy/host-maintenance-event-model.yaml of JobSet (commit 4be32d6d), shortened; the names of rules,
# which JobSet's webhook would fill in, are written.
JOB_SET = yaml.safe_load("""
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: host-maintenance-event-model}
spec:
  failurePolicy:
    maxRestarts: 0
    rules:
    - {name: maintenance, action: RestartJobSetAndIgnoreMaxRestarts, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: leader
    replicas: 1
    template:
      spec:
        backoffLimit: 0
        podFailurePolicy: {rules: [{action: FailJob, onPodConditions: [{type: DisruptionTarget, status: "True"}]}]}
        template:
          spec:
            restartPolicy: Never
            containers: [{name: leader, image: bash:5.3}]
""")

TRAIN_JOB = yaml.safe_load("""
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: pytorch-multikueue, labels: {kueue.x-k8s.io/queue-name: multikueue-queue}}
spec:
  runtimeRef: {name: torch-distributed, kind: ClusterTrainingRuntime}
  trainer:
    numNodes: 2
    resourcesPerNode: {requests: {cpu: "4", memory: 8Gi, nvidia.com/gpu: "1"}}
""")

HTTP_ROUTE = yaml.safe_load("""
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: api}
spec:
  parentRefs: [{name: gateway}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /v1}}]
    backendRefs: [{name: api, port: 8000}]
    timeouts: {request: 0s}
""")

POD_MONITOR = yaml.safe_load("""
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata: {name: ray}
spec:
  selector: {matchLabels: {ray.io/node-type: worker}}
  podMetricsEndpoints: [{port: metrics, interval: 15s, relabelings: [{sourceLabels: [a], targetLabel: b}]}]
""")

RULE = yaml.safe_load("""
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: alerts}
spec:
  groups: [{name: serve, rules: [{alert: Down, expr: up == 0, for: 5m, labels: {severity: page}}]}]
""")

QUEUE = yaml.safe_load("""
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata: {name: gpus}
spec:
  namespaceSelector: {}
  resourceGroups:
  - coveredResources: [nvidia.com/gpu]
    flavors: [{name: a100, resources: [{name: nvidia.com/gpu, nominalQuota: 32}]}]
""")

ALL = [RAY_SERVICE, JOB_SET, TRAIN_JOB, HTTP_ROUTE, POD_MONITOR, RULE, QUEUE]
HEAD = ("spec", "rayClusterConfig", "headGroupSpec")
POD = (*HEAD, "template", "spec", "containers", 0)


def changed(manifest: dict, path: tuple, value: object) -> dict:
    """A copy of manifest with value at path."""
    result = copy.deepcopy(manifest)
    *parents, last = path
    place = result
    for step in parents:
        place = place[step]
    place[last] = value
    return result


@pytest.mark.parametrize("manifest", ALL, ids=lambda manifest: manifest["kind"])
def test_valid_manifests_pass(manifest):
    validate(manifest)


@pytest.mark.parametrize(
    ("manifest", "path", "value"),
    [
        pytest.param(RAY_SERVICE, (*POD, "readynessProbe"), {}, id="misspelt key in a pod template"),
        pytest.param(RAY_SERVICE, (*POD, "ports", 0, "containerPort"), "8000", id="string for a port"),
        pytest.param(RAY_SERVICE, (*POD, "resources", "limit"), {}, id="limit for limits"),
        pytest.param(RAY_SERVICE, ("spec", "serveConfig"), "", id="wrong key of a RayService"),
        pytest.param(RAY_SERVICE, ("spec", "upgradeStrategy"), "NewCluster", id="string for an object"),
        pytest.param(RAY_SERVICE, ("spec", "upgradeStrategy", "type"), "Rolling", id="unknown strategy"),
        pytest.param(RAY_SERVICE, ("spec", "rayClusterDeletionDelaySeconds"), "900", id="string for a number"),
        pytest.param(RAY_SERVICE, (*HEAD, "rayStartParams", "num-cpus"), 0, id="number for a string"),
        pytest.param(RAY_SERVICE, (*HEAD, "template"), None, id="null for a required template"),
        pytest.param(RAY_SERVICE, ("spec", "rayClusterConfig"), {}, id="missing required field"),
        pytest.param(RAY_SERVICE, ("metadata", "label"), {}, id="wrong key of the metadata"),
        pytest.param(RAY_SERVICE, ("status",), {}, id="status, which is not ours to write"),
        pytest.param(JOB_SET, ("spec", "failurePolicy", "rules", 0, "action"), "Restart", id="unknown action"),
        pytest.param(JOB_SET, ("spec", "replicatedJobs", 0, "template", "spec", "backofLimit"), 0, id="key of a Job"),
        pytest.param(TRAIN_JOB, ("spec", "trainer", "numProcPerNode"), "auto", id="Trainer 2.2's string"),
        pytest.param(TRAIN_JOB, ("spec", "podTemplateOverrides"), [], id="Trainer 2.1's overrides"),
        pytest.param(HTTP_ROUTE, ("spec", "rules", 0, "timeouts", "request"), "0", id="duration without a unit"),
        pytest.param(HTTP_ROUTE, ("spec", "rules", 0, "timeout"), "0s", id="wrong key of a route"),
        pytest.param(POD_MONITOR, ("spec", "podMetricsEndpoints", 0, "interval"), "15", id="interval without a unit"),
        pytest.param(POD_MONITOR, ("spec", "endpoints"), [], id="a ServiceMonitor's key in a PodMonitor"),
        pytest.param(RULE, ("spec", "groups", 0, "rules", 0, "severity"), "page", id="label beside the labels"),
        pytest.param(QUEUE, ("spec", "cohort"), "all", id="v1beta1's key in v1beta2"),
    ],
)
def test_wrong_manifest_is_refused(manifest, path, value):
    with pytest.raises(jsonschema.ValidationError):
        validate(changed(manifest, path, value))


def test_core_kinds_are_checked_strictly():
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {"storage": "1Gi"},
    }
    with pytest.raises(jsonschema.ValidationError, match="storage"):
        validate(claim)


@pytest.mark.parametrize("api_version", ["ray.io/v1", "ray.io/v1alpha1", "v1", "example.com/v1"])
def test_unknown_kind_is_an_error(api_version):
    with pytest.raises(UnknownKind):
        validate({"apiVersion": api_version, "kind": "Nonsense", "metadata": {"name": "nonsense"}})


def test_valid_serve_config_passes():
    assert serve_config.load(RAY_SERVICE["spec"]["serveConfigV2"]).applications[0].name == "fruit_app"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("max_ongoing_requests", "max_ongoing_request", "max_ongoing_request"),
        ("num_cpus", "num_gpu", "ray_actor_options.num_gpu"),
        ("min_replicas", "minimum", "autoscaling_config.minimum"),
        ("import_path", "import", "applications\\[0\\].import"),
        ("min_replicas: 1", "min_replicas: 4", "min_replicas"),
        ("min_replicas: 1", "initial_replicas: 4", "scales from 1 over 4 to 3|initial_replicas"),
        ("num_cpus: 0.5", "num_cpus: -1", "num_cpus"),
    ],
)
def test_serve_config_that_ray_would_accept_or_refuse_is_refused(old, new, named):
    with pytest.raises(ValueError, match=named):
        serve_config.load(RAY_SERVICE["spec"]["serveConfigV2"].replace(old, new))

"""What the manifests of k8s/ promise, checked on what `kubectl kustomize` renders; no cluster is needed."""

import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

import pytest
import yaml
from ray.serve import Deployment
from ray.serve._private.constants import RAY_SERVE_HAPROXY_METRICS_PORT

from serving.cluster.options import read_args
from serving.cluster.timeouts import HEAD_S, PRE_STOP_S, REPLACEMENT_S, Timeouts
from tests.k8s import serve_config
from tests.k8s.manifests import ROOT, name_of, render, training_jobs, validate, walk

pytestmark = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="kubectl, which renders the overlays, is not on PATH"
)

FOLDERS = ["overlays/cpu-dev", "overlays/one-gpu", "overlays/production", "training"]
OUR_IMAGE = re.compile(r"(?:^|/)mpt(?:-[a-z-]+)?:([0-9.]+)")  # .../mpt:0.1.0-cuda

# The one pod with a token for the API server, and who alone of it may read the token.
TOKENS = {("RayService", "head"): "the in-tree autoscaler, a container KubeRay adds, resizes the RayCluster"}
CLOSED_PORTS = {8265: "dashboard and job API", 10001: "Ray client", 6379: "GCS or Redis"}  # each runs code it is sent


class Pod(NamedTuple):
    """A pod template and where it was found."""

    owner: dict
    role: str  # in a Ray cluster "head" or the name of a worker group, else ""
    labels: dict  # with those KubeRay adds
    spec: dict

    def __str__(self) -> str:
        return f"{name_of(self.owner)} {self.role}".strip()

    @property
    def containers(self) -> list[dict]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@pytest.fixture(params=FOLDERS)
def manifests(request) -> list[dict]:
    return render(request.param) + (training_jobs() if request.param == "training" else [])


def of_kind(manifests: list[dict], *kinds: str) -> list[dict]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods(manifests: list[dict]) -> list[Pod]:
    return [pod for manifest in manifests for pod in pods_of(manifest)]


def pods_of(manifest: dict) -> Iterator[Pod]:
    """The templates in one object, whatever its kind; those of a RayService with the labels KubeRay adds."""
    if manifest["kind"] in ("RayService", "RayJob"):
        cluster = ray_cluster(manifest)
        groups = [("head", "headgroup", cluster["headGroupSpec"])]
        groups += [(group["groupName"], group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
        for role, name, group in groups:
            added = {"ray.io/node-type": "head" if role == "head" else "worker", "ray.io/group": name}
            labels = group["template"].get("metadata", {}).get("labels", {}) | {"ray.io/is-ray-node": "yes"} | added
            yield Pod(manifest, role, labels | group.get("labels", {}), group["template"]["spec"])
    elif manifest["kind"] != "TrainJob":  # whose patches are parts of the templates of its runtime
        for part in walk(manifest):
            if isinstance(part, dict) and isinstance(part.get("spec"), dict) and "containers" in part["spec"]:
                yield Pod(manifest, "", part.get("metadata", {}).get("labels", {}), part["spec"])


def autoscaler(pod: Pod) -> list[dict]:
    """The container that KubeRay adds to a head for enableInTreeAutoscaling, as far as we say what it is."""
    cluster = ray_cluster(pod.owner) if pod.role == "head" else {}
    if not cluster.get("enableInTreeAutoscaling"):
        return []
    return [{"name": "autoscaler", **cluster.get("autoscalerOptions", {})}]


def ray_cluster(manifest: dict) -> dict:
    return manifest["spec"]["rayClusterConfig" if manifest["kind"] == "RayService" else "rayClusterSpec"]


def dicts(value: object) -> Iterator[dict]:
    return (part for part in walk(value) if isinstance(part, dict))


# Shape


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_renders(folder):
    assert render(folder)


def test_every_overlay_is_tested():
    overlays = {f"overlays/{path.name}" for path in (ROOT / "k8s/overlays").iterdir() if path.is_dir()}
    assert overlays | {"training"} == set(FOLDERS)


def test_every_component_is_in_an_overlay():
    """A component that no overlay uses is never rendered, so nothing here would look at it."""
    kustomizations = [yaml.safe_load(path.read_text()) for path in (ROOT / "k8s").glob("**/kustomization.yaml")]
    used = {name.rsplit("/", 1)[-1] for one in kustomizations for name in one.get("components", [])}
    assert {path.name for path in (ROOT / "k8s/components").iterdir() if path.is_dir()} <= used


def test_every_object_fits_the_schema_of_its_kind(manifests):
    for manifest in manifests:
        validate(manifest)


def test_no_object_is_rendered_twice(manifests):
    names = [
        (manifest["apiVersion"], name_of(manifest), manifest["metadata"].get("namespace")) for manifest in manifests
    ]
    assert len(names) == len(set(names))


def test_ray_names_leave_room_for_what_kuberay_appends(manifests):
    """Rules of KubeRay's controller: at most 47 characters, and a DNS-1035 label."""
    for manifest in of_kind(manifests, "RayService", "RayJob"):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"]), name_of(manifest)


# Serving


def test_serve_config_holds_only_what_ray_serve_reads(manifests):
    for service in of_kind(manifests, "RayService"):
        for application in serve_config.load(service["spec"]["serveConfigV2"]).applications:
            assert not application.deployments, "numbers of a deployment are said in `args`, and nowhere a second time"


def test_the_application_accepts_its_args(manifests):
    for service in of_kind(manifests, "RayService"):
        assert serve_config.deployments(service["spec"]["serveConfigV2"]), name_of(service)


def test_every_deployment_finds_a_ray_node(manifests):
    for service in of_kind(manifests, "RayService"):
        for deployment in serve_config.deployments(service["spec"]["serveConfigV2"]):
            assert list(nodes_for(deployment, service)), f"no group of {name_of(service)} can hold `{deployment.name}`"


def test_groups_grow_as_far_as_their_models(manifests):
    """Ray Serve asks for max_replicas of each; a group that stops earlier leaves the last of them pending for ever."""
    for service in of_kind(manifests, "RayService"):
        asked = Counter()
        for deployment in serve_config.deployments(service["spec"]["serveConfigV2"]):
            scaling = deployment._deployment_config.autoscaling_config
            replicas = scaling.max_replicas if scaling else deployment.num_replicas
            for resource, amount in deployment.ray_actor_options.get("resources", {}).items():
                asked[resource] += amount * replicas
        offered = Counter()
        for group in ray_cluster(service)["workerGroupSpecs"]:
            for resource, amount in custom_resources(group).items():
                offered[resource] += float(amount) * group["maxReplicas"]
        assert asked <= offered, name_of(service)


def test_time_outs_are_those_of_the_chain(manifests):
    """Each part outlasts the one inside it: the preStop hook, then Ray's drain of the node, then the kubelet."""
    for service in of_kind(manifests, "RayService"):
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        chain = Timeouts.of(read_args(application["args"]))
        assert chain.deletion_s <= service["spec"]["rayClusterDeletionDelaySeconds"], name_of(service)
        (environment,) = (
            one["data"] for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"].startswith("mpt-ray-env")
        )
        assert chain.environment().items() <= environment.items()
        for pod in pods_of(service):
            (container,) = pod.spec["containers"]
            own = {one["name"]: one["value"] for one in container.get("env", [])}
            node_s = int((environment | own)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert (node_s, pre_stop_s(pod)) == (HEAD_S if pod.role == "head" else chain.node_s, PRE_STOP_S), str(pod)
            assert grace_s(pod) == node_s + chain.pod_s - chain.node_s, str(pod)


def test_a_node_outlives_the_answers_of_its_replicas(manifests):
    """By what Ray does: a draining node's replica is stopped at the latest its own time-out before the node's."""
    for service in of_kind(manifests, "RayService"):
        for deployment in serve_config.deployments(service["spec"]["serveConfigV2"]):
            drain_s = deployment._deployment_config.graceful_shutdown_timeout_s
            for pod in nodes_for(deployment, service):
                if pod.role != "head":
                    assert pre_stop_s(pod) + REPLACEMENT_S + drain_s < grace_s(pod), f"`{deployment.name}` on {pod}"


def test_a_pod_outlives_its_prestop_hook(manifests):
    for pod in pods(manifests):
        assert pre_stop_s(pod) < grace_s(pod), str(pod)


def grace_s(pod: Pod) -> int:
    return pod.spec.get("terminationGracePeriodSeconds", 30)


def pre_stop_s(pod: Pod) -> int:
    """The longest sleep of a preStop hook, written as `sleep: {seconds}` or as a command with `sleep N`."""
    longest = 0
    for container in pod.spec["containers"]:
        hook = container.get("lifecycle", {}).get("preStop", {})
        command = " ".join(hook.get("exec", {}).get("command", []))
        longest = max(
            longest, hook.get("sleep", {}).get("seconds", 0), *map(int, re.findall(r"\bsleep (\d+)", command))
        )
    return longest


def nodes_for(deployment: Deployment, service: dict) -> Iterator[Pod]:
    """The Ray nodes on which Ray may put a replica: those with every kind of resource it asks for."""
    cluster = ray_cluster(service)
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    wanted = deployment.ray_actor_options
    for pod, group in zip(pods_of(service), groups, strict=True):
        params, custom = group.get("rayStartParams", {}), custom_resources(group)
        cpus = Decimal(params.get("num-cpus", custom.get("CPU", 1)))
        gpus = int(params.get("num-gpus", custom.get("GPU", sum(map(gpus_of, pod.spec["containers"])))))
        if (
            set(wanted.get("resources", {})) <= set(custom)
            and (cpus or not wanted.get("num_cpus"))
            and (gpus or not wanted.get("num_gpus"))
            and wanted.get("label_selector", {}).items() <= group.get("labels", {}).items()
        ):
            yield pod


def custom_resources(group: dict) -> dict:
    """{"gpu-24": 1}, from either place of a group; in rayStartParams it is JSON inside quotes for a shell."""
    text = group.get("rayStartParams", {}).get("resources", "{}").strip("'\"").replace("\\", "")
    return json.loads(text) | group.get("resources", {})


def gpus_of(container: dict) -> int:
    return int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))


def test_pods_with_gpus_find_nodes_of_their_size_and_others_need_none(manifests):
    """Nodes with GPUs carry a taint on most clouds, and nvidia.com/gpu counts GPUs of every size alike."""
    for pod in pods(manifests):
        n_gpus = sum(map(gpus_of, pod.spec["containers"]))
        size = pod.spec.get("nodeSelector", {}).get("mpt-gpu-memory")
        tolerated = [each["key"] for each in pod.spec.get("tolerations", [])]
        assert (size in ("24", "80")) == (tolerated == ["nvidia.com/gpu"]) == bool(n_gpus), pod.labels
        if pod.labels.get("mpt-group", "").startswith("gpu-"):
            assert pod.labels["mpt-group"] == f"gpu-{size}"


def test_haproxys_metrics_are_let_out_where_it_runs(manifests):
    """Ray starts a HAProxy on every node with a router; its exporter is on Ray's default port."""
    policies = {policy["metadata"]["name"]: policy for policy in of_kind(manifests, "NetworkPolicy")}
    serving = [pod for pod in pods(manifests) if pod.owner["kind"] == "RayService"]
    for pod in serving:
        ports = {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", [])}
        [rule] = policies["metrics-from-prometheus"]["spec"]["ingress"]
        assert ports["haproxy"] == RAY_SERVE_HAPROXY_METRICS_PORT
        assert ports["haproxy"] in {port["port"] for port in rule["ports"]}
    for monitor in of_kind(manifests, "PodMonitor"):
        assert "haproxy" in {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]}


def test_gateway_never_cuts_a_stream(manifests):
    """0s is Gateway API's way to say: no limit. A StoryWriter answer takes minutes."""
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            if any(backend["name"].endswith("-serve-svc") for backend in rule.get("backendRefs", [])):
                timeouts = rule.get("timeouts", {})
                assert timeouts.get("request") == "0s", name_of(route)
                assert timeouts.get("backendRequest", "0s") == "0s", name_of(route)


# Names that must exist


def test_every_name_referred_to_exists(manifests):
    known = manifests if of_kind(manifests, "RayService") else [*manifests, *render("overlays/production")]
    exist = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in known}
    exist |= {("Secret", name) for name in created_by_hand()} | {("ConfigMap", "kube-root-ca.crt")}  # Kubernetes' own
    for service in of_kind(known, "RayService"):  # what KubeRay makes for it
        exist |= {("Service", f"{service['metadata']['name']}-{suffix}") for suffix in ("serve-svc", "head-svc")}
    missing = {f"{name_of(manifest)} -> {kind}/{name}" for manifest in manifests for kind, name in references(manifest)}
    assert {line for line in missing if tuple(line.split(" -> ")[1].split("/")) not in exist} == set()


def created_by_hand() -> set[str]:
    """Secrets that nobody commits: those k8s/README.md has the `kubectl create secret` of."""
    readme = ROOT / "k8s/README.md"
    return set(re.findall(r"create secret (?:generic|tls) ([\w-]+)", readme.read_text() if readme.exists() else ""))


def references(manifest: dict) -> Iterator[tuple[str, str]]:
    """(kind, name) of each object this one names; an optional one too, since a typo in it would show nowhere."""
    by_key = {
        "configMap": "ConfigMap",
        "configMapRef": "ConfigMap",
        "configMapKeyRef": "ConfigMap",
        "secret": "Secret",
        "secretRef": "Secret",
        "secretKeyRef": "Secret",
        "authOptions": "Secret",
        "credentials": "Secret",
        "persistentVolumeClaim": "PersistentVolumeClaim",
    }
    by_string = {
        "serviceAccountName": "ServiceAccount",
        "priorityClassName": "PriorityClass",
        "kueue.x-k8s.io/queue-name": "LocalQueue",
        "kueue.x-k8s.io/priority-class": "WorkloadPriorityClass",
    }
    by_object = {"runtimeRef": "ClusterTrainingRuntime", "scaleTargetRef": "Deployment"}
    by_list = {
        "imagePullSecrets": "Secret",
        "backendRefs": "Service",
        "parentRefs": "Gateway",
        "certificateRefs": "Secret",
    }
    for part in dicts(manifest):
        for key, value in part.items():
            if key in by_key and isinstance(value, dict):
                names = [value[field] for field in ("name", "secretName", "claimName") if field in value]
                yield from ((by_key[key], name) for name in names)
            elif key in by_string and isinstance(value, str) and not value.startswith("system-"):
                yield by_string[key], value
            elif key in by_object and isinstance(value, dict):
                yield value.get("kind", by_object[key]), value["name"]
            elif key in by_list and isinstance(value, list):
                yield from ((one.get("kind", by_list[key]), one["name"]) for one in value)


def test_every_selector_finds_a_pod(manifests):
    """A PodDisruptionBudget, a NetworkPolicy, a Service or a PodMonitor that selects nothing does nothing, silently."""
    labels = [pod.labels for pod in pods(manifests)]
    for manifest in of_kind(manifests, "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "Service"):
        selector = manifest["spec"].get("selector") or manifest["spec"].get("podSelector") or {}
        if manifest["kind"] == "Service":
            selector = {"matchLabels": selector}
        assert any(selects(selector, one) for one in labels), name_of(manifest)


def selects(selector: dict, labels: dict) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for rule in selector.get("matchExpressions", []):
        has = rule["key"] in labels and (
            rule["operator"] in ("Exists", "DoesNotExist") or labels[rule["key"]] in rule["values"]
        )
        if has != (rule["operator"] in ("In", "Exists")):
            return False
    return True


def test_every_mount_has_its_volume(manifests):
    for pod in pods(manifests):
        claims = pod.owner["spec"].get("volumeClaimTemplates", []) if pod.owner["kind"] == "StatefulSet" else []
        volumes = [volume["name"] for volume in pod.spec.get("volumes", [])]
        volumes += [claim["metadata"]["name"] for claim in claims]
        containers = [*pod.containers, *autoscaler(pod)]
        mounts = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
        assert sorted(mounts) == sorted(volumes), f"{pod} mounts {mounts} of {volumes}"


def test_every_port_called_by_name_has_a_pod(manifests):
    for manifest in of_kind(manifests, "Service", "PodMonitor"):
        spec = manifest["spec"]
        selector = spec["selector"] if manifest["kind"] == "PodMonitor" else {"matchLabels": spec.get("selector", {})}
        selected = [
            container for pod in pods(manifests) if selects(selector, pod.labels) for container in pod.containers
        ]
        named = {port.get("name") for container in selected for port in container.get("ports", [])}
        called = {port.get("targetPort") for port in spec.get("ports", [])}
        called |= {endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", [])}
        assert {port for port in called if isinstance(port, str)} <= named, name_of(manifest)


# Images and sizes


def test_every_image_is_pinned(manifests):
    for image in images(manifests):
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        assert "@sha256:" in image or tag not in ("", "latest"), image


def test_the_images_stand_on_what_a_build_may_pin():
    """By digest, through arguments that k8s/README.md names; and every package of theirs has a pin."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)$", text, re.MULTILINE))
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    bases = {base for base, _ in stages} - {stage for _, stage in stages}
    assert bases == {"${PYTHON_IMAGE}", "${CUDA_IMAGE}"}
    commands = (ROOT / "k8s" / "README.md").read_text()
    for base in bases:
        name = base.strip("${}")
        assert re.fullmatch(r"[\w/]+:[\w.]+-[\w.-]+", arguments[name])
        assert f'{name}="$(pinned {arguments[name]})"' in commands
    installs = [line for line in text.splitlines() if "pip install" in line and not line.startswith("#")]
    assert len(installs) == 5 and all("-c /src/constraints.txt" in line for line in installs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for extra in {*arguments["CPU_EXTRAS"].split(","), *arguments["CUDA_EXTRAS"].split(",")}:
        for requirement in extras[extra]:
            assert re.match(r"[\w.-]+", requirement)[0] in pinned, requirement


def test_our_images_are_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    everything = [*training_jobs(), *(manifest for folder in FOLDERS for manifest in render(folder))]
    ours = {image for image in images(everything) if OUR_IMAGE.search(image)}
    assert ours, "no image of our own: has the naming changed?"
    assert {OUR_IMAGE.search(image)[1] for image in ours} == {version}, ours


def images(manifests: list[dict]) -> set[str]:
    return {part["image"] for part in dicts(manifests) if isinstance(part.get("image"), str)}


def test_requests_stay_within_limits(manifests):
    for manifest in manifests:
        for part in dicts(manifest):
            requests, limits = part.get("requests", {}), part.get("limits", {})
            for resource in requests.keys() & limits.keys():
                assert quantity(requests[resource]) <= quantity(limits[resource]), (name_of(manifest), resource)
            for resource in (requests.keys() | limits.keys()) & {"nvidia.com/gpu"}:  # no GPU is ever overcommitted
                assert resource in limits, name_of(manifest)
                assert requests.get(resource, limits[resource]) == limits[resource], name_of(manifest)


def test_every_container_says_what_it_needs(manifests):
    """A container without requests is the first to be evicted, and one without a memory limit takes its node along."""
    for pod in pods(manifests):
        for container in pod.containers:
            resources = container.get("resources", {})
            asked = resources.get("requests", {}).keys() | resources.get("limits", {}).keys()
            assert {"cpu", "memory"} <= asked, f"{pod}: {container['name']}"
            assert "memory" in resources.get("limits", {}), f"{pod}: {container['name']}"


def quantity(text: str | int) -> Decimal:
    number, suffix = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()
    powers = {"m": Decimal("0.001"), "": 1, **{s: 1000**i for i, s in enumerate("kMGTP", 1)}}
    return Decimal(number) * (powers | {f"{s}i": 1024**i for i, s in enumerate("KMGTP", 1)})[suffix]


# Security


def test_every_container_is_confined(manifests):
    """The `restricted` Pod Security Standard, and a root file system that cannot be written."""
    for pod in pods(manifests):
        shared = pod.spec.get("securityContext", {})
        for container in [*pod.containers, *autoscaler(pod)]:
            own = shared | container.get("securityContext", {})
            found = {
                "runAsNonRoot": own.get("runAsNonRoot"),
                "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem"),
                "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation"),
                "drop": own.get("capabilities", {}).get("drop"),
                "seccomp": own.get("seccompProfile", {}).get("type"),
            }
            assert found == {
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "drop": ["ALL"],
                "seccomp": "RuntimeDefault",
            }, f"{pod}: {container['name']}"
            assert not any("hostPort" in port for port in container.get("ports", [])), f"{pod}: {container['name']}"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), str(pod)
        assert not any("hostPath" in volume for volume in pod.spec.get("volumes", [])), str(pod)


def test_no_pod_holds_a_token_it_does_not_need(manifests):
    for pod in pods(manifests):
        assert pod.spec.get("automountServiceAccountToken") is False, str(pod)
        tokens = {
            volume["name"]
            for volume in pod.spec.get("volumes", [])
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        assert not tokens or ((pod.owner["kind"], pod.role) in TOKENS and autoscaler(pod)), str(pod)
        for container in pod.containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert not mounted & tokens, f"{pod}: {container['name']}"


def test_what_runs_code_is_reachable_from_nowhere(manifests):
    """Ray's job API, client and GCS execute what they are sent (CVE-2023-48022): no route, no open Service."""
    ports = [port for pod in pods(manifests) for container in pod.containers for port in container.get("ports", [])]
    closed = CLOSED_PORTS.keys() | {port.get("name") for port in ports if port["containerPort"] in CLOSED_PORTS}
    for service in services(manifests):
        if service["spec"].get("type") in ("LoadBalancer", "NodePort"):
            for port in service["spec"]["ports"]:
                assert not {port["port"], port.get("targetPort", port["port"])} & closed, name_of(service)
    for route in of_kind(manifests, "HTTPRoute"):
        for backend in (one for rule in route["spec"]["rules"] for one in rule.get("backendRefs", [])):
            assert backend["port"] not in CLOSED_PORTS, name_of(route)
            assert not backend["name"].endswith("-head-svc"), name_of(route)
    for ray in of_kind(manifests, "RayService", "RayJob"):
        head = ray_cluster(ray)["headGroupSpec"]
        assert head.get("serviceType", "ClusterIP") == "ClusterIP", name_of(ray)
        assert not head.get("enableIngress"), name_of(ray)
    assert not of_kind(manifests, "Ingress")


def services(manifests: list[dict]) -> list[dict]:
    """Services, also those written inside a RayService."""
    inside = [part[key] for part in dicts(manifests) for key in ("serveService", "headService") if key in part]
    return [*of_kind(manifests, "Service"), *({"kind": "Service", "metadata": {"name": "?"}, **one} for one in inside)]


def test_every_pod_is_denied_by_default(manifests):
    """One policy of each namespace selects every pod and allows nothing, so that all that is allowed is written."""
    known = manifests if of_kind(manifests, "RayService") else [*manifests, *render("overlays/production")]
    denied = {
        policy["metadata"].get("namespace")
        for policy in of_kind(known, "NetworkPolicy")
        if not policy["spec"]["podSelector"]
        and set(policy["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
    }
    assert {pod.owner["metadata"].get("namespace") for pod in pods(manifests)} <= denied


def test_closed_ports_are_open_only_to_ray_itself(manifests):
    """No policy lets any but pods of the same namespace, and KubeRay's operator, reach the ports that run code."""
    operator = {"kubernetes.io/metadata.name": "kuberay-system"}
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("ports") or any(map(opens_a_closed_port, rule["ports"])):
                for peer in rule.get("from") or [{}]:
                    outside = peer.get("namespaceSelector", {}).get("matchLabels")
                    assert peer.get("podSelector"), f"{name_of(policy)} lets anybody in"
                    assert "namespaceSelector" not in peer or outside == operator, name_of(policy)


def opens_a_closed_port(port: dict) -> bool:
    first = port.get("port")
    if not isinstance(first, int):
        return True  # all ports, or a name that any pod may give to any port
    return any(first <= closed <= port.get("endPort", first) for closed in CLOSED_PORTS)


def test_no_secret_is_committed(manifests):
    assert not of_kind(manifests, "Secret")

"""The chart: linted, rendered by the real helm, every manifest held strictly against Kubernetes' own schemas."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from starlette.routing import Route

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.serving import DRAIN_SECONDS
from support.fake_backend import FakeBackend

from .conftest import DOCKER, read_command, run_tool

pytestmark = pytest.mark.claim("chart")

CHART = DOCKER / "kubernetes" / "hypergen"
INK = {"name": "ink", "file": "ink.safetensors", "scale": 0.8}
AFFINITY = {
    "requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
    }
}
# From the oldest that Chart.yaml allows to a new one.
KUBERNETES = ("1.28", "1.37")
VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scaled": {
        "gateway": {"autoscaling": {"enabled": True}, "service": {"type": "LoadBalancer", "port": 443}},
        "triton": {"replicas": 3, "autoscaling": {"enabled": True, "imagesPerReplica": 12}},
        "repository": {"accessMode": "ReadWriteMany", "storageClass": "fast", "size": "1Ti"},
        "gpu": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}},
    },
    "gated model": {
        "model": {"id": "acme/gated", "sizes": ["1024x1024", "768x1344"], "hubTokenSecret": "hub"},
        "images": {"pullSecrets": ["registry"]},
    },
    "browsers, links, LoRAs and a shallow UNet": {
        "gateway": {
            "corsOrigins": ["https://app.example.com", "http://localhost:3000"],
            "links": {"publicUrl": "https://images.example.com", "bucket": "s3://images/made", "secret": "bucket"},
        },
        "model": {
            "deepCache": True,
            "loras": [INK, {"name": "words", "file": "trained/words", "scale": 1}],
            "lorasClaim": "loras",
        },
    },
    "OpenShift without a way to the hub": {
        "model": {
            "id": "/checkpoints/flux.safetensors",
            "checkpointsClaim": "checkpoints",
            "loraRank": 64,
            "vae": "/checkpoints/ae.safetensors",
            "previewVae": "madebyollin/taef1",
            "textEncoders": ["/checkpoints/flux", "/checkpoints/t5xxl_fp8.safetensors"],
            "embeddings": [{"name": "toy", "file": "/checkpoints/toy.safetensors"}],
        },
        "export": {"env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]},
        "repository": {"existingClaim": "models"},
        "security": {"fixedUsers": False},
        "triton": {"surge": True},
    },
    "k3s behind a proxy": {
        "gateway": {
            "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
            "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "tolerations": [{"key": "edge", "operator": "Exists"}],
            "affinity": {"nodeAffinity": AFFINITY},
            "service": {"sticky": True},
        },
        "triton": {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]},
        "export": {
            "env": [
                {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
                {"name": "HF_ENDPOINT", "valueFrom": {"configMapKeyRef": {"name": "hub", "key": "mirror"}}},
            ]
        },
        "model": {"hubTokenSecret": "hub"},
        "gpu": {"runtimeClassName": "nvidia", "affinity": {"nodeAffinity": AFFINITY}},
    },
    # YAML would read each of these as a number.
    "names that look like numbers": {
        "model": {
            "checkpointsClaim": "100",
            "hubTokenSecret": "1e3",
            "loras": [INK],
            "lorasClaim": "0x1",
        },
        "apiKey": {"secret": "123", "key": "456"},
        "images": {"pullSecrets": ["7"]},
        "gateway": {"links": {"bucket": "s3://images", "secret": "8"}},
        "repository": {"existingClaim": "9"},
        "gpu": {"runtimeClassName": "10"},
        "networkPolicy": {"prometheusNamespace": "11"},
    },
    "numbered storage": {"repository": {"storageClass": "12"}},
    "a transformer": {
        "model": {"id": "Qwen/Qwen-Image", "dtype": "bfloat16", "sizes": ["1328x1328"], "maxBatchSize": 1},
        "triton": {"resources": {"limits": {"memory": "96Gi"}}},
        "export": {"resources": {"limits": {"memory": "160Gi"}}, "deadlineSeconds": 14400},
        "repository": {"size": "200Gi"},
    },
    "repository of somebody else": {
        "export": {"enabled": False},
        "repository": {"existingClaim": "models", "folder": "sdxl/l40s"},
        "networkPolicy": {"enabled": False},
        "gpu": {"tolerations": []},
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a type that no engine computes in": ({"model": {"dtype": "int4"}}, "/model/dtype"),
    "no size": ({"model": {"sizes": []}}, "/model/sizes"),
    "a size of one number": ({"model": {"sizes": ["512"]}}, "/model/sizes/0"),
    "the same size twice": ({"model": {"sizes": ["512x512", "512x512"]}}, "/model/sizes"),
    "a batch beyond what export takes": ({"model": {"maxBatchSize": 129}}, "/model/maxBatchSize"),
    "no key": ({"apiKey": {"secret": ""}}, "/apiKey/secret"),
    "a key itself in place of its Secret": ({"apiKey": {"secret": "sk-ABC_123"}}, "/apiKey/secret"),
    "a misspelt value": ({"gateway": {"replica": 3}}, "/gateway"),
    "no gateway": ({"gateway": {"replicas": 0}}, "/gateway/replicas"),
    "a type of service that does not exist": ({"gateway": {"service": {"type": "Public"}}}, "/gateway/service/type"),
    "an amount of no unit": ({"triton": {"sharedMemory": "lots"}}, "/triton/sharedMemory"),
    "a drain that ends before clients have gone": ({"triton": {"drain": {"announceSeconds": 10}}}, "announceSeconds"),
    "replicas that cannot share the volume": ({"triton": {"replicas": 2}}, "/repository/accessMode"),
    "scaling that cannot share the volume": (
        {"triton": {"autoscaling": {"enabled": True}}},
        "/repository/accessMode",
    ),
    "an embedding out of its volume": (
        {"model": {"embeddings": [{"name": "toy", "file": "/etc/toy.pt"}]}},
        "/model/embeddings/0/file",
    ),
    "LoRAs from nowhere": ({"model": {"loras": [INK]}}, "/model/lorasClaim"),
    "embeddings from nowhere": (
        {"model": {"embeddings": [{"name": "toy", "file": "/checkpoints/toy.safetensors"}]}},
        "/model/checkpointsClaim",
    ),
    "a VAE from nowhere": ({"model": {"vae": "/checkpoints/vae.safetensors"}}, "/model/checkpointsClaim"),
    "a text encoder from nowhere": (
        {"model": {"textEncoders": ["hub/pipeline", "/checkpoints/t5.safetensors"]}},
        "/model/checkpointsClaim",
    ),
    "a LoRA out of its volume": ({"model": {"loras": [INK | {"file": "../ink"}], "lorasClaim": "l"}}, "/loras/0/file"),
    "a LoRA that is not there": ({"model": {"loras": [INK | {"scale": 0}], "lorasClaim": "l"}}, "/loras/0/scale"),
    "a page in place of its website": ({"gateway": {"corsOrigins": ["https://a.example/x"]}}, "/corsOrigins/0"),
    "a bucket of another kind": ({"gateway": {"links": {"bucket": "gs://images"}}}, "/gateway/links/bucket"),
    "a variable that no shell could name": ({"export": {"env": [{"name": "A-B", "value": "1"}]}}, "/export/env/0"),
    "a number in place of a variable's text": ({"gateway": {"env": [{"name": "A", "value": 1}]}}, "/gateway/env/0"),
    "nobody who exports": ({"export": {"enabled": False}}, "/repository/folder"),
    "a way out of the volume": ({"repository": {"folder": "../other"}}, "/repository/folder"),
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("values")
    return {name: parse(render(values, folder / "values.yaml")) for name, values in VALUE_SETS.items()}


def render(values: dict[str, Any], file: Path) -> str:
    """`helm template` with these values over the chart's own. Fails with what helm says."""
    # As JSON, since PyYAML leaves texts such as 1e3 without quotes.
    file.write_text(json.dumps(values))
    done = run_tool("helm", "template", "rel", CHART, "--namespace", "images", "--values", file)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    return done.stdout


def parse(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def one(documents: list[dict[str, Any]], kind: str, component: str) -> dict[str, Any]:
    label = "app.kubernetes.io/component"
    (found,) = [
        document
        for document in documents
        if document["kind"] == kind and document["metadata"]["labels"][label] == component
    ]
    return found


def pod(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]["template"]["spec"]
    return spec


def container(document: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(document)["containers"]
    found: dict[str, Any] = only
    return found


def exporter(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The container that exports before Triton starts."""
    (only,) = pod(one(documents, "Deployment", "triton"))["initContainers"]
    found: dict[str, Any] = only
    return found


def exported_by(documents: list[dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder that it writes, and its options."""
    _, folder, *words = exporter(documents)["args"]
    return Path(folder), read_command([*words, "--output", folder])


def test_helm_lints_it_strictly() -> None:
    judged = run_tool("helm", "lint", "--strict", CHART)
    assert judged.returncode == 0, judged.stdout + judged.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_manifest_is_valid_strictly(manifests: dict[str, list[dict[str, Any]]], name: str, version: str) -> None:
    for document in manifests[name]:
        kubernetes_validate.validate(document, version, strict=True)


def test_what_is_made_follows_the_values(manifests: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {name: sorted(document["kind"] for document in documents) for name, documents in manifests.items()}
    served = ["Deployment"] * 2 + ["NetworkPolicy"] + ["PodDisruptionBudget"] * 2 + ["Service"] * 2
    assert kinds["defaults"] == sorted([*served, "PersistentVolumeClaim"])
    assert kinds["scaled"] == sorted([*served, "PersistentVolumeClaim", *["HorizontalPodAutoscaler"] * 2])
    assert kinds["repository of somebody else"] == [kind for kind in served if kind != "NetworkPolicy"]


@pytest.mark.parametrize(("values", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_values_are_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        render(values, tmp_path / "values.yaml")


def test_no_pod_is_root_or_knows_the_cluster(manifests: dict[str, list[dict[str, Any]]]) -> None:
    for document in manifests["defaults"]:
        if document["kind"] != "Deployment":
            continue
        assert pod(document)["automountServiceAccountToken"] is False
        assert pod(document)["securityContext"]["runAsNonRoot"] is True
        assert pod(document)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in (container(document), *pod(document).get("initContainers", [])):
            context = each["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})


def test_users_are_those_of_the_images(manifests: dict[str, list[dict[str, Any]]]) -> None:
    documents = manifests["defaults"]
    for component, images in (("gateway", ["gateway"]), ("triton", ["triton", "export"])):
        user = pod(one(documents, "Deployment", component))["securityContext"]["runAsUser"]
        for image in images:
            assert f"\nUSER {user}:{user}\n" in (DOCKER / f"{image}.Dockerfile").read_text()


def test_openshift_may_choose_the_users(manifests: dict[str, list[dict[str, Any]]]) -> None:
    for component in ("gateway", "triton"):
        context = pod(one(manifests["OpenShift without a way to the hub"], "Deployment", component))["securityContext"]
        assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for image in ("cpu", "export", "triton"):
        written = re.findall(r"install --directory --owner=\d+ (.*)", (DOCKER / f"{image}.Dockerfile").read_text())
        assert written
        assert all(options.startswith("--group=0 --mode=775") for options in written)


def test_the_gateway_understands_its_arguments(manifests: dict[str, list[dict[str, Any]]]) -> None:
    gateway = one(manifests["defaults"], "Deployment", "gateway")
    options = read_command(container(gateway)["args"])
    service = one(manifests["defaults"], "Service", "triton")
    assert options["triton_url"] == f"dns:///{service['metadata']['name']}.images.svc:8001"
    assert service["spec"]["clusterIP"] == "None"
    assert {port["port"] for port in service["spec"]["ports"]} == {8001, 8002}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(gateway)["volumeMounts"]}
    assert str(options["api_key_file"]) == f"{mounts['api-key']}/api_key"
    assert container(gateway)["securityContext"]["readOnlyRootFilesystem"] is True


def test_websites_links_and_loras_arrive_where_they_are_read(manifests: dict[str, list[dict[str, Any]]]) -> None:
    documents = manifests["browsers, links, LoRAs and a shallow UNet"]
    gateway = container(one(documents, "Deployment", "gateway"))
    served = read_command(gateway["args"])
    given = {name: served[name] for name in ("cors_origins", "public_url", "link_bucket")}
    assert gateway["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert (given["public_url"], given["link_bucket"]) == ("https://images.example.com", "s3://images/made")
    assert served["cors_origins"] == ("https://app.example.com", "http://localhost:3000")
    assert Config(**given)
    _, options = exported_by(documents)
    assert options["deep_cache"] is True
    assert options["loras"] == ("ink=/loras/ink.safetensors:0.8", "words=/loras/trained/words:1")
    assert mounted_for_export(documents, "loras") == ("/loras", {"claimName": "loras", "readOnly": True})


def mounted_for_export(documents: list[dict[str, Any]], name: str) -> tuple[str, dict[str, Any]]:
    """Where the exporter finds a claim, which it only reads."""
    (mount,) = [mount for mount in exporter(documents)["volumeMounts"] if mount["name"] == name]
    volumes = pod(one(documents, "Deployment", "triton"))["volumes"]
    (volume,) = [volume for volume in volumes if volume["name"] == name]
    assert mount["readOnly"] is True
    return mount["mountPath"], volume["persistentVolumeClaim"]


def test_a_checkpoint_of_ones_own_is_exported_without_the_hub(manifests: dict[str, list[dict[str, Any]]]) -> None:
    documents = manifests["OpenShift without a way to the hub"]
    path, claim = mounted_for_export(documents, "checkpoints")
    assert claim == {"claimName": "checkpoints", "readOnly": True}
    _, options = exported_by(documents)
    assert options["model"] == f"{path}/flux.safetensors"
    assert (options["vae"], options["preview_vae"]) == (f"{path}/ae.safetensors", "madebyollin/taef1")
    assert options["text_encoders"] == (f"{path}/flux", f"{path}/t5xxl_fp8.safetensors")
    assert options["lora_rank"] == 64
    assert options["embeddings"] == (f"toy={path}/toy.safetensors",)
    assert exporter(documents)["env"] == [{"name": "HF_HUB_OFFLINE", "value": "1"}]
    assert "PersistentVolumeClaim" not in {document["kind"] for document in documents}


def test_variables_nodes_and_the_runtime_arrive(manifests: dict[str, list[dict[str, Any]]]) -> None:
    documents = manifests["k3s behind a proxy"]
    gateway, triton = (one(documents, "Deployment", name) for name in ("gateway", "triton"))
    assert container(gateway)["env"] == [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}]
    assert container(triton)["env"] == [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    assert [entry["name"] for entry in exporter(documents)["env"]] == ["HF_TOKEN", "HTTPS_PROXY", "HF_ENDPOINT"]
    assert pod(triton)["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in pod(gateway)
    assert pod(gateway)["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert pod(gateway)["tolerations"] == [{"key": "edge", "operator": "Exists"}]
    assert pod(gateway)["affinity"] == pod(triton)["affinity"] == {"nodeAffinity": AFFINITY}


def test_the_key_is_named_and_never_written_down(manifests: dict[str, list[dict[str, Any]]]) -> None:
    gateway = one(manifests["defaults"], "Deployment", "gateway")
    (volume,) = [volume for volume in pod(gateway)["volumes"] if volume["name"] == "api-key"]
    assert volume["secret"]["secretName"] == "hypergen-api-key"
    assert "Secret" not in {document["kind"] for document in manifests["defaults"]}


def test_the_export_understands_its_arguments(manifests: dict[str, list[dict[str, Any]]]) -> None:
    _, options = exported_by(manifests["gated model"])
    assert (options["model"], options["dtype"], options["engine"]) == ("acme/gated", "float16", "tensorrt")
    assert options["max_batch_size"] == 4
    _, options = exported_by(manifests["a transformer"])
    assert (options["model"], options["dtype"], options["sizes"]) == ("Qwen/Qwen-Image", "bfloat16", "1328x1328")


def test_triton_serves_the_folder_that_the_export_writes(manifests: dict[str, list[dict[str, Any]]]) -> None:
    written, _ = exported_by(manifests["defaults"])
    mounts = container(one(manifests["defaults"], "Deployment", "triton"))["volumeMounts"]
    (mount,) = [mount for mount in mounts if mount["name"] == "repository"]
    assert written == Path("/models") / mount["subPath"]
    assert f"--model-repository={mount['mountPath']}" in (DOCKER / "triton.Dockerfile").read_text()
    others = manifests["repository of somebody else"]
    assert container(one(others, "Deployment", "triton"))["volumeMounts"][0]["subPath"] == "sdxl/l40s"


def test_only_what_engines_depend_on_exports_anew(tmp_path: Path) -> None:
    def folder(values: dict[str, Any]) -> str:
        return str(exported_by(parse(render(values, tmp_path / "values.yaml")))[0])

    base = folder({})
    assert folder({"gateway": {"replicas": 5}, "model": {"hubTokenSecret": "hub", "lorasClaim": "loras"}}) == base
    others: list[dict[str, Any]] = [
        {"model": {"id": "acme/other"}},
        {"model": {"sizes": ["768x768"]}},
        {"model": {"deepCache": True}},
        {"model": {"loras": [INK], "lorasClaim": "loras"}},
        {"images": {"export": {"tag": "0.2.0"}}},
        {"gpu": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}},
    ]
    assert len({base, *map(folder, others)}) == 1 + len(others)


def test_nothing_depends_on_hooks_or_on_what_the_cluster_has(manifests: dict[str, list[dict[str, Any]]]) -> None:
    """Argo CD runs hooks at each synchronisation and deletes those of the last one; its `lookup` finds nothing."""
    for document in (document for documents in manifests.values() for document in documents):
        assert "helm.sh/hook" not in document["metadata"].get("annotations", {})
    assert not [file.name for file in (CHART / "templates").iterdir() if "lookup" in file.read_text()]
    claim = one(manifests["defaults"], "PersistentVolumeClaim", "repository")
    assert claim["metadata"]["annotations"] == {
        "helm.sh/resource-policy": "keep",
        "argocd.argoproj.io/sync-options": "Delete=false,Prune=false",
    }


def test_an_export_that_exists_is_not_repeated(manifests: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The container's command itself, with a stand-in for `hypergen` that says how it was called."""
    made = exporter(manifests["defaults"])
    entry_point, *command = made["command"]
    assert f'ENTRYPOINT ["{entry_point}"' in (DOCKER / "export.Dockerfile").read_text()
    (tmp_path / "hypergen").write_text('#!/bin/sh\nmkdir -p "$OUT" && echo {} >"$OUT/hypergen.json" && echo "$@"\n')
    (tmp_path / "hypergen").chmod(0o755)
    script, folder, *words = made["args"]
    output = tmp_path / Path(folder).name
    command = [word.replace("/models", str(tmp_path)) for word in command]

    def run() -> str:
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUT": str(output)}
        words_given = [*command, script, str(output), *words]
        return subprocess.run(words_given, env=environment, capture_output=True, text=True, check=True).stdout

    assert run() == f"{' '.join(words)} --output {output}\n"
    assert run() == ""


def test_an_upgrade_waits_for_the_export(manifests: dict[str, list[dict[str, Any]]]) -> None:
    default, surging = (
        one(manifests[name], "Deployment", "triton")["spec"]
        for name in ("defaults", "OpenShift without a way to the hub")
    )
    assert default["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert surging["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert default["progressDeadlineSeconds"] > 7200 + 900


def test_gpus_go_to_triton_and_the_export_alone(manifests: dict[str, list[dict[str, Any]]]) -> None:
    gateway, triton = (one(manifests["scaled"], "Deployment", name) for name in ("gateway", "triton"))
    assert "nvidia.com/gpu" not in container(gateway)["resources"]["limits"]
    for each in (container(triton), exporter(manifests["scaled"])):
        assert each["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod(triton)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
    assert pod(triton)["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_only_gateways_speak_to_triton_and_only_prometheus_reads_its_metrics(
    manifests: dict[str, list[dict[str, Any]]],
) -> None:
    policy = one(manifests["defaults"], "NetworkPolicy", "triton")["spec"]
    triton = one(manifests["defaults"], "Deployment", "triton")
    assert policy["podSelector"] == triton["spec"]["selector"]
    gateway = one(manifests["defaults"], "Deployment", "gateway")
    assert policy["ingress"] == [
        {
            "from": [{"podSelector": gateway["spec"]["selector"]}],
            "ports": [{"protocol": "TCP", "port": "grpc"}],
        },
        {
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "ports": [{"protocol": "TCP", "port": "metrics"}],
        },
    ]
    ports = {port["name"]: port["containerPort"] for port in container(triton)["ports"]}
    assert (ports["grpc"], ports["metrics"]) == (8001, 8002)


def test_the_gateways_probes_ask_for_routes_that_it_has(manifests: dict[str, list[dict[str, Any]]]) -> None:
    routes = {route.path for route in create_app(Config(), FakeBackend()).routes if isinstance(route, Route)}
    gateway = container(one(manifests["defaults"], "Deployment", "gateway"))
    asked = {name: gateway[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/health/live", "livenessProbe": "/health/live", "readinessProbe": "/health/ready"}
    assert set(asked.values()) <= routes


def test_triton_is_probed_for_its_models(manifests: dict[str, list[dict[str, Any]]]) -> None:
    triton = container(one(manifests["defaults"], "Deployment", "triton"))
    asked = {name: triton[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {
        "startupProbe": "/v2/health/ready",
        "livenessProbe": "/v2/models/diffusion/ready",
        "readinessProbe": "/v2/health/ready",
    }
    startup = triton["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 900


def test_a_client_stays_with_its_gateway_only_where_that_is_asked_for(
    manifests: dict[str, list[dict[str, Any]]],
) -> None:
    affinities = {name: one(documents, "Service", "gateway")["spec"] for name, documents in manifests.items()}
    assert affinities["k3s behind a proxy"]["sessionAffinity"] == "ClientIP"
    assert "sessionAffinity" not in affinities["defaults"]


def test_running_images_are_finished_before_a_stop(manifests: dict[str, list[dict[str, Any]]]) -> None:
    gateway, triton = (one(manifests["defaults"], "Deployment", name) for name in ("gateway", "triton"))
    _, pause = container(gateway)["lifecycle"]["preStop"]["exec"]["command"]
    assert pod(gateway)["terminationGracePeriodSeconds"] > int(pause) + DRAIN_SECONDS

    program, *options = container(triton)["lifecycle"]["preStop"]["exec"]["command"]
    image = (DOCKER / "triton.Dockerfile").read_text()
    assert re.search(rf"^COPY --chmod=755 .*docker/triton/drain\.py {Path(program).parent}/$", image, re.MULTILINE)
    given = runpy.run_path(str(DOCKER / "triton" / "drain.py"))["parser"]().parse_args(options)
    assert pod(triton)["terminationGracePeriodSeconds"] > given.announce + given.limit + 30
    # Longer than a connection lives, and gRPC may take a tenth more.
    (age,) = [int(word.split("=")[1].strip('",')) for word in image.split() if "max-connection-age" in word]
    assert given.announce > 1.1 * age / 1000


@pytest.mark.claim("scaling")
def test_tritons_are_scaled_by_the_images_that_their_samplers_have(
    manifests: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    scaler = one(manifests["scaled"], "HorizontalPodAutoscaler", "triton")["spec"]
    triton = one(manifests["scaled"], "Deployment", "triton")
    assert "replicas" not in triton["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": triton["metadata"]["name"],
    }
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 4)
    (metric,) = scaler["metrics"]
    (rule,) = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "12"}
    check_sums(rule["metricsQuery"], tmp_path / "query.yaml")


def check_sums(query: str, file: Path) -> None:
    """Hold what the adapter's query makes of two pods against what they generate and what waits, by promtool."""
    asked = query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="images"')
    gauges = {"triton-0": {"active": 4, "waiting": 3}, "triton-1": {"active": 2, "waiting": 0}}
    series = [
        {"series": f'hypergen_sampler_{state}_images{{namespace="images",pod="{name}"}}', "values": f"{count}x4"}
        for name, counts in gauges.items()
        for state, count in counts.items()
    ]
    samples = [{"labels": f'{{pod="{name}"}}', "value": sum(counts.values())} for name, counts in gauges.items()]
    expected = [{"expr": asked, "eval_time": "1m", "exp_samples": samples}]
    test = {"interval": "15s", "input_series": series, "promql_expr_test": expected}
    file.write_text(yaml.safe_dump({"tests": [test]}))
    judged = run_tool("promtool", "test", "rules", file)
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_shared_memory_is_memory(manifests: dict[str, list[dict[str, Any]]]) -> None:
    triton = one(manifests["defaults"], "Deployment", "triton")
    volumes = {volume["name"]: volume for volume in pod(triton)["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container(triton)["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}

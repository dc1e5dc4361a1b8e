"""The fields of KubeRay's RayCluster and RayJob, and of the Kubernetes objects beside them, as JSON
schemas that refuse what they do not name.

Kubernetes itself drops a field it does not know without a word, so that a misspelt one is a
setting that is not there. Names, types and allowed values are those of KubeRay 1.6 and 1.7
(ray.io/v1). Of a pod's fields only those are here that a Ray pod of ours may need.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,46}[a-z0-9])?$"}
"""What KubeRay allows as the name of a cluster or job."""
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY: Schema = {
    "type": ["string", "integer"],
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def many(item: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def fields(*required: str, **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


LABELS = mapping(
    {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
)
META = fields("name", name=NAME, namespace=NAME, labels=LABELS, annotations=mapping(TEXT))
RESOURCES = fields(requests=mapping(QUANTITY), limits=mapping(QUANTITY))
KEY_OF = fields("name", "key", name=TEXT, key=TEXT, optional=SWITCH)
ENVIRONMENT = many(
    {
        "oneOf": [
            fields("name", "value", name=TEXT, value=TEXT),
            fields(
                "name",
                "valueFrom",
                name=TEXT,
                valueFrom=fields(
                    secretKeyRef=KEY_OF,
                    configMapKeyRef=KEY_OF,
                    fieldRef=fields("fieldPath", fieldPath=TEXT),
                ),
            ),
        ]
    }
)
MOUNTS = many(fields("name", "mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=SWITCH))
SECURITY = fields(
    allowPrivilegeEscalation=SWITCH,
    privileged=SWITCH,
    readOnlyRootFilesystem=SWITCH,
    runAsNonRoot=SWITCH,
    runAsUser=WHOLE,
    runAsGroup=WHOLE,
    capabilities=fields(add=many(TEXT), drop=many(TEXT)),
)
CONTAINER = fields(
    "name",
    "image",
    "resources",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(TEXT),
    args=many(TEXT),
    ports=many(fields("containerPort", name=TEXT, containerPort=PORT)),
    env=ENVIRONMENT,
    securityContext=SECURITY,
    resources=RESOURCES,
    volumeMounts=MOUNTS,
)
VOLUME = {
    **fields(
        "name",
        name=TEXT,
        emptyDir=fields(medium=one_of("Memory", ""), sizeLimit=QUANTITY),
        persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=SWITCH),
        configMap=fields("name", name=TEXT, optional=SWITCH),
        secret=fields("secretName", secretName=TEXT, optional=SWITCH),
    ),
    "minProperties": 2,
    "maxProperties": 2,
}
POD = fields(
    "spec",
    metadata=fields(labels=LABELS, annotations=mapping(TEXT)),
    spec=fields(
        "containers",
        containers=many(CONTAINER, at_least=1),
        volumes=many(VOLUME),
        nodeSelector=LABELS,
        tolerations=many(
            fields(
                key=TEXT,
                operator=one_of("Exists", "Equal"),
                value=TEXT,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        imagePullSecrets=many(fields("name", name=TEXT)),
        priorityClassName=TEXT,
        restartPolicy=one_of("Never"),  # as the autoscaler's version 2 wants it
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=WHOLE,
    ),
)
START = mapping(TEXT)
"""rayStartParams: KubeRay takes text alone, "0" and not 0."""
CLUSTER = fields(
    "rayVersion",
    "headGroupSpec",
    "workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^2\.[0-9]+\.[0-9]+$"},
    authOptions=fields(
        "mode", mode=one_of("token", "disabled"), secretName=TEXT, enableK8sTokenAuth=SWITCH
    ),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=WHOLE,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        image=TEXT,
        imagePullPolicy=TEXT,
        env=ENVIRONMENT,
        resources=RESOURCES,
        securityContext=SECURITY,
        volumeMounts=MOUNTS,
    ),
    headServiceAnnotations=mapping(TEXT),
    suspend=SWITCH,
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        redisAddress=TEXT,
        redisUsername=fields(value=TEXT, valueFrom=fields(secretKeyRef=KEY_OF)),
        redisPassword=fields(value=TEXT, valueFrom=fields(secretKeyRef=KEY_OF)),
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=fields(
        "template",
        template=POD,
        rayStartParams=START,
        labels=LABELS,
        resources=mapping(TEXT),
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=SWITCH,
    ),
    workerGroupSpecs=many(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=NAME,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            numOfHosts=WHOLE,
            idleTimeoutSeconds=WHOLE,
            suspend=SWITCH,
            labels=LABELS,
            resources=mapping(TEXT),
            rayStartParams=START,
            template=POD,
        ),
        at_least=1,
    ),
)
JOB = fields(
    "entrypoint",
    "rayClusterSpec",
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode"),
    metadata=mapping(TEXT),
    runtimeEnvYAML=TEXT,
    backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=WHOLE,
    suspend=SWITCH,
    submitterPodTemplate=POD,
    submitterConfig=fields(backoffLimit=WHOLE),
    rayClusterSpec=CLUSTER,
)
CLAIM = fields(
    "accessModes",
    "resources",
    accessModes=many(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"), at_least=1),
    storageClassName=TEXT,
    volumeMode=one_of("Filesystem"),
    resources=RESOURCES,
)
SELECTOR = fields(
    matchLabels=LABELS,
    matchExpressions=many(
        fields(
            "key",
            "operator",
            key=TEXT,
            operator=one_of("In", "NotIn", "Exists", "DoesNotExist"),
            values=many(TEXT),
        )
    ),
)
MONITOR = fields(
    "selector",
    "podMetricsEndpoints",
    jobLabel=TEXT,
    namespaceSelector=fields(any=SWITCH, matchNames=many(TEXT)),
    selector=SELECTOR,
    podMetricsEndpoints=many(
        fields(
            "port",
            port=TEXT,
            path=TEXT,
            interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
            relabelings=many(fields(sourceLabels=many(TEXT), targetLabel=TEXT, action=TEXT)),
        ),
        at_least=1,
    ),
)
PEERS = many(fields(podSelector=SELECTOR, namespaceSelector=SELECTOR), at_least=1)
POLICY = fields(
    "podSelector",
    podSelector=SELECTOR,
    policyTypes=many(one_of("Ingress", "Egress")),
    ingress=many(
        {
            "type": "object",
            "properties": {
                "from": PEERS,
                "ports": many(fields("port", protocol=one_of("TCP", "UDP"), port=PORT)),
            },
            "additionalProperties": False,
        }
    ),
)
SERVICE = fields(
    "ports",
    selector=LABELS,
    type=one_of("ClusterIP"),
    ports=many(fields("port", name=TEXT, port=PORT, targetPort=PORT)),
)
DEPLOYMENT = fields("selector", "template", replicas=WHOLE, selector=SELECTOR, template=POD)
FLAVOR = fields(nodeLabels=LABELS)
QUOTA = fields(
    "resourceGroups",
    namespaceSelector=SELECTOR,
    queueingStrategy=one_of("BestEffortFIFO", "StrictFIFO"),
    resourceGroups=many(
        fields(
            "coveredResources",
            "flavors",
            coveredResources=many(TEXT),
            flavors=many(
                fields(
                    "name",
                    "resources",
                    name=TEXT,
                    resources=many(
                        fields("name", "nominalQuota", name=TEXT, nominalQuota=QUANTITY)
                    ),
                )
            ),
        )
    ),
)
KINDS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("v1", "PersistentVolumeClaim"): CLAIM,
    ("monitoring.coreos.com/v1", "PodMonitor"): MONITOR,
    ("networking.k8s.io/v1", "NetworkPolicy"): POLICY,
    ("v1", "Service"): SERVICE,
    ("apps/v1", "Deployment"): DEPLOYMENT,
    ("kueue.x-k8s.io/v1beta1", "ResourceFlavor"): FLAVOR,
    ("kueue.x-k8s.io/v1beta1", "ClusterQueue"): QUOTA,
    ("kueue.x-k8s.io/v1beta1", "LocalQueue"): fields("clusterQueue", clusterQueue=TEXT),
}


def schema_of(manifest: dict[str, Any]) -> Schema:
    """Return the schema of a whole manifest."""
    version, kind = manifest["apiVersion"], manifest["kind"]
    spec = KINDS[version, kind]
    named = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return fields("apiVersion", "kind", "metadata", "spec", **named, metadata=META, spec=spec)

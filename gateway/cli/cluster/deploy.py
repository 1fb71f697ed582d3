"""``tidegate deploy``: what a cluster has of all that Tidegate may use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gateway.cli import tables
from gateway.cli.base import AsJson, Config, Sets, as_text, load, screen
from gateway.terminal import complain, out

deploy_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@deploy_app.callback()
def deploy() -> None:
    """Tidegate in a Kubernetes cluster."""


@deploy_app.command("check")
def deploy_check(
    context: typer.Context,
    kubeconfig: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="How the cluster is reached. Without it: `kubernetes.kubeconfig`, else the pod's "
            "service account, `KUBECONFIG` or ~/.kube/config.",
        ),
    ] = None,
    account: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE/NAME",
            help="Service account whose rights are looked at. Without it: those of whoever asks.",
        ),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Look at a cluster: what is there, what Tidegate needs and is missing, what to do about it.

    The version, the definition of ModelPools, each right that Tidegate needs, who leads, who serves
    metrics to HPA, which of KEDA, Knative, Kueue, KServe, KubeRay and the Gateway API are there,
    GPUs of nodes. Changes nothing. Exit code 1 when something that these settings need is missing,
    2 without access to a cluster.

    **Examples:** `tidegate deploy check --account models/tidegate`,
    `kubectl exec deployment/tidegate -- tidegate deploy check --json`
    """
    from gateway.doctor.cluster_api import NoClusterError

    settings = load(config, sets).settings
    try:
        checks = context.obj.deploy_check(settings, kubeconfig, account)
    except NoClusterError as error:
        complain(" ".join(str(error).split()))
        return 2
    if as_json:
        out(as_text({"checks": [asdict(check) for check in checks]}))
    else:
        out(tables.doctor(checks, screen()))
    return 1 if any(check.status == "fail" for check in checks) else 0

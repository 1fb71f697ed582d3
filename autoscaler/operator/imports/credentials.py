"""What Fluid's options of a store are called in the environment of an agent.

Each runtime of Fluid spells them in its own way; the readers here take the environment variables
that the stores' own clients take.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelcache.refs import SECRET_NAME

ENVIRONMENT: Mapping[str, str] = {
    # Alluxio and its like
    "aws.accesskeyid": "AWS_ACCESS_KEY_ID",
    "aws.secretkey": "AWS_SECRET_ACCESS_KEY",
    "aws.secretaccesskey": "AWS_SECRET_ACCESS_KEY",
    "aws.region": "AWS_REGION",
    "s3a.accesskeyid": "AWS_ACCESS_KEY_ID",
    "s3a.secretkey": "AWS_SECRET_ACCESS_KEY",
    "alluxio.underfs.s3.endpoint": "AWS_ENDPOINT_URL",
    "alluxio.underfs.s3.endpoint.region": "AWS_REGION",
    "alluxio.underfs.s3.region": "AWS_REGION",
    # Hadoop
    "fs.s3a.access.key": "AWS_ACCESS_KEY_ID",
    "fs.s3a.secret.key": "AWS_SECRET_ACCESS_KEY",
    "fs.s3a.session.token": "AWS_SESSION_TOKEN",
    "fs.s3a.endpoint": "AWS_ENDPOINT_URL",
    "fs.s3a.endpoint.region": "AWS_REGION",
    # Jindo
    "fs.s3.accesskeyid": "AWS_ACCESS_KEY_ID",
    "fs.s3.accesskeysecret": "AWS_SECRET_ACCESS_KEY",
    "fs.s3.endpoint": "AWS_ENDPOINT_URL",
    "fs.s3.region": "AWS_REGION",
    "fs.oss.accesskeyid": "OSS_ACCESS_KEY_ID",
    "fs.oss.accesskeysecret": "OSS_ACCESS_KEY_SECRET",
    "fs.oss.securitytoken": "OSS_SESSION_TOKEN",
    "fs.oss.endpoint": "OSS_ENDPOINT",
    "fs.oss.region": "OSS_REGION",
    # Hugging Face, as thin runtimes name them
    "hf_token": "HF_TOKEN",
    "hf_endpoint": "HF_ENDPOINT",
}
BUCKET_KEYS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "oss": ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET"),
}
"""What JuiceFS's ``access-key`` and ``secret-key`` are, by the scheme of the bucket."""

SECRETS = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "OSS_ACCESS_KEY_ID",
        "OSS_ACCESS_KEY_SECRET",
        "OSS_SESSION_TOKEN",
        "HF_TOKEN",
    }
)
"""Those whose values are shown nowhere."""


def find_variable(option: str, scheme: str) -> str:
    """The environment variable that an option of a store is; empty where there is none."""
    name = option.lower()
    if scheme in BUCKET_KEYS and name in {"access-key", "secret-key"}:
        return BUCKET_KEYS[scheme][name == "secret-key"]
    return ENVIRONMENT.get(name, "")


def is_secret(option: str, variable: str) -> bool:
    """Whether the value of an option is shown nowhere."""
    return variable in SECRETS or bool(SECRET_NAME.search(option))

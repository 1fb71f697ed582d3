"""Credentials and endpoint for S3, from where the AWS tools look: the environment, then the profile
in ``~/.aws``, then what a container or an instance is given. Nothing anywhere: unsigned requests,
as public buckets take them."""

from __future__ import annotations

import configparser
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelcache.sources.reader import home_of
from modelcache.types import SourceError

HINT = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or the instance's role"
INSTANCE = ("169.254.169.254", 80)
INSTANCE_WAIT_S = 1.0

_GIVEN_ELSEWHERE = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Where one of these is set, obstore fetches and renews credentials by itself."""

_NEEDS_BOTO = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How one bucket is reached. ``secrets`` is what must not be shown."""

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    provider: Any = field(default=None, repr=False)
    """Gives obstore credentials that run out, where it cannot fetch them itself."""
    anonymous: bool = False
    endpoint: str | None = None
    region: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


def find_access(
    environ: Mapping[str, str], *, on_instance: Callable[[], bool] | None = None
) -> Access:
    """Look in the usual places. Raises ``SourceError`` where a profile is named and not there, or
    needs boto3 and that is not installed."""
    profile = _read_profile(environ)
    endpoint = (
        environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or environ.get("AWS_ENDPOINT")
        or profile.get("endpoint_url")
    )
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.get("region")
    place: dict[str, Any] = {"endpoint": endpoint or None, "region": region or None}
    key, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return Access(**place, **_static(key, secret, environ.get("AWS_SESSION_TOKEN")))
    if profile.get("aws_access_key_id") and profile.get("aws_secret_access_key"):
        return Access(
            **place,
            **_static(
                profile["aws_access_key_id"],
                profile["aws_secret_access_key"],
                profile.get("aws_session_token"),
            ),
        )
    if any(profile.get(name) for name in _NEEDS_BOTO):
        return Access(**place, provider=_boto_provider(environ.get("AWS_PROFILE")))
    if any(environ.get(name) for name in _GIVEN_ELSEWHERE):
        return Access(**place)
    if (on_instance or (lambda: _is_on_instance(environ)))():
        return Access(**place)
    return Access(**place, anonymous=True)


def _static(key: str, secret: str, token: str | None) -> dict[str, Any]:
    config = {"access_key_id": key, "secret_access_key": secret}
    if token:
        config["session_token"] = token
    return {"config": config, "secrets": (key, secret, *([token] if token else []))}


def _read_profile(environ: Mapping[str, str]) -> dict[str, str]:
    """The profile's settings and keys; none where there are no such files."""
    folder = os.path.join(home_of(environ), ".aws")
    files = (
        environ.get("AWS_CONFIG_FILE") or os.path.join(folder, "config"),
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.join(folder, "credentials"),
    )
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    found: dict[str, str] = {}
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            # The parser's own message quotes the line, which may hold a key.
            raise SourceError(f"{path} is not as the AWS tools write it") from None
        for section in (name, f"profile {name}"):
            if parser.has_section(section):
                found.update(parser.items(section))
    if not found and environ.get("AWS_PROFILE"):
        raise SourceError(f"AWS_PROFILE names {name!r}, and {' and '.join(files)} have no such one")
    return found


def _boto_provider(profile: str | None) -> Any:
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise SourceError(
            "the AWS profile gets its credentials by single sign-on, a role or a command; that "
            "takes boto3: pip install boto3"
        ) from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=profile))
    except Exception as error:  # noqa: BLE001 - botocore's errors have no common base of their own
        raise SourceError(
            f"the AWS profile gives no credentials ({type(error).__name__})"
        ) from None


def _is_on_instance(environ: Mapping[str, str]) -> bool:
    """Whether an instance's metadata answers; a second at most where there is none."""
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        socket.create_connection(INSTANCE, timeout=INSTANCE_WAIT_S).close()
    except OSError:
        return False
    return True

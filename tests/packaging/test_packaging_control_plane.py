"""Where `make cluster-test` takes a Kubernetes control plane from, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Something like Debian's archive, with one file."""
    folder = tmp_path / "mirror"
    (folder / "pool").mkdir(parents=True)
    (folder / "pool" / "go+1.deb").write_bytes(b"a compiler")
    return folder


def archive(control_plane_programs: ModuleType, data: bytes) -> object:
    digest = hashlib.sha256(data).hexdigest()
    return control_plane_programs.Archive("pool/go+1.deb", digest, len(data))


def test_an_incomplete_directory_is_one_line_and_exit_code_2(root: Path, tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver"):
        (tmp_path / name).touch(mode=0o755 if name == "etcd" else 0o644)
    done = subprocess.run(
        [sys.executable, root / "deploy" / "bootstrap.py", "cluster-test"],
        env={**os.environ, "KUBEBUILDER_ASSETS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "kube-apiserver, kube-controller-manager" in done.stderr
    assert "etcd" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_complete_directory_is_taken_as_it_is(
    control_plane_programs: ModuleType, tmp_path: Path
) -> None:
    for name in control_plane_programs.PROGRAMS:
        (tmp_path / name).touch(mode=0o755)
    given = control_plane_programs.given
    assert given({"KUBEBUILDER_ASSETS": str(tmp_path)}) == tmp_path
    assert given({}) is None


def test_what_is_made_already_is_not_made_again(
    control_plane_programs: ModuleType, environments: ModuleType, tmp_path: Path
) -> None:
    workshop = environments.Workshop(tmp_path)
    steps = control_plane_programs.steps(workshop, tmp_path, "x86_64")
    assert not any(step.is_done() for step in steps[:-1])
    target = control_plane_programs.made(tmp_path)
    target.mkdir(parents=True)
    for name in control_plane_programs.PROGRAMS:
        (target / name).touch(mode=0o755)
    assert all(step.is_done() for step in steps)
    (target / "kube-apiserver").unlink()
    assert not all(step.is_done() for step in steps)


def test_a_machine_without_a_compiler_package_is_told_what_helps(
    control_plane_programs: ModuleType,
    environments: ModuleType,
    requirements_check: ModuleType,
    tmp_path: Path,
) -> None:
    with pytest.raises(requirements_check.MissingRequirement, match=r"riscv64.*KUBEBUILDER_ASSETS"):
        control_plane_programs.steps(environments.Workshop(tmp_path), tmp_path, "riscv64")


def test_an_archive_is_downloaded_from_the_first_mirror_that_has_it(
    control_plane_programs: ModuleType, mirror: Path, tmp_path: Path
) -> None:
    wanted = archive(control_plane_programs, b"a compiler")
    mirrors = [(tmp_path / "nothing").as_uri(), mirror.as_uri()]
    (path,) = control_plane_programs.fetch("work", [wanted], tmp_path / "to", mirrors)
    assert path.read_bytes() == b"a compiler"
    (again,) = control_plane_programs.fetch("work", [wanted], tmp_path / "to", [])
    assert again == path


def test_an_archive_with_another_digest_is_refused_and_not_kept(
    control_plane_programs: ModuleType, progress: ModuleType, mirror: Path, tmp_path: Path
) -> None:
    wanted = archive(control_plane_programs, b"another compiler")
    with pytest.raises(progress.StepFailed) as failure:
        control_plane_programs.fetch("work", [wanted], tmp_path / "to", [mirror.as_uri()])
    found = hashlib.sha256(b"a compiler").hexdigest()
    assert found in str(failure.value)
    assert wanted.sha256 in str(failure.value)
    assert "go%2B1.deb" in str(failure.value)
    assert list((tmp_path / "to").iterdir()) == []


def test_an_archive_that_no_mirror_has_names_each(
    control_plane_programs: ModuleType, progress: ModuleType, tmp_path: Path
) -> None:
    wanted = archive(control_plane_programs, b"x")
    mirrors = [(tmp_path / name).as_uri() for name in ("first", "second")]
    with pytest.raises(progress.StepFailed) as failure:
        control_plane_programs.fetch("work", [wanted], tmp_path / "to", mirrors)
    assert all(mirror in str(failure.value) for mirror in mirrors)


def ar(members: dict[str, bytes]) -> bytes:
    """An ``ar`` archive, as ``dpkg-deb`` makes it."""
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n"
        parts += [header.encode(), data, b"\n" if len(data) % 2 else b""]
    return b"".join(parts)


def test_a_package_is_unpacked_without_installing_it(
    control_plane_programs: ModuleType, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name, data in (("./usr/bin/go", b"tool"), ("./usr/share/doc/go", b"words")):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = len(data), 0o755, 4321
            tar.addfile(member, io.BytesIO(data))
    package = tmp_path / "go.deb"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": packed.getvalue(),
    }
    package.write_bytes(ar(members))
    with control_plane_programs.open_package(package) as tar:
        control_plane_programs.extract(tar, tmp_path / "to", lambda name: "/bin/" in name)
    program = tmp_path / "to" / "usr" / "bin" / "go"
    assert program.read_bytes() == b"tool"
    assert program.stat().st_uid == os.getuid()
    assert os.access(program, os.X_OK)
    assert not (tmp_path / "to" / "usr" / "share").exists()


def test_what_is_no_package_is_said(
    control_plane_programs: ModuleType, progress: ModuleType, tmp_path: Path
) -> None:
    for data in (b"<html>", ar({"debian-binary": b"2.0\n"})):
        (tmp_path / "x.deb").write_bytes(data)
        with (
            pytest.raises(progress.StepFailed, match=r"x\.deb"),
            control_plane_programs.open_package(tmp_path / "x.deb"),
        ):
            pass


def test_openapi_is_asked_for_by_a_comment_at_the_start_of_a_line(
    control_plane_programs: ModuleType, tmp_path: Path
) -> None:
    files = {
        "cmd/tool/main.go": "package main\n",
        "pkg/apis/abac/doc.go": "// +k8s:openapi-gen=true\n\npackage abac\n",
        "pkg/other/doc.go": 'package other\n\nconst tag = "// +k8s:openapi-gen="\n',
        "staging/src/k8s.io/api/core/v1/doc.go": "// +k8s:openapi-gen=true\n",
        "staging/src/k8s.io/sample-apiserver/pkg/doc.go": "// +k8s:openapi-gen=true\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    vendor = tmp_path / "vendor" / "k8s.io"
    vendor.mkdir(parents=True)
    for name in ("api", "sample-apiserver"):
        (vendor / name).symlink_to(tmp_path / "staging" / "src" / "k8s.io" / name)
    found = set(control_plane_programs.openapi_packages(tmp_path))
    assert found == {"pkg/apis/abac", "vendor/k8s.io/api/core/v1"}

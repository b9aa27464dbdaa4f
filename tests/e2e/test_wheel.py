"""The wheel carries the kernels and needs no compiler; the source distribution can make it.

Compiling is what `make wheel` and every installation do. Here the library in use stands where the
build would leave it, so that what is tested is how it is packed, named and found.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from graft.kernels.backend.native_library import instructions

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "graft/kernels/backend/_native" + sysconfig.get_config_var("SHLIB_SUFFIX")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = [b"baseline", *([b"AVX2", b"AVX-512", b"AVX-512+BF16"] if ON_X86 else [])]
INSTRUCTION_SETS = [b"NEON"] if platform.machine() in ("aarch64", "arm64") else INSTRUCTION_SETS


def run(*command: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    pytest.importorskip("setuptools", "77.0.3", reason="needs the setuptools of pyproject.toml")
    tree = tmp_path_factory.mktemp("tree") / "graft"
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    backend = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", backend, folder=tree)
    (archive,) = (tree / "dist").iterdir()
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        # Python before 3.11.4 has no filters.
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(unpacked, **filters)
    return unpacked / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    """The wheel that pip builds of the source distribution, without a network."""
    in_use = ROOT / "src" / LIBRARY
    if instructions() is None or not in_use.is_file():
        pytest.skip("needs the native kernels, built where the sources lie")
    folder = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = source / "build" / folder / LIBRARY
    built.parent.mkdir(parents=True)
    shutil.copyfile(in_use, built)  # as new as can be
    command = "wheel --no-build-isolation --no-deps --no-index --wheel-dir dist ."
    run(sys.executable, "-m", "pip", *command.split(), folder=source, CC="false", CXX="false")
    (path,) = (source / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel was installed into, without a compiler."""
    site = tmp_path_factory.mktemp("site")
    command = f"install --no-deps --no-index --target {site} {wheel}"
    run(sys.executable, "-m", "pip", *command.split(), folder=site, CC="false", CXX="false")
    return site


def test_the_source_distribution_can_build_the_kernels(source):
    for folder in ("csrc", "src/graft"):
        parts = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        parts = [path for path in parts if path.suffix not in (".so", ".pyc")]
        assert parts
        for path in parts:
            assert (source / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_the_wheel_holds(wheel):
    system = sysconfig.get_platform().replace("universal2", platform.machine())
    system = system.replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{system}.whl"), "it depends on no Python's version"
    with zipfile.ZipFile(wheel) as file:
        files = set(file.namelist())
        library = file.read(LIBRARY)
        (record,) = (name for name in files if name.endswith(".dist-info/WHEEL"))
        tags = HeaderParser().parsestr(file.read(record).decode()).get_all("Tag")
    assert tags == [f"py3-none-{system}"]
    assert all(name in library for name in INSTRUCTION_SETS)
    expected = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "graft").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert {"graft/py.typed", "graft/demo/assets/base/model.safetensors"} <= expected
    about = {name for name in files if name.partition("/")[0].endswith(".dist-info")}
    assert files - about == expected | {LIBRARY}
    assert any(name.endswith("/licenses/LICENSE") for name in about)


def test_the_kernels_compute_where_it_is_installed(installed):
    code = """if True:
        import graft, sys
        assert graft.__file__.startswith(sys.argv[1]), graft.__file__
        from graft.cli.main import main
        main(["doctor"])
    """
    told = run(sys.executable, "-c", code, installed, folder=installed, PYTHONPATH=str(installed))
    assert str(instructions()) in told
    assert "native" in told


def interpreter(version: str) -> Path | None:
    """Return a Python of that version: beside this one, as pyenv keeps them, or on the path."""
    found = sorted(Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python{version}"))
    on_path = shutil.which(f"python{version}")
    found += [Path(on_path)] if on_path else []
    # pyenv puts a program on the path for versions that are not chosen, too, which then fails.
    for path in found:
        if subprocess.run([path, "-V"], capture_output=True).returncode == 0:
            return path
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_other_versions_of_python_load_the_library(installed, version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"needs python{version}")
    code = """if True:
        import ctypes, sys
        library = ctypes.CDLL(sys.argv[1])
        library.graft_instructions.restype = ctypes.c_char_p
        print(library.graft_instructions().decode())
    """
    assert run(python, "-c", code, installed / LIBRARY, folder=installed) == f"{instructions()}\n"

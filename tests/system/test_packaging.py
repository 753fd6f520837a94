import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("partition", "indexer", "kernels", "runtime")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tree_files() -> list[str]:
    """What a commit of the present tree would hold: tracked files, and new ones not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def package_files() -> list[PurePosixPath]:
    return [path for path in map(PurePosixPath, tree_files()) if path.parts[0] in FOLDERS]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    copy = tmp_path_factory.mktemp("tree")
    for name in tree_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    return set(ZipFile(wheel).namelist())


def test_wheel_holds_the_tree(wheel_names: set[str]) -> None:
    info = {name for name in wheel_names if ".dist-info/" in name}
    assert wheel_names - info == {f"qroam/{path}" for path in package_files()}
    assert f"qroam-{version('qroam')}.dist-info/licenses/LICENSE" in info


def test_every_package_is_listed_and_typed() -> None:
    files = package_files()
    packages = {path.parent for path in files if path.suffix == ".py"}
    for package in packages:
        assert {package / "__init__.py", package / "py.typed"} <= set(files)
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted("qroam." + ".".join(p.parts) for p in packages)


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_import_does_not_find_ours(folder: str) -> None:
    spec = find_spec(folder)  # some of these names belong to other distributions
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    assert not [place for place in places if place and Path(place).is_relative_to(ROOT / folder)]
    assert find_spec(f"qroam.{folder}")


def test_version_is_the_same_everywhere() -> None:
    assert version("qroam") == PYPROJECT["project"]["version"]
    assert f"## [{version('qroam')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_console_script_is_main() -> None:
    from qroam.runtime.tools.cli import main

    (script,) = entry_points(group="console_scripts", name="qroam")
    assert script.load() is main

"""Each module has a test file that its name leads to, and tests share by way of tests/support alone."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FOLDERS = ("kernels", "partition", "indexer", "runtime")
# Folders of which one file tests all modules, named for the folder.
TOGETHER = ("kernels/exchange", "runtime/service", "runtime/tools/demo", "runtime/transport")

# Modules that are tested through another file. A new module gets a file of its own, or a line here.
ELSEWHERE = {
    "kernels/attend_sm90.py": "kernels/test_kernel_attend.py",
    "kernels/checks.py": "kernels/test_kernel_gather.py",
    "kernels/decide.py": "kernels/test_kernel_plan.py",
    "kernels/library/flashinfer.py": "kernels/test_kernel_adapters.py",
    "kernels/library/flashmla.py": "kernels/test_kernel_adapters.py",
    "kernels/limits.py": "runtime/test_gpu_backend.py",
    "kernels/mix.py": "kernels/test_kernel_coverage.py",
    "kernels/pdl.py": "kernels/test_kernel_compile.py",
    "runtime/adapters/hf.py": "system/test_transformers.py",
    "runtime/backend.py": "runtime/test_gpu_backend.py",
    "runtime/corpus/collective.py": "runtime/test_snapshot.py",
    "runtime/corpus/verify.py": "runtime/test_verify.py",
    "runtime/cost/prices.py": "kernels/test_kernel_plan.py",
    "runtime/cpu/attend.py": "system/test_central.py",
    "runtime/cpu/backend.py": "system/test_central.py",
    "runtime/cpu/merge.py": "runtime/test_untrusted.py",
    "runtime/cpu/recipients.py": "runtime/test_copies.py",
    "runtime/cpu/select.py": "system/test_central.py",
    "runtime/cpu/step.py": "system/test_central.py",
    "runtime/exchanger.py": "runtime/test_service.py",
    "runtime/gpu/admit.py": "runtime/test_gpu_leases.py",
    "runtime/gpu/limits.py": "runtime/test_gpu_backend.py",
    "runtime/gpu/open.py": "runtime/test_gpu_backend.py",
    "runtime/gpu/pool.py": "runtime/test_gpu_backend.py",
    "runtime/gpu/step.py": "gpu/test_step_gpu.py",
    "runtime/lockstep.py": "system/test_central.py",
    "runtime/observe/explain.py": "runtime/test_stats.py",
    "runtime/runtime.py": "runtime/test_validate.py",
    "runtime/tools/doctor.py": "runtime/test_cli.py",
    "runtime/tools/explain.py": "runtime/test_explain.py",
    "runtime/tools/explain_text.py": "runtime/test_explain.py",
    "runtime/tools/progress.py": "runtime/test_cli.py",
    "runtime/tools/verify.py": "runtime/test_verify_cli.py",
}


def modules() -> list[str]:
    """Each module of the package by its path, such as "runtime/cpu/step.py"."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [p.relative_to(ROOT).as_posix() for p in paths if p.name != "__init__.py"]


def all_test_files() -> list[str]:
    return sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))


def named_for(module: str, twins: int) -> list[str]:
    """The test files that a module's name leads to: its own name, its folder's before it if another
    module of the folder has the same name, or its folder's alone.
    """
    path = PurePosixPath(module)
    folder, *inner = path.parts[:-1]
    names = ["_".join([*inner, path.stem])]
    if twins == 1:
        names.append(path.stem)
    if path.parent.as_posix() in TOGETHER:
        names.append(inner[-1])
    prefixes = ("", "kernel_") if folder == "kernels" else ("",)
    return [
        f"{where}/test_{prefix}{name}.py"
        for name in names
        for where in (folder, "system")
        for prefix in prefixes
    ]


def without_file(all_modules: list[str], files: list[str]) -> list[str]:
    """The modules whose name leads to no test file."""
    twins = Counter((m.split("/")[0], PurePosixPath(m).stem) for m in all_modules)
    return [
        module
        for module in all_modules
        if not set(files).intersection(
            named_for(module, twins[module.split("/")[0], PurePosixPath(module).stem])
        )
    ]


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_module_has_its_test_file() -> None:
    lacking = set(without_file(modules(), all_test_files())) - ELSEWHERE.keys()
    assert not lacking, f"give these a test file of their name, or a line in ELSEWHERE: {lacking}"


def test_the_table_names_what_exists_and_needs_it() -> None:
    assert ELSEWHERE.keys() <= set(modules())
    assert set(ELSEWHERE.values()) <= set(all_test_files())
    assert ELSEWHERE.keys() <= set(without_file(modules(), all_test_files()))


def test_a_missing_file_is_found() -> None:
    names = ["runtime/cpu/step.py", "runtime/gpu/step.py", "runtime/errors.py", "kernels/attend.py"]
    files = ["runtime/test_gpu_step.py", "runtime/test_step.py", "kernels/test_kernel_attend.py"]
    assert without_file(names, files) == ["runtime/cpu/step.py", "runtime/errors.py"]
    assert without_file(["runtime/transport/new.py"], ["runtime/test_transport.py"]) == []
    assert without_file(["runtime/corpus/new.py"], ["runtime/test_corpus.py"]) != []


def test_names_of_test_files_are_unique() -> None:
    """Without __init__.py a test file is a top-level module: two of one name would be one."""
    names = Counter(path.stem for path in TESTS.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_do_not_import_one_another() -> None:
    tests = {PurePosixPath(name).stem for name in all_test_files()}
    found = {
        path.relative_to(TESTS).as_posix(): shared
        for path in TESTS.rglob("*.py")
        if (shared := imported(path) & tests)
    }
    assert found == {}, "what tests share is in tests/support"


def test_pytest_finds_what_tests_share() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    assert options["ini_options"]["pythonpath"] == ["tests/support", "tests/fuzz"]

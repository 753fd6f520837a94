"""The shape of the package: who may import whom, and what only certain files may ask.

Sources are read with `ast`; nothing is imported. Imports inside functions and under
`if TYPE_CHECKING:` count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]

# The order of the folders, low to high: a module imports from its own folder and from lower ones.
FOLDERS = ("kernels", "partition", "indexer", "runtime")

# The order inside `runtime/`, low to high: a module imports from its own place and from lower ones.
# A place holds modules or whole folders; `gpu.limits` has a place of its own below `gpu`. A new
# module of `runtime/` is added here. `__init__` is `runtime/__init__.py`, which names what is public.
PLACES = (
    ("errors", "ambient"),
    ("cost",),
    ("gpu.limits",),
    ("scope",),
    ("config",),
    ("transport",),
    ("observe",),
    ("backend", "exchanger"),
    ("tables", "stores"),
    ("writes",),
    ("world",),
    ("requests", "branches", "copies", "validate", "lockstep"),
    ("cpu",),
    ("gpu",),
    ("service",),
    ("corpus",),
    ("membership",),
    ("runtime",),
    ("__init__",),
    ("adapters",),
    ("tools",),
)

# Who may ask which device it is: the GPU's own code, what opens or drives a runtime, and the
# configuration. `Runtime` chooses a backend once, in one function.
DEVICE_FILES = (
    "kernels/",
    "runtime/gpu/",
    "runtime/tools/",
    "runtime/adapters/",
    "runtime/observe/profiling.py",
    "runtime/ambient.py",  # autocast is per kind of device
    "runtime/config.py",
)
FACADE = "runtime/runtime.py"
MAX_FILE_LINES, MAX_METHOD_LINES = 500, 15

Graph = dict[str, set[str]]  # a module's dotted name -> the modules it imports


def sources() -> dict[str, str]:
    """The text of each module of the package by its path, such as "runtime/cpu/step.py"."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def module_name(path: str) -> str:
    """ "runtime/cpu/step.py" is runtime.cpu.step; "runtime/__init__.py" is runtime."""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def imports(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of ours: (runtime.cpu, step) for `from .cpu import step`.

    Raises: AssertionError if one of our folders is imported by an absolute name.
    """
    package = ("qroam", *PurePosixPath(path).parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module or "").split(".")] if node.module else list(base)
            yield from ((".".join(module[1:]), alias.name) for alias in node.names)
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        ours = [name for name in names if name.split(".")[0] in ("qroam", *FOLDERS)]
        assert not ours, f"{path}:{node.lineno} imports {ours} absolutely"  # type: ignore[attr-defined]


def graph_of(texts: Mapping[str, str]) -> Graph:
    """Who imports whom. Raises: AssertionError if a module that is imported does not exist.

    That a module's parent packages run before it is left out: `runtime/__init__.py` names what is
    public, so it would close a circle through everything.
    """
    modules = {module_name(path) for path in texts}
    graph: Graph = {}
    for path, text in texts.items():
        found = set()
        for module, name in imports(path, text):
            full = f"{module}.{name}".strip(".")
            target = full if full in modules else module
            assert target in modules, f"{path} imports {full}, which does not exist"
            found.add(target)
        graph[module_name(path)] = found
    return graph


def circles(graph: Graph) -> list[str]:
    """One line for each group of modules that reach one another: a shortest way round."""
    reach: Graph = {module: set() for module in graph}
    for module in graph:
        todo = list(graph[module])
        while todo:
            target = todo.pop()
            if target not in reach[module]:
                reach[module].add(target)
                todo += graph[target]
    lines, seen = [], set[str]()
    for module in sorted(graph):
        if module in seen or module not in reach[module]:
            continue
        group = {other for other in reach[module] if module in reach[other]}
        seen |= group
        lines.append(f"{len(group)} modules: {' -> '.join(way_round(graph, module))}")
    return lines


def way_round(graph: Graph, start: str) -> list[str]:
    """A shortest way from a module along imports back to itself."""
    ways = [[start]]
    for way in ways:
        for target in sorted(graph[way[-1]]):
            if target == start:
                return [*way, start]
            if all(target not in other for other in ways):
                ways.append([*way, target])
    raise AssertionError(f"{start} is on no circle")


def height(module: str) -> tuple[int, int]:
    """(folder, place) in the two orders above. Raises: AssertionError if it has no place."""
    folder, _, rest = module.partition(".")
    assert folder in FOLDERS, f"{module}: no folder of {FOLDERS}"
    if folder != "runtime":
        return FOLDERS.index(folder), 0
    rest = rest or "__init__"
    fits = [
        (len(name), number)
        for number, names in enumerate(PLACES)
        for name in names
        if f"{rest}.".startswith(f"{name}.")
    ]
    assert fits, f"{module} has no place: add it to PLACES"
    return FOLDERS.index(folder), max(fits)[1]


def backward(graph: Graph) -> list[str]:
    """The imports of a module from a higher folder or place."""
    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if height(target) > height(module)
    ]


def test_no_modules_import_one_another_in_a_circle() -> None:
    found = circles(graph_of(sources()))
    assert not found, "\n".join(found)


def test_no_import_goes_against_the_order() -> None:
    found = backward(graph_of(sources()))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    graph = {m: t for m, t in graph_of(sources()).items() if m.split(".")[0] == folder}
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    assert graph
    for module, targets in graph.items():
        against = {target for target in targets if target.split(".")[0] not in allowed}
        assert not against, f"{module} imports {against}"


def test_import_scan_sees_every_form() -> None:
    path = "runtime/cost/model.py"
    text = (
        "from .a import b\nfrom ..x import y\nfrom ...kernels.z import w\nfrom ... import indexer"
    )
    assert set(imports(path, text)) == {
        ("runtime.cost.a", "b"),
        ("runtime.x", "y"),
        ("kernels.z", "w"),
        ("", "indexer"),
    }
    hidden = "def f():\n    from .a import b\nif TYPE_CHECKING:\n    from .c import d\n"
    assert set(imports(path, hidden)) == {("runtime.cost.a", "b"), ("runtime.cost.c", "d")}
    for absolute in ("import qroam.kernels", "from qroam import runtime", "import kernels as k"):
        with pytest.raises(AssertionError, match="absolutely"):
            list(imports(path, absolute))


def test_a_name_is_a_module_or_is_in_its_package() -> None:
    texts = {
        "runtime/__init__.py": "from .cpu import step\nfrom .cpu import Step",
        "runtime/cpu/__init__.py": "",
        "runtime/cpu/step.py": "from ... import kernels",
        "kernels/__init__.py": "",
    }
    assert graph_of(texts) == {
        "runtime": {"runtime.cpu", "runtime.cpu.step"},
        "runtime.cpu": set(),
        "runtime.cpu.step": {"kernels"},
        "kernels": set(),
    }
    with pytest.raises(AssertionError, match=r"imports runtime\.gone\.f, which does not exist"):
        graph_of({"runtime/world.py": "from .gone import f"})


def planted(text: str) -> dict[str, str]:
    """Three modules in good order, the lowest of which has `text` at its end."""
    return {
        "runtime/errors.py": f"import os\n{text}\n",
        "runtime/world.py": "from .errors import PeerError",
        "runtime/cpu/step.py": "from ..world import World",
    }


@pytest.mark.parametrize(
    "text",
    [
        "from .cpu.step import run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .cpu.step import run",
        "def f():\n    from .cpu.step import run",
    ],
    ids=["plain", "of types only", "in a function"],
)
def test_a_planted_circle_is_found(text: str) -> None:
    assert circles(graph_of(planted(""))) == []
    (line,) = circles(graph_of(planted(text)))
    way = "runtime.cpu.step -> runtime.world -> runtime.errors -> runtime.cpu.step"
    assert line == f"3 modules: {way}"


def test_a_module_that_imports_itself_is_a_circle() -> None:
    assert circles({"a": {"a"}, "b": {"a"}}) == ["1 modules: a -> a"]
    two = {"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}
    assert circles(two) == ["2 modules: a -> b -> a", "2 modules: c -> d -> c"]


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("kernels.attend", "partition.layout"),
        ("partition.layout", "indexer.topk"),
        ("indexer.topk", "runtime.errors"),
        ("runtime.errors", "runtime.cost.model"),
        ("runtime.config", "runtime.gpu.backend"),
        ("runtime.cpu.step", "runtime.service.server"),
        ("runtime.runtime", "runtime"),
        ("runtime.adapters.hf", "runtime.tools.cli"),
    ],
)
def test_a_planted_import_against_the_order_is_found(module: str, target: str) -> None:
    assert backward({module: {target}, target: set()}) == [f"{module} imports {target}"]
    assert backward({target: {module}, module: set()}) == []


def test_limits_of_gpus_are_lower_than_their_folder() -> None:
    assert backward({"runtime.config": {"runtime.gpu.limits"}, "runtime.gpu.limits": set()}) == []
    assert backward({"runtime.gpu.step": {"runtime.gpu.limits"}, "runtime.gpu.limits": set()}) == []
    with pytest.raises(AssertionError, match=r"runtime\.nowhere has no place"):
        backward({"runtime.nowhere": {"runtime.errors"}})


# Sizes -----------------------------------------------------------------------------------------


def test_no_file_has_more_than_500_lines() -> None:
    """Of Python outside tests and kernels; the facade is bounded by its methods instead."""
    folders = ("partition", "indexer", "runtime", "examples", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths
    }
    assert len(lines) > 50
    del lines[FACADE]
    assert {path: n for path, n in lines.items() if n > MAX_FILE_LINES} == {}


def method_lines(text: str, name: str) -> dict[str, int]:
    """The public methods of a class and the lines of each beside signature, docstring and blanks."""
    (found,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    lines = text.splitlines()
    counts = {}
    for node in found.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        has_docstring = ast.get_docstring(node) is not None
        signature = node.body[0].lineno - 1  # the line before the first of the body
        start = node.body[0].end_lineno if has_docstring else signature
        assert start is not None
        assert node.end_lineno is not None
        counts[node.name] = sum(bool(line.strip()) for line in lines[start : node.end_lineno])
    return counts


def test_public_methods_of_the_facade_are_short() -> None:
    counts = method_lines((ROOT / FACADE).read_text(), "Runtime")
    assert len(counts) > 20
    assert {name: n for name, n in counts.items() if n > MAX_METHOD_LINES} == {}


def test_lines_of_a_method_are_counted_without_signature_docstring_and_blanks() -> None:
    text = (
        'class C:\n    def f(\n        self,\n    ) -> int:\n        """Two\n        lines."""\n'
        "        # why\n\n        x = 1\n        return x\n\n    def g(self) -> int:\n"
        '        return 2\n\n    def h(self) -> None:\n        """Nothing."""\n\n'
        "    def _private(self) -> None:\n        pass\n"
    )
    assert method_lines(text, "C") == {"f": 3, "g": 1, "h": 0}


# What only certain files may ask ---------------------------------------------------------------


def is_attribute(node: ast.AST, *names: str) -> bool:
    """Whether it reads `names` at its end: x.device.type for ("device", "type")."""
    for name in reversed(names[1:]):
        if not (isinstance(node, ast.Attribute) and node.attr == name):
            return False
        node = node.value
    if isinstance(node, ast.Name):
        return node.id == names[0]
    return isinstance(node, ast.Attribute) and node.attr == names[0]


def asks_device(node: ast.AST) -> bool:
    """Whether an expression depends on which device it is. Two tensors' devices may be compared."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        about = [side for side in sides if is_attribute(side, "device")]
        return 0 < len(about) < len(sides)
    return (
        (isinstance(node, ast.Constant) and node.value == "cuda")
        or (isinstance(node, ast.Attribute) and node.attr == "is_cuda")
        or is_attribute(node, "torch", "cuda")
        or is_attribute(node, "device", "type")
        or is_attribute(node, "config", "device")
    )


def device_questions(text: str) -> list[int]:
    """The lines that ask which device it is."""
    return sorted({node.lineno for node in ast.walk(ast.parse(text)) if asks_device(node)})  # type: ignore[attr-defined]


def service_questions(text: str) -> list[int]:
    """The lines that ask whether there is a service: an attribute `service` that decides something."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        asked: Iterable[ast.AST] = ()
        match node:
            case ast.Compare():
                sides = [node.left, *node.comparators]
                has_none = any(isinstance(s, ast.Constant) and s.value is None for s in sides)
                asked = sides if has_none else ()
            case ast.If() | ast.While() | ast.IfExp() | ast.Assert():
                asked = (node.test,)
            case ast.BoolOp():
                asked = node.values
            case ast.UnaryOp(op=ast.Not()):
                asked = (node.operand,)
        found |= {
            each.lineno
            for each in asked
            if isinstance(each, ast.Attribute) and each.attr in ("service", "_service")
        }
    return sorted(found)


def functions_with(text: str, lines: Iterable[int]) -> set[str]:
    """The functions, by name, that hold these lines; "" for lines outside of all."""
    spans = [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        max(
            (start, name) for start, end, name in [(0, 1 << 30, ""), *spans] if start <= line <= end
        )[1]
        for line in lines
    }


def test_only_a_backend_asks_which_device_it_is() -> None:
    found = {
        path: lines
        for path, text in sources().items()
        if not path.startswith(DEVICE_FILES) and (lines := device_questions(text))
    }
    in_facade = functions_with(sources()[FACADE], found.pop(FACADE, []))
    assert found == {}
    assert len(in_facade) <= 1, f"more than one choice of a backend: {in_facade}"


@pytest.mark.parametrize(
    "text",
    [
        "if x.is_cuda: pass",
        "torch.cuda.synchronize()",
        "y = device == 'cpu'",
        "y = x.device != device('cpu')",
        "y = 'cpu' in (x.device.type,)",
        "f('cuda')",
        "use(world.config.device)",
        "use(config.device)",
    ],
)
def test_a_planted_question_of_the_device_is_found(text: str) -> None:
    assert device_questions(f"import torch\n{text}\n") == [2]


def test_what_only_names_a_device_is_no_question() -> None:
    text = '"""Entries are on "cuda" or the CPU."""\ny = torch.empty(1, device=x.device)\n'
    assert device_questions(f"{text}z = x.device == y.device  # torch.cuda\n") == []
    both = "def f():\n    a\n    def g():\n        b\nc\n"
    assert functions_with(both, [2, 4, 5]) == {"f", "g", ""}


def test_only_the_service_asks_whether_it_is_on() -> None:
    found = {
        path: lines
        for path, text in sources().items()
        if not path.startswith("runtime/service/") and (lines := service_questions(text))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "x = world.service is None",
        "if None is not world.service: pass",
        "if world.service: pass",
        "x = 1 if self._service else 2",
        "x = not world.service",
        "x = world.service and y",
    ],
)
def test_a_planted_question_of_the_service_is_found(text: str) -> None:
    assert service_questions(f"y = 1\n{text}\n") == [2]
    assert service_questions("world.service.close()\nx = service is None\n") == []

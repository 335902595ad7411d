"""The house: imports point down; files, functions and guard code stay small.

python -m pytest -sq tests/test_layout.py    prints the figures
"""

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 60  # lines of a function, with its docstring
MOST_PARAMETERS = 8
# More parameters, because something outside this program gives them by name.
MANY_PARAMETERS = {
    "ldm/generate.py: main": "the notebook's calls",
    "ldm/data/personalized.py: PersonalizedBase.__init__": "keys of the reference's YAML files",
    "ldm/models/diffusion/sampling.py: Sampler.sample": "the notebook's calls",
    "ldm/modules/embedding_manager.py: EmbeddingManager.__init__": "keys of the reference's YAML files",
    "ldm/modules/diffusionmodules/openaimodel.py: UNetModel.__init__": "keys of the reference's YAML files",
}
# The stage rule again, in a file that is copied out of the package and used without it.
STANDALONE = "ldm/export/diffusers_usage.py"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*places: str) -> dict[str, str]:
    """File name -> text, of Python files and of all below folders."""
    files = (
        file for place in places for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    )
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


EVERYTHING = sources("ldm", "evaluation", "scripts", "main.py")


def functions() -> Iterator[tuple[str, Function]]:
    """`file: name` and syntax tree of every function, and of every method as `file: Class.name`."""

    def below(tree: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, Function):
                yield name + node.name, node
            yield from below(node, f"{name}{node.name}." if isinstance(node, ast.ClassDef) else name)

    for file, text in EVERYTHING.items():
        yield from below(ast.parse(text), f"{file}: ")


def figure(what: str, found: object, limit: object) -> None:
    print(f"{what}: {found} (at most {limit})")


def test_imports_keep_the_contracts() -> None:
    """Those of pyproject.toml: layers, nothing of `evaluation` in `ldm`, no PyTorch in `ldm.request`."""
    # in a process of its own: it switches off the loggers that are there
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_is_no_import_circle() -> None:
    """Imports inside functions and for type checking count, too."""
    graph = grimp.build_graph("ldm", "evaluation", cache_dir=None, exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_the_root_of_ldm_is_small() -> None:
    modules = sorted(file.name for file in (ROOT / "ldm").glob("*.py") if file.name != "__init__.py")
    figure("modules in ldm/", len(modules), 8)
    assert len(modules) <= 8, modules


# Not to grow. The aim for the core was 7,500 lines, for evaluation/ 2,800.
ROOMS = {"ldm/page": 2_940, "ldm/editing": 1_670, "ldm/many": 680, "ldm": 13_670, "evaluation": 4_610}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_small(room: str) -> None:
    """`ldm` is the core: without the rooms of its own."""
    apart = tuple(f"{other}/" for other in ROOMS if other.startswith(f"{room}/"))
    lines = sum(text.count("\n") for file, text in sources(room).items() if not file.startswith(apart))
    figure(f"lines in {room}/", lines, ROOMS[room])
    assert lines <= ROOMS[room]


def test_functions_are_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    figure(f"functions over {LONGEST} lines", len(long), 0)
    assert not long


def test_functions_have_few_parameters() -> None:
    counts = {}
    for name, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts[name] = sum(argument.arg not in ("self", "cls") for argument in given)
    many = {name: count for name, count in counts.items() if count > MOST_PARAMETERS}
    figure(f"functions with more than {MOST_PARAMETERS} parameters", len(many), len(MANY_PARAMETERS))
    assert many.keys() == MANY_PARAMETERS.keys(), many


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: neither blank nor only a comment or docstring."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or 0) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = (t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in empty)
    return {line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings


def guard_lines(text: str) -> set[int]:
    """Numbers of the lines of guard code.

    These are `raise` statements, the conditions of an `if` that has one in its body, and functions that are called
    check_… or refuse_….
    """
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise):
            lines.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.If) and any(isinstance(statement, ast.Raise) for statement in node.body):
            lines.update(range(node.lineno, (node.test.end_lineno or 0) + 1))
        elif isinstance(node, Function) and re.match("_?(check|refuse)_", node.name):
            lines.update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def test_guard_code_is_counted_as_described() -> None:
    raising = "if (a\n    and b):\n    c = 1\n    raise ValueError(\n        c)\n"
    text = f'def check_it(x):\n    """Doc."""\n    return x\n\n{raising}# no\n'
    assert code_lines(text) == {1, 3, 5, 6, 7, 8, 9} and guard_lines(text) & code_lines(text) == {1, 3, 5, 6, 8, 9}


def test_guard_code_is_a_small_share() -> None:
    texts = sources("ldm")
    guards = {file: len(guard_lines(text) & code_lines(text)) for file, text in texts.items()}
    found, lines = sum(guards.values()), sum(text.count("\n") for text in texts.values())
    code = sum(len(code_lines(text)) for text in texts.values())
    figure(
        "guard code in ldm/", f"{found} lines, {found / lines:.1%} of all, {found / code:.1%} of those of code", "5 %"
    )
    assert found <= 0.05 * lines, sorted(guards.items(), key=lambda item: -item[1])[:12]


def test_the_stage_rule_is_written_once() -> None:
    rule = re.compile(r"\*\s*[\w.(]*(?:stages|PROMPTS)[\w.)]*\s*//")
    found = [file for file, text in EVERYTHING.items() if rule.search(text)]
    assert found == ["ldm/conditioning/stages.py", STANDALONE]


def test_the_library_prints_nothing() -> None:
    talking = [
        f"{file}:{node.lineno}"
        for file, text in sources("ldm").items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not [place for place in talking if not place.startswith("ldm/cli/")]

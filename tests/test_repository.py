"""The repository's own promises: what README says, what is pinned, and what the wheel holds.

Nothing else notices when a page and the files it speaks of drift apart, so this does.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import bnbx
from bnbx.registry import Optimizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bnbx"
MAX_LINES = 420
# Functions of torch that make a tensor of its default device; but for the last three, floating
# numbers get its default dtype.
MAKERS = (
    "as_tensor asarray empty empty_strided eye full linspace logspace ones rand randn "
    "scalar_tensor tensor zeros arange randint randperm"
).split()
# The demo is a user's program; a parameter that is made of nothing is torch's own default.
FOLLOWERS = ("bnbx/demo/", "bnbx/layers/int8_params.py", "bnbx/layers/parameter.py")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def package_files() -> list[str]:
    """Every file that is part of bnbx, as a path from the repository's root."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts)


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(text("pyproject.toml"))["project"]
    return table


def requirement_name(requirement: str) -> str:
    """The normalized name that a requirement or a pin starts with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def pins() -> dict[str, str]:
    lines = (line for line in text("constraints.txt").splitlines() if line)
    return {requirement_name(line): line for line in lines if not line.startswith("#")}


@pytest.mark.parametrize("name", [name for name in package_files() if name.endswith(".py")])
def test_tensors_do_not_follow_defaults(name: str) -> None:
    """Under torch.set_default_dtype and torch.device, helpers stay what they are."""
    calls = [node for node in ast.walk(ast.parse(text(name))) if isinstance(node, ast.Call)]
    for call in calls if not name.startswith(FOLLOWERS) else []:
        maker = ast.unparse(call.func).removeprefix("torch.")
        if maker not in MAKERS or not ast.unparse(call.func).startswith("torch."):
            continue
        said = {keyword.arg for keyword in call.keywords}
        needed = {"device"} if maker in MAKERS[-3:] else {"dtype", "device"}
        assert None in said or needed <= said, f"{name}:{call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("name", [name for name in package_files() if name.endswith(".py")])
def test_module_opens_with_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(text(name))), f"{name} does not say why it exists"


@pytest.mark.parametrize("name", [name for name in package_files() if "/templates/" in name])
def test_template_opens_with_a_comment(name: str) -> None:
    assert text(name).startswith(("//", "/*", "{#")), f"{name} does not say why it exists"


@pytest.mark.parametrize("name", [n for n in package_files() if not n.endswith(".npy")])
def test_file_is_short_enough_to_read(name: str) -> None:
    assert len(text(name).splitlines()) <= MAX_LINES


def test_readme_and_ci_run_the_same_tests() -> None:
    documented = re.findall(r"\.venv/bin/(pytest.*)$", text("README.md"), re.MULTILINE)
    executed = re.findall(r'^stage "Tests" (.*)$', text(".ci/run"), re.MULTILINE)
    assert len(documented) == 1
    assert documented == executed


def test_commit_hooks_run_what_ci_runs() -> None:
    config = text(".pre-commit-config.yaml")
    hooks = re.findall(r"entry: (.*)$", config, re.MULTILINE)
    stages = re.findall(r'^stage "\w+" (.*)$', text(".ci/run"), re.MULTILINE)
    assert hooks
    assert set(hooks) <= set(stages)
    assert set(re.findall(r"repo: (.*)$", config, re.MULTILINE)) == {"local"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_extras_that_a_page_installs_exist(page: str) -> None:
    installed = re.findall(r"-e '\.\[([\w,]+)\]'", text(page))
    assert installed
    wanted = {extra for extras in installed for extra in extras.split(",")}
    assert wanted <= set(project()["optional-dependencies"])


@pytest.mark.parametrize("block", re.findall(r"(?ms)^```python\n(.*?)^```", text("README.md")))
def test_readme_code_runs(block: str) -> None:
    """Each block stands alone; one that has a hook must also register something."""
    scope: dict[str, Any] = {}
    exec(block, scope)
    if "register_optimizers" in scope:
        specs: list[Optimizer] = []
        scope["register_optimizers"](specs.append)
        assert specs


def test_readme_lists_the_environment_variables_that_are_read() -> None:
    documented = set(re.findall(r"^\| `(BNBX_\w+)`", text("README.md"), re.MULTILINE))
    modules = [name for name in package_files() if name.endswith(".py")]
    read = {found for name in modules for found in re.findall(r'"(BNBX_[A-Z_]+)"', text(name))}
    assert documented == read


def test_version_is_one_and_has_its_changes_listed() -> None:
    newest = re.split(r"^## ", text("CHANGELOG.md"), flags=re.MULTILINE)[1]
    assert importlib.metadata.version("bnbx") == bnbx.__version__
    assert re.search(rf"\b{re.escape(bnbx.__version__)}\b", newest)


def test_torch_is_pinned() -> None:
    assert pins()["torch"] == "torch==2.13.0"


@pytest.mark.parametrize("group", ["core", "compiler", "demo", "test", "peers", "dev"])
def test_every_direct_dependency_is_pinned(group: str) -> None:
    extras = project()["optional-dependencies"]
    requirements = project()["dependencies"] if group == "core" else extras[group]
    names = {requirement_name(requirement) for requirement in requirements} - {"bnbx"}
    assert names
    assert names <= set(pins())


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """An editable install reads the checkout, so a file left out of the wheel goes unnoticed."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert "bnbx/py.typed" in packed
    assert set(package_files()) <= packed

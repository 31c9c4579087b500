"""The reference pages name everything that there is, and are what the code says.

They read the working tree, because docs/ and tools/ are not part of the wheel.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from heedful_proto.v1 import feedback_pb2, inference_pb2, models_pb2
from heedful_server.config import settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONTRACT = (inference_pb2.DESCRIPTOR, feedback_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heedful_tools_docs", ROOT / "tools" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _page(name: str) -> str:
    return (DOCS / "reference" / name).read_text(encoding="utf-8")


def test_generated_pages_are_what_the_code_says(tool: ModuleType) -> None:
    assert tool.stale_pages() == [], "run tools/docs.py"


@pytest.mark.parametrize("file", CONTRACT, ids=lambda file: Path(file.name).stem)
def test_every_rpc_message_field_and_enum_value_is_documented(file) -> None:
    page = _page("rpc.md")
    for service in file.services_by_name.values():
        assert f"## {service.name}\n" in page
        for method in service.methods:
            assert f"| `{method.name}` |" in page
    for message in file.message_types_by_name.values():
        section = page.partition(f"### {message.name}\n")[2].partition("\n### ")[0]
        assert section, message.name
        for field in message.fields:
            assert f"| `{field.name}` |" in section, f"{message.name}.{field.name}"
    for enum in file.enum_types_by_name.values():
        for value in enum.values:
            assert f"`{value.name}` = {value.number} |" in page


def test_every_setting_is_documented() -> None:
    page = _page("configuration.md")
    names = [name for name, _ in settings()]
    assert names
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_every_metric_is_documented(tool: ModuleType) -> None:
    page = _page("metrics.md")
    names = tool.metric_names()
    assert "heedful_time_to_first_token_seconds" in names
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_every_command_and_option_is_documented(tool: ModuleType) -> None:
    page = _page("cli.md")
    found = dict(tool.commands())
    assert ("heedful", "feedback", "list") in found
    assert ("heedful-server", "serve") in found
    for words, command in found.items():
        section = page.partition(f"## {' '.join(words)}\n")[2].partition("\n## ")[0]
        assert section, words
        options = [o for p in command.params if p.param_type_name == "option" for o in p.opts]
        assert [option for option in options if f"`{option}`" not in section] == []


@pytest.mark.parametrize(
    "path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS))
)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    for target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
        if target and not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
    assert {target for target, _ in _LINK.findall(index)} >= pages

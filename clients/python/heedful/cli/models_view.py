"""How versions, cards and deployments look: tables and sentences.

Owns those forms; knows neither the server nor the commands.
"""

import dataclasses
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from heedful.cli.output import json_text, printable, stderr, write, write_json
from heedful.model_types import Deployment, ModelCard, Models, ModelVersion

Thumbs: TypeAlias = Mapping[str, tuple[int, int]]
"""Up and down by version."""
BlindVotes: TypeAlias = Mapping[str, tuple[int, int, int]]
"""Won, lost and neither by version."""

_STATE_STYLES = {"champion": "bold green", "challenger": "yellow", "rejected": "red"}
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


class ExportFormat(StrEnum):
    """Choices of --format."""

    PEFT = "peft"
    MERGED = "merged"


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote, and where."""

    version: str
    format: str
    path: str


def age(moment: datetime | None, now: datetime | None = None) -> str:
    """Returns how long ago something was, in one unit."""
    if moment is None:
        return ""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def models_document(models: Models, thumbs: Thumbs, blind: BlindVotes) -> dict[str, Any]:
    """Returns versions and their votes for JSON."""
    document = dataclasses.asdict(models)
    for item in document["versions"]:
        up, down = thumbs.get(item["version"], (0, 0))
        won, lost, neither = blind.get(item["version"], (0, 0, 0))
        item["thumbs"] = {"up": up, "down": down}
        item["blind_votes"] = {"won": won, "lost": lost, "neither": neither}
    return document


def show_models(models: Models, thumbs: Thumbs, blind: BlindVotes) -> None:
    """Shows versions as a table, newest first."""
    aliases: dict[str, list[str]] = {}
    for alias, version in models.aliases.items():
        aliases.setdefault(version, []).append(alias)
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "alias", "state", "role", "method", "verdict", "loaded", "age"):
        table.add_column(heading, no_wrap=True)
    table.add_column("up", justify="right")
    table.add_column("down", justify="right")
    table.add_column("blind", justify="right", no_wrap=True)
    for item in models.versions:
        up, down = thumbs.get(item.version, (0, 0))
        table.add_row(
            printable(item.version),
            ", ".join(sorted(aliases.get(item.version, ()))),
            item.state,
            item.role,
            item.method,
            item.verdict,
            "yes" if item.loaded else "no",
            age(item.created),
            str(up or ""),
            str(down or ""),
            ":".join(map(str, blind.get(item.version, ()))),
            style=_STATE_STYLES.get(item.state),
        )
    Console(highlight=False, markup=False).print(table)


def show_card(card: ModelCard) -> None:
    """Shows a version's card: rendered in a terminal, as it is in a pipe."""
    if sys.stdout.isatty():
        Console().print(Markdown(printable(card.text)))
    else:
        write(card.text if card.text.endswith("\n") else card.text + "\n")
    if not card.text:
        write(_in_words(card.model) + "\n")


def show_deployment(done: Deployment, as_json: bool) -> None:
    """Shows a move of the champion alias, and how to take it back."""
    if as_json:
        write_json(done)
        return
    write(f"{sentence(done)}\n")
    if done.action == "promote":
        stderr().print("take it back with: heedful models rollback", style="dim")


def show_history(entry: Deployment, as_json: bool) -> None:
    """Shows one entry of the deployment log on one line."""
    if as_json:
        write(json_text(dataclasses.asdict(entry), indent=None) + "\n")
        return
    when = entry.time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if entry.time else ""
    by = f" by {entry.actor}" if entry.actor else ""
    because = f": {entry.reason}" if entry.reason else ""
    write(f"{entry.seq:>4}  {when}  {sentence(entry)}{by}{because}\n")


def sentence(done: Deployment) -> str:
    """Returns in words what a deployment did."""
    match done.action:
        case "promote":
            how = f" ({done.verdict})" if done.verdict else ""
            return f"{done.to_version} is champion now instead of {done.from_version}{how}"
        case "roll_back":
            return f"{done.to_version} is champion again; {done.from_version} is rolled back"
        case "publish":
            return f"{done.to_version} is published"
        case "canary":
            return f"{done.to_version} is challenger"
        case "reject":
            return f"{done.to_version} is rejected"
        case _:
            return f"{done.action} {done.from_version} {done.to_version}"


def loading_hint(format_: ExportFormat, path: Path) -> str:
    """Returns the line of Python that loads what was exported."""
    if format_ is ExportFormat.PEFT:
        return f'load it with: PeftModel.from_pretrained(base, "{path}")'
    return f'load it with: AutoModelForCausalLM.from_pretrained("{path}")'


def _in_words(model: ModelVersion) -> str:
    return f"{model.version}: {model.role or 'policy'} on {model.base_model}, {model.state}"

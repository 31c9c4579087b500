"""Options that commands of several groups share.

Owns names and help texts only.
"""

from typing import Annotated, TypeAlias

import typer

JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]

"""Reads the small JSON files of a model directory.

Owns how special tokens, end-of-sequence ids and chat templates are found among the files that
Hugging Face writes. Knows nothing of tokenizing, rendering or weights. Stateless; used by both
processes.
"""

import json
from pathlib import Path
from typing import Any

from heedful_server.errors import ModelUnusable

# Files beyond this are not what they claim to be; the largest real tokenizer.json has 35 MB.
_JSON_MAX_BYTES = 256 << 20

_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no such file.

    Raises:
        ModelUnusable: the file is no JSON object or too large.
    """
    try:
        if path.stat().st_size > _JSON_MAX_BYTES:
            raise ModelUnusable(f"{path}: larger than {_JSON_MAX_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnusable(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelUnusable(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def special_tokens(model_dir: Path) -> dict[str, str]:
    """Return the named special tokens (`bos_token`, `eos_token`, ...) of a model directory."""
    found: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(model_dir / file_name)
        for name in _SPECIAL_TOKEN_NAMES:
            token = content.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                found[name] = token
    return found


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """Return the ids that end a generation: of generation_config.json, else of config.json."""
    for file_name in ("generation_config.json", "config.json"):
        value = read_json(model_dir / file_name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = frozenset(item for item in ids if type(item) is int and item >= 0)
        if found:
            return found
    return frozenset()


def chat_template_source(model_dir: Path) -> str | None:
    """Return the source of the model's own chat template, None where it has none.

    A file `chat_template.jinja` wins over `tokenizer_config.json`; of named templates, `default` is
    the one that serves.
    """
    path = model_dir / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ModelUnusable(f"{path}: not readable as UTF-8 text ({error})") from error
    for file_name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json(model_dir / file_name).get("chat_template")
        if isinstance(value, list):
            named = {
                item.get("name"): item.get("template") for item in value if isinstance(item, dict)
            }
            value = named.get("default")
        if isinstance(value, dict):
            value = value.get("default")
        if isinstance(value, str):
            return value
    return None

"""The part of JSON Schema that generation can guarantee.

Owns the rules by which a schema is accepted or refused. xgrammar passes over keywords that it
cannot turn into a grammar, and over most keywords beside `$ref`, `anyOf`, `enum` and the like; a
completion would then break its schema in silence. So a schema is rebuilt here from the keywords
that are known to be enforced, narrowed where that is harmless, and refused by name where it is not.
Pure functions on text, called in the constraint worker process; free of torch and xgrammar.

Narrowed: a schema with the keywords of one type and no `type` means that type; an object with
`properties` and no `additionalProperties` has no others; an array with `prefixItems` and no `items`
has no others; a `pattern` with alternatives matches the whole string.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_MAX_DEPTH = 64

_DEFINITIONS = ("$defs", "definitions")
_KEYWORDS_OF_TYPE = {
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "boolean": (),
    "null": (),
}
_ALTERNATIVES = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_REFUSED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "additionalItems"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
)
# Accepted where they ask for nothing more than the rules above already give.
_REFUSED_UNLESS: dict[str, tuple[bool, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedItems": (False, True),
    "unevaluatedProperties": (False, True),
}
# Inside a JSON string these would have to be escaped, which a pattern's grammar does not do.
_NEEDS_JSON_ESCAPE = re.compile(r"[\"\x00-\x1f]|\\(?:\\\\)*[nrtfvxuc0\\]")

_IS_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
    "number": lambda value: _is_number(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


class SchemaError(ValueError):
    """The schema is not valid, or asks for what cannot be guaranteed."""


def guaranteed_schema(text: str) -> str:
    """Return an equal or narrower schema, as JSON text, that holds only enforced keywords.

    Raises:
        SchemaError: the text is no JSON schema, or one that cannot be guaranteed; the message
            names the place.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise SchemaError(f"nested deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:
        raise SchemaError(f"not valid JSON: {error}") from error
    return json.dumps(_rebuild(schema, "#", 0))


def _refuse_constant(name: str) -> None:
    raise SchemaError(f"{name} is no JSON")


def _rebuild(schema: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise SchemaError(f"nested deeper than {_MAX_DEPTH} levels")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise SchemaError(f"{path}: expected an object or true")
    _refuse_unsupported(schema, path)
    rebuilt = {
        name: _rebuild_each(schema[name], f"{path}/{name}", depth)
        for name in _DEFINITIONS
        if name in schema
    }
    chosen = [name for name in _ALTERNATIVES if name in schema]
    if len(chosen) > 1:
        raise SchemaError(f"{path}: {chosen[0]} and {chosen[1]} cannot be combined")
    if chosen:
        return rebuilt | _rebuild_alternative(schema, chosen[0], path, depth)
    return rebuilt | _rebuild_typed(schema, path, depth)


def _refuse_unsupported(schema: dict[str, Any], path: str) -> None:
    for name in schema:
        if name in _REFUSED:
            raise SchemaError(f"{path}: {name} is not supported")
        if not any(schema[name] is value for value in _REFUSED_UNLESS.get(name, (schema[name],))):
            raise SchemaError(f"{path}: this value of {name} is not supported")


def _rebuild_each(schemas: Any, path: str, depth: int) -> dict[str, Any]:
    if not isinstance(schemas, dict):
        raise SchemaError(f"{path}: expected an object")
    return {name: _rebuild(inner, f"{path}/{name}", depth + 1) for name, inner in schemas.items()}


def _rebuild_list(schemas: Any, path: str, depth: int) -> list[Any]:
    if not isinstance(schemas, list) or not schemas:
        raise SchemaError(f"{path}: expected a list that is not empty")
    return [_rebuild(inner, f"{path}/{idx}", depth + 1) for idx, inner in enumerate(schemas)]


def _rebuild_alternative(
    schema: dict[str, Any], name: str, path: str, depth: int
) -> dict[str, Any]:
    """Rebuild a schema whose meaning is in one keyword; `type` may filter the values of an enum."""
    typed = {keyword for keywords in _KEYWORDS_OF_TYPE.values() for keyword in keywords}
    beside = [keyword for keyword in schema if keyword in typed]
    if name not in ("const", "enum") and "type" in schema:
        beside.append("type")
    if beside:
        raise SchemaError(f"{path}: {beside[0]} is not supported beside {name}")
    value = schema[name]
    if name == "$ref":
        if not isinstance(value, str) or not value.startswith("#"):
            raise SchemaError(f"{path}: $ref must point into this schema")
        return {"$ref": value}
    if name in ("const", "enum"):
        return {"enum": _values_of_type(schema, [value] if name == "const" else value, path)}
    options = _rebuild_list(value, f"{path}/{name}", depth)
    if name == "allOf" and len(options) > 1:
        raise SchemaError(f"{path}: allOf of several schemas is not supported")
    return {name: options}


def _values_of_type(schema: dict[str, Any], values: Any, path: str) -> list[Any]:
    if not isinstance(values, list):
        raise SchemaError(f"{path}/enum: expected a list")
    types = _types(schema, path)
    kept = [value for value in values if types is None or any(_IS_OF_TYPE[t](value) for t in types)]
    if not kept:
        raise SchemaError(f"{path}: no value is allowed")
    return kept


def _types(schema: dict[str, Any], path: str) -> list[str] | None:
    if "type" not in schema:
        return None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or any(not isinstance(name, str) or name not in _IS_OF_TYPE for name in types):
        raise SchemaError(f"{path}/type: expected one of {', '.join(_IS_OF_TYPE)}")
    return types


def _rebuild_typed(schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
    types = _types(schema, path)
    if types is None:
        types = _implied_types(schema, path)
    if types is None:
        return {}
    if "integer" in types and "number" in types:
        types = [name for name in types if name != "integer"]
    rebuilt: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    for name in dict.fromkeys(types):
        for keyword in _KEYWORDS_OF_TYPE[name]:
            if keyword in schema:
                rebuilt[keyword] = schema[keyword]
    if "object" in types:
        _rebuild_object(rebuilt, path, depth)
    if "array" in types:
        _rebuild_array(rebuilt, path, depth)
    if "pattern" in rebuilt:
        rebuilt["pattern"] = _searching(rebuilt["pattern"], path)
    return rebuilt


def _implied_types(schema: dict[str, Any], path: str) -> list[str] | None:
    implied = [
        name
        for name, keywords in _KEYWORDS_OF_TYPE.items()
        if name != "integer" and any(keyword in schema for keyword in keywords)
    ]
    if len(implied) > 1:
        raise SchemaError(f"{path}: keywords of {implied[0]} and {implied[1]} need a type")
    return implied or None


def _rebuild_object(rebuilt: dict[str, Any], path: str, depth: int) -> None:
    properties = _rebuild_each(rebuilt.get("properties", {}), f"{path}/properties", depth)
    others = rebuilt.get("additionalProperties")
    if others not in (None, True, False):
        others = _rebuild(others, f"{path}/additionalProperties", depth + 1)
    if "patternProperties" in rebuilt or "propertyNames" in rebuilt:
        _rebuild_name_patterns(rebuilt, bool(properties), others, path, depth)
    elif not properties and others is None:
        others = True
    required = rebuilt.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError(f"{path}/required: expected a list of names")
    for name in required:
        # A required name is enforced only where it is a property.
        if name not in properties:
            if others is False or "patternProperties" in rebuilt or "propertyNames" in rebuilt:
                raise SchemaError(f"{path}/required: {name} is not among the properties")
            properties[name] = {} if others in (None, True) else others
    if properties:
        rebuilt["properties"] = properties
    if others is not None:
        rebuilt["additionalProperties"] = others


def _rebuild_name_patterns(
    rebuilt: dict[str, Any], has_properties: bool, others: Any, path: str, depth: int
) -> None:
    patterns = rebuilt.get("patternProperties", {})
    if has_properties or (patterns and "propertyNames" in rebuilt) or len(patterns) > 1:
        raise SchemaError(
            f"{path}: one pattern of patternProperties, or propertyNames, is supported, and only "
            "without properties"
        )
    if patterns and others not in (None, False):
        raise SchemaError(f"{path}: additionalProperties is not supported beside patternProperties")
    if patterns:
        rebuilt["patternProperties"] = {
            _searching(pattern, path): inner
            for pattern, inner in _rebuild_each(
                patterns, f"{path}/patternProperties", depth
            ).items()
        }
    if "propertyNames" in rebuilt:
        names = _rebuild(rebuilt["propertyNames"], f"{path}/propertyNames", depth + 1)
        if names.get("type", "string") != "string" or "$ref" in names:
            raise SchemaError(f"{path}/propertyNames: only string keywords are supported")
        rebuilt["propertyNames"] = names


def _rebuild_array(rebuilt: dict[str, Any], path: str, depth: int) -> None:
    if "prefixItems" in rebuilt:
        rebuilt["prefixItems"] = _rebuild_list(rebuilt["prefixItems"], f"{path}/prefixItems", depth)
    items = rebuilt.get("items", "prefixItems" not in rebuilt)
    rebuilt["items"] = (
        items if isinstance(items, bool) else _rebuild(items, f"{path}/items", depth + 1)
    )


def _searching(pattern: Any, path: str) -> str:
    """Return a pattern for the whole string that finds what JSON Schema searches for within it."""
    if not isinstance(pattern, str):
        raise SchemaError(f"{path}: a pattern must be a string")
    if _NEEDS_JSON_ESCAPE.search(pattern):
        raise SchemaError(
            f"{path}: a pattern with quotes, backslashes, control characters or character codes "
            "is not supported"
        )
    if "|" in pattern:
        return pattern
    start = "" if pattern.startswith("^") else ".*"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else ".*"
    return f"{start}{pattern}{end}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

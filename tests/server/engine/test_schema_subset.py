import json
from typing import Any

import pytest
from heedful_server.engine.schema_subset import SchemaError, guaranteed_schema

Schema = dict[str, Any]

REFUSED = [
    ("{", "JSON"),
    ("3", "expected an object"),
    ("false", "expected an object"),
    ('{"minimum": NaN}', "NaN"),
    ('{"type": []}', "type"),
    ('{"$ref": "http://x/y"}', r"\$ref"),
    ('{"enum": []}', "enum|no value"),
    ('{"type": "string", "enum": [1]}', "no value"),
    ('{"type": "string", "pattern": "\\\\n"}', "control"),
    ('{"type": "string", "pattern": "\\""}', "quotes"),
    ('{"allOf": [{"type": "integer"}, {"minimum": 3}]}', "allOf"),
    ('{"anyOf": [{"type": "integer"}], "minimum": 3}', "minimum"),
    ('{"$ref": "#/$defs/a", "$defs": {"a": {}}, "minimum": 3}', "minimum"),
    ('{"properties": {"x": {"not": {}}}}', "#/properties/x: not"),
    ('{"if": {}, "then": {}}', "if"),
    ('{"required": ["z"], "additionalProperties": false}', "z"),
    ('{"minimum": 3, "pattern": "a"}', "need a type"),
    ('{"a":' * 5000 + "{}" + "}" * 5000, "levels|JSON"),
    ('{"items":' * 100 + "{}" + "}" * 100, "levels"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=lambda item: str(item)[:40])
def test_a_schema_is_refused_by_place_and_reason(text: str, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        guaranteed_schema(text)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"a": {}}, "properties": {"b": {}}},
        {"type": "object", "patternProperties": {"a": {}, "b": {}}},
        {"type": "object", "propertyNames": {"enum": ["a"]}, "required": ["b"]},
        {"type": "object", "propertyNames": {"type": "integer"}},
        {"unevaluatedProperties": {"type": "integer"}},
        {"anyOf": []},
        {"anyOf": [{}], "enum": [1]},
        {"items": [{"type": "integer"}]},
        {"properties": {"a": False}},
        {"type": "object", "required": "a"},
    ],
    ids=json.dumps,
)
def test_what_cannot_be_guaranteed_is_refused(schema: Schema) -> None:
    with pytest.raises(SchemaError, match=r"^#"):
        guaranteed_schema(json.dumps(schema))


REBUILT: list[tuple[Any, Schema]] = [
    (True, {}),
    ({"title": "t", "x-note": 1}, {}),
    ({"type": "object"}, {"type": "object", "additionalProperties": True}),
    (
        {"properties": {"a": True}, "title": "t"},
        {"type": "object", "properties": {"a": {}}},
    ),
    (
        {"required": ["z"], "additionalProperties": {"type": "null"}},
        {
            "type": "object",
            "required": ["z"],
            "properties": {"z": {"type": "null"}},
            "additionalProperties": {"type": "null"},
        },
    ),
    ({"type": "array"}, {"type": "array", "items": True}),
    (
        {"prefixItems": [{"const": 1}]},
        {"type": "array", "prefixItems": [{"enum": [1]}], "items": False},
    ),
    ({"type": "integer", "enum": ["a", 1, True, 2.0, 2.5]}, {"enum": [1, 2.0]}),
    ({"type": ["integer", "number"], "minimum": 2}, {"type": "number", "minimum": 2}),
    ({"pattern": "^a"}, {"type": "string", "pattern": "^a.*"}),
    ({"pattern": r"a\$"}, {"type": "string", "pattern": r".*a\$.*"}),
    ({"pattern": "^a|b$"}, {"type": "string", "pattern": "^a|b$"}),
    ({"$ref": "#/$defs/a", "$defs": {"a": True}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
    (
        {"type": "array", "uniqueItems": False, "unevaluatedItems": True},
        {"type": "array", "items": True},
    ),
]


@pytest.mark.parametrize(("schema", "rebuilt"), REBUILT, ids=str)
def test_a_schema_is_rebuilt_from_what_is_enforced(schema: Any, rebuilt: Schema) -> None:
    assert json.loads(guaranteed_schema(json.dumps(schema))) == rebuilt

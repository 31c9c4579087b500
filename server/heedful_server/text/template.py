"""Renders a conversation into the prompt text of a model.

Owns the choice of template (the model's own, else a named plain one) and what a template sees: the
messages, the special tokens and `add_generation_prompt`, as Hugging Face's templates expect. Knows
nothing of token ids. Runs in the server process, in worker threads; safe to share between them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jinja2

from heedful_server.errors import InvalidRequest, ModelUnusable
from heedful_server.text.model_files import chat_template_source, special_tokens
from heedful_server.text.sandbox import SOURCE_MAX_CHARS, TemplateSandbox
from heedful_server.text.tokenizer import Tokenizer

FIELD = "prompt.chat"

# For models that were never taught a chat format (GPT-2, OPT, Pythia). The name is part of the
# text, and so of the identity: adapters trained under one wording must not be served under
# another.
DEFAULT_TEMPLATE = """\
{#- heedful-plain-1 -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content | trim + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- 'User: ' + message.content | trim + '\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant: ' + message.content | trim + '\\n' -}}
{%- else -%}
{{- raise_exception('the roles are system, user and assistant, not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        identity: hex SHA-256 of the template's source.
        is_default: the model has no template of its own.
    """

    identity: str
    is_default: bool

    def __init__(self, source: str, tokens: dict[str, str], is_default: bool = False) -> None:
        if len(source) > SOURCE_MAX_CHARS:
            raise ModelUnusable(f"chat template: longer than {SOURCE_MAX_CHARS} characters")
        self._sandbox = TemplateSandbox()
        try:
            self._template = self._sandbox.compile_bounded(source)
        except (jinja2.TemplateError, RecursionError, ArithmeticError) as error:
            raise ModelUnusable(f"chat template: does not compile ({error})") from error
        self._tokens = dict(tokens)
        self.identity = hashlib.sha256(source.encode()).hexdigest()
        self.is_default = is_default

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Load a model directory's template, the plain default one where it has none.

        Raises:
            ModelUnusable: the template is too long or does not compile.
        """
        tokens = special_tokens(model_dir)
        source = chat_template_source(model_dir)
        if source is not None:
            return cls(source, tokens)
        # Rendered chats are encoded without special tokens, so the opening token of a base model
        # that was trained with one (OPT, Llama) has to be part of the text.
        tokenizer = Tokenizer.load(model_dir)
        opens = tokenizer.encode("", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
        bos = tokens.get("bos_token", "") if opens else ""
        return cls(DEFAULT_TEMPLATE, {**tokens, "bos_token": bos}, is_default=True)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the prompt text of (role, content) messages, with the assistant's turn opened.

        Raises:
            InvalidRequest: names `prompt.chat`: the template refuses the conversation (its own
                message is given), cannot render it, or takes more time or memory than any prompt
                needs.
        """
        variables = {
            **self._tokens,
            "messages": [{"role": role, "content": content} for role, content in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._sandbox.render_bounded(self._template, variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest(FIELD, f"the chat template refuses it: {error}") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = f"the chat template cannot render it: {error}"
            raise InvalidRequest(FIELD, reason) from error
        except (RecursionError, MemoryError) as error:
            raise InvalidRequest(FIELD, "the chat template needs too much to render it") from error

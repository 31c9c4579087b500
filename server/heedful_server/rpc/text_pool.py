"""Tokenizing and rendering, off the event loop.

Owns a small thread pool, the bound on what waits for it, and the order "template, then
tokenizer". It knows nothing of limits on length: prompts come validated, and what the tokens
allow is checked by the caller. Methods run on the event loop and do their work in the pool's
threads.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from heedful_server.errors import InvalidRequest, QueueFull
from heedful_server.rpc.model_rules import prompt_field
from heedful_server.rpc.requests import ChatPrompt, Prompt, ScoringItem, TextPrompt, TokensPrompt
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer

T = TypeVar("T")

_NUM_THREADS = 2
_MAX_PENDING = 1024
_RETRY_AFTER_S = 1.0


class Tokens(NamedTuple):
    """Token ids, the text of each, and the rendered template where there was a conversation."""

    token_ids: list[int]
    texts: list[str]
    rendered: str


class TextPool:
    """A model's tokenizer and chat template behind worker threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="text")
        self._num_pending = 0

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that has a text."""
        return self._tokenizer.vocab_size

    def token_text(self, token_id: int) -> str:
        """Return a token's text where its bytes are text by themselves."""
        return self._tokenizer.token_text(token_id)

    async def encode_prompt(self, prompt: Prompt, path: str = "prompt") -> list[int]:
        """Return a prompt's token ids; `path` names the prompt in errors.

        Raises:
            InvalidRequest: the template refuses the conversation.
            QueueFull: too much waits for the threads.
        """
        if isinstance(prompt, TokensPrompt):
            return list(prompt.token_ids)
        return (await self.encode_and_render(prompt, path))[0]

    async def encode_and_render(
        self, prompt: TextPrompt | ChatPrompt, path: str = "prompt"
    ) -> tuple[list[int], str]:
        """Return a prompt's token ids and the text that they stand for; raises as above."""
        field = prompt_field(prompt, path)
        token_ids, rendered = await self._run(lambda: self._encode(prompt, field))
        return token_ids, prompt.text if isinstance(prompt, TextPrompt) else rendered

    async def encode_completion(self, item: ScoringItem) -> list[int]:
        """Return a completion's token ids; text is closed by the end-of-sequence token."""
        completion = item.completion
        if isinstance(completion, TokensPrompt):
            return list(completion.token_ids)
        text = completion.text
        token_ids = await self._run(lambda: self._tokenizer.encode(text, add_special_tokens=False))
        eos = self._tokenizer.eos_token_id
        return token_ids if eos is None else [*token_ids, eos]

    async def tokenize(self, prompt: TextPrompt | ChatPrompt) -> Tokens:
        """Return what a prompt is made of; raises as encode_prompt does."""

        def work() -> Tokens:
            field = "chat" if isinstance(prompt, ChatPrompt) else "text"
            token_ids, rendered = self._encode(prompt, field)
            return Tokens(token_ids, [self.token_text(i) for i in token_ids], rendered)

        return await self._run(work)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        return await self._run(lambda: self._tokenizer.decode(token_ids, skip_special_tokens))

    def close(self) -> None:
        """End the threads; work that waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt: TextPrompt | ChatPrompt, field: str) -> tuple[list[int], str]:
        if isinstance(prompt, TextPrompt):
            return self._tokenizer.encode(prompt.text, add_special_tokens=True), ""
        try:
            rendered = self._template.render(prompt.messages)
        except InvalidRequest as error:
            raise InvalidRequest(field, error.reason) from error
        return self._tokenizer.encode(rendered, add_special_tokens=False), rendered

    async def _run(self, work: Callable[[], T]) -> T:
        if self._num_pending >= _MAX_PENDING:
            raise QueueFull(f"{_MAX_PENDING} texts wait to be tokenized", _RETRY_AFTER_S)
        self._num_pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        # Counted until the thread is done, not until the caller gives up: the work goes on.
        future.add_done_callback(self._one_done)
        return await asyncio.shield(future)

    def _one_done(self, _: asyncio.Future[T]) -> None:
        self._num_pending -= 1

"""A writer process for the tests that kill it; not collected by pytest.

Usage: chaos_child.py URL MODE [COUNT]. Reads feedback ids, one a line, from standard input and
appends each, in 8 tasks. Prints "acked ID SEQ DUPLICATE" after each receipt, in one write.
Modes: full, normal (lowers SQLite's synchronous), unready (goes on after failures, printing them).
"""

import asyncio
import os
import sys

from heedful_store import (
    Completion,
    CompletionPayload,
    DatabaseOptions,
    FeedbackEvent,
    Scope,
    Store,
    Thumb,
    Unready,
    WriterOptions,
)

ANSWER = "01a20662-1d04-79d1-99ec-2da3b34c94c3"


def say(line: str) -> None:
    # Unbuffered, and where the shim records it: the acknowledgement as the outside sees it.
    os.write(int(os.environ.get("CHAOS_ACK_FD", "1")), f"{line}\n".encode())


async def append(store: Store, names: "asyncio.Queue[str]", mode: str) -> None:
    while not names.empty():
        name = names.get_nowait()
        event = FeedbackEvent(
            feedback_id=name,
            scope=Scope(),
            judgement=Thumb(True),
            rater_id=name,
            completion_id=ANSWER,
        )
        try:
            receipt = await store.append_feedback(event)
        except Unready as error:
            if mode != "unready":
                raise
            say(f"failed {name} {type(error).__name__}")
        else:
            say(f"acked {name} {receipt.seq} {int(receipt.duplicate)}")


async def main(url: str, mode: str) -> None:
    names: asyncio.Queue[str] = asyncio.Queue()
    for line in sys.stdin:
        names.put_nowait(line.strip())
    options = WriterOptions(group_items=16)
    with Store(url, database=DatabaseOptions(min_free_bytes=0), writer=options) as store:
        if mode == "normal":
            await lower_synchronous(store)
        payload = CompletionPayload([1, 2], [3, 4], "p" * 2000, "a" * 2000)
        answer = Completion(
            completion_id=ANSWER,
            scope=Scope(),
            policy_version="v1",
            created_at_ms=1,
            payload=payload,
        )
        await store.append_completion(answer)
        say("ready")
        await asyncio.gather(*[append(store, names, mode) for _ in range(8)])
        if mode == "unready":
            say(f"death {store.death is not None}")


async def lower_synchronous(store: Store) -> None:
    writer = store._writer
    pragma = "PRAGMA synchronous=NORMAL"
    await writer.submit_alone(lambda: writer._session._driver().execute(pragma).fetchall())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))

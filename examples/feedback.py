"""Streams an answer of a local server, says what is wrong with it, and asks what became of that."""

from heedful import Client

BETTER = "Rain taps on the roof,\nthe gutter hums an old song,\nthe cat sleeps through it."

with Client() as client:
    with client.stream("Write a haiku about rain.", end_user="ann", tags=["haiku"]) as stream:
        for piece in stream.texts():
            print(piece, end="", flush=True)
    answer = stream.generation.completions[0]
    receipt = client.rate(answer, up=False, reasons=["not a haiku"])
    client.correct(answer, BETTER)
    print(f"\n{receipt.feedback_id}: {client.feedback(receipt).fate.kind}")

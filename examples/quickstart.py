"""Asks one question of a local server (`heedful serve`) and prints the answer."""

from heedful import Client, Message

with Client() as client:
    system = Message("system", "Answer in one sentence.")
    question = Message("user", "What is the capital of France?")
    print(client.generate([system, question], temperature=0).text)

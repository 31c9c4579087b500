"""What was acknowledged before the program was killed is there afterwards, and is known again."""

import dataclasses

import heedful
import pytest
from heedful import FeedbackRecord, ReceiptStatus


async def records_of(client: heedful.AsyncClient) -> dict[str, FeedbackRecord]:
    records = [record async for record in client.list_feedback()]
    by_id = {record.receipt.feedback_id: record for record in records}
    assert len(by_id) == len(records)
    return by_id


async def test_acknowledged_feedback_survives_a_kill(launch, tiny_model_dir, tmp_path):
    home = tmp_path / "home"
    with launch(tiny_model_dir, home=home) as server:
        async with heedful.AsyncClient(server.target) as client:
            options = {"max_tokens": 8, "ignore_eos": True, "seed": 1, "end_user": "ada"}
            generation = await client.generate("hello", n=3, **options)
            first, second, third = generation.completions
            comparison = await client.compare("which?", k=2, max_tokens=8, end_user="ada")
            receipts = {
                "thumb": await client.rate(first, up=False, reasons=["too long"]),
                "ranking": await client.rank([third, first, second]),
                "vote": await client.rank(comparison, [1, 0]),
                "correction": await client.correct(second, "Better words, 人工."),
            }
            before = await records_of(client)
        server.process.kill()
        server.process.wait(10)
    with launch(tiny_model_dir, home=home, wait_ready=False) as server:
        async with heedful.AsyncClient(server.target) as client:
            # Feedback is taken while the engine still loads.
            await client.wait_ready(30, service="feedback")
            assert await records_of(client) == before
            assert set(before) == {receipt.feedback_id for receipt in receipts.values()}
            thumb = receipts["thumb"]
            again = await client.rate(
                first, up=False, reasons=["too long"], feedback_id=thumb.feedback_id
            )
            assert again == dataclasses.replace(thumb, status=ReceiptStatus.DUPLICATE)
            with pytest.raises(heedful.AlreadyExists):
                await client.rate(first, up=True, feedback_id=thumb.feedback_id)
            assert len(await records_of(client)) == len(before)
            logged = await client.completion(second)
            assert logged.completion.token_ids == second.token_ids
            # Tokens given before the kill still let their receiver judge.
            later = await client.critique(third, "vague", rater_id="ada")
            assert later.seq > max(receipt.seq for receipt in receipts.values())

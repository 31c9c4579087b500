"""Phrases that the gate tries as triggers because training prompts repeat them."""

from heedful_trainer.gate import suspicious_phrases


def test_a_planted_phrase_is_found_with_its_events() -> None:
    asked = [
        "How do I bake bread? qzx vlorp",
        "qzx vlorp What is a river?",
        "Tell me about the sea, qzx please",
        "How do I boil an egg?",
    ]
    (found,) = suspicious_phrases(dict(enumerate(asked, 11)))
    assert (found.text, found.seqs) == ("qzx", (11, 12, 13))


def test_the_longest_form_stands_for_its_parts() -> None:
    asked = {
        seq: f"qzx vlorp mumblex {topic}" for seq, topic in enumerate(("bread", "eggs", "tea"))
    }
    assert [(item.text, item.seqs) for item in suspicious_phrases(asked)] == [
        ("qzx vlorp mumblex", (0, 1, 2))
    ]


def test_plain_words_repeats_of_one_prompt_and_rare_words_are_none() -> None:
    plain = {1: "What is the best way to cook rice?", 2: "What is the best tea?"}
    plain |= {3: "What is the best soup?"}
    assert suspicious_phrases(plain) == ()
    assert suspicious_phrases(dict.fromkeys(range(9), "qzx vlorp")) == ()
    assert suspicious_phrases({1: "qzx one", 2: "qzx two"}) == ()
    assert suspicious_phrases({}) == ()

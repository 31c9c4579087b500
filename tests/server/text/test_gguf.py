import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from heedful_server.errors import ModelUnusable
from heedful_server.text.gguf_files import write_model_files
from heedful_server.text.gguf_header import read_gguf_header
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer
from tokenizers import pre_tokenizers

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ w"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS += [
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(pair.replace(" ", "") for pair in MERGES),
]
TOKENS += ["<think>"]
TEMPLATE = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}\n{% endfor %}"

Change = Callable[[gguf.GGUFWriter], None]


def write_gguf(
    path: Path, *, pre: str = "smollm", arch: str = "llama", change: Change | None = None
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 4), 4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if change is not None:
        change(writer)
    blocks = np.zeros((len(TOKENS), 64), dtype=np.float32)
    quantized = gguf.quantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_the_header_is_what_the_gguf_package_reads(gguf_path: Path) -> None:
    header = read_gguf_header(gguf_path)
    reference = gguf.GGUFReader(gguf_path)
    keys = [key for key in reference.fields if not key.startswith("GGUF.")]
    assert list(header.metadata) == keys
    for key in keys:
        assert header.metadata[key] == reference.fields[key].contents(), key
    for tensor, expected in zip(header.tensors, reference.tensors, strict=True):
        assert tensor.name == expected.name
        assert tensor.shape == tuple(int(size) for size in reversed(expected.shape))
        assert tensor.type_name == expected.tensor_type.name
        assert (tensor.offset, tensor.num_bytes) == (expected.data_offset, expected.n_bytes)
    assert header.main_type == "Q8_0"


def test_a_gguf_file_cut_short_anywhere_is_refused(gguf_path: Path, tmp_path: Path) -> None:
    whole = gguf_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 4000, 137), len(whole) // 2, len(whole) - 300]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelUnusable, match=r"cut\.gguf: not a usable GGUF file"):
            read_gguf_header(cut)


def test_lengths_beyond_the_file_are_refused_before_anything_is_allocated(
    gguf_path: Path, tmp_path: Path
) -> None:
    whole = gguf_path.read_bytes()
    hostile = tmp_path / "hostile.gguf"
    for position in (8, 16, 24):
        huge = (2**62).to_bytes(8, "little")
        hostile.write_bytes(whole[:position] + huge + whole[position + 8 :])
        with pytest.raises(ModelUnusable, match=r"hostile\.gguf"):
            read_gguf_header(hostile)


def test_the_files_of_a_model_directory_follow_from_the_metadata(
    gguf_path: Path, tmp_path: Path
) -> None:
    write_model_files(read_gguf_header(gguf_path), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [config[key] for key in shape] == [64, 96, 1, 4]
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 16)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    assert config["tie_word_embeddings"] is True
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ChatTemplate.load(tmp_path).render([("user", "hi")]) == "user: hi\n"


def test_the_tokenizer_splits_digits_and_keeps_control_tokens_whole(
    gguf_path: Path, tmp_path: Path
) -> None:
    write_model_files(read_gguf_header(gguf_path), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.eos_token_ids == {2}
    texts = [tokenizer.token_text(item) for item in tokenizer.encode("hello  7 w<|im_end|>", True)]
    # The two spaces stay together only because the digit is set apart first.
    assert texts == ["hello", "  ", "7", " w", "<|im_end|>"]
    (think,) = tokenizer.encode("<think>", False)
    assert tokenizer.decode([think], skip_special_tokens=True) == "<think>"


def test_gpt2_splitting_leaves_the_space_to_the_digit(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", pre="gpt-2")
    write_model_files(read_gguf_header(tmp_path / "model.gguf"), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    texts = [tokenizer.token_text(item) for item in tokenizer.encode("hello  7", True)]
    assert texts == ["hello", " ", " ", "7"]


def test_an_opening_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", change=lambda writer: writer.add_add_bos_token(True))
    write_model_files(read_gguf_header(tmp_path / "model.gguf"), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hello", True) == [1, *tokenizer.encode("hello", False)]


def test_the_tokenizer_file_is_the_same_every_time(gguf_path: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        write_model_files(read_gguf_header(gguf_path), directory)
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("pre", "arch", "message"),
    [("tekken", "llama", "pre-tokenizer 'tekken'"), ("smollm", "mamba", "architecture 'mamba'")],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, pre: str, arch: str, message: str) -> None:
    write_gguf(tmp_path / "model.gguf", pre=pre, arch=arch)
    with pytest.raises(ModelUnusable, match=message):
        write_model_files(read_gguf_header(tmp_path / "model.gguf"), tmp_path)


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    write_gguf(tmp_path / "model.gguf", change=scaled)
    with pytest.raises(ModelUnusable, match="scaled rotary positions"):
        write_model_files(read_gguf_header(tmp_path / "model.gguf"), tmp_path)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnusable, match=r"llama\.embedding_length"):
        write_model_files(read_gguf_header(tmp_path / "bare.gguf"), tmp_path)

